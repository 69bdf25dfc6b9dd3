"""Merging of whole models: options by layer, what is no matrix, reports, and models that do not fit."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import wraps

import pytest
import torch
from torch import Tensor, nn

from orthokit.errors import (
    NonFiniteError,
    NothingMatchedWarning,
    OptionError,
    OrthokitError,
    ParameterError,
    ShapeError,
    UnknownNameError,
)
from orthokit.merging import dare, fda, linear, merge, methods, orthomerge, ties, tsv
from orthokit.merging.recipe import Recipe


def model(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Embedding(20, 8), nn.Conv1d(8, 6, 3), nn.LayerNorm(6), nn.Linear(6, 5), nn.BatchNorm1d(5)
        )


def near(base: nn.Module, seed: int, size: float = 0.05) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {
        name: W + size * torch.randn(W.shape, generator=g) if W.is_floating_point() else W
        for name, W in base.state_dict().items()
    }


@pytest.fixture(scope="module")
def family() -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    base = model()
    return base.state_dict(), [near(base, seed) for seed in (1, 2, 3)]


STATISTICS = {"grams": lambda W: W.flatten(1).mT @ W.flatten(1) + torch.eye(W[0].numel()), "fishers": torch.square}


@pytest.mark.parametrize("method", list(methods()))
def test_every_method_merges_a_whole_model(
    method: str, family: tuple[dict[str, Tensor], list[dict[str, Tensor]]]
) -> None:
    base, experts = family
    spec = methods()[method]
    given = None
    if spec.statistics:
        make = STATISTICS.get(spec.statistics, torch.square)
        given = [{name: make(W) for name, W in e.items() if W.ndim > 1 or spec.statistics != "grams"} for e in experts]
        given = [{name: W for name, W in one.items() if W.is_floating_point()} for one in given]
    options = {"losses": [1.0, 2.0]} if method == "metrics_weighted" else {}
    merged = merge(
        base, experts[: 2 if method in ("slerp", "metrics_weighted") else 3], method=method, statistics=given, **options
    )
    assert list(merged) == list(base)
    assert all(merged[name].dtype == base[name].dtype and merged[name].shape == base[name].shape for name in base)
    assert not torch.equal(merged["3.weight"], base["3.weight"])
    model(7).load_state_dict(merged)
    assert [row["name"] for row in merged.report.rows] == list(base)
    assert json.loads(merged.report.to_json())["method"] == method
    assert len(merged.report.to_frame()) == len(base)


def test_tensors_are_merged_as_the_matrices_that_they_are(
    family: tuple[dict[str, Tensor], list[dict[str, Tensor]]],
) -> None:
    base, experts = family
    for name, function in (("orthomerge", orthomerge), ("tsv", tsv), ("fda", fda)):
        merged = merge(base, experts, method=name)
        flat = [e["1.weight"].flatten(1) for e in experts]
        assert torch.allclose(merged["1.weight"].flatten(1), function(base["1.weight"].flatten(1), flat), atol=1e-6)
    whole = model()
    rows = {row["name"]: row for row in merge(whole, experts, method="tsv").report.rows}
    # An embedding is a table of vectors.
    assert rows["0.weight"]["method"] == "linear" and "no matrix" in rows["0.weight"]["note"]
    assert rows["4.num_batches_tracked"]["method"] == "copy"
    turned = merge(whole, experts)
    assert torch.allclose(turned["0.weight"], linear(base["0.weight"], [e["0.weight"] for e in experts]), atol=1e-6)
    rows = {row["name"]: row for row in turned.report.rows}
    assert rows["0.weight"]["route"] == ["none"] * 3 and rows["3.weight"]["rotation_fraction"][0] > 0


def test_modules_and_dicts_are_the_same_and_nothing_is_changed() -> None:
    base, expert = model(0), model(0)
    expert.load_state_dict(near(base, 4))
    before = {name: W.clone() for name, W in base.state_dict().items()}
    merged = merge(base, [expert, expert.state_dict()], method="task_arithmetic", scale=0.5)
    assert all(torch.equal(before[name], W) for name, W in base.state_dict().items())
    assert torch.allclose(merged["3.bias"], expert.state_dict()["3.bias"])


def test_options_by_layer_and_the_later_pattern_wins(family: tuple[dict[str, Tensor], list[dict[str, Tensor]]]) -> None:
    base, experts = family
    merged = merge(
        base,
        experts,
        method="ties",
        density=0.4,
        layers={"*": {"scale": 0.5}, "3.*": {"density": 1.0, "scale": 2.0}, "1.weight": {"method": "linear"}},
    )
    of = {name: [e[name] for e in experts] for name in base}
    assert torch.allclose(merged["2.weight"], ties(base["2.weight"], of["2.weight"], density=0.4, scale=0.5))
    assert torch.allclose(merged["3.weight"], ties(base["3.weight"], of["3.weight"], density=1.0, scale=2.0))
    assert torch.allclose(merged["1.weight"], linear(base["1.weight"], of["1.weight"], scale=0.5))
    assert {row["name"]: row["method"] for row in merged.report.rows}["1.weight"] == "linear"


def test_random_choices_follow_from_the_seed_and_the_name(
    family: tuple[dict[str, Tensor], list[dict[str, Tensor]]],
) -> None:
    base, experts = family
    one, again = (merge(base, experts, method="dare", seed=3) for _ in range(2))
    other = merge(base, experts, method="dare", seed=4)
    some = merge({"3.weight": base["3.weight"]}, [{"3.weight": e["3.weight"]} for e in experts], method="dare", seed=3)
    assert all(torch.equal(one[name], again[name]) for name in base)
    assert not torch.equal(one["3.weight"], other["3.weight"]) and torch.equal(one["3.weight"], some["3.weight"])
    fixed = merge(base, experts, method="dare", layers={"3.weight": {"seed": 5}})
    assert torch.equal(fixed["3.weight"], dare(base["3.weight"], [e["3.weight"] for e in experts], seed=5))


def test_tied_tensors_stay_one() -> None:
    W = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    base = {"embed": W, "head": W}
    experts = [{"embed": W + i, "head": W + i} for i in (1.0, 2.0)]
    merged = merge(base, experts, method="dare", p=0.5)
    assert merged["head"] is merged["embed"]
    assert "tied" in merged.report.rows[1]["note"]
    apart = merge(base, [experts[0], {"embed": W + 2.0, "head": W - 3.0}], method="linear")
    assert torch.allclose(apart["embed"], W + 1.5) and torch.allclose(apart["head"], W - 1.0)


def test_a_full_report_tells_agreement_energy_and_spectrum(
    family: tuple[dict[str, Tensor], list[dict[str, Tensor]]],
) -> None:
    base, experts = family
    base, *experts = ({name: W.double() for name, W in one.items()} for one in (base, *experts))
    row = {row["name"]: row for row in merge(base, experts, report="full").report.rows}["3.weight"]
    assert abs(row["energy_rotated"] - row["energy_base"]) < 1e-10 < abs(row["energy_merged"] - row["energy_base"])
    assert torch.allclose(*(torch.tensor(row[f"singular_values_{x}"]) for x in ("base", "rotated")), atol=1e-5)
    taus = [e["3.weight"] - base["3.weight"] for e in experts]
    cosines = [float((taus[i] * taus[j]).sum() / taus[i].norm() / taus[j].norm()) for i in range(3) for j in range(i)]
    assert row["cosine"] == pytest.approx(sum(cosines) / 3, abs=1e-5)
    signs = torch.stack([tau.sign() for tau in taus])
    assert row["sign_agreement"] == pytest.approx(float((signs == signs[0]).all(0).float().mean()))
    same = merge(base, [base, base], report="full")
    assert json.loads(same.report.to_json())["rows"][0]["cosine"] is None


def test_models_that_do_not_fit_are_refused_with_the_tensors_named(unchecked: None) -> None:
    base = model().state_dict()
    with pytest.raises(ParameterError, match=r"expert 1 lacks '3.weight'"):
        merge(base, [base, {name: W for name, W in base.items() if name != "3.weight"}])
    with pytest.raises(ParameterError, match="besides"):
        merge(base, [{**base, "extra": torch.zeros(2)}])
    with pytest.raises(ShapeError, match=r"'3.weight' \(\(5, 6\) and \(5, 7\)\)"):
        merge(base, [{**base, "3.weight": torch.zeros(5, 7)}])
    broken = {**base, "3.weight": torch.full((5, 6), torch.nan)}
    with pytest.raises(NonFiniteError, match=r"'3\.weight': expert 1 holds NaN"):
        merge(base, [base, broken])
    codes = {"codes": torch.tensor([1, 2])}
    with pytest.raises(ParameterError, match="codes"):
        merge(codes, [{"codes": torch.tensor([1, 3])}])
    assert torch.equal(merge(codes, [codes])["codes"], codes["codes"])
    # Their scales lie elsewhere, so that a mean of codes means nothing.
    eight = {"W": torch.ones(2, 2).to(torch.float8_e4m3fn)}
    with pytest.raises(ParameterError, match="quantised"):
        merge(eight, [{"W": (2 * torch.ones(2, 2)).to(torch.float8_e4m3fn)}])


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"method": "mean"}, UnknownNameError, "method"),
        ({"density": 0.1}, UnknownNameError, "density"),
        ({"report": "long"}, UnknownNameError, "report"),
        ({"layers": {"*": {"method": "ties", "prior": 1.0}}}, UnknownNameError, "prior"),
        ({"layers": {"*": 3}}, OptionError, "layers"),
        ({"method": "slerp"}, OptionError, "exactly 2"),
        ({"weights": [1.0]}, OptionError, "weights"),
        ({"statistics": [{}]}, OptionError, "statistics"),
    ],
)
def test_bad_options_are_refused_before_anything_is_merged(
    options: dict[str, object], error: type[OrthokitError], words: str, unchecked: None
) -> None:
    base = model().state_dict()
    with pytest.raises(error, match=words):
        merge(base, [base, base, base], **options)  # type: ignore[arg-type]


def test_no_expert_and_patterns_that_fit_nothing() -> None:
    base = model().state_dict()
    with pytest.raises(OptionError):
        merge(base, [])
    with pytest.warns(NothingMatchedWarning, match="attention"):
        merge(base, [base], layers={"*attention*": {"scale": 2.0}})


def test_reports_are_written_beside_and_renamed(tmp_path) -> None:
    base = model().state_dict()
    text = merge(base, [base]).report.to_json(tmp_path / "report.json")
    assert (tmp_path / "report.json").read_text() == text and len(list(tmp_path.iterdir())) == 1


def test_recipes_know_which_options_a_tensor_gets() -> None:
    recipe = Recipe(
        "ties", [1.0], None, {"a*": {"density": 0.5}, "ab": {"method": "dare", "p": 0.5}}, {"election": "count"}
    )
    assert recipe.for_tensor("x")[1] == {"weights": [1.0], "election": "count"}
    assert recipe.for_tensor("ac")[1] == {"weights": [1.0], "election": "count", "density": 0.5}
    spec, options = recipe.for_tensor("ab")
    assert spec.name == "dare" and options.pop("seed") >= 0 and options == {"weights": [1.0], "p": 0.5}


@pytest.mark.parametrize("method", ["linear", "task_arithmetic", "fisher", "metrics_weighted", "orthomerge"])
def test_large_tensors_merge_piece_by_piece_to_the_same(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    g = torch.Generator().manual_seed(0)
    base = {"emb": torch.randn(50, 4, generator=g), "bias": torch.randn(70, generator=g), "one": torch.tensor(1.0)}
    experts = [{name: W + torch.randn(W.shape, generator=g) for name, W in base.items()} for _ in range(2)]
    more: dict[str, object] = {"losses": [1.0, 2.0]} if method == "metrics_weighted" else {}
    if method == "fisher":
        more["statistics"] = [{name: W.square() for name, W in expert.items()} for expert in experts]
    if method == "orthomerge":  # a vector goes to its residual method, the mean
        base, *experts = ({"bias": one["bias"]} for one in (base, *experts))
    whole = merge(base, experts, method=method, **more)
    seen: list[int] = []
    monkeypatch.setattr("orthokit.merging.recipe._PIECE", 12)
    function = methods()[method].function

    @wraps(function)
    def told(base: Tensor, experts: list[Tensor], **options: object) -> Tensor:
        seen.append(base.numel())
        return function(base, experts, **options)

    changed = {**methods(), method: replace(methods()[method], function=told)}
    monkeypatch.setattr("orthokit.merging.recipe.method_named", lambda name: changed[name])
    pieces = merge(base, experts, method=method, **more)
    assert all(torch.equal(pieces[name], whole[name]) for name in whole)
    assert method == "orthomerge" or max(seen) <= 12 < len(seen) * 12


def test_a_method_is_elementwise_where_it_says_so() -> None:
    g = torch.Generator().manual_seed(0)
    base, *experts = torch.randn(4, 30, generator=g)
    for spec in methods().values():
        if not spec.elementwise:
            continue
        more: dict[str, object] = {spec.statistics: [W.square() for W in experts]} if spec.statistics else {}
        more |= {"losses": [1.0, 2.0, 3.0]} if spec.name == "metrics_weighted" else {}
        whole = spec.function(base, experts, **more)
        half = {key: [one[:7] for one in each] if key == spec.statistics else each for key, each in more.items()}
        assert torch.equal(spec.function(base[:7], [W[:7] for W in experts], **half), whole[:7])
