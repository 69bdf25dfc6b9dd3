"""Device choice, seeded generators, and the measured rates that are kept on disk."""

import json
import os
from pathlib import Path

import pytest
import torch

from orthokit import device
from orthokit.errors import DeviceError, OptionError


@pytest.fixture
def cache(monkeypatch, tmp_path) -> Path:
    monkeypatch.setenv("ORTHOKIT_CACHE", str(tmp_path / "cache"))
    device._cached_rates.cache_clear()
    yield tmp_path / "cache" / "matmul.json"
    device._cached_rates.cache_clear()


@pytest.fixture
def measured(monkeypatch) -> list[torch.dtype]:
    """Dtypes that were measured; the rates are set, so that no test depends on the machine."""
    calls = []
    rates = {torch.float32: 1e9, torch.bfloat16: 4e9, torch.float16: 9e9}
    monkeypatch.setattr(device, "_rate", lambda where, dtype, n, seconds: calls.append(dtype) or rates[dtype])
    return calls


def test_auto_takes_what_is_here():
    assert device.pick_device().type == (
        "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    )
    assert device.pick_device("cpu") == device.pick_device(torch.device("cpu")) == torch.device("cpu")


@pytest.mark.parametrize("name", ["graphics", "", "cpu:x"])
def test_names_that_are_no_device_are_refused(name):
    with pytest.raises(DeviceError, match=r"'auto' or a torch device name.*cpu"):
        device.pick_device(name)


@pytest.mark.parametrize("name", ["cuda:99", "xpu", "meta"])
def test_devices_that_are_not_here_are_refused(name):
    with pytest.raises(DeviceError, match="not on this machine"):
        device.pick_device(name)


def test_generators_repeat_and_leave_the_global_one_alone():
    state = torch.get_rng_state()
    one, two, other = (torch.randn(5, generator=device.generator(seed)) for seed in (3, 3, 4))
    assert torch.equal(one, two) and not torch.equal(one, other)
    assert torch.equal(state, torch.get_rng_state())


def test_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("ORTHOKIT_CACHE", str(tmp_path / "a"))
    assert device.cache_dir() == tmp_path / "a"
    monkeypatch.delenv("ORTHOKIT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "b"))
    assert device.cache_dir() == tmp_path / "b" / "orthokit"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "c"))
    assert device.cache_dir() == tmp_path / "c" / ".cache" / "orthokit"


def test_real_rates_are_positive_and_in_a_plausible_range(cache):
    rates = device.matmul_rates()
    assert set(rates) == {"float32", "bfloat16", "float16"}
    assert all(1e6 < rate < 1e16 for rate in rates.values())


def test_rates_are_measured_once_and_read_from_disk_by_the_next_process(cache, measured):
    first = device.matmul_rates()
    assert device.matmul_rates() == first and len(measured) == 3
    device._cached_rates.cache_clear()  # as a new process
    assert device.matmul_rates() == first and len(measured) == 3
    (key,) = json.loads(cache.read_text())
    assert torch.__version__ in key and f"{torch.get_num_threads()} threads" in key
    assert [path.name for path in cache.parent.iterdir()] == ["matmul.json"]


def test_another_number_of_threads_is_another_measurement(cache, measured):
    before = torch.get_num_threads()
    device.matmul_rates()
    torch.set_num_threads(before + 1)
    try:
        device.matmul_rates()
    finally:
        torch.set_num_threads(before)
    assert len(measured) == 6 and len(json.loads(cache.read_text())) == 2


@pytest.mark.parametrize("content", ["", "{", "[]", '{"a": 1}', "null", "KEY"])
def test_a_damaged_cache_is_measured_again(cache, measured, content):
    cache.parent.mkdir()
    key = device._device_key(torch.device("cpu"), torch.get_num_threads())
    cache.write_text(json.dumps({key: 3}) if content == "KEY" else content)
    assert device.matmul_rates()["float32"] == 1e9 and len(measured) == 3
    device._cached_rates.cache_clear()
    device.matmul_rates()
    assert len(measured) == 3  # and mended


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_cache_that_cannot_be_written_costs_only_time(cache, measured):
    cache.parent.mkdir(mode=0o500)
    assert device.matmul_rates()["float32"] == 1e9


def test_a_cache_path_that_is_a_file_costs_only_time(monkeypatch, tmp_path, cache, measured):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ORTHOKIT_CACHE", str(tmp_path / "file"))
    assert device.matmul_rates()["float32"] == 1e9


def test_callers_cannot_change_what_is_kept(cache, measured):
    device.matmul_rates()["float32"] = 0.0
    assert device.matmul_rates()["float32"] == 1e9


@pytest.mark.parametrize(
    ("bfloat16", "expected", "small"),
    [
        (4e9, torch.bfloat16, torch.bfloat16),
        (1.5e9, torch.bfloat16, torch.bfloat16),
        (1.4e9, torch.float32, torch.bfloat16),
        (1.05e9, torch.float32, torch.float32),
    ],
)
def test_half_precision_has_to_win_clearly(monkeypatch, bfloat16, expected, small):
    rates = {"float32": 1e9, "bfloat16": bfloat16, "float16": 9e9}
    monkeypatch.setattr(device, "matmul_rates", lambda where, side: rates)
    assert device.fast_matmul_dtype() == expected
    assert device.fast_matmul_dtype(side=128) == small


def test_the_rates_of_one_size_are_kept_by_themselves(cache, monkeypatch):
    sizes = []
    monkeypatch.setattr(device, "_rate", lambda where, dtype, n, seconds: sizes.append(n) or float(n))
    assert device.matmul_rates(side=128)["float32"] == 128 and device.matmul_rates()["float32"] == 512
    assert device.matmul_rates(side=128)["float32"] == 128 and sizes == [128] * 3 + [512] * 3
    assert all(device.processor() in key for key in json.loads(cache.read_text()))


@pytest.mark.parametrize("ask", [device.matmul_rates, device.fast_matmul_dtype])
def test_a_side_without_rows_is_refused(ask, cache, measured):
    for side in (0, -1):
        with pytest.raises(OptionError, match="side must be at least 1"):
            ask(side=side)
    assert not measured


def test_description_names_the_threads_and_the_dtype(cache, measured):
    threads = torch.get_num_threads()
    counted = f"{threads} thread{'s' * (threads > 1)}"
    assert device.describe("cpu") == f"cpu, {counted}, matrices multiply fastest in bfloat16"
