"""The first line of every notebook: where it runs, with which versions and seed, and how long it should take."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from orthokit import device as devices
from orthokit.errors import OptionError, unknown_name

__all__ = ["SIZES", "Setup", "duration", "setup", "version"]

SIZES = ("smoke", "laptop", "gpu")


def setup(
    *,
    seed: int = 0,
    device: str | torch.device = "auto",
    size: str = "laptop",
    expected: Mapping[str, float | int] | float | int | None = None,
) -> Setup:
    """Prints one line about the machine and returns what the cells need.

    Args:
        seed: Seed of the returned generator.
        device: ``"auto"``, or a torch device name.
        size: ``"smoke"`` (seconds, for tests), ``"laptop"`` or ``"gpu"``.
        expected: Seconds the notebook takes, or one number per size; printed for orientation.

    Returns:
        Device, generator, seed and size.

    Raises:
        UnknownNameError: Another size.
        DeviceError: The device is not there.

    Example:
        >>> here = setup(seed=1, device="cpu", size="smoke", expected={"smoke": 5, "laptop": 40})  # doctest: +ELLIPSIS
        device: cpu, ... · seed 1 · smoke size, about 5 s
        >>> here.device.type, here.seed
        ('cpu', 1)
    """
    if size not in SIZES:
        raise unknown_name("size", size, SIZES)
    chosen = devices.pick_device(device)
    seconds = expected.get(size) if isinstance(expected, Mapping) else expected
    if seconds is not None and seconds <= 0:
        raise OptionError(f"expected must be a positive number of seconds; got {seconds:g}.")
    about = f", about {duration(seconds)}" if seconds is not None else ""
    torch_version = torch.__version__.split("+")[0]
    parts = [
        f"device: {devices.describe(chosen)}",
        f"torch {torch_version}",
        f"orthokit {version()}",
        f"seed {seed}",
        f"{size} size{about}",
    ]
    print(" · ".join(parts))  # noqa: T201 - the line is the cell's output
    return Setup(device=chosen, generator=devices.generator(seed, chosen), seed=seed, size=size)


@dataclass(frozen=True)
class Setup:
    """What :func:`setup` found: the device to work on and a seeded generator that lives there."""

    device: torch.device
    generator: torch.Generator
    seed: int
    size: str

    def pick(self, *, smoke: Any, laptop: Any, gpu: Any) -> Any:
        """The value for the size in force: ``steps = here.pick(smoke=20, laptop=400, gpu=4000)``."""
        return {"smoke": smoke, "laptop": laptop, "gpu": gpu}[self.size]


def duration(seconds: float | int) -> str:
    """``40 s``, ``3 min`` or ``2.5 h``."""
    if seconds < 99.5:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s".replace(".0 s", " s")
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def version() -> str:
    """The version of the orthokit that is imported."""
    import orthokit

    return getattr(orthokit, "__version__", None) or importlib.metadata.version("orthokit")
