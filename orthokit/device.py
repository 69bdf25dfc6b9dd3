"""Where to compute and in which precision: chosen in the open, measured once, cached.

Nothing in orthokit moves a tensor by itself. Functions follow their inputs; this module is for the edges (notebooks,
pages, the command line) and for the optimizers, which ask which dtype multiplies matrices fast on this machine.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import platform
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from orthokit.errors import DeviceError, OptionError

__all__ = ["cache_dir", "describe", "fast_matmul_dtype", "generator", "matmul_rates", "pick_device", "processor"]

# A dtype of half the bits must win clearly before it is worth its rounding error; asked about one size, by a tenth.
_WORTHWHILE, _WORTHWHILE_THERE = 1.5, 1.1


def cache_dir() -> Path:
    """The folder for what may be recomputed: ``$ORTHOKIT_CACHE``, else ``~/.cache/orthokit``."""
    chosen = os.environ.get("ORTHOKIT_CACHE")
    if chosen:
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "orthokit"


def _available() -> list[str]:
    names = [f"cuda:{i}" for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    if torch.backends.mps.is_available():
        names.append("mps")
    return [*names, "cpu"]


def pick_device(name: str | torch.device = "auto") -> torch.device:
    """The device a notebook, page or command works on.

    Args:
        name: ``"auto"`` (first of cuda, mps, cpu that is here) or any torch device name.

    Returns:
        The device.

    Raises:
        DeviceError: A device was named that is not on this machine; the message lists those that are.

    Example:
        >>> pick_device("cpu").type
        'cpu'
    """
    here = _available()
    if str(name) == "auto":
        return torch.device(here[0])
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise DeviceError(f"a device must be 'auto' or a torch device name; got {name!r}. Here: {here}.") from error
    indexed = f"{device.type}:{device.index or 0}" if device.type == "cuda" else device.type
    if indexed not in here:
        raise DeviceError(f"device {str(device)!r} is not on this machine. Here: {here}. Use 'auto' to take the first.")
    return device


def generator(seed: int, device: str | torch.device = "cpu") -> torch.Generator:
    """A random generator of its own, so that nothing touches torch's global one.

    Args:
        seed: Any integer.
        device: Where the generator draws; default the CPU.

    Returns:
        The seeded generator.

    Example:
        >>> a, b = (torch.randn(3, generator=generator(7)) for _ in range(2))
        >>> bool((a == b).all())
        True
    """
    return torch.Generator(device=device).manual_seed(seed)


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def _rate(device: torch.device, dtype: torch.dtype, n: int, seconds: float) -> float:
    """FLOP/s of an ``n x n`` product: the best of many, because other load only ever slows one down."""
    a = torch.randn(n, n, generator=generator(0)).to(device=device, dtype=dtype)
    torch.mm(a, a)
    _synchronise(device)
    best, start = float("inf"), time.perf_counter()
    while time.perf_counter() - start < seconds:
        t = time.perf_counter()
        torch.mm(a, a)
        _synchronise(device)
        best = min(best, time.perf_counter() - t)
    return 2 * n**3 / best


@functools.cache
def processor() -> str:
    """The name of this machine's processor, or its architecture where the system does not tell.

    Example:
        >>> len(processor()) > 0
        True
    """
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = (line.split(":", 1)[1].strip() for line in lines if line.lower().startswith("model name"))
    return next(named, platform.processor() or platform.machine())


@functools.cache
def _device_key(device: torch.device, threads: int, side: int | None = None) -> str:
    if device.type == "cuda":
        what = torch.cuda.get_device_name(device)
    else:
        what = f"{processor()} {torch.backends.cpu.get_cpu_capability()} {os.cpu_count()} cores"
    of = "" if side is None else f" side {side}"
    return f"{device.type} {what} {threads} threads torch {torch.__version__}{of}"


@functools.cache
def _cached_rates(key: str, device: torch.device, side: int | None = None) -> dict[str, float]:
    path = cache_dir() / "matmul.json"
    # A missing or damaged entry is no error: the rates are measured again.
    with contextlib.suppress(ValueError, KeyError, AttributeError, TypeError):
        return {name: float(rate) for name, rate in _known(path)[key].items()}
    n = side or (2048 if device.type == "cuda" else 512)
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    rates = {name: _rate(device, dtype, n, 0.05) for name, dtype in dtypes.items()}
    _store(path, key, rates)
    return rates


def _known(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _store(path: Path, key: str, rates: dict[str, float]) -> None:
    known = _known(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False) as beside:
            json.dump({**known, key: rates}, beside, indent=1)
        Path(beside.name).replace(path)
    except OSError:
        return  # a home that cannot be written costs the next process one more measurement, nothing else


def matmul_rates(device: str | torch.device = "cpu", *, side: int | None = None) -> dict[str, float]:
    """How fast this machine multiplies square matrices, per dtype, in FLOP/s.

    Measured once for each machine, thread count and torch version (0.05 s a dtype) and kept in :func:`cache_dir`.

    Args:
        device: Where to measure; default the CPU.
        side: Rows of the matrices, ``>= 1``; default large ones: 512 on a CPU, 2048 on CUDA.

    Returns:
        ``{"float32": ..., "bfloat16": ..., "float16": ...}`` in FLOP/s.

    Raises:
        OptionError: ``side`` is below 1.

    Example:
        >>> all(rate > 0 for rate in matmul_rates().values())
        True
    """
    if side is not None and side < 1:
        raise OptionError(f"side must be at least 1; got {side}. It is the number of rows of the matrices multiplied.")
    where = torch.device(device)
    return dict(_cached_rates(_device_key(where, torch.get_num_threads(), side), where, side))


def fast_matmul_dtype(device: str | torch.device = "cpu", *, side: int | None = None) -> torch.dtype:
    """The dtype to run Newton-Schulz style iterations in: bfloat16 where it is clearly faster, else float32.

    float16 is never chosen: its range of 6e-5 ... 65504 loses small singular values that bfloat16 keeps.

    Args:
        device: Where the products will run; default the CPU.
        side: Rows of the matrices, ``>= 1``; default large ones. For small ones, the fixed cost of a product decides.

    Returns:
        ``torch.bfloat16`` if its measured rate is at least 1.5 times float32's (1.1 times if a ``side`` was given),
        else ``torch.float32``.

    Raises:
        OptionError: ``side`` is below 1.

    Example:
        >>> fast_matmul_dtype() in (torch.float32, torch.bfloat16)
        True
    """
    rates, least = matmul_rates(device, side=side), _WORTHWHILE if side is None else _WORTHWHILE_THERE
    return torch.bfloat16 if rates["bfloat16"] >= least * rates["float32"] else torch.float32


def _threads() -> str:
    count = torch.get_num_threads()
    return f"{count} thread" + ("s" if count != 1 else "")


def describe(device: str | torch.device = "cpu") -> str:
    """One line about a device, for the first output of a notebook: name, threads, fast dtype.

    Args:
        device: A torch device.

    Returns:
        For example ``"cpu, 2 threads, matrices multiply fastest in bfloat16"``.

    Example:
        >>> describe("cpu").startswith("cpu")
        True
    """
    where = torch.device(device)
    name = torch.cuda.get_device_name(where) if where.type == "cuda" else _threads()
    fast = str(fast_matmul_dtype(where)).removeprefix("torch.")
    return f"{where}, {name}, matrices multiply fastest in {fast}"
