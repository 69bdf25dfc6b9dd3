"""The loss on the plane through three models, and where paths of training or merging run in it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor, nn

from orthokit.errors import NonFiniteError, OptionError, ShapeError, unknown_name
from orthokit.merging._common import check_range

__all__ = ["LossPlane", "loss_plane"]

State = Mapping[str, Tensor]


@dataclass(frozen=True, eq=False)
class LossPlane:
    """A loss on a grid in weight space; coordinates are distances (Frobenius) from the first model.

    Args:
        x: Grid along the way to the second model, shape ``(k,)``.
        y: Grid across it, towards the third model, shape ``(k,)``.
        losses: Shape ``(k, k)``, one row a ``y``.
        points: Model to its place ``(x, y)``; the first is at ``(0, 0)``.
        paths: Path to its places, shape ``(n, 2)``: orthogonal projections on the plane.
        off: Path to the distance from the plane at each place, shape ``(n,)``.
    """

    x: Float[Tensor, " k"]
    y: Float[Tensor, " k"]
    losses: Float[Tensor, "k k"]
    points: dict[str, tuple[float, float]]
    paths: dict[str, Tensor] = field(default_factory=dict)
    off: dict[str, Tensor] = field(default_factory=dict)


def loss_plane(
    model: nn.Module,
    points: Mapping[str, State],
    loss: Callable[[nn.Module], float],
    *,
    grid: int = 15,
    margin: float = 0.2,
    paths: Mapping[str, Sequence[State]] | None = None,
    progress: Callable[[int, dict[str, float]], object] | None = None,
) -> LossPlane:
    r"""A loss on the plane through three models: the base and two experts, say.

    .. math:: L(\theta_0 + x u + y v),\quad u \parallel \theta_1 - \theta_0,\; v \perp u,\;
              v \in \mathrm{span}(\theta_1 - \theta_0, \theta_2 - \theta_0)

    Args:
        model: Gives architecture and whatever the points do not hold. A copy is evaluated; nothing is changed.
        points: Three names with state dicts, the first the origin. All hold the same tensors, some of the model's.
        loss: From a model to a number, such as the sum of losses over tasks. It is called ``grid ** 2`` times.
        grid: Points along each axis, ``>= 2``; default 15.
        margin: Room around all points and paths, as a share of their extent, ``>= 0``; default 0.2.
        paths: Name to state dicts along a path, such as task arithmetic with growing ``lambda``.
        progress: Called as ``progress(done, {"loss": ..., "of": ...})`` after each evaluation.

    Returns:
        :class:`LossPlane`.

    Raises:
        OptionError: Not three points, points on one line, or options out of range.
        UnknownNameError: A tensor that the model does not have.
        ShapeError: Points that hold different tensors.
        NonFiniteError: A NaN or an infinity in a point.

    Example:
        >>> model, zero = torch.nn.Linear(2, 1, bias=False), torch.zeros(1, 2)
        >>> ends = {"base": zero, "a": torch.tensor([[1.0, 0.0]]), "b": torch.tensor([[1.0, 2.0]])}
        >>> plane = loss_plane(model, {k: {"weight": w} for k, w in ends.items()}, lambda m: float(m.weight.sum()))
        >>> plane.points["b"]
        (1.0, 2.0)

    Numerics:
        Coordinates in float64; models in their own dtype.

    References:
        T. Garipov et al. (2018), Loss surfaces, mode connectivity, and fast ensembling, arXiv 1802.10026, for the plane
        through three models.
    """
    if len(points) != 3:
        raise OptionError(f"a plane goes through three points; got {len(points)}: {list(points)}.")
    check_range("grid", grid, least=2)
    check_range("margin", margin, least=0)
    twin = copy.deepcopy(model)
    own = twin.state_dict()
    origin = next(iter(points.values()))
    names = [name for name, t in origin.items() if t.is_floating_point()]
    for name in names:
        if name not in own:
            raise unknown_name("tensor", name, own)
    flat = {label: _flat(label, state, origin, names) for label, state in points.items()}
    start, first, second = flat.values()
    u = _unit(first - start, "the first two points are equal")
    across = second - start
    v = _unit(across - (across @ u) * u, "the three points lie on one line", beside=float(across.norm()))

    def place(vector: Tensor) -> tuple[Tensor, Tensor]:
        away = vector - start
        at = torch.stack([away @ u, away @ v])
        return at, (away - at[0] * u - at[1] * v).norm()

    found, off = {}, {}
    for label, states in (paths or {}).items():
        if not states:
            raise ShapeError(f"path {label!r} is empty; give at least one state dict.")
        at, distance = zip(*(place(_flat(label, state, origin, names)) for state in states), strict=True)
        found[label], off[label] = torch.stack(at), torch.stack(distance)
    corners = {label: place(vector)[0] for label, vector in flat.items()}
    every = torch.cat([torch.stack(list(corners.values())), *found.values()])
    low, high = every.amin(0), every.amax(0)
    room = margin * (high - low)
    ends = torch.stack([low - room, high + room]).mT.tolist()
    x, y = (torch.linspace(a, b, grid, dtype=torch.float64) for a, b in ends)
    losses = torch.empty(grid, grid, dtype=torch.float64)
    for row in range(grid):
        for column in range(grid):
            _load(twin, start + x[column] * u + y[row] * v, origin, names)
            with torch.no_grad():
                losses[row, column] = float(loss(twin))
            if progress is not None:
                done = row * grid + column
                progress(done, {"loss": float(losses[row, column]), "of": float(grid * grid)})
    spots = {label: (float(at[0]), float(at[1])) for label, at in corners.items()}
    return LossPlane(x, y, losses, spots, found, off)


def _flat(label: str, state: State, origin: State, names: Sequence[str]) -> Tensor:
    for name in names:
        if name not in state or state[name].shape != origin[name].shape:
            raise ShapeError(
                f"{label!r} must hold {name} with shape {tuple(origin[name].shape)}, as the first point does."
            )
    found = torch.cat([state[name].detach().cpu().double().flatten() for name in names])
    if not bool(torch.isfinite(found).all()):
        raise NonFiniteError(f"{label!r} holds a NaN or an infinity; leave it out.")
    return found


def _unit(vector: Tensor, problem: str, *, beside: float | None = None) -> Tensor:
    size = float(vector.norm())
    # Subtracting what is along u leaves rounding of the whole length.
    if size <= (0.0 if beside is None else 1e-9 * beside):
        raise OptionError(f"{problem}, which spans no plane; choose other models.")
    return vector / size


@torch.no_grad()
def _load(model: nn.Module, vector: Tensor, origin: State, names: Sequence[str]) -> None:
    state = model.state_dict()
    parts = vector.split([origin[name].numel() for name in names])
    for name, part in zip(names, parts, strict=True):
        state[name].copy_(part.view(origin[name].shape))
