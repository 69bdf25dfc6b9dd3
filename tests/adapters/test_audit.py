"""What the audit measures, against the dense rotation, and which defects it names for which release."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from orthokit.adapters import adapted_layers, attach
from orthokit.adapters.audit import AuditReport, audit
from orthokit.adapters.boft import BOFT
from orthokit.adapters.files import save, write_pair
from orthokit.adapters.hra import HRA
from orthokit.adapters.lora import LoRA
from orthokit.adapters.oft import OFT
from orthokit.adapters.peft_import import load_peft
from orthokit.errors import CheckpointError

GOLDEN = Path(__file__).parent / "data" / "peft"
CASES = json.loads((GOLDEN / "cases.json").read_text())
MODELS = {
    "linear": lambda: nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 16, bias=False)),
    "embedding": lambda: nn.Sequential(nn.Embedding(11, 16), nn.Linear(16, 8)),
    "conv": lambda: nn.Sequential(nn.Conv2d(4, 6, 3, padding=1)),
    "point": lambda: nn.Sequential(nn.Conv2d(8, 6, 1)),
}


def moved(config, *, size: float = 0.4, targets: str = "all", model: nn.Module | None = None) -> nn.Module:
    torch.manual_seed(0)
    model = attach(MODELS["linear"]() if model is None else model, config, targets=targets)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for layer in adapted_layers(model).values():
            for p in layer.adapters.parameters():
                p.add_(size * torch.randn(p.shape, generator=generator))
    return model


def dense_facts(part) -> tuple[float, float, float]:
    R = part.dense(torch.float64)
    s = torch.linalg.svdvals(R)
    error = (R.T @ R - torch.eye(len(R), dtype=R.dtype)).abs().max()
    return float(error), float(s[-1]), float(torch.linalg.eigvals(R).angle().abs().max())


def texts(report: AuditReport, *, applies: bool = True) -> str:
    return "\n".join(one.text for one in report.findings if one.applies == applies)


@pytest.mark.parametrize(
    "config",
    [
        OFT(4),
        OFT(4, map="exp", share=True),
        OFT(4, map="cayley_neumann", terms=3, tolerance=None, block_rate=False),
        OFT(4, map="cayley_neumann", terms=2),
        BOFT(4, factors=1, map="exp_taylor", order=2),
        BOFT(4, factors=2, map="exp_taylor", order=8, block_rate=False),
        BOFT(4, factors=2),
        HRA(4),
        HRA(3, symmetric=False),
        HRA(2, symmetric=False, orthogonal=True),
    ],
    ids=lambda config: f"{config.kind}-{getattr(config, 'map', '')}",
)
def test_own_adapters_are_measured_as_the_dense_rotation(config, tmp_path):
    model = moved(config)
    report = audit(save(model, tmp_path))
    assert report.writer.startswith("orthokit ")
    for row, layer in zip(report.layers, adapted_layers(model).values(), strict=True):
        error, smallest, angle = dense_facts(layer.adapters["default"].double())
        assert math.isclose(row.orthogonality_error, error, rel_tol=1e-5, abs_tol=1e-12)
        if getattr(config, "factors", 1) > 1:  # of several factors a lower bound
            assert smallest - error <= row.smallest_singular_value <= smallest + 1e-12
        else:
            assert math.isclose(row.smallest_singular_value, smallest, rel_tol=1e-9, abs_tol=1e-12)
        assert row.fault == ("not orthogonal" if error > 1e-3 else "")
        if config.kind == "boft" and row.fault:
            assert row.largest_angle is None
        else:
            assert math.isclose(row.largest_angle, angle, rel_tol=1e-5, abs_tol=max(1e-6, 10 * error))
    assert report.ok == all(not row.fault for row in report.layers)


@pytest.mark.parametrize("case", [case for case, kind in CASES.items() if kind in MODELS])
def test_adapters_of_peft_are_measured_as_they_are_when_read(case):
    report = audit(GOLDEN / case)
    layers = adapted_layers(load_peft(MODELS[CASES[case]](), GOLDEN / case))
    assert {row.layer for row in report.layers} == set(layers)
    for row in report.layers:
        part = layers[row.layer].adapters["default"]
        if row.kind in ("lora", "dora"):
            assert row.orthogonality_error is row.smallest_singular_value is row.largest_angle is None
            continue
        error, smallest, angle = dense_facts(part)
        assert math.isclose(row.orthogonality_error, error, rel_tol=1e-4, abs_tol=1e-12)
        assert math.isclose(row.smallest_singular_value, smallest, rel_tol=1e-6, abs_tol=1e-9)
        assert math.isclose(row.largest_angle, angle, rel_tol=1e-5, abs_tol=1e-6)


@pytest.mark.parametrize(
    ("case", "ok", "named"),
    [
        ("oft-0.15.2", True, ["first of three OFT formats", "Outputs are scaled by"]),
        ("oft-0.17.1", False, ["second of three OFT formats", "change by up to"]),
        ("oft_t2-0.17.1", False, []),
        ("oft_exact-0.17.1", True, []),
        ("oft-0.18.1", False, []),
        ("oft_t3-0.18.1", False, ["3 and 4 are the same map"]),
        ("oft_t1-0.21.2", True, ["nothing was trained"]),
        ("oft_exact-0.21.2", True, []),
        ("boft-0.21.2", True, ["Outputs are scaled by"]),
        ("boft_factors-0.21.2", True, ["Several butterfly factors", "Outputs are scaled by"]),
        ("hra-0.21.2", True, []),
        ("lora-0.21.2", True, []),
        ("lora_pissa-0.21.2", True, ["saved without conversion"]),
    ],
)
def test_defects_that_apply_are_named_and_no_others(case, ok, named):
    report = audit(GOLDEN / case)
    assert report.ok is ok
    found = [one.text for one in report.findings if one.applies]
    assert len(found) == len({text for text in found for name in named if name in text})
    assert all(any(name in text for text in found) for name in named)


def test_defects_under_a_condition_depend_on_the_release():
    conditional = {
        case: texts(audit(GOLDEN / case), applies=False) for case in ("oft-0.17.1", "oft-0.18.1", "oft-0.21.2")
    }
    for found in conditional.values():
        for said in ("opposite signs", "opposite order", "Conv2d with a kernel larger than 1 x 1"):
            assert said in found
    assert "bitsandbytes" in conditional["oft-0.17.1"]
    assert "bitsandbytes" in conditional["oft-0.18.1"]
    assert "bitsandbytes" not in conditional["oft-0.21.2"]
    assert "use_cayley_neumann is changed to False" in conditional["oft-0.21.2"]
    assert "use_cayley_neumann is changed to True" in texts(audit(GOLDEN / "oft_exact-0.21.2"), applies=False)
    assert texts(audit(GOLDEN / "hra-0.15.2"), applies=False) == ""


def edited(folder: Path, case: str, config=None, change=None) -> Path:
    """A golden adapter with other options or other numbers."""
    values = json.loads((GOLDEN / case / "adapter_config.json").read_text()) | (config or {})
    tensors = load_file(GOLDEN / case / "adapter_model.safetensors")
    tensors = {key: change(t) if change else t for key, t in tensors.items()}
    return write_pair(folder, "adapter_model.safetensors", tensors, "adapter_config.json", values)


def test_options_that_were_without_effect_are_named(tmp_path):
    found = texts(audit(edited(tmp_path, "oft_exact-0.21.2", {"module_dropout": 0.2})))
    assert found == "module_dropout=0.2 was stored and never applied in training."
    found = texts(audit(edited(tmp_path, "boft-0.21.2", {"boft_n_butterfly_factor": 3})))
    assert "asks for 3 butterfly factors and the tensors have one" in found


def test_rank_collapse_of_the_usual_series_is_named_with_the_norm(tmp_path):
    # A plane with a generator of norm 1: the series with k = 3 makes it 0.
    def one(t: torch.Tensor) -> torch.Tensor:
        t = torch.zeros_like(t)
        t[0, 0] = 1
        return t

    report = audit(edited(tmp_path, "oft-0.21.2", change=one))
    assert max(row.smallest_singular_value for row in report.layers) < 1e-7
    assert "Rank collapse: the series with powers up to k=3" in texts(report)
    assert "the largest norm here is 1." in texts(report)
    quiet = audit(edited(tmp_path, "oft-0.21.2", change=lambda t: 0.01 * t))
    assert quiet.ok
    assert texts(quiet) == ""


def test_the_collapse_of_an_own_series_is_named_too(tmp_path):
    config = OFT(4, map="cayley_neumann", terms=3, tolerance=None, block_rate=False)
    report = audit(save(moved(config, size=0.6), tmp_path))
    assert "Rank collapse" in texts(report)
    assert audit(save(moved(OFT(4), size=0.6), tmp_path)).findings == ()


def test_numbers_that_are_none_break_a_layer_and_not_the_others(tmp_path):
    folder = edited(tmp_path, "hra-0.21.2")
    tensors = load_file(folder / "adapter_model.safetensors")
    tensors["base_model.model.2.hra_u"][0, 0] = torch.nan
    save_file(tensors, folder / "adapter_model.safetensors")
    report = audit(folder)
    rows = {row.layer: row for row in report.layers}
    assert not report.ok
    assert rows["2"].fault == "vectors: NaN or infinite entries"
    assert math.isnan(rows["2"].orthogonality_error)
    assert rows["0"].fault == ""
    broken = next(row for row in json.loads(report.to_json())["layers"] if row["layer"] == "2")
    assert broken["orthogonality_error"] is None
    assert "1 of 2 layers are broken" in str(report)


def test_own_numbers_that_are_none_are_reported_not_raised(tmp_path):
    import hashlib

    folder = save(moved(LoRA(2)), tmp_path)
    path = folder / "adapter.safetensors"
    save_file({key: t * torch.inf for key, t in load_file(path).items()}, path)
    values = json.loads((folder / "adapter.json").read_text())
    values["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    (folder / "adapter.json").write_text(json.dumps(values))
    report = audit(folder)
    assert [row.fault for row in report.layers] == ["down, up: NaN or infinite entries"] * 2


def test_a_rewound_adapter_is_measured_where_it_is(tmp_path):
    model = moved(OFT(4))
    for layer in adapted_layers(model).values():
        layer.adapters["default"].strength = 0.5
    half = audit(save(model, tmp_path)).layers[0].largest_angle
    assert math.isclose(half, model[0].adapters["default"].largest_angle(), rel_tol=1e-5)
    for layer in adapted_layers(model).values():
        layer.adapters["default"].strength = 0.0
    rest = audit(save(model, tmp_path)).layers[0]
    assert (rest.orthogonality_error, rest.smallest_singular_value, rest.largest_angle) == (0.0, 1.0, 0.0)


def test_convolutions_are_measured_by_what_was_saved_of_them(tmp_path):
    torch.manual_seed(0)
    model = moved(OFT(6, conv="patches"), model=nn.Sequential(nn.Conv2d(4, 6, 3)), targets="conv")
    report = audit(save(model, tmp_path))
    assert report.layers[0].parameters == 6 * 15
    assert report.ok


def test_the_report_says_it_in_words_as_a_table_as_json_and_as_html(tmp_path):
    report = audit(GOLDEN / "oft-0.17.1")
    assert "written by PEFT 0.16 or 0.17; 2 of 2 layers are broken" in str(report)
    assert "(under a condition) If" in str(report)
    frame = report.to_frame()
    assert frame["layer"].tolist() == [row.layer for row in report.layers]
    assert (frame["orthogonality_error"] > 1e-3).all()
    values = json.loads(report.to_json())
    assert values["ok"] is False
    assert len(values["findings"]) == len(report.findings)
    assert report._repr_html_().count("<li>") == len(report.findings)
    lora = audit(GOLDEN / "lora-0.21.2")
    assert lora.to_frame()["orthogonality_error"].isna().all()
    assert "no layer is broken" in str(lora)


def test_long_reports_show_the_worst_layers_first(tmp_path):
    torch.manual_seed(0)
    model = attach(nn.Sequential(*[nn.Linear(4, 4) for _ in range(30)]), OFT(2, init_std=0.1))
    report = audit(save(model, tmp_path))
    assert "... and 10 more" in str(report)
    assert len(report.to_frame()) == 30


@pytest.mark.parametrize("make", [lambda folder: folder / "nowhere", lambda folder: folder])
def test_a_folder_without_an_adapter_is_refused(make, tmp_path):
    with pytest.raises(CheckpointError, match=r"has no adapter\.json"):
        audit(make(tmp_path))


def test_tensors_of_other_sizes_than_their_options_are_damage(tmp_path):
    folder = save(moved(OFT(4)), tmp_path)
    values = json.loads((folder / "adapter.json").read_text())
    values["layers"]["0"]["shape"] = [24, 32]
    (folder / "adapter.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match="'0' is damaged"):
        audit(folder)
