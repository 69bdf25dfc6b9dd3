"""One optimizer for a whole model: matrices to the orthogonal one, everything else to AdamW."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from orthokit.errors import OptionError, ParameterError, unknown_name
from orthokit.matrices import MatrixTable, matrices
from orthokit.optim.base import MatrixOptimizer
from orthokit.optim.muon import Muon
from orthokit.optim.pion import Pion

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["OPTIMIZERS", "RoutedOptimizer", "for_model"]

OPTIMIZERS: dict[str, type[MatrixOptimizer]] = {"muon": Muon, "pion": Pion}


class RoutedOptimizer(torch.optim.Optimizer):
    """Two optimizers behind one: one ``step``, one state dict, one learning-rate scheduler. Made by :func:`for_model`.

    Args:
        matrix: The optimizer of the matrices.
        fallback: The optimizer of the rest, or ``None`` when nothing is left.
        table: What each parameter is.
        names: Parameter names, for messages.
    """

    def __init__(
        self,
        matrix: MatrixOptimizer,
        fallback: torch.optim.AdamW | None,
        *,
        table: MatrixTable,
        names: dict[Tensor, str],
    ) -> None:
        self.parts: list[torch.optim.Optimizer] = [matrix] if fallback is None else [matrix, fallback]
        self.table = table
        self._names = names
        groups = [group for part in self.parts for group in part.param_groups]
        super().__init__(groups, dict(matrix.defaults))
        self._link()

    def _link(self) -> None:
        """Let the parts work on this optimizer's own groups and state, so that there is one copy of everything."""
        start = 0
        for part in self.parts:
            count = len(part.param_groups)
            part.param_groups = self.param_groups[start : start + count]
            part.state = self.state
            start += count

    def __getstate__(self) -> dict[str, Any]:
        own = {"parts": self.parts, "table": self.table, "_names": self._names}
        return {**super().__getstate__(), **own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._link()

    @property
    def matrix(self) -> MatrixOptimizer:
        """The optimizer of the matrices."""
        return cast("MatrixOptimizer", self.parts[0])

    def state_dict(self) -> dict[str, Any]:
        """The options and the state of both parts; see ``MatrixOptimizer.state_dict``."""
        return self.matrix.gathered(super().state_dict(), self.param_groups)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what ``state_dict()`` gave; the next step is the one that would have followed."""
        super().load_state_dict(state_dict)
        self._link()
        self.matrix.adopt(self, state_dict)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Only for the construction: new parameters need a new routing.

        Raises:
            ParameterError: Called after the optimizer was made.
        """
        if len(self.param_groups) >= sum(len(part.param_groups) for part in self.parts):
            raise ParameterError("a routed optimizer takes no further groups; call optim.for_model again instead.")
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all parameters; see the two parts.

        Args:
            closure: Recomputes and returns the loss; called once.

        Returns:
            What the closure returned, else ``None``.

        Raises:
            NonFiniteError: A gradient holds NaN or infinity, in either part; nothing was changed.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.matrix.check([(self._names[p], p) for group in self.param_groups for p in group["params"]])
        for part in self.parts:
            # The matrices' gradients are checked already.
            part.update() if isinstance(part, MatrixOptimizer) else part.step()
        return loss

    @property
    def routing(self) -> pd.DataFrame:
        """One row per matrix block or other parameter: who updates it, how it is read and why."""
        frame = self.table.to_frame()
        owner = {
            self._names[p]: type(part).__name__
            for part in self.parts
            for group in part.param_groups
            for p in group["params"]
        }
        frame.insert(2, "optimizer", [owner.get(name, "none") for name in frame["parameter"]])
        return frame

    def report(self, **options: Any) -> pd.DataFrame:
        """What the last step did to each matrix, as the optimizers of the parts report it.

        Call it after ``step`` and before ``zero_grad``. AdamW has no report, so its parameters have no rows.

        Args:
            **options: Of the report of the matrices' optimizer, such as ``time`` of ``Muon.report``.

        Returns:
            A pandas frame, one row per block: ``matrix``, ``optimizer``, and the columns of ``Muon.report`` or
            ``Pion.report``.

        Raises:
            ParameterError: No matrix holds a gradient, or no part has a report.

        Example:
            >>> model = nn.Linear(4, 3)
            >>> optimizer = for_model(model, lr=0.1)
            >>> model(torch.ones(4)).sum().backward()
            >>> _ = optimizer.step()
            >>> optimizer.report(time=False)[["matrix", "optimizer"]].values.tolist()
            [['weight', 'Muon']]
        """
        import pandas as pd

        frames = []
        for part in self.parts:
            make: Any = getattr(part, "report", None)
            if callable(make):
                frame: Any = make(**options)
                frame.insert(1, "optimizer", type(part).__name__)
                frames.append(frame)
        if not frames:
            names = " and ".join(type(part).__name__ for part in self.parts)
            raise ParameterError(f"{names} make no report; only an optimizer with a report() can be asked for one.")
        return pd.concat(frames, ignore_index=True)


def for_model(
    model: nn.Module,
    name_or_class: str | type[MatrixOptimizer] = "muon",
    *,
    lr: float,
    fallback_lr: float | None = None,
    fallback_betas: tuple[float, float] = (0.9, 0.95),
    fallback_weight_decay: float = 0.0,
    split_heads: Any = None,
    split_fused: Any = None,
    exclude: Any = None,
    **options: Any,
) -> RoutedOptimizer:
    r"""One optimizer for all of ``model``: its hidden matrices to Muon or Pion, embeddings, heads, norms and biases to
    AdamW.

    Args:
        model: Any module; only parameters that require gradients are given to an optimizer.
        name_or_class: ``"muon"``, ``"pion"`` or a class.
        lr: Learning rate of the matrices, ``>= 0``.
        fallback_lr: Learning rate of AdamW; default ``lr``. That fits because the matrices' updates have the size
            AdamW's have: Muon defaults to ``adjust_lr_fn="match_rms_adamw"`` here, Pion's ``rms`` is the same 0.2.
        fallback_betas: AdamW's averaging; default (0.9, 0.95).
        fallback_weight_decay: AdamW's decay, ``>= 0``; default 0: it holds norms, biases and embeddings.
        split_heads: See :func:`orthokit.matrices.matrices`; default none.
        split_fused: See :func:`orthokit.matrices.matrices`; default none.
        exclude: Patterns or a callable; such matrices go to AdamW.
        **options: Options of the matrix optimizer.

    Returns:
        The optimizer; ``.routing`` is the table of who updates what.

    Raises:
        UnknownNameError: No optimizer of that name.
        ParameterError: The model has no trainable matrix.
        OptionError: An option out of range.

    Example:
        >>> model = nn.Sequential(nn.Embedding(16, 8), nn.Linear(8, 8), nn.LayerNorm(8))
        >>> optimizer = for_model(model, "muon", lr=1e-3)
        >>> optimizer.routing[["name", "optimizer"]].values.tolist()
        [['0.weight', 'AdamW'], ['1.weight', 'Muon'], ['1.bias', 'AdamW'], ['2.weight', 'AdamW'], ['2.bias', 'AdamW']]
    """
    if isinstance(name_or_class, str) and name_or_class not in OPTIMIZERS:
        raise unknown_name("optimizer", name_or_class, OPTIMIZERS)
    # Any: each optimizer takes lr and options of its own, which the base does not name.
    kind: Any = OPTIMIZERS[name_or_class] if isinstance(name_or_class, str) else name_or_class
    if fallback_lr is not None and not fallback_lr >= 0:
        raise OptionError(f"fallback_lr must be at least 0; got {fallback_lr}.")
    table = matrices(model, split_heads=split_heads, split_fused=split_fused, exclude=exclude)
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    blocks = {named[name]: table.blocks(name) for name in table.parameters() if name in named}
    if not blocks:
        raise ParameterError(
            f"{type(model).__name__} has no trainable matrix for {kind.__name__}; use torch.optim.AdamW."
        )
    if "adjust_lr_fn" in inspect.signature(kind).parameters:
        options.setdefault("adjust_lr_fn", "match_rms_adamw")
    matrix = kind([(name, p) for name, p in named.items() if p in blocks], lr=lr, blocks=blocks, **options)
    rest = [(name, p) for name, p in named.items() if p not in blocks]
    fallback = None
    if rest:
        rate = lr if fallback_lr is None else fallback_lr
        fallback = torch.optim.AdamW(rest, lr=rate, betas=fallback_betas, weight_decay=fallback_weight_decay)
    return RoutedOptimizer(matrix, fallback, table=table, names={p: name for name, p in named.items()})
