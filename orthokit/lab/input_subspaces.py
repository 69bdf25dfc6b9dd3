r"""The directions in which the layers of a model have had inputs: what a new task must leave alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from orthokit.diagnostics._modes import evaluating
from orthokit.errors import NonFiniteError, OptionError, ParameterError
from orthokit.lab.example_gradients import task_scores
from orthokit.lab.tasks import Task

__all__ = ["InputSubspaces"]

# Rows of layer inputs that enter a basis; a convolution has one for every pixel of every image.
_ROWS = 4096


class InputSubspaces:
    r"""The directions in which each layer has had inputs: a change of its weight orthogonal to them is not noticed.

    For a layer :math:`y = W x + b` with the orthonormal basis ``M`` of its inputs ``(x, 1)``

    .. math:: (\Delta W, \Delta b) \leftarrow (\Delta W, \Delta b)\,(I - M M^\top)

    leaves :math:`y` as it was for every input in the span. A convolution is a linear layer on patches.

    Args:
        free: Patterns of names of parameters that move freely, such as ``("head.*",)`` for a head with rows of its own
            for every task. Default none.

    Example:
        >>> from orthokit.lab import SmallCNN, image_classification
        >>> model, task = SmallCNN(width=2), image_classification("digits", batch=16)
        >>> space = InputSubspaces().extend(model, task, samples=16, energy=0.9)
        >>> step = {"hidden.weight": torch.ones(64, 64), "hidden.bias": torch.ones(64)}
        >>> space.project(step)
        >>> step["hidden.weight"].norm() < 64
        tensor(True)

    Numerics:
        Bases are found in float64 from the ``in x in`` second moments of what the present basis misses. Trainable
        parameters of other layers (embeddings, normalisations) cannot be protected this way: they stand still, unless
        they are ``free``.

    References:
        G. Saha, I. Garg, K. Roy (2021), Gradient projection memory for continual learning, arXiv 2103.09762. We treat a
        bias as one more input, which is always 1; the published code has no biases.
    """

    def __init__(self, *, free: Sequence[str] = ()) -> None:
        self.free = tuple(free)
        #: Name of a layer to its basis, shape ``(inputs, directions)``; a bias is the last input.
        self.bases: dict[str, Tensor] = {}
        self._places: dict[str, tuple[str, int]] = {}

    def extend(
        self, model: nn.Module, task: Task, *, samples: int = 256, energy: float = 0.97, first: int = 10**6
    ) -> InputSubspaces:
        """Add the inputs that a task gives to each layer.

        Args:
            model: After the task was learned; not changed.
            task: Source of examples.
            samples: How many, ``>= 1``; default 256.
            energy: Share of the squared length of the inputs that the basis holds afterwards, in (0, 1]; default 0.97.
            first: Step of the first batch; default far behind any training run.

        Returns:
            Itself.

        Raises:
            OptionError: A number out of range.
            ParameterError: No linear layer or convolution is trainable, or a convolution has groups or a padding that
                is not by zeros.
            NonFiniteError: An input is not finite.
        """
        if samples < 1 or not 0 < energy <= 1:
            raise OptionError(f"need samples >= 1 and 0 < energy <= 1; got {samples} and {energy}.")
        layers = self._layers(model)
        seen = layer_inputs(model, task, layers, samples=samples, first=first)
        for name, X in seen.items():
            self.bases[name] = _extended(self.bases.get(name), X, energy, name)
        return self

    def _layers(self, model: nn.Module) -> dict[str, nn.Linear | nn.Conv2d]:
        found: dict[str, nn.Linear | nn.Conv2d] = {}
        for name, layer in model.named_modules():
            if not isinstance(layer, (nn.Linear, nn.Conv2d)) or not layer.weight.requires_grad:
                continue
            if self._is_free(f"{name}.weight"):
                continue
            if isinstance(layer, nn.Conv2d) and (layer.groups != 1 or layer.padding_mode != "zeros"):
                raise ParameterError(f"convolution {name!r} has groups or a padding that is not by zeros; set it free.")
            found[name] = layer
        if not found:
            raise ParameterError("no linear layer or convolution with a trainable weight is left to be protected.")
        return found

    def _is_free(self, name: str) -> bool:
        return any(fnmatchcase(name, pattern) for pattern in self.free)

    @torch.no_grad()
    def project(self, parts: dict[str, Tensor]) -> None:
        """Take the directions out of a change of the parameters, in place.

        Args:
            parts: Name of a parameter to its change (or gradient). Before the first :meth:`extend` nothing happens.
        """
        if not self.bases:
            return
        weights = {f"{name}.weight": name for name in self.bases}
        biases = {f"{name}.bias" for name in self.bases}
        for parameter, change in parts.items():
            if self._is_free(parameter) or (parameter in biases and f"{parameter[:-4]}weight" in parts):
                continue
            if parameter not in weights:
                change.zero_()
                continue
            name = weights[parameter]
            M = self.bases[name].to(change)
            bias = parts.get(f"{name}.bias")
            D = change.flatten(1)
            D = D if bias is None else torch.cat([D, bias[:, None]], 1)
            # A frozen bias does not move: only the inputs proper have to be avoided, which the first rows span.
            M = M if M.shape[0] == D.shape[1] else torch.linalg.qr(M[: D.shape[1]])[0]
            D = D - (D @ M) @ M.mT
            change.copy_(D[:, : change[0].numel()].reshape(change.shape))
            if bias is not None:
                bias.copy_(D[:, -1])

    def describe(self) -> dict[str, Any]:
        """Sizes of the bases: for the record of a run."""
        return {"projection": "input subspaces", "directions": {n: b.shape[1] for n, b in self.bases.items()}}


@torch.no_grad()
def layer_inputs(
    model: nn.Module, task: Task, layers: Mapping[str, nn.Linear | nn.Conv2d], *, samples: int, first: int = 10**6
) -> dict[str, Tensor]:
    """What comes into each layer, as rows; a layer with a bias has one input more, which is 1."""
    kept: dict[str, list[Tensor]] = {name: [] for name in layers}
    batch = task.batch(first)[0]
    per_batch = max(1, _ROWS // max(1, -(-samples // len(batch))))

    def keep(name: str) -> Any:
        def hook(layer: nn.Module, args: tuple[Any, ...]) -> None:
            kept[name].append(_thinned(_as_rows(layers[name], args[0].detach()), per_batch))

        return hook

    handles = [layer.register_forward_pre_hook(keep(name)) for name, layer in layers.items()]
    try:
        with evaluating(model):
            left, step = samples, first
            while left > 0:
                inputs = task.batch(step)[0][:left]
                task_scores(task, model, inputs)
                left, step = left - len(inputs), step + 1
    finally:
        for handle in handles:
            handle.remove()
    return {name: torch.cat(rows) for name, rows in kept.items() if rows}


def _as_rows(layer: nn.Linear | nn.Conv2d, x: Tensor) -> Tensor:
    if isinstance(layer, nn.Conv2d):
        if isinstance(layer.padding, str):
            raise ParameterError(f"a convolution with padding={layer.padding!r} is not supported; give it as numbers.")
        patches = F.unfold(
            x,
            layer.kernel_size,
            dilation=layer.dilation,
            padding=layer.padding,
            stride=layer.stride,  # type: ignore[arg-type]
        )
        rows = patches.mT.reshape(-1, patches.shape[1])
    else:
        rows = x.reshape(-1, x.shape[-1])
    return rows if layer.bias is None else torch.cat([rows, rows.new_ones(len(rows), 1)], 1)


def _thinned(rows: Tensor, most: int) -> Tensor:
    """Evenly spaced rows, so that no generator is touched."""
    if len(rows) <= most:
        return rows
    return rows[torch.linspace(0, len(rows) - 1, most, device=rows.device).long()]


def _extended(basis: Tensor | None, X: Tensor, energy: float, name: str) -> Tensor:
    """The basis with as many directions of what it misses of ``X`` as hold the wanted share of the squared length."""
    if not bool(X.isfinite().all()):
        raise NonFiniteError(f"inputs of layer {name!r} must be finite; has the model diverged?")
    X = X.double()
    old = X.new_zeros(X.shape[1], 0) if basis is None else basis.to(X)
    missed = X - (X @ old) @ old.mT
    whole = float(X.square().sum())
    values, vectors = torch.linalg.eigh(missed.mT @ missed)
    values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)
    held = whole - float(missed.square().sum())
    shares = (held + torch.cat([values.new_zeros(1), values.cumsum(0)])) / max(whole, torch.finfo(X.dtype).tiny)
    # Rounding must not make a full share unreachable.
    enough = (shares >= energy - 1e-9).nonzero()
    count = int(enough[0]) if len(enough) else int((values > 0).sum())
    count = min(count, int((values > 1e-12 * max(whole, 1e-300)).sum()))
    new = vectors[:, :count]
    new = new - old @ (old.mT @ new)
    return torch.cat([old, torch.linalg.qr(new)[0] if count else new], 1)
