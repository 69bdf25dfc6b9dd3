"""A look at a model: every column against its formula, files read lazily, and nothing lost when it is stopped."""

import json
import math
import threading

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from orthokit.adapters import OFT, LoRA, attach, merge
from orthokit.diagnostics import COLUMNS, Inspection, expected_energy, hyperspherical_energy, inspect, stable_rank
from orthokit.diagnostics.inspection import run
from orthokit.diagnostics.inspection.cache import forget_old
from orthokit.diagnostics.inspection.measures import cleaned, exact_spectrum, relative_change, spectrum_columns
from orthokit.diagnostics.inspection.sources import place_in_model, source_name
from orthokit.errors import CheckpointError, DtypeError, NothingMatchedWarning, OptionError, UnknownNameError


def gaussian(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def small(seed: int = 0) -> dict[str, Tensor]:
    """A model of two layers with every kind of parameter."""
    shapes = {"embed_tokens.weight": (50, 48)}
    for i in range(2):
        shapes |= {f"layers.{i}.attn.q_proj.weight": (48, 48), f"layers.{i}.mlp.up_proj.weight": (96, 48)}
        shapes |= {f"layers.{i}.mlp.down_proj.weight": (48, 96), f"layers.{i}.norm.weight": (48,)}
    return {name: gaussian(*shape, seed=seed + i) for i, (name, shape) in enumerate(shapes.items())}


@pytest.fixture
def on_disk(tmp_path):
    """The small model in a file, and one that differs in every way a file can."""
    folder = tmp_path / "tuned"
    folder.mkdir()
    save_file(small(), tmp_path / "base.safetensors")
    save_file(
        {name: W + 0.01 * gaussian(*W.shape, seed=9) for name, W in small().items()}, folder / "model.safetensors"
    )
    return tmp_path / "base.safetensors", folder


def reference(W: Tensor) -> dict[str, float]:
    """The plain columns by their formulas, in float64."""
    s = torch.linalg.svdvals(W.double())
    p = s / s.sum()
    rows, columns = W.double().norm(dim=1), W.double().norm(dim=0)
    return {
        "frobenius": float(s.square().sum().sqrt()),
        "spectral_norm": float(s[0]),
        "stable_rank": float(s.square().sum() / s[0] ** 2),
        "effective_rank": float((-(p * p.log()).sum()).exp()),
        "condition": float(s[0] / s[-1]),
        "orthogonality_error": float((1 - s.sum() ** 2 / (len(s) * s.square().sum())).sqrt()),
        "row_spread": float(rows.std(correction=0) / rows.mean()),
        "column_spread": float(columns.std(correction=0) / columns.mean()),
        "largest_row": float(rows.max() / rows.median()),
        "energy_excess": float(hyperspherical_energy(W.double())) - expected_energy(W.shape[1]),
    }


@pytest.mark.parametrize("shape", [(48, 48), (96, 31), (31, 97), (2, 40)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_columns_are_their_formulas(shape, dtype):
    W = gaussian(*shape).to(dtype)
    row = inspect({"a.weight": W}).rows[0]
    for name, expected in reference(W).items():
        assert row[name] == pytest.approx(expected, rel=2e-6, abs=2e-6), name
    assert row["stored"] == str(dtype).removeprefix("torch.") and row["measured"] == "full"
    assert row["shape"] == f"{shape[0]} x {shape[1]}" and row["numel"] == W.numel() and row["nonfinite"] == 0


def test_a_first_look_is_near_and_says_so():
    W = gaussian(96, 48)
    row = inspect({"a.weight": W}, detail="norms").rows[0]
    assert row["measured"] == "first look" and row["condition"] is None
    assert row["spectral_norm"] == pytest.approx(float(torch.linalg.matrix_norm(W, 2)), rel=2e-3)
    assert row["stable_rank"] == pytest.approx(float(stable_rank(W)), rel=4e-3)


def test_every_row_has_every_column_and_every_column_a_meaning():
    found = inspect(small(), base=small(3))
    assert all(list(row) == list(COLUMNS) for row in found.rows)
    assert all(column.meaning.endswith(".") and column.label for column in COLUMNS.values())
    assert all(row["verdict"] and row["kind"] == "general" for row in found.rows)
    alone = inspect(small()).to_frame()
    assert not any(COLUMNS[name].compared for name in alone.columns) and len(alone) == 6


def test_random_matrices_are_near_random_and_spikes_are_counted():
    W = gaussian(300, 200)
    spiked = W + 60 * torch.outer(gaussian(300, seed=1), gaussian(200, seed=2)) / (300 * 200) ** 0.5
    plain, with_spike = (inspect({"a.weight": M}).rows[0] for M in (W, spiked))
    assert plain["above_edge"] == 0 and plain["mp_distance"] < 0.02 and plain["noise"] == pytest.approx(1, rel=0.02)
    assert with_spike["above_edge"] == 1 and plain["alpha"] is None and plain["alpha_refused"]
    assert plain["mp_edge"] == pytest.approx(300**0.5 + 200**0.5, rel=0.02)


def test_a_power_law_is_found():
    U, _, Vh = torch.linalg.svd(gaussian(400, 200, dtype=torch.float64), full_matrices=False)
    q = (torch.arange(200, dtype=torch.float64) + 0.5) / 200
    # Eigenvalues at the quantiles of a law with exponent 3.
    row = inspect({"a.weight": ((U * (1 - q) ** -0.25) @ Vh).float()}).rows[0]
    assert row["alpha"] == pytest.approx(3, abs=0.1) and row["alpha_low"] < 3 < row["alpha_high"]
    assert row["alpha_refused"] is None and row["alpha_tail"] > 150


class TestExactness:
    @pytest.mark.parametrize("smallest", [1e-2, 1e-5, 1e-7])
    def test_small_values_are_right_whatever_the_condition(self, smallest):
        U, _, Vh = torch.linalg.svd(gaussian(60, 40, dtype=torch.float64), full_matrices=False)
        W = ((U * torch.logspace(0, math.log10(smallest), 40, dtype=torch.float64)) @ Vh).float()
        exact = torch.linalg.svdvals(W.double()).numpy()
        np.testing.assert_allclose(exact_spectrum(W), exact, rtol=3e-5)

    def test_dependent_rows_have_no_finite_condition(self):
        W = torch.ones(5, 4)
        assert spectrum_columns(exact_spectrum(W), shape=(5, 4), floor=0.0)["condition"] == math.inf

    def test_a_zero_matrix_has_norms_and_no_more(self):
        row = inspect({"a.weight": torch.zeros(5, 4)}).rows[0]
        assert row["frobenius"] == row["spectral_norm"] == row["stable_rank"] == 0
        assert row["condition"] is None and row["alpha_refused"] == "all entries are 0"

    @pytest.mark.parametrize("scale", [2.0**-120, 2.0**120])
    def test_columns_without_a_unit_do_not_feel_the_scale(self, scale):
        plain, scaled = (inspect({"a.weight": c * gaussian(80, 60)}).rows[0] for c in (1.0, scale))
        for name in ("stable_rank", "effective_rank", "condition", "mp_distance", "above_edge", "orthogonality_error"):
            assert scaled[name] == pytest.approx(plain[name], rel=1e-6), name
        for name in ("frobenius", "spectral_norm", "noise", "mp_edge"):
            assert scaled[name] == pytest.approx(scale * plain[name], rel=1e-6), name

    def test_relative_change_is_that_of_the_whole(self):
        W0, W = gaussian(70, 3), gaussian(70, 3, seed=1)
        expected = float((W.double() - W0.double()).norm() / W0.double().norm())
        assert relative_change(W, W0) == pytest.approx(expected, rel=1e-12)
        assert relative_change(torch.zeros(3), torch.zeros(3)) == 0
        assert relative_change(torch.ones(3), torch.zeros(3)) is None
        assert relative_change(torch.tensor([math.nan]), torch.ones(1)) is None


class TestSources:
    def test_a_file_a_folder_a_module_and_a_mapping_give_the_same_rows(self, on_disk):
        base, folder = on_disk
        by_file, by_mapping = inspect(base, cache=False), inspect(dict(sorted(small().items())))
        assert by_file.rows == by_mapping.rows and by_file.name == "base.safetensors"
        assert inspect(folder, cache=False).name == "tuned"
        module = nn.Sequential(nn.Linear(48, 96), nn.LayerNorm(96), nn.Linear(96, 48))
        assert [row["name"] for row in inspect(module).rows] == ["0.weight", "2.weight"]
        assert inspect(module).name == "Sequential"

    def test_what_is_left_out_says_why(self, on_disk):
        left = {one["name"]: one for one in inspect(on_disk[0]).left_out}
        assert (
            "looked up" in left["embed_tokens.weight"]["reason"] and left["embed_tokens.weight"]["shape"] == "50 x 48"
        )
        assert left["layers.0.norm.weight"]["relative_change"] is None

    def test_stacks_and_parts_have_a_row_each(self):
        experts = {"layers.0.experts.up.weight": gaussian(3, 20, 16), "layers.0.attn.qkv.weight": gaussian(48, 16)}
        names = [row["name"] for row in inspect(experts, split_fused=True).rows]
        assert names[:3] == [f"layers.0.experts.up.weight[{i}]" for i in range(3)] and len(names) == 6
        assert [row["role"] for row in inspect(experts).rows][:2] == ["experts.up", "experts.up"]

    @pytest.mark.parametrize(
        ("name", "layer", "role"),
        [
            ("model.layers.11.self_attn.q_proj.weight", 11, "self_attn.q_proj"),
            ("blk.0.attn_q.weight", 0, "attn_q"),
            ("0.weight", 0, "0"),
            ("features.3.weight", 3, "features"),
            ("model.layers.2.mlp.experts.7.w1.weight", 2, "mlp.experts.w1"),
            ("head.weight", None, "head"),
        ],
    )
    def test_depth_and_role_come_from_the_name(self, name, layer, role):
        assert place_in_model(name) == (layer, role)

    def test_files_that_are_called_like_every_other_are_named_by_their_folder(self, tmp_path):
        assert source_name(tmp_path / "Llama" / "model" / "model.safetensors") == "Llama"
        assert source_name(tmp_path / "mine.gguf") == "mine.gguf"

    def test_layers_of_a_file_are_in_their_order(self, tmp_path):
        save_file({f"layers.{i}.w.weight": torch.ones(3, 3) for i in range(12)}, tmp_path / "x.safetensors")
        assert [row["layer"] for row in inspect(tmp_path / "x.safetensors").rows] == list(range(12))

    def test_looking_changes_nothing(self):
        model = {name: W.double() for name, W in small().items()}
        before = {name: W.clone() for name, W in model.items()}
        inspect(model, base=small(4))
        assert all(torch.equal(model[name], W) for name, W in before.items())

    @pytest.mark.parametrize("given", [3, None, [1, 2]])
    def test_anything_else_is_refused(self, given, unchecked):
        with pytest.raises(DtypeError, match=r"nn\.Module, a mapping"):
            inspect(given)

    def test_a_model_without_matrices_warns(self):
        with pytest.warns(NothingMatchedWarning):
            assert len(inspect({"norm.weight": torch.ones(3)})) == 0

    @pytest.mark.parametrize(
        ("content", "words"),
        [(b"hello", "safetensors"), (b"GGUF\x03\0\0\0", "GGUF"), (b"\xff" * 8 + b"{}", "header")],
        ids=["text", "cut GGUF", "terabytes"],
    )
    def test_files_that_are_no_models_are_refused_in_words(self, tmp_path, content, words):
        (tmp_path / "x.bin").write_bytes(content)
        with pytest.raises(CheckpointError, match=words):
            inspect(tmp_path / "x.bin")


class TestAgainstABase:
    def test_the_change_of_every_parameter_is_told(self, on_disk):
        base, folder = on_disk
        found = inspect(folder, base=base, cache=False)
        assert found.compared and found.base_name == "base.safetensors" and not found.unmatched
        assert all(row["relative_change"] == pytest.approx(0.01, rel=0.1) for row in found.rows)
        assert all(one["relative_change"] == pytest.approx(0.01, rel=0.3) for one in found.left_out)
        name = found.rows[0]["name"]
        change = small()[name] + 0.01 * gaussian(48, 48, seed=9) - small()[name]
        np.testing.assert_allclose(found.changes[name], torch.linalg.svdvals(change).numpy(), rtol=1e-4, atol=1e-6)
        assert found.profiles[name]["adaptation"].shape == (48,)

    @pytest.mark.parametrize(("config", "kind"), [(OFT(block_size=16), "oft"), (LoRA(rank=4, alpha=8), "lora")])
    def test_a_merged_adapter_is_named(self, config, kind):
        def made() -> nn.Module:
            model = nn.Sequential(nn.Linear(64, 48), nn.Linear(48, 64))
            for i, layer in enumerate(model):
                layer.weight.data = gaussian(*layer.weight.shape, seed=i)
            return model

        tuned = attach(made(), config)
        for i, p in enumerate(p for p in tuned.parameters() if p.requires_grad):
            p.data = 0.1 * gaussian(*p.shape, seed=20 + i)
        found = inspect(merge(tuned), base=made())
        assert [row["kind"] for row in found.rows] == [kind, kind]

    def test_a_beginning_of_all_names_is_seen_through(self):
        wrapped = {f"model.{name}": W for name, W in small().items()}
        for model, base in ((wrapped, small()), (small(), wrapped)):
            found = inspect(model, base=base)
            assert not found.unmatched and all(row["kind"] == "unchanged" for row in found.rows)
            assert "'model.'" in found.notes[0]

    def test_another_architecture_shows_what_fits_and_lists_the_rest(self):
        other = small(1)
        other["layers.0.mlp.up_proj.weight"] = gaussian(80, 48)
        del other["layers.1.attn.q_proj.weight"]
        other["layers.2.attn.q_proj.weight"] = gaussian(48, 48)
        found = inspect(small(), base=other)
        reasons = {one["name"]: one["reason"] for one in found.unmatched}
        assert "another shape: 96 x 48" in reasons["layers.0.mlp.up_proj.weight"] and len(reasons) == 3
        assert reasons["layers.1.attn.q_proj.weight"] == reasons["layers.2.attn.q_proj.weight"].replace("layers.2", "")
        assert found["layers.0.mlp.up_proj.weight"]["kind"] is None
        assert found["layers.0.mlp.down_proj.weight"]["kind"] == "general"

    def test_a_base_that_does_not_fit_at_all_is_said(self):
        found = inspect(small(), base={"x.weight": gaussian(3, 4)})
        assert "is no base of" in found.notes[0] and all(row["kind"] is None for row in found.rows)
        assert "stable rank" in repr(found) and "verdict" not in repr(found)

    def test_bad_numbers_of_the_base_are_said(self):
        W, bad = gaussian(9, 8), gaussian(9, 8)
        bad[1, 2] = math.nan
        assert inspect({"a.weight": W}, base={"a.weight": bad}).rows[0]["note"].startswith("in the base 1 entry is NaN")


class TestBadNumbers:
    def test_nan_and_infinity_are_counted_and_measured_as_zero(self):
        W = gaussian(20, 30)
        clean = W.clone()
        for i, bad in enumerate((math.nan, math.inf, -math.inf)):
            W[i, i], clean[i, i] = bad, 0.0
        found = inspect({"a.weight": W})
        assert found.rows[0]["nonfinite"] == 3 and "3 entries are NaN" in found.rows[0]["note"]
        assert found.rows[0]["frobenius"] == inspect({"a.weight": clean}).rows[0]["frobenius"]
        assert "3 entries are NaN or infinite" in found.summary()

    def test_large_finite_numbers_are_no_infinities(self):
        W = torch.full((4, 4), 3e38)
        assert cleaned(W)[1] == 0 and cleaned(W)[0] is W

    def test_complex_numbers_are_not_halved_in_silence(self):
        row = inspect({"a.weight": gaussian(4, 4).to(torch.complex64), "b.weight": gaussian(4, 4)}).rows[0]
        assert row["measured"] == "not" and "only real matrices" in row["note"] and row["frobenius"] is None

    def test_one_bad_matrix_does_not_end_the_rest(self, monkeypatch):
        def failing(W: Tensor) -> np.ndarray:
            if W.shape[0] == 96:
                raise torch.linalg.LinAlgError("did not converge")
            return exact_spectrum(W)

        monkeypatch.setattr(run, "exact_spectrum", failing)
        found = inspect(small())
        states = {row["shape"]: (row["measured"], row["note"]) for row in found.rows}
        assert states["96 x 48"] == ("first look", "did not converge") and states["48 x 96"] == ("full", None)


class TestStopping:
    def test_a_stop_keeps_what_is_done(self):
        stop, seen = threading.Event(), []

        def progress(at: object) -> None:
            seen.append(at)
            if at.look == 2:
                stop.set()

        found = inspect(small(), threads=1, stop=stop, progress=progress)
        states = [row["measured"] for row in found.rows]
        assert found.interrupted and states[0] == "full" and states[-1] == "first look"
        assert len(found.spectra) == states.count("full") < 6 and "interrupted" in found.summary()
        assert [at.done for at in seen[:6]] == [1, 2, 3, 4, 5, 6] and seen[0].rows[0]["frobenius"] > 0

    def test_an_interrupt_from_the_keyboard_keeps_it_too(self):
        def progress(at: object) -> None:
            if at.look == 2 and at.done == 2:
                raise KeyboardInterrupt

        found = inspect(small(), threads=1, progress=progress)
        assert found.interrupted and [row["measured"] for row in found.rows].count("full") >= 2

    def test_a_sample_is_spread_over_the_model_and_said(self):
        found = inspect(small(), sample=2)
        assert [row["name"] for row in found.rows] == ["layers.0.attn.q_proj.weight", "layers.1.mlp.down_proj.weight"]
        assert found.notes == ["2 of 6 matrices, evenly spread over the model"]

    @pytest.mark.parametrize("options", [{"sample": 0}, {"threads": 0}, {"rank": 0}])
    def test_options_out_of_range(self, options):
        with pytest.raises(OptionError, match="at least 1"):
            inspect(small(), **options)

    def test_an_unknown_detail(self):
        with pytest.raises(UnknownNameError, match="spectrum"):
            inspect(small(), detail="spectra")

    def test_torch_has_its_threads_again(self):
        before = torch.get_num_threads()
        inspect(small(), threads=3)
        assert torch.get_num_threads() == before


class TestCache:
    @pytest.fixture(autouse=True)
    def own(self, tmp_path, monkeypatch):
        monkeypatch.setenv("ORTHOKIT_CACHE", str(tmp_path / "cache"))

    def counted(self, monkeypatch) -> list[tuple[int, ...]]:
        seen = []
        monkeypatch.setattr(run, "exact_spectrum", lambda W: seen.append(tuple(W.shape)) or exact_spectrum(W))
        return seen

    def test_a_second_look_measures_nothing(self, on_disk, monkeypatch):
        base, folder = on_disk
        first = inspect(folder, base=base)
        seen = self.counted(monkeypatch)
        second = inspect(folder, base=base)
        assert not seen and second.rows == first.rows and second.left_out == first.left_out
        for kind in ("spectra", "base_spectra", "changes"):
            for name, values in getattr(first, kind).items():
                np.testing.assert_array_equal(getattr(second, kind)[name], values)

    def test_what_is_missing_is_measured_and_the_rest_remembered(self, on_disk, monkeypatch):
        inspect(on_disk[0], include="*q_proj*")
        seen = self.counted(monkeypatch)
        assert len(inspect(on_disk[0])) == 6 and len(seen) == 4
        assert len(inspect(on_disk[0], sample=3)) == 3 and len(inspect(on_disk[0])) == 6 and len(seen) == 4

    def test_a_smaller_look_at_other_matrices_is_remembered_too(self, on_disk, monkeypatch):
        inspect(on_disk[0], exclude="layers.1.mlp.up_proj*")
        inspect(on_disk[0], include="layers.1.mlp.up_proj*")
        seen = self.counted(monkeypatch)
        assert len(inspect(on_disk[0])) == 6 and not seen

    def test_what_is_done_is_kept_on_the_way(self, on_disk, monkeypatch):
        monkeypatch.setattr(run, "_KEEP", 0.0)

        def killed(at: object) -> None:
            if at.look == 2 and at.done == 4:
                raise MemoryError  # nothing that a look waits for

        with pytest.raises(MemoryError):
            inspect(on_disk[0], threads=1, progress=killed)
        seen = self.counted(monkeypatch)
        inspect(on_disk[0])
        assert len(seen) <= 3

    def test_a_first_look_alone_leaves_nothing(self, on_disk, tmp_path):
        inspect(on_disk[0], detail="norms")
        assert not (tmp_path / "cache").exists()

    def test_a_stopped_look_goes_on_where_it_was(self, on_disk, monkeypatch):
        stop = threading.Event()
        inspect(on_disk[0], threads=1, stop=stop, progress=lambda at: at.look == 2 and at.done == 3 and stop.set())
        seen = self.counted(monkeypatch)
        assert not inspect(on_disk[0]).interrupted and len(seen) == 3

    def test_a_file_that_was_written_again_is_measured_again(self, on_disk, monkeypatch):
        inspect(on_disk[0])
        save_file({name: 2 * W for name, W in small().items()}, on_disk[0])
        assert inspect(on_disk[0]).rows[0]["frobenius"] == pytest.approx(2 * float(small()[list(small())[1]].norm()))

    def test_other_settings_are_kept_apart_and_modules_are_not_kept(self, on_disk, monkeypatch):
        base, folder = on_disk
        inspect(folder, base=base)
        seen = self.counted(monkeypatch)
        inspect(folder)
        inspect(folder, base=base, rank=3)
        assert len(seen) == 6 + 6
        inspect(small())
        inspect(small())
        assert len(seen) == 12 + 12
        inspect(folder, base=small())
        inspect(folder, base=small())
        assert len(seen) == 24 + 12

    def test_a_damaged_file_is_measured_again(self, on_disk, tmp_path):
        first = inspect(on_disk[0])
        (kept,) = (tmp_path / "cache" / "inspect").glob("*.json")
        kept.write_text(kept.read_text()[:1000])
        assert inspect(on_disk[0]).rows == first.rows

    def test_the_oldest_are_forgotten(self, on_disk, tmp_path):
        for rank in (1, 2, 3):
            inspect(on_disk[0], base=on_disk[0], rank=rank)
        forget_old(most=2)
        assert len(list((tmp_path / "cache" / "inspect").glob("*.json"))) == 2


class TestOutput:
    def test_json_brings_everything_back(self, tmp_path):
        model = small() | {"layers.3.w.weight": torch.ones(4, 4)}  # with an infinite condition
        found = inspect(model, base=small(5) | {"layers.3.w.weight": torch.eye(4)})
        again = Inspection.from_json(found.to_json(tmp_path / "x.json"))
        assert again.rows == found.rows and again.notes == found.notes and again.summary() == found.summary()
        np.testing.assert_array_equal(again.spectra["layers.3.w.weight"], found.spectra["layers.3.w.weight"])
        assert "Infinity" not in (tmp_path / "x.json").read_text() and not list(tmp_path.glob("*.tmp"))

    @pytest.mark.parametrize("text", ["", "{}", "[1]", json.dumps({"orthokit": "inspection 0"})])
    def test_other_json_is_refused(self, tmp_path, text):
        (tmp_path / "x.json").write_text(text)
        with pytest.raises(CheckpointError, match="no inspection written by to_json"):
            Inspection.from_json(tmp_path / "x.json")

    def test_a_folder_that_is_not_there_is_said(self, tmp_path):
        with pytest.raises(CheckpointError, match="cannot be written"):
            inspect(small()).to_json(tmp_path / "none" / "x.json")

    def test_the_table_reads(self, tmp_path):
        found = inspect(small())
        lines = repr(found).splitlines()
        assert lines[0].startswith("state dict: 6 matrices hold") and len(lines) == 8
        assert found._repr_html_().count("<tr>") == 7 and 'scope="row"' in found._repr_html_()
        table = found.to_csv(tmp_path / "x.csv").read_text().splitlines()
        assert len(table) == 7 and table[0].startswith("name,shape,rule")
        with pytest.raises(UnknownNameError):
            found["layers.0.attn.q_pro.weight"]
        with pytest.raises(UnknownNameError):
            found.to_frame(columns=["frobenus"])

    def test_long_tables_show_both_ends(self):
        found = inspect({f"layers.{i}.w.weight": gaussian(4, 4, seed=i) for i in range(70)})
        assert "... 10 more, see .to_frame()" in repr(found) and "layers.69.w.weight" in repr(found)
