"""What was measured of files before, kept by what the files are: a second look costs the reading of one file."""

from __future__ import annotations

import contextlib
import hashlib
import json
from pathlib import Path
from typing import Any

from orthokit.device import cache_dir
from orthokit.diagnostics.inspection.result import Inspection
from orthokit.errors import CheckpointError

__all__ = ["cache_key", "forget_old", "recall", "remember"]

# To be raised when what is measured changes.
_VERSION = 1
# Models that are remembered; the least recently used go first.
_MOST = 64


def cache_key(*, model: str, base: str, settings: dict[str, Any]) -> str:
    """Name of what is kept for two models and the settings that change a row; empty if one of them has no digest."""
    if not model or base == "none":
        return ""
    told = json.dumps([_VERSION, model, base, {name: repr(value) for name, value in sorted(settings.items())}])
    return hashlib.sha256(told.encode()).hexdigest()[:32]


def _file(key: str) -> Path:
    return cache_dir() / "inspect" / f"{key}.json"


def recall(key: str) -> Inspection | None:
    """What is kept under a key; ``None`` where there is nothing that can be read."""
    if not key or not _file(key).is_file():
        return None
    try:
        found = Inspection.from_json(_file(key))
    except CheckpointError:
        return None  # of another version, or cut off: measured again
    with contextlib.suppress(OSError):
        _file(key).touch()
    return found


def remember(key: str, found: Inspection) -> None:
    """Keep what was measured; a folder that cannot be written to is no reason to fail."""
    if not key:
        return
    with contextlib.suppress(OSError):
        _file(key).parent.mkdir(parents=True, exist_ok=True)
        found.to_json(_file(key))
        forget_old()


def forget_old(*, most: int = _MOST) -> None:
    """Delete all but the most recently used."""
    files = sorted(_file("").parent.glob("*.json"), key=lambda file: file.stat().st_mtime_ns)
    for file in files[: max(0, len(files) - most)]:
        file.unlink(missing_ok=True)
