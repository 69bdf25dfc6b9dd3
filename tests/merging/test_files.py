"""Models merged in files: as in memory, resumable, bounded in memory, and never half there."""

import json
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from orthokit.checkpoints import CheckpointWriter, open_checkpoint, writing
from orthokit.errors import (
    CheckpointError,
    NonFiniteError,
    NothingMatchedWarning,
    OptionError,
    ParameterError,
    ShapeError,
    UnknownNameError,
)
from orthokit.merging import merge
from orthokit.merging._stream import MergeProgress
from orthokit.merging.files import merge_checkpoints

State = dict[str, Tensor]


def llama(seed: int = 0, *, layers: int = 2, dtype: torch.dtype = torch.float32) -> State:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"model.embed_tokens.weight": (11, 6), "model.norm.weight": (6,)}
    for i in range(layers):
        start = f"model.layers.{i}."
        shapes |= {f"{start}self_attn.q_proj.weight": (6, 6), f"{start}mlp.up_proj.weight": (8, 6)}
        shapes |= {f"{start}mlp.down_proj.weight": (6, 8), f"{start}input_layernorm.weight": (6,)}
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def moved(state: State, seed: int) -> State:
    generator = torch.Generator().manual_seed(100 + seed)
    return {
        name: (t + 0.1 * torch.randn(t.shape, generator=generator)).to(t.dtype) if t.is_floating_point() else t.clone()
        for name, t in state.items()
    }


def saved(folder: Path, state: State, *, shard_bytes: int = 10**9, beside: dict[str, bytes] | None = None) -> Path:
    plan = {name: (t.dtype, tuple(t.shape)) for name, t in state.items()}
    with CheckpointWriter(folder, plan, shard_bytes=shard_bytes) as writer:
        for name, tensor in state.items():
            writer.write(name, tensor)
        return writer.finish(beside or {})


def read(folder: Path) -> State:
    with open_checkpoint(folder) as model:
        return {name: model.tensor(name) for name in model.names()}


def content(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def listed(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


@pytest.fixture
def models(tmp_path: Path) -> tuple[Path, list[Path]]:
    """A base with files beside and three experts; the second in shards."""
    base = llama()
    beside = {
        "config.json": b'{"torch_dtype": "float32", "tie_word_embeddings": true}',
        "tokenizer.json": b"{}",
        "tokenizer.model": b"\x00\x01",
        "generation_config.json": b"{}",
        "LICENSE": b"mine",
        "README.md": b"of the base",
        "training_args.bin": b"\x80",
    }
    start = saved(tmp_path / "base", base, beside=beside)
    experts = [saved(tmp_path / f"e{i}", moved(base, i), shard_bytes=300 if i == 1 else 10**9) for i in range(3)]
    return start, experts


METHODS: list[tuple[str, dict[str, Any]]] = [
    ("linear", {"weights": [1.0, 2.0, 0.5]}),
    ("task_arithmetic", {"scale": 0.4}),
    ("ties", {"density": 0.5, "layers": {"*.mlp.*": {"density": 0.3}, "*norm*": {"method": "linear"}}}),
    ("dare", {"p": 0.5, "seed": 7}),
    ("model_stock", {}),
    ("tsv", {}),
    ("orthomerge", {}),
]


@pytest.mark.parametrize(("method", "options"), METHODS, ids=[name for name, _ in METHODS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_files_and_shards_and_dicts_give_the_same_bits(
    tmp_path: Path, method: str, options: dict[str, Any], dtype: torch.dtype
) -> None:
    base = llama(dtype=dtype) | {"counter": torch.tensor(3), "mask": torch.tensor([True, False])}
    experts = [moved(base, i) for i in range(3)]
    expected = merge(base, experts, method=method, **options)
    start = saved(tmp_path / "base", base)
    whole = [saved(tmp_path / f"w{i}", one) for i, one in enumerate(experts)]
    parts = [saved(tmp_path / f"p{i}", one, shard_bytes=200) for i, one in enumerate(experts)]
    told = merge_checkpoints(start, whole, tmp_path / "a", method=method, threads=1, **options)
    merge_checkpoints(start, parts, tmp_path / "b", method=method, threads=3, shard_bytes=256, **options)
    for folder in (tmp_path / "a", tmp_path / "b"):
        found = read(folder)
        assert found.keys() == base.keys()
        assert all(found[n].dtype == base[n].dtype and torch.equal(found[n], expected[n]) for n in base)
    assert [row["name"] for row in told.rows] == list(read(start))
    by_name = {row["name"]: row for row in expected.report.rows}
    assert all(row["method"] == by_name[row["name"]]["method"] for row in told.rows)


def test_slerp_takes_two(tmp_path: Path, models: tuple[Path, list[Path]]) -> None:
    base, experts = models
    merge_checkpoints(base, experts[:2], tmp_path / "out", method="slerp", t=0.25)
    expected = merge(read(base), [read(one) for one in experts[:2]], method="slerp", t=0.25)
    found = read(tmp_path / "out")
    assert all(torch.equal(found[name], expected[name]) for name in found)
    with pytest.raises(OptionError, match="exactly 2"):
        merge_checkpoints(base, experts, tmp_path / "other", method="slerp")


def test_the_files_beside_come_from_the_base(tmp_path: Path, models: tuple[Path, list[Path]]) -> None:
    base, experts = models
    told = merge_checkpoints(base, experts, tmp_path / "out", method="linear")
    beside = ["LICENSE", "config.json", "generation_config.json", "tokenizer.json", "tokenizer.model"]
    assert listed(tmp_path / "out") == sorted([*beside, "model.safetensors"])
    assert sorted(told.copied) == sorted(beside)
    assert (tmp_path / "out" / "config.json").read_bytes() == (base / "config.json").read_bytes()


def test_a_model_in_one_file_takes_nothing_from_beside_it(tmp_path: Path, models: tuple[Path, list[Path]]) -> None:
    base, experts = models
    merge_checkpoints(base / "model.safetensors", experts, tmp_path / "out", method="linear")
    assert listed(tmp_path / "out") == ["model.safetensors"]


@pytest.mark.parametrize("dtype", ["bfloat16", torch.float16, "float64"], ids=str)
def test_the_type_can_be_chosen_and_the_configuration_says_so(
    tmp_path: Path, models: tuple[Path, list[Path]], dtype: Any
) -> None:
    base, experts = models
    merge_checkpoints(base, experts, tmp_path / "out", method="linear", dtype=dtype)
    wanted = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    start = {name: t.to(torch.promote_types(t.dtype, wanted)) for name, t in read(base).items()}
    expected = merge(start, [read(one) for one in experts], method="linear")
    found = read(tmp_path / "out")
    assert all(torch.equal(found[name], expected[name].to(wanted)) for name in found)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == str(wanted).split(".")[1]


def test_a_wide_type_is_not_rounded_to_the_narrow_one_of_the_base(tmp_path: Path) -> None:
    base = saved(tmp_path / "base", {"W": torch.ones(3, 3, dtype=torch.bfloat16)})
    experts = [saved(tmp_path / f"e{i}", {"W": torch.full((3, 3), 1 + i * 2.0**-10)}) for i in (1, 2)]
    merge_checkpoints(base, experts, tmp_path / "wide", method="linear", dtype=None)
    found = read(tmp_path / "wide")["W"]
    assert found.dtype == torch.float32 and torch.equal(found, torch.full((3, 3), 1 + 1.5 * 2.0**-10))


def test_names_can_be_brought_together(tmp_path: Path, models: tuple[Path, list[Path]]) -> None:
    base, experts = models
    plain = [{name.removeprefix("model."): t for name, t in read(one).items()} for one in experts]
    others = [saved(tmp_path / f"o{i}", one) for i, one in enumerate(plain)]
    with pytest.raises(CheckpointError, match=r"no tensor of expert 0 .*pass rename=lambda name: 'model\.' \+ name"):
        merge_checkpoints(base, others, tmp_path / "out", method="linear")
    merge_checkpoints(base, others, tmp_path / "out", method="linear", rename=lambda name: f"model.{name}")
    merge_checkpoints(base, experts, tmp_path / "same", method="linear")
    assert content(tmp_path / "out") == content(tmp_path / "same")
    with pytest.raises(CheckpointError, match=r"pass rename=lambda name: name\.removeprefix\('model\.'\)"):
        merge_checkpoints(others[0], experts, tmp_path / "third", method="linear")


def test_two_tensors_may_not_get_one_name(tmp_path: Path, models: tuple[Path, list[Path]]) -> None:
    base, experts = models
    names = {"model.norm.weight": "model.layers.0.input_layernorm.weight"}
    with pytest.raises(OptionError, match="the one name"):
        merge_checkpoints(base, experts, tmp_path / "out", method="linear", rename=names)


def test_what_the_base_lacks_is_told_and_what_experts_lack_is_refused_or_kept(tmp_path: Path) -> None:
    base = llama()
    more = moved(base, 0) | {"lm_head.weight": torch.ones(11, 6)}
    less = moved(base, 1)
    del less["model.norm.weight"]
    start, a, b = saved(tmp_path / "base", base), saved(tmp_path / "a", more), saved(tmp_path / "b", less)
    with pytest.raises(CheckpointError, match=r"expert 1 .* lacks 1 of the 10 tensors.*'model\.norm\.weight'"):
        merge_checkpoints(start, [a, b], tmp_path / "out", method="linear")
    assert not (tmp_path / "out").exists()
    told = merge_checkpoints(start, [a, b], tmp_path / "out", method="linear", missing="base")
    assert dict(told.left_out) == {0: ["lm_head.weight"]} and "lm_head.weight" in str(told)
    found = read(tmp_path / "out")
    assert "lm_head.weight" not in found
    kept = (more["model.norm.weight"] + base["model.norm.weight"]) / 2
    assert torch.allclose(found["model.norm.weight"], kept)
    with pytest.raises(OptionError, match="missing must be"):
        merge_checkpoints(start, [a, b], tmp_path / "other", method="linear", missing="skip")


def test_shapes_that_differ_are_listed_and_a_vocabulary_is_told(tmp_path: Path) -> None:
    base = llama()
    start = saved(tmp_path / "base", base)
    words = base | {"model.embed_tokens.weight": torch.ones(13, 6)}
    with pytest.raises(ShapeError, match=r"vocabularies differ.*embed_tokens.*\(11, 6\).*\(13, 6\) in expert 0"):
        merge_checkpoints(start, [saved(tmp_path / "words", words)], tmp_path / "out", method="linear")
    wide = words | {"model.norm.weight": torch.ones(7)}
    with pytest.raises(ShapeError, match=r"one shape.*embed_tokens.*model\.norm\.weight"):
        merge_checkpoints(start, [saved(tmp_path / "wide", wide)], tmp_path / "out", method="linear")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.float8_e4m3fn], ids=str)
def test_what_has_no_mean_is_copied_when_equal_and_refused_when_not(tmp_path: Path, dtype: torch.dtype) -> None:
    codes = torch.tensor([0, 1, 1]).to(dtype)
    state = {"W": torch.ones(2, 2), "codes": codes}
    start = saved(tmp_path / "base", state)
    same = saved(tmp_path / "same", {"W": torch.zeros(2, 2), "codes": codes})
    merge_checkpoints(start, [same], tmp_path / "out", method="linear", dtype="bfloat16")
    found = read(tmp_path / "out")["codes"]
    assert found.dtype == dtype and torch.equal(found.view(torch.uint8), codes.view(torch.uint8))
    other = saved(tmp_path / "other", {"W": torch.zeros(2, 2), "codes": torch.tensor([1, 1, 1]).to(dtype)})
    with pytest.raises(ParameterError, match=r"'codes'.*expert 1"):
        merge_checkpoints(start, [same, other], tmp_path / "again", method="linear")
    assert not (tmp_path / "again").exists()


def test_an_expert_with_nan_is_named_with_the_tensor(tmp_path: Path, models: tuple[Path, list[Path]]) -> None:
    base, experts = models
    ill = read(experts[1])
    ill["model.layers.1.mlp.up_proj.weight"][2, 3] = float("nan")
    bad = saved(tmp_path / "ill", ill)
    with pytest.raises(NonFiniteError, match=r"model\.layers\.1\.mlp\.up_proj\.weight.*expert 1 holds NaN"):
        merge_checkpoints(base, [experts[0], bad], tmp_path / "out", method="ties")
    assert not (tmp_path / "out").exists()


def test_bad_options_are_met_before_anything_is_made(tmp_path: Path, models: tuple[Path, list[Path]]) -> None:
    base, experts = models
    calls: list[tuple[type[Exception], Callable[[Path], Any]]] = [
        (UnknownNameError, lambda out: merge_checkpoints(base, experts, out, method="tise")),
        (UnknownNameError, lambda out: merge_checkpoints(base, experts, out, method="ties", densty=0.5)),
        (OptionError, lambda out: merge_checkpoints(base, [], out)),
        (OptionError, lambda out: merge_checkpoints(base, str(experts[0]), out)),
        (OptionError, lambda out: merge_checkpoints(base, experts, out, threads=0)),
        (OptionError, lambda out: merge_checkpoints(base, experts, out, shard_bytes=0)),
        (OptionError, lambda out: merge_checkpoints(base, experts, out, dtype="int8")),
        (OptionError, lambda out: merge_checkpoints(base, experts, out, method="fisher", statistics=[{}])),
        (CheckpointError, lambda out: merge_checkpoints(base, [tmp_path / "nowhere"], out)),
        (CheckpointError, lambda out: merge_checkpoints(base, experts, base, method="linear")),
    ]
    before = listed(tmp_path)
    for error, call in calls:
        with pytest.raises(error):
            call(tmp_path / "out")
    assert listed(tmp_path) == before


def test_a_pattern_that_fits_nothing_is_a_warning(tmp_path: Path, models: tuple[Path, list[Path]]) -> None:
    base, experts = models
    with pytest.warns(NothingMatchedWarning, match="matches no tensor"):
        merge_checkpoints(base, experts, tmp_path / "out", method="linear", layers={"*.conv.*": {"weights": [1, 0, 0]}})


def test_statistics_may_lie_in_files(tmp_path: Path, models: tuple[Path, list[Path]]) -> None:
    base, experts = models
    known = [{n: torch.rand(t.shape) + 0.1 for n, t in read(base).items() if "mlp" in n} for _ in experts]
    for i, one in enumerate(known):
        save_file(one, tmp_path / f"fishers-{i}.safetensors")
    files = [tmp_path / f"fishers-{i}.safetensors" for i in range(3)]
    merge_checkpoints(base, experts, tmp_path / "files", method="fisher", statistics=files)
    merge_checkpoints(base, experts, tmp_path / "memory", method="fisher", statistics=known)
    assert content(tmp_path / "files") == content(tmp_path / "memory")
    expected = merge(read(base), [read(one) for one in experts], method="fisher", statistics=known)
    found = read(tmp_path / "files")
    assert all(torch.equal(found[name], expected[name]) for name in found)


def test_progress_tells_every_tensor_and_ends_at_the_whole(tmp_path: Path, models: tuple[Path, list[Path]]) -> None:
    base, experts = models
    seen: list[MergeProgress] = []
    told = merge_checkpoints(base, experts, tmp_path / "out", method="linear", progress=seen.append)
    assert [at.done for at in seen] == list(range(1, 11)) and {at.name for at in seen} == set(read(base))
    assert seen[-1].bytes_done == seen[-1].bytes_total == told.bytes == sum(t.nbytes for t in read(base).values())
    assert seen[-1].remaining == 0.0 and seen[0].rate > 0 and "10/10 tensors" in seen[-1].line()


def test_the_report_is_json_with_all_that_happened(tmp_path: Path, models: tuple[Path, list[Path]]) -> None:
    base, experts = models
    told = merge_checkpoints(base, experts, tmp_path / "out", method="linear", report="full")
    text = told.to_json(tmp_path / "report.json")
    values = json.loads((tmp_path / "report.json").read_text())
    assert values == json.loads(text)
    assert len(values["rows"]) == 10 and values["folder"] == str(tmp_path / "out") and values["resumed"] == 0
    assert all(row["change"] >= 0 for row in values["rows"])
    assert list(told.to_frame()["name"]) == [row["name"] for row in values["rows"]]


KILLED = """
    import os, signal, sys, time
    from pathlib import Path
    from orthokit.merging.files import merge_checkpoints

    place, method = Path(sys.argv[1]), sys.argv[2]
    def killed(at):
        time.sleep(0.3)  # time for the disk; then three tensors or more are known to be on it soon
        if len((place / ".out.making/journal.jsonl").read_text().splitlines()) > 3:
            os.kill(os.getpid(), signal.SIGKILL)
    from orthokit.checkpoints import writing
    writing._SECONDS = 0.0
    experts = [place / f"e{i}" for i in range(3)]
    merge_checkpoints(place / "base", experts, place / "out", method=method, shard_bytes=400, seed=3, progress=killed)
"""


@pytest.mark.parametrize("method", ["dare"])
def test_a_killed_run_is_gone_on_with_and_gives_the_same_bytes(
    tmp_path: Path, models: tuple[Path, list[Path]], method: str
) -> None:
    base, experts = models
    command = [sys.executable, "-c", textwrap.dedent(KILLED), str(tmp_path), method]
    assert subprocess.run(command, timeout=120).returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists() and (tmp_path / ".out.making").is_dir()
    options: dict[str, Any] = {"method": method, "shard_bytes": 400, "seed": 3}
    told = merge_checkpoints(base, experts, tmp_path / "out", **options)
    assert 3 <= told.resumed < 10 and len(told.rows) == 10
    again = merge_checkpoints(base, experts, tmp_path / "again", **options)
    assert again.resumed == 0
    assert content(tmp_path / "out") == content(tmp_path / "again")
    assert [dict(row) for row in told.rows] == [dict(row) for row in again.rows]
    assert not (tmp_path / ".out.making").exists()


class Stop(Exception):
    """Ends a merge half-way."""


@pytest.mark.parametrize("change", ["nothing", "seed", "option", "weights", "input", "no resume"])
def test_only_the_same_recipe_of_the_same_files_is_gone_on_with(
    tmp_path: Path, models: tuple[Path, list[Path]], change: str
) -> None:
    base, experts = models

    def stop(at: MergeProgress) -> None:
        if at.done == 5:
            raise Stop

    options: dict[str, Any] = {"method": "dare", "p": 0.5, "seed": 1, "weights": [1.0, 1.0, 1.0]}
    with pytest.raises(Stop):
        merge_checkpoints(base, experts, tmp_path / "out", progress=stop, **options)
    if change == "seed":
        options["seed"] = 2
    elif change == "option":
        options["p"] = 0.25
    elif change == "weights":
        options["weights"] = [1.0, 1.0, 2.0]
    elif change == "input":
        os.utime(experts[0] / "model.safetensors", ns=(1, 1))
    elif change == "no resume":
        options["resume"] = False
    told = merge_checkpoints(base, experts, tmp_path / "out", **options)
    assert (told.resumed >= 5) == (change == "nothing")
    options.pop("resume", None)
    merge_checkpoints(base, experts, tmp_path / "again", **options)
    assert content(tmp_path / "out") == content(tmp_path / "again")


def test_a_recipe_that_cannot_be_compared_starts_anew(tmp_path: Path, models: tuple[Path, list[Path]]) -> None:
    """Masks in a form of their own are options too; what is no number, text or tensor is never gone on with."""
    from orthokit.merging._file_merge import signature_of

    assert signature_of({"a": [1, 2.5, None, "x"], "b": torch.ones(2)}) == signature_of(
        {"a": (1, 2.5, None, "x"), "b": torch.ones(2)}
    )
    assert signature_of(torch.ones(2)) != signature_of(torch.ones(2, 1))
    with pytest.raises(TypeError, match="no form"):
        signature_of({"a": lambda: None})


def test_two_merges_into_one_folder_are_one_too_many(tmp_path: Path, models: tuple[Path, list[Path]]) -> None:
    base, experts = models

    def second(at: MergeProgress) -> None:
        if at.done == 1:
            with pytest.raises(CheckpointError, match="another process is writing"):
                merge_checkpoints(base, experts, tmp_path / "out", method="linear")

    merge_checkpoints(base, experts, tmp_path / "out", method="linear", progress=second)
    with pytest.raises(CheckpointError, match="exists already"):
        merge_checkpoints(base, experts, tmp_path / "out", method="linear")


def test_a_disk_that_fills_up_leaves_no_model_and_can_be_gone_on_with(
    tmp_path: Path, models: tuple[Path, list[Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    base, experts = models
    real, calls = writing.write_at, []

    def full(*arguments: Any) -> None:
        calls.append(1)
        if len(calls) > 6:
            raise OSError(28, "No space left on device")
        real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(writing, "write_at", full)
        with pytest.raises(CheckpointError, match=r"No space left on device\. Free some room and run the same again"):
            merge_checkpoints(base, experts, tmp_path / "out", method="linear")
    assert not (tmp_path / "out").exists()
    assert merge_checkpoints(base, experts, tmp_path / "out", method="linear").resumed >= 4


def test_a_truncated_shard_is_refused_before_anything_is_written(
    tmp_path: Path, models: tuple[Path, list[Path]]
) -> None:
    base, experts = models
    shard = sorted(experts[1].glob("*.safetensors"))[1]
    os.truncate(shard, shard.stat().st_size - 8)
    with pytest.raises(CheckpointError, match=rf"{shard.name}.*cut off.*again"):
        merge_checkpoints(base, experts, tmp_path / "out", method="linear")
    assert not (tmp_path / "out").exists() and not (tmp_path / ".out.making").exists()


def test_torchs_threads_are_put_back(tmp_path: Path, models: tuple[Path, list[Path]]) -> None:
    base, experts = models
    before = torch.get_num_threads()
    merge_checkpoints(base, experts, tmp_path / "out", method="linear", threads=4)
    assert torch.get_num_threads() == before


MEMORY = """
    import sys
    from pathlib import Path
    from orthokit.merging.files import merge_checkpoints

    def now(what):
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(what)) * 1024

    place = Path(sys.argv[1])
    # What torch and the imports take for themselves is no memory of the merge.
    merge_checkpoints(place / "small", [place / "small"], place / "first", method="linear", threads=2)
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = now("VmRSS:")
    merge_checkpoints(place / "base", [place / "e0", place / "e1"], place / "out", method="linear", threads=2)
    print(now("VmHWM:") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is read from Linux's /proc")
def test_the_peak_of_memory_is_a_few_tensors_and_not_the_models(tmp_path: Path) -> None:
    """Three models of 64 MB in 32 tensors of 2 MB: two at a time with their buffers are far below one model."""
    names = [f"layers.{i}.weight" for i in range(32)]
    plan = dict.fromkeys(names, (torch.float32, (512, 1024)))
    for folder in ("base", "e0", "e1"):
        with CheckpointWriter(tmp_path / folder, plan) as writer:
            for i, name in enumerate(names):
                writer.write(name, torch.full((512, 1024), float(i)))
            writer.finish()
    saved(tmp_path / "small", {name: torch.ones(1, 1) for name in names})
    command = [sys.executable, "-c", textwrap.dedent(MEMORY), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    model = 32 * (2 << 20)
    assert 0 < int(done.stdout) < model / 2
    merged = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(merged[name], torch.full((512, 1024), float(i))) for i, name in enumerate(names))
