"""What is in a folder with an adapter: how orthogonal it is, and whether it is known to be defective."""

from __future__ import annotations

import html
import json
import math
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from orthokit.adapters._blocks import BlockAdapter, BlockOptions
from orthokit.adapters._install import Entry
from orthokit.adapters.boft import BOFTAdapter
from orthokit.adapters.files import MANIFEST, read
from orthokit.adapters.hra import HRA, HRAAdapter
from orthokit.adapters.peft_defects import Finding, peft_findings, series_findings
from orthokit.adapters.peft_read import CONFIG, entry_of, read_peft
from orthokit.adapters.sites import Site
from orthokit.errors import CheckpointError

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["AuditReport", "LayerAudit", "audit"]

# Rotations further from orthogonal than this are broken: a hundred times what float32 leaves of an exact map.
TOLERANCE = 1e-3
# Angles of a product of factors that is not block-diagonal take its eigenvalues.
_WIDEST = 2048
_SHOWN = 20


@dataclass(frozen=True)
class LayerAudit:
    """One adapter of one layer.

    Args:
        layer: Its name.
        adapter: Name of the adapter.
        kind: Such as ``"oft"``.
        parameters: Numbers stored.
        orthogonality_error: ``max |R^T R - I|`` of the rotation, in float64; ``None`` for adapters that turn nothing.
        smallest_singular_value: Of ``R``; for several factors the product of theirs, which is a lower bound.
        largest_angle: Of a plane, in radians; ``None`` as well for BOFT where it is broken, or would take a large
            eigenvalue problem.
        fault: What is broken, or ``""``.
    """

    layer: str
    adapter: str
    kind: str
    parameters: int
    orthogonality_error: float | None
    smallest_singular_value: float | None
    largest_angle: float | None
    fault: str


@dataclass(frozen=True)
class AuditReport:
    """What :func:`audit` found.

    Args:
        folder: The folder.
        writer: The program that wrote it, as far as the files tell.
        layers: Each adapter of each layer.
        findings: Defects in words.
    """

    folder: str
    writer: str
    layers: tuple[LayerAudit, ...]
    findings: tuple[Finding, ...]

    @property
    def ok(self) -> bool:
        """Whether no layer is broken."""
        return not any(layer.fault for layer in self.layers)

    def to_frame(self) -> pd.DataFrame:
        """One row per layer and adapter; NaN where there is no rotation."""
        import pandas as pd

        frame = pd.DataFrame([asdict(layer) for layer in self.layers])
        numbers = ["orthogonality_error", "smallest_singular_value", "largest_angle"]
        return frame.astype(dict.fromkeys(numbers, "float64"))

    def to_json(self) -> str:
        """All of it; numbers that are not finite are ``null``."""
        layers = [{key: _finite(value) for key, value in asdict(layer).items()} for layer in self.layers]
        findings = [asdict(finding) for finding in self.findings]
        values = {"folder": self.folder, "writer": self.writer, "ok": self.ok, "layers": layers, "findings": findings}
        return json.dumps(values, indent=2, allow_nan=False)

    def __str__(self) -> str:
        """The summary, the worst layers and the findings."""
        frame = self.to_frame().sort_values("orthogonality_error", ascending=False, kind="stable", na_position="last")
        frame = frame.sort_values("fault", ascending=False, kind="stable") if not self.ok else frame
        shown = frame.head(_SHOWN).to_string(index=False, na_rep="-", float_format=lambda x: f"{x:.3g}")
        more = f"\n... and {len(frame) - _SHOWN} more" if len(frame) > _SHOWN else ""
        return "\n\n".join([self._summary(), shown + more, *self._lists()])

    def _repr_html_(self) -> str:
        table = self.to_frame().to_html(index=False, na_rep="", float_format=lambda x: f"{x:.3g}")
        items = "".join(f"<li>{html.escape(_line(finding))}</li>" for finding in self.findings)
        return f"<p>{html.escape(self._summary())}</p>{table}" + (f"<ul>{items}</ul>" if items else "")

    def _summary(self) -> str:
        broken = sum(bool(layer.fault) for layer in self.layers)
        state = f"{broken} of {len(self.layers)} layers are broken" if broken else "no layer is broken"
        return f"{self.folder}: written by {self.writer}; {state}."

    def _lists(self) -> list[str]:
        return ["\n".join(f"- {_line(finding)}" for finding in self.findings)] if self.findings else []


def audit(folder: str | os.PathLike[str]) -> AuditReport:
    r"""Measure an adapter that orthokit or PEFT wrote, without the model, and say which known defects concern it.

    Args:
        folder: As ``save`` or PEFT's ``save_pretrained`` left it.

    Returns:
        Per layer ``max |R^T R - I|``, the smallest singular value and the largest angle of the rotation; and findings
        in words. A layer is broken whose numbers are not finite, or whose error is above 1e-3.

    Raises:
        CheckpointError: The files are missing, damaged, or of a type that is not read.

    Example:
        >>> import tempfile
        >>> from torch import nn
        >>> from orthokit.adapters import OFT, attach, save
        >>> model = nn.Sequential(nn.Linear(8, 4))
        >>> config = OFT(4, map="cayley_neumann", terms=3, tolerance=None, block_rate=False, init_std=0.4)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     report = audit(save(attach(model, config), folder))
        >>> report.ok, report.layers[0].orthogonality_error > 1e-3  # a short series, and large angles
        (False, True)

    Numerics:
        In float64 from the stored numbers. Blocks are taken one by one; a product of butterfly factors with its whole
        width, ``O(n^2 b)``.

    References:
        The defects were found by reading the source of PEFT 0.15 to 0.21 and, but for that of bitsandbytes merges, by
        running it. PEFT writes its release into configs since 0.18.
    """
    place = Path(folder)
    if (place / MANIFEST).is_file() or not (place / CONFIG).is_file():
        stored = read(place, finite=False)
        rows, found = [], []
        for name, entries in stored.plan.items():
            for path, entry in entries.items():
                facts = stored.layers[path]
                out, width = facts["shape"]
                sizes = {"groups": int(facts["groups"]), "patch": int(facts["patch"])}
                site = _site(path, str(facts["kind"]), width, out, **sizes)
                rows.append(_measured(path, name, entry, site))
            found += series_findings(_sound(entries))
        return AuditReport(str(place), stored.writer, tuple(rows), tuple(found))
    file = read_peft(place)
    entries = {path: entry_of(file, path, None, finite=False) for path in file.layers}
    rows = [_measured(path, "default", entry, _own_site(path, entry)) for path, entry in entries.items()]
    sound = _sound(entries)
    found = [*series_findings(sound), *peft_findings(file, sound)] if sound else []
    return AuditReport(str(place), file.release.text, tuple(rows), tuple(found))


def _sound(entries: Any) -> dict[str, Entry]:
    return {path: entry for path, entry in entries.items() if not _broken(entry)}


def _broken(entry: Entry) -> list[str]:
    return [leaf for leaf, tensor in entry.tensors.items() if not bool(torch.isfinite(tensor).all())]


def _measured(path: str, name: str, entry: Entry, site: Site) -> LayerAudit:
    numbers: tuple[float | None, ...] = (None, None, None)
    fault = ""
    if broken := _broken(entry):
        fault = f"{', '.join(broken)}: NaN or infinite entries"
        numbers = (math.nan, math.nan, math.nan) if isinstance(entry.config, BlockOptions | HRA) else numbers
    elif isinstance(entry.config, BlockOptions | HRA):
        numbers = _turning(entry, site)
        if not (numbers[0] is not None and numbers[0] <= TOLERANCE):
            fault = "not orthogonal"
    parameters = sum(tensor.numel() for tensor in entry.tensors.values())
    return LayerAudit(path or "layer", name, entry.config.kind, parameters, *numbers, fault)


@torch.no_grad()
def _turning(entry: Entry, site: Site) -> tuple[float, float, float | None]:
    """Error, smallest singular value and largest angle."""
    part: Any = entry.config.part(site, _no_weight, stream=0)
    own = part.state_dict()
    if own.keys() != entry.tensors.keys() or any(own[leaf].shape != t.shape for leaf, t in entry.tensors.items()):
        shapes = {leaf: tuple(t.shape) for leaf, t in entry.tensors.items()}
        raise CheckpointError(f"{site.name!r} is damaged: {shapes} do not belong to {entry.config}.")
    for leaf, tensor in entry.tensors.items():
        own[leaf].copy_(tensor)
    part.strength = entry.strength
    if isinstance(part, HRAAdapter):
        smallest = _smallest_of_reflections(part)
    else:
        smallest = math.prod(float(torch.linalg.svdvals(stack)[..., -1].min()) for stack in _stacks(part))
    error = part.orthogonality_error()
    # Of products of factors angles are read from cosines, which are none far from orthogonal.
    wide = isinstance(part, BOFTAdapter) and len(part.factors(torch.float64)) > 1 and site.in_features > _WIDEST
    unread = wide or (isinstance(part, BOFTAdapter) and not error <= TOLERANCE)
    return error, smallest, None if unread else part.largest_angle()


def _stacks(part: BlockAdapter) -> list[Tensor]:
    return part.rotations(torch.float64) if part.strength else [torch.eye(2, dtype=torch.float64)]


def _smallest_of_reflections(part: HRAAdapter) -> float:
    """``I - V T V^T`` is the identity beside the span of ``V``."""
    if part.strength == 0:
        return 1.0
    V, T = part.factors(torch.float64)
    C = torch.linalg.qr(V)[1]
    inside = torch.eye(len(C), dtype=C.dtype) - C @ T @ C.mT
    smallest = float(torch.linalg.svdvals(inside)[-1])
    return min(1.0, smallest) if len(C) < len(V) else smallest


def _own_site(path: str, entry: Entry) -> Site:
    """A linear layer that the tensors fit."""
    config: Any = entry.config
    if isinstance(config, BlockOptions):
        width = entry.tensors["generator"].shape[-2] * config.block_size
    elif isinstance(config, HRA):
        width = entry.tensors["vectors"].shape[1]
    else:
        width = entry.tensors["down"].shape[1]
    scale = entry.tensors.get("scale", entry.tensors.get("up"))
    return _site(path, "linear", width, 1 if scale is None else len(scale))


def _site(path: str, kind: str, width: int, out: int, *, groups: int = 1, patch: int = 1) -> Site:
    return Site(path, kind, width, out, groups, patch, torch.float64, torch.device("cpu"))


def _no_weight() -> Tensor:
    raise CheckpointError("an adapter in a file has no weight beside it.")


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _line(finding: Finding) -> str:
    return finding.text if finding.applies else f"(under a condition) {finding.text}"
