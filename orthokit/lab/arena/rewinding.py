"""Back from a fine-tuned model to the pretrained one, along several paths."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from orthokit.adapters._rotating import Rotating
from orthokit.adapters.layer import AdaptedLayer
from orthokit.adapters.paths import rewind, safe_scales
from orthokit.errors import OptionError, unknown_name
from orthokit.lab.arena.grounds import figures_at_start, judged, pretrained_model
from orthokit.lab.arena.weights import effective_bias, head_of, weights_after, weights_before

__all__ = ["ALPHAS", "PATHS", "SCALES", "paths_of", "rewound"]

ALPHAS = tuple(k / 10 for k in range(11))
"""Places on a path: 0 is the pretrained model, 1 the fine-tuned one."""
PATHS = ("cayley_sqrt", "cayley_linear", "dense")
"""Paths from the one to the other."""
SCALES = ("safe", "min", "uniform")
"""Single points: rotations scaled layer by layer to a common strength, or all by the same."""
UNIFORM = 0.4

_Rewound = dict[str, float | str]


def paths_of(model: nn.Module) -> tuple[str, ...]:
    """The paths and single points that a fine-tuned model has: rotations have all, everything else the dense path.

    Example:
        >>> from orthokit.adapters import OFT, LoRA, attach
        >>> paths_of(attach(nn.Sequential(nn.Linear(4, 4)), LoRA(rank=2)))
        ('dense',)
        >>> "cayley_sqrt" in paths_of(attach(nn.Sequential(nn.Linear(4, 4)), OFT(2)))
        True
    """
    parts = [part for layer in model.modules() if isinstance(layer, AdaptedLayer) for part in layer.adapters.values()]
    turning = bool(parts) and all(isinstance(part, Rotating) for part in parts)
    return (*PATHS, *SCALES) if turning else ("dense",)


def rewound(
    ground: str,
    model: nn.Module,
    *,
    alphas: Sequence[float] = ALPHAS,
    paths: Sequence[str] | None = None,
    small: bool = False,
) -> list[dict[str, float | str]]:
    r"""What a fine-tuned model scores on its way back to the pretrained one.

    With a rotation ``R = f(Q)`` of a layer, ``"cayley_sqrt"`` is :math:`W_0 f(\sqrt\alpha Q)`, ``"cayley_linear"``
    :math:`W_0 f(\alpha Q)`; ``"dense"`` is :math:`W_0 + \alpha (W - W_0)`, the own path of methods that add.
    A head that was trained along goes straight back on all of them, so ``alpha = 0`` is the pretrained model.

    Args:
        ground: Where it was fine-tuned.
        model: The model; as it was afterwards.
        alphas: Places, in [0, 1]; default 0, 0.1, ..., 1.
        paths: Some of :data:`PATHS`, and of the single points :data:`SCALES`: ``"safe"``, ``"min"`` (see
            :func:`orthokit.adapters.safe_scales`; ``alpha`` is the mean scale, the head stays) and ``"uniform"``
            (all generators times 0.4). Default all that the model has.
        small: As it was entered.

    Returns:
        Rows ``path, alpha, target, general``, both losses.

    Raises:
        UnknownNameError: No such ground or path.
        OptionError: ``alpha`` out of range, or a path of rotations for a model that is not turned.
        ParameterError, ShapeError: The model is not one of that ground's.

    Example:
        >>> from orthokit.lab.arena import enter
        >>> racer = enter("tinygpt", "oft", lr=1e-2, seed=0, steps=2, small=True)
        >>> _ = racer.advance(), racer.advance()
        >>> rows = rewound("tinygpt", racer.model, alphas=[0.0, 1.0], paths=["cayley_sqrt", "dense"], small=True)
        >>> rows[0]["target"] == rows[2]["target"], abs(rows[1]["target"] - rows[3]["target"]) < 1e-5
        (True, True)

    References:
        Z. Huang et al., PEFT-Arena, arXiv 2605.28819, path-wise rewinding, SafeScale and MinScale.
    """
    return walked(ground, model, alphas=alphas, paths=paths, small=small, known={})


def walked(
    ground: str,
    model: nn.Module,
    *,
    alphas: Sequence[float],
    paths: Sequence[str] | None,
    small: bool,
    known: Mapping[float, Mapping[str, float]],
) -> list[dict[str, float | str]]:
    """:func:`rewound` by someone who knows what the model scores at some places that all paths share, such as 1."""
    there = paths_of(model)
    chosen = there if paths is None else tuple(paths)
    for path in chosen:
        if path not in (*PATHS, *SCALES):
            raise unknown_name("path", path, (*PATHS, *SCALES))
        if path not in there:
            raise OptionError(f"path {path!r} is one of rotations, and this model is not turned; take 'dense'.")
    for alpha in alphas:
        if not 0 <= alpha <= 1:
            raise OptionError(f"alpha must be in [0, 1]; got {alpha}.")
    weights_after(ground, model, small=small)  # refuses another model before anything is evaluated
    shared: dict[float, Mapping[str, float]] = {0.0: figures_at_start(ground, small), **known}
    rows: list[_Rewound] = []
    for path in chosen:
        if path in SCALES:
            rows += _single(ground, model, path, small)
        else:
            with _on_path(ground, model, path, small) as go:
                for alpha in alphas:
                    # Both ends are the same on every path.
                    found = shared[alpha] if alpha in shared else judged(ground, go(alpha), small)
                    if alpha == 1:
                        shared[1.0] = found
                    rows.append({"path": path, "alpha": float(alpha), **_two(found)})
    return rows


def _two(found: Mapping[str, float]) -> dict[str, float]:
    return {key: found[key] for key in ("target", "general")}


def _single(ground: str, model: nn.Module, rule: str, small: bool) -> list[_Rewound]:
    try:
        scales = safe_scales(model, rule=rule) if rule != "uniform" else UNIFORM
        rewind(model, scales, path="cayley_linear")
    except OptionError:
        return []  # reflections that hold a half turn have no generator
    try:
        alpha = sum(scales.values()) / len(scales) if isinstance(scales, dict) else scales
        return [{"path": rule, "alpha": alpha, **_two(judged(ground, model, small))}]
    finally:
        rewind(model, 1.0)


@contextmanager
def _on_path(ground: str, model: nn.Module, path: str, small: bool) -> Iterator[Callable[[float], nn.Module]]:
    """A function that gives the model at a place; the model is as before when the block ends."""
    start = {name: p.detach().clone() for name, p in head_of(ground, pretrained_model(ground, small)).items()}
    end = {name: p.detach().clone() for name, p in head_of(ground, model).items()}
    if path == "dense":
        yield _dense(ground, model, small, start, end)
        return

    def go(alpha: float) -> nn.Module:
        _mix_head(ground, model, start, end, alpha)
        return rewind(model, alpha, path=path)

    try:
        yield go
    finally:
        _mix_head(ground, model, start, end, 1.0)
        rewind(model, 1.0)


@torch.no_grad()
def _mix_head(
    ground: str, model: nn.Module, start: Mapping[str, Tensor], end: Mapping[str, Tensor], alpha: float
) -> None:
    for name, p in head_of(ground, model).items():
        p.copy_(end[name] if alpha == 1 else torch.lerp(start[name], end[name], alpha))


def _dense(
    ground: str, model: nn.Module, small: bool, start: Mapping[str, Tensor], end: Mapping[str, Tensor]
) -> Callable[[float], nn.Module]:
    """Straight lines between the weights, in a plain copy: the same for every kind of method."""
    twin = pretrained_model(ground, small).eval()
    before, after = weights_before(ground, small), weights_after(ground, model, small=small)
    layers = {name: twin.get_submodule(name) for name in before}
    biases = {
        name: (effective_bias(layer), effective_bias(model.get_submodule(name))) for name, layer in layers.items()
    }

    @torch.no_grad()
    def go(alpha: float) -> nn.Module:
        for name, layer in layers.items():
            layer.weight.copy_(torch.lerp(before[name], after[name], alpha))  # type: ignore[operator,union-attr]
            first, last = biases[name]
            if first is not None and last is not None:
                layer.bias.copy_(torch.lerp(first, last, alpha))  # type: ignore[operator,union-attr]
        _mix_head(ground, twin, start, end, alpha)
        return twin

    return go
