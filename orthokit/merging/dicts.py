"""Merging of state dicts and modules."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from orthokit.errors import NothingMatchedWarning, OptionError, ParameterError, ShapeError
from orthokit.merging.recipe import Recipe, merge_tensor, plan
from orthokit.merging.report import MergeReport

__all__ = ["Merged", "merge"]

Model = nn.Module | Mapping[str, Tensor]


class Merged(dict[str, Tensor]):
    """A state dict, with the report of the merge that it came from as ``.report``."""

    report: MergeReport


def merge(
    base: Model,
    experts: Iterable[Model],
    *,
    method: str = "orthomerge",
    weights: Sequence[float] | None = None,
    scale: float | None = None,
    layers: Mapping[str, Mapping[str, Any]] | None = None,
    statistics: Sequence[Mapping[str, Tensor]] | None = None,
    seed: int = 0,
    report: str = "brief",
    **options: Any,
) -> Merged:
    r"""One model out of several that were trained from one base, tensor by tensor.

    Matrices are those of :func:`orthokit.matrices`, seen as it says (convolutions flat, stacks in batches).
    Methods that need matrices merge the rest by the weighted mean, and OrthoMerge merges it by its residual method;
    each row of the report says what a tensor was merged by.

    Args:
        base: The model that the experts were trained from: a module or a state dict. Not changed.
        experts: Models with the same tensors.
        method: One of :func:`methods`; default ``"orthomerge"``.
        weights: One per expert; default: all 1.
        scale: Factor on the merged change; default: that of the method.
        layers: By shell pattern over names, other options for some tensors, such as
            ``{"*.mlp.*": {"method": "ties", "density": 0.5}}``. A later pattern wins over an earlier one.
        statistics: For ``regmean``, ``fisher`` and ``curvature``: of each expert, what the method needs by parameter
            name. Tensors that none of them names are merged by the weighted mean.
        seed: Of random choices; default 0. Every tensor draws by its own name, so the order does not matter.
        report: ``"brief"`` (default) or ``"full"``: with agreements, energies and singular values.
        **options: Those of the method: ``methods()[method].options``.

    Returns:
        A state dict in the dtypes of the base, with ``.report``.

    Raises:
        UnknownNameError: Unknown method or option.
        OptionError: No expert or too many, weights that do not fit.
        ParameterError: Tensors that some models have and others lack, or integers that differ.
        ShapeError: Tensors of different shapes, all of them named.
        NonFiniteError: A NaN or an infinity, and where.

    Warns:
        NothingMatchedWarning: A pattern of ``layers`` fits no tensor.

    Example:
        >>> import torch
        >>> base = nn.Linear(8, 4)
        >>> experts = [{name: p.detach() + 0.01 for name, p in base.named_parameters()} for _ in range(2)]
        >>> merged = merge(base, experts, method="linear")
        >>> torch.allclose(merged["weight"], base.weight + 0.01), len(merged.report.rows)
        (True, 2)

    Numerics:
        As each method; tensors that are one in the base (tied) are merged once and stay one.
    """
    start = time.perf_counter()
    recipe = Recipe(method, weights, scale, layers or {}, options, seed, report)
    tensors, others = _state(base), [_state(expert) for expert in experts]
    recipe.check_count(len(others))
    if statistics is not None and len(statistics) != len(others):
        raise OptionError(f"statistics must hold one mapping per expert; got {len(statistics)} for {len(others)}.")
    check_same_tensors(tensors, others)
    for pattern in recipe.unmatched(list(tensors)):
        warnings.warn(f"layers: {pattern!r} matches no tensor.", NothingMatchedWarning, stacklevel=2)
    blocks = plan(base)
    merged, rows, done = Merged(), [], {}
    for name, tensor in tensors.items():
        place = (tensor.data_ptr(), tuple(tensor.shape), tuple(tensor.stride()))
        first = done.setdefault(place, name)
        # Tied in the base alone they are two tensors, one of which would be lost.
        if first != name and tensor.numel() and all(torch.equal(other[name], other[first]) for other in others):
            merged[name] = merged[first]
            rows.append(
                {**next(row for row in rows if row["name"] == first), "name": name, "note": f"tied to {first!r}"}
            )
            continue
        known = [one[name] for one in statistics or () if name in one]
        merged[name], row = merge_tensor(
            recipe,
            name,
            tensor,
            [other[name] for other in others],
            block=blocks.get(name),
            statistics=known if known and len(known) == len(others) else None,
        )
        rows.append(row)
    asked = {"weights": weights, "scale": scale, "layers": dict(layers or {}), "seed": seed, **options}
    merged.report = MergeReport(method, rows, asked, time.perf_counter() - start)
    return merged


def check_same_tensors(base: Mapping[str, Tensor], experts: Sequence[Mapping[str, Tensor]]) -> None:
    """Raise unless all models have tensors of the same names and shapes."""
    for index, expert in enumerate(experts):
        lacking, more = [name for name in base if name not in expert], [name for name in expert if name not in base]
        if lacking or more:
            said = [f"lacks {_few(lacking)}"] * bool(lacking) + [f"has {_few(more)} besides"] * bool(more)
            raise ParameterError(
                f"all models must have the same tensors; expert {index} {' and '.join(said)}. "
                "Merge models of one architecture, with names in one scheme."
            )
        differing = [
            f"{name!r} ({tuple(base[name].shape)} and {tuple(expert[name].shape)})"
            for name in base
            if base[name].shape != expert[name].shape
        ]
        if differing:
            raise ShapeError(
                f"all models must have tensors of the same shapes; expert {index} differs from the base in "
                f"{_few(differing, quote=False)}. Merge models of one architecture."
            )


def _state(model: Model) -> dict[str, Tensor]:
    if isinstance(model, nn.Module):
        return model.state_dict()
    if isinstance(model, Mapping) and all(isinstance(value, Tensor) for value in model.values()):
        return dict(model)
    raise OptionError(f"models must be modules or state dicts; got {type(model).__name__}.")


def _few(names: Sequence[str], *, quote: bool = True) -> str:
    shown = [repr(name) if quote else name for name in names[:4]]
    return ", ".join(shown) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
