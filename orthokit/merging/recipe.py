"""What is to be done to each tensor of a model: the method, its options, and which tensors are matrices."""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from orthokit.errors import OptionError, OrthokitError, ParameterError, unknown_name
from orthokit.matrices import MatrixBlock, matrices
from orthokit.merging._registry import MergeMethod, method_named
from orthokit.merging.decoupling import orthomerge_parts
from orthokit.merging.report import measured

__all__ = ["Recipe", "check_same", "merge_tensor", "mergeable", "plan"]

REPORTS = ("brief", "full")
# Entries that are merged at a time where they can be: more would only take memory.
_PIECE = 1 << 24
# Options of merge() itself that a pattern may set for the tensors it fits.
_COMMON = ("method", "weights", "scale")


@dataclass(frozen=True)
class Recipe:
    """A method with its options, checked, and other options for some of the tensors.

    Args:
        method: Name of a method.
        weights: One per expert; default: all 1.
        scale: Factor on the merged change; default: that of the method.
        layers: By shell pattern over parameter names, options that hold for the tensors it fits: ``method``,
            ``weights``, ``scale`` or options of the method. A later pattern wins over an earlier one.
        options: Options of the method.
        seed: From which, with the name of the tensor, each random choice follows.
        report: ``"brief"`` (default): what the method itself knows; ``"full"``: also how experts agree, energies and
            singular values, which costs more than most merges.
    """

    method: str = "orthomerge"
    weights: Sequence[float] | None = None
    scale: float | None = None
    layers: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    report: str = "brief"

    def __post_init__(self) -> None:
        """Raise for unknown names."""
        if self.report not in REPORTS:
            raise unknown_name("report", self.report, REPORTS)
        _known(method_named(self.method), self.options, "")
        for pattern, given in self.layers.items():
            if not isinstance(given, Mapping):
                raise OptionError(f"layers={{{pattern!r}: ...}} must be a mapping of options; got {given!r}.")
            own = {name: value for name, value in given.items() if name not in _COMMON}
            _known(method_named(given.get("method", self.method)), own, f" of layers[{pattern!r}]")

    def for_tensor(self, name: str) -> tuple[MergeMethod, dict[str, Any]]:
        """The method of a tensor and all keyword options to call it with, the statistics apart."""
        method = self.method
        common: dict[str, Any] = {"weights": self.weights, "scale": self.scale}
        own = dict(self.options)
        for pattern, given in self.layers.items():
            if fnmatchcase(name, pattern):
                other = given.get("method", method)
                own = {**(own if other == method else {}), **{k: v for k, v in given.items() if k not in _COMMON}}
                common |= {key: given[key] for key in ("weights", "scale") if key in given}
                method = other
        spec = method_named(method)
        if "seed" in spec.options and "seed" not in own:
            # Of its own for each tensor, and the same in whatever order and by however many threads they are merged.
            own["seed"] = (self.seed * 0x9E3779B1 + zlib.crc32(name.encode())) % (1 << 31)
        return spec, {**{key: value for key, value in common.items() if value is not None}, **own}

    def unmatched(self, names: Sequence[str]) -> list[str]:
        """Patterns of ``layers`` that fit none of these names."""
        return [pattern for pattern in self.layers if not any(fnmatchcase(name, pattern) for name in names)]

    def check_count(self, experts: int) -> None:
        """Raise unless every method in it takes so many experts."""
        for method in {self.method, *(given.get("method", self.method) for given in self.layers.values())}:
            least, most = method_named(method).experts
            if experts < least or (most is not None and experts > most):
                wanted = f"exactly {least}" if most == least else f"at least {least}"
                raise OptionError(f"method={method!r} merges {wanted} experts; got {experts}.")


def plan(model: nn.Module | Mapping[str, Tensor]) -> dict[str, MatrixBlock]:
    """How the tensors of a model that are matrices are seen as such, by name.

    Args:
        model: A module, which tells what its layers are, or the tensors by name; of the meta device will do.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a model of vectors alone can be merged as well
        return {block.parameter: block for block in matrices(model)}


def merge_tensor(
    recipe: Recipe,
    name: str,
    base: Tensor,
    experts: Sequence[Tensor],
    *,
    block: MatrixBlock | None,
    statistics: Sequence[Tensor] | None = None,
) -> tuple[Tensor, dict[str, Any]]:
    """One tensor of a model and its row of the report.

    Args:
        recipe: What is to be done.
        name: Of the parameter.
        base: Its value in the base.
        experts: And in each expert.
        block: From :func:`plan`.
        statistics: What the method needs of each expert, for this tensor.

    Raises:
        ParameterError: Integer tensors that differ between the models.
        OptionError: Something about this tensor, which the message names; like the other errors of the method.
    """
    spec, options = recipe.for_tensor(name)
    row: dict[str, Any] = {"name": name, "shape": list(base.shape), "method": spec.name, "note": ""}
    if not all(mergeable(tensor.dtype) for tensor in (base, *experts)):
        check_same(name, base, experts)
        return base.clone(), {**row, "method": "copy", "note": "no floating numbers of 2 bytes or more: copied"}
    spec, options, row["note"] = _fitting(spec, options, name, block, statistics)
    row["method"] = spec.name
    seen = (lambda tensor: block.read(tensor)) if block is not None else (lambda tensor: tensor)
    W0, Ws = seen(base), [seen(expert) for expert in experts]
    if spec.statistics:
        options[spec.statistics] = [seen(one) if one.shape == base.shape else one for one in statistics or ()]
    rotated = None
    try:
        if spec.name == "orthomerge":
            # What is no matrix of the model is no map whose inputs could be rotated.
            flat = block is None
            told = recipe.report == "full" and not flat
            pieces = flat and method_named(options.get("residual", "linear")).elementwise
            each = [W.flatten() if flat else W for W in (W0, *Ws)]
            value, parts = _by_pieces(orthomerge_parts, each, {**options, "rotated": told}, pieces=pieces)
            value = value.reshape(W0.shape)
            rotated = parts.rotated if told else None
            row |= _numbers(parts)
        else:
            own = {spec.statistics: options.pop(spec.statistics)} if spec.statistics else {}
            value, _ = _by_pieces(spec.function, [W0, *Ws], options, pieces=spec.elementwise, statistics=own)
    except OrthokitError as error:
        raise type(error)(f"{name!r}: {error}") from error
    if recipe.report == "full":
        row |= measured(W0, Ws, value, rotated=rotated)
    if block is not None and value.shape != base.shape:
        out = torch.empty_like(base)
        block.write(out, value)
        return out, row
    return value, row


def _by_pieces(
    function: Callable[..., Any],
    tensors: Sequence[Tensor],
    options: Mapping[str, Any],
    *,
    pieces: bool,
    statistics: Mapping[str, Sequence[Tensor]] | None = None,
) -> tuple[Tensor, Any]:
    """What a method makes of the base and the experts, if it can be piece by piece; and all that it told (last)."""
    length = max(1, _PIECE * len(tensors[0]) // max(1, tensors[0].numel())) if tensors[0].ndim else 0
    if not pieces or not tensors[0].ndim or length >= len(tensors[0]):
        found = function(tensors[0], list(tensors[1:]), **(statistics or {}), **options)
        return (found if isinstance(found, Tensor) else found.merged), found
    result, found = torch.empty_like(tensors[0]), None
    for start in range(0, len(result), length):
        part = slice(start, start + length)
        own = {key: [one[part] for one in each] for key, each in (statistics or {}).items()}
        found = function(tensors[0][part], [tensor[part] for tensor in tensors[1:]], **own, **options)
        result[part] = found if isinstance(found, Tensor) else found.merged
    return result, found


def _fitting(
    spec: MergeMethod,
    options: dict[str, Any],
    name: str,
    block: MatrixBlock | None,
    statistics: Sequence[Tensor] | None,
) -> tuple[MergeMethod, dict[str, Any], str]:
    """The method that this tensor can be merged by, and why it is another than the one asked for."""
    why = ""
    if spec.matrices and block is None:
        why = f"no matrix of the model: weighted mean instead of {spec.name}"
    elif spec.statistics and statistics is None:
        why = f"no {spec.statistics} of this tensor: weighted mean instead of {spec.name}"
    if not why:
        return spec, options, ""
    return method_named("linear"), {key: options[key] for key in ("weights",) if key in options}, why


def mergeable(dtype: torch.dtype) -> bool:
    """Whether numbers of this type have a mean: those of one byte are codes that a scale elsewhere belongs to."""
    return dtype.is_floating_point and dtype.itemsize > 1


def check_same(name: str, base: Tensor, experts: Sequence[Tensor], *, places: Sequence[object] = ()) -> None:
    """Raise unless a tensor that cannot be merged is the same everywhere; a lone counter, as of batches, may differ."""
    for index, expert in enumerate(experts):
        same = expert.dtype == base.dtype and (base.ndim == 0 or torch.equal(_bytes(expert), _bytes(base)))
        if not same:
            where = f" ({places[index]})" if places else ""
            raise ParameterError(
                f"{name!r} is {base.dtype} in the base and {expert.dtype} in expert {index}{where}, and they differ; "
                "whole numbers and quantised weights have no mean. Dequantise the models first, or leave the tensor "
                "out of them."
            )


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)


def _numbers(parts: Any) -> dict[str, Any]:
    """What OrthoMerge tells about a tensor; of a batch the means, and the largest correction."""
    batch = tuple(range(parts.correction.ndim))

    def mean(tensor: Tensor) -> list[float]:
        return [float(value) for value in (tensor.mean(dim=batch) if batch else tensor)]

    correction = parts.correction.max()
    return {
        "rotation_fraction": mean(parts.rotation_fractions),
        "generator_norm": mean(parts.generator_norms),
        "correction": float(correction) if bool(torch.isfinite(correction)) else None,
        "clipped": bool(parts.clipped.any()),
        "conflict_share": mean(parts.conflicts),
        "route": list(parts.routes),
    }


def _known(spec: MergeMethod, options: Mapping[str, Any], where: str) -> None:
    for name in options:
        if name not in spec.options:
            raise unknown_name(f"option of {spec.name}{where}", name, tuple(spec.options))
