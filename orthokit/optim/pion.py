"""Pion: rotate each weight matrix from both sides, so that its singular values stay what they were."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from orthokit.errors import OptionError, ParameterError, unknown_name
from orthokit.linalg._workspace import Workspace
from orthokit.matrices import MatrixBlock
from orthokit.optim._pieces import Piece, chunks
from orthokit.optim._pion_maps import check_map
from orthokit.optim._pion_report import pion_report
from orthokit.optim._pion_state import (
    fine_weight,
    new_state,
    product_dtype,
    split_weight,
    state_of_block,
    wide_dtype,
)
from orthokit.optim._pion_step import Chunk, takes_parts
from orthokit.optim.base import MatrixOptimizer, check_rate

__all__ = ["Pion"]

SIDES = ("both", "alternate", "in", "out")
MOMENTA = ("lie", "ambient", "transported")
VARIANTS = ("adaptive", "sign")
# Powers of the generators leave the range of float16.
PRODUCTS = (None, torch.bfloat16, torch.float32, torch.float64)

# Entries of the generators that go through a step at once on a CPU.
_ROOM = 1 << 20


class Pion(MatrixOptimizer):
    r"""Steps along rotations: ``W <- E_out W E_in`` with orthogonal factors, so the spectrum of ``W`` is kept.

    With gradient ``G``, per matrix and step:

    - generators ``G_in = W^T G - G^T W`` and ``G_out = G W^T - W G^T``, both skew;
    - moments ``m <- b1 m + (1 - b1) G_s`` and ``v <- b2 v + (1 - b2) G_s * G_s`` of each, without bias correction;
    - ``A_s = -m / (sqrt(v) + eps)``, still skew, and ``s = lr rms sqrt(out in) / ||A_out W + W A_in||_F``, which gives
      the change a root mean square of ``lr rms`` whatever the shape;
    - ``W <- E(s A_out) W E(s A_in)`` with ``E`` the exponential to second order, or another ``map``.

    What a rotation cannot do, it does not do: the part of the gradient that would change singular values is left
    unused, so the size and shape of the initial spectrum stay a choice for good. :meth:`report` shows that part.

    Args:
        params: Tensors, named tensors or groups, as in every torch optimizer; real. Two dimensions are a matrix, three
            a batch of matrices, four or five a convolution, flattened to ``(out, in * kernel)``.
        lr: Learning rate, ``>= 0``; default 1e-3. A one-element tensor is read at every step.
        betas: ``(b1, b2)``, each in ``[0, 1)``; default (0.9, 0.95).
        rms: Root mean square of the change in units of ``lr``, ``> 0``; default 0.2, where AdamW's learning rates fit.
            ``None``: ``s = lr``, with Adam's bias corrections, which the scale makes needless otherwise.
        exp_order: Order of ``map``: ``p`` of ``"exp_taylor"``, ``k`` of ``"cayley_neumann"``, ``>= 1``; default 2.
        map: ``"exp_taylor"`` (default, as published), ``"cayley_neumann"`` (one product more at order 2, and
            an error of ``theta^6 / 128`` instead of ``theta^4 / 8`` for planes turned by ``theta``), or ``"cayley"``,
            exact by one solve in the dtype of the weights.
        polish: Newton-Schulz steps on each factor, 0 (default), 1 or 2; each triples the products.
        sides: ``"both"`` (default), ``"alternate"`` (in-side at odd steps, out-side at even ones; both keep moments),
            ``"in"`` or ``"out"``.
        momentum: What is averaged. ``"lie"`` (default): the generators, which all live at the identity. ``"ambient"``:
            the gradients; the generators, and ``v``, are those of the average. ``"transported"``: the same, and the
            average is turned along with the weights.
        second_moment: Divide by ``sqrt(v)``; default ``True``. ``False``: ``A = -m``, at half the state.
        variant: ``"adaptive"`` (default) or ``"sign"``: ``A = -msign(m)`` by Newton-Schulz, which turns all planes by
            one angle, ``lr`` if ``rms`` is ``None``. It divides by no moment: give ``second_moment=False``.
        eps: Added to ``sqrt(v)``, ``> 0``; default 1e-8.
        floor: Share of the usual strength below which a step is no longer scaled up to full size, ``>= 0``; default
            0.1. The strength is the root mean square of ``A`` (of ``m`` over that of ``G_s`` without second moment);
            usual is ``sqrt((1 - b1) / (1 + b1))``, that of pure noise. Below the floor the step shrinks in proportion:
            when gradients vanish, steps do.
        weight_decay: Decay, ``>= 0``; default 0. Shrinking changes the spectrum, so whatever you give here you give up
            of the one thing Pion promises; the published code ignores it.
        compensated: Keep the bits that bfloat16 or float16 parameters drop (2 bytes a weight for bfloat16); default
            ``True``. Without them rounding changes the spectrum more than the rotations.
        dtype: Precision of the products; default the fastest measured here for float32 and below, float64 for float64.
            Only generators and changes are rounded to it, never the weights.
        restore_every: Every that many steps, give each matrix the singular values back that it had at the first one, by
            a singular value decomposition; default 0, never. The drift, whatever its cause, stays that of so many
            steps.
        track: Keep the first spectrum and the drift that each step's truncation causes, for :meth:`report`; default
            ``False``. Costs one singular value decomposition at the start and about one more application a step.
        blocks: The matrix blocks of each parameter, from ``matrices``; default read from the shape. ``optim.for_model``
            fills it in. Only the spectrum of the blocks is kept: splitting by head does not keep that of the whole.
        process_group: The processes that divide the work on replicated parameters (DDP): a group or ``"world"``;
            default ``None``, every process updates everything. DTensors (FSDP2) divide it along their mesh in any case.

    Raises:
        OptionError: An option is out of range, or two contradict each other.
        UnknownNameError: Unknown sides, momentum, map or variant.
        ParameterError: A parameter is complex or no matrix, or its gradient is sparse.
        NonFiniteError: At a step: a gradient holds NaN or infinity. Nothing was changed.

    Example:
        >>> W = torch.nn.Parameter(torch.randn(4, 8, generator=torch.Generator().manual_seed(0)))
        >>> before = torch.linalg.svdvals(W.detach())
        >>> optimizer = Pion([W], lr=0.1, dtype=torch.float32)
        >>> (W**2 @ torch.ones(8)).square().sum().backward()
        >>> _ = optimizer.step()
        >>> torch.allclose(torch.linalg.svdvals(W.detach()), before, rtol=1e-4)
        True

    Numerics:
        The state is ``out^2 + in^2`` numbers a matrix (half of that without second moment), half of the published
        size: skew matrices and their squares are stored folded. A generator that does not stand above the rounding of
        its products counts as zero. Per step and matrix, with ``b`` the larger and ``c`` the smaller of ``out`` and
        ``in``: about ``8 b^2 c + 10 b c^2`` FLOP of products at order 2. The longer side's generator has at most
        rank ``2 c``, and products with its factors would be cheap; but every step adds to the rank of its average, and
        dividing by ``sqrt(v)`` entry by entry fills it. So neither moment allows it.

    References:
        Pion: an orthogonal optimizer without reparameterisation (2026), arXiv 2605.12492. Folded state, the floor, the
        compensation, ``"cayley_neumann"`` and the report are ours. Ambient moments keep ``v`` of the averaged
        generator, as the published code does.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        *,
        rms: float | None = 0.2,
        exp_order: int = 2,
        map: str = "exp_taylor",
        polish: int = 0,
        sides: str = "both",
        momentum: str = "lie",
        second_moment: bool = True,
        variant: str = "adaptive",
        eps: float = 1e-8,
        floor: float = 0.1,
        weight_decay: float = 0.0,
        compensated: bool = True,
        dtype: torch.dtype | None = None,
        restore_every: int = 0,
        track: bool = False,
        blocks: Mapping[Any, list[MatrixBlock]] | None = None,
        process_group: Any = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "rms": rms,
            "exp_order": exp_order,
            "map": map,
            "polish": polish,
            "sides": sides,
            "momentum": momentum,
            "second_moment": second_moment,
            "variant": variant,
            "eps": eps,
            "floor": floor,
            "weight_decay": weight_decay,
            "compensated": compensated,
            "dtype": dtype,
            "restore_every": restore_every,
            "track": track,
        }
        self._workspace = Workspace()
        super().__init__(params, defaults, blocks=blocks, process_group=process_group)

    def _check_options(self, group: dict[str, Any]) -> None:
        check_rate(group, "weight_decay", "floor")
        if len(group["betas"]) != 2 or not all(0 <= beta < 1 for beta in group["betas"]):
            raise OptionError(f"betas must be two numbers in [0, 1); got {group['betas']}.")
        if not group["eps"] > 0:
            raise OptionError(f"eps must be above 0; got {group['eps']}.")
        if group["rms"] is not None and not group["rms"] > 0:
            raise OptionError(f"rms must be above 0, or None for a step without scale; got {group['rms']}.")
        if group["dtype"] not in PRODUCTS:
            raise OptionError(f"dtype must be bfloat16, float32, float64 or None; got {group['dtype']}.")
        if not group["restore_every"] >= 0:
            raise OptionError(f"restore_every must be at least 0; got {group['restore_every']}.")
        if group["restore_every"] and group["weight_decay"]:
            raise OptionError("restore_every would undo weight_decay; leave one of them at 0.")
        for name, choices in {"sides": SIDES, "momentum": MOMENTA, "variant": VARIANTS}.items():
            if group[name] not in choices:
                raise unknown_name(name, group[name], choices)
        check_map(group["map"], group["exp_order"], group["polish"])
        if group["variant"] == "sign" and group["second_moment"]:
            raise OptionError('variant="sign" divides by no moment; give second_moment=False with it.')

    def _join(self, group: dict[str, Any]) -> None:
        for p in group["params"]:
            if p.is_complex():
                raise ParameterError(
                    f"Pion turns real matrices, and {self._names[p]!r} is {p.dtype}. Give it to Muon, which takes both."
                )
        super()._join(group)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_workspace": self._workspace}

    def _cost(self, block: MatrixBlock, group: dict[str, Any]) -> float:
        c, b = sorted(block.shape[-2:])
        return block.count * (8.0 * b * b * c + 10.0 * b * c * c)

    def _update(self, group: dict[str, Any]) -> None:
        alike: dict[int, list[Piece]] = defaultdict(list)
        for p in group["params"]:
            if p.grad is None or not p.numel():
                continue
            if not self.state[p]:
                self.state[p].update(new_state(p, self._blocks[p], group))
            self.state[p]["step"] += 1
            alike[int(self.state[p]["step"])] += [Piece(p, block) for block in self._blocks[p]]
        self._share([members for pieces in alike.values() for members in step_chunks(pieces)], self._move, group)

    def _move(self, members: list[Piece], group: dict[str, Any]) -> None:
        """One step of matrices of one shape."""
        first, states = members[0].parameter, [self.state_of(piece, group) for piece in members]
        weights = [piece.of(piece.parameter) for piece in members]
        exact = first.dtype == wide_dtype(first)
        W = weights
        if not exact or not (len(members) == 1 or takes_parts(weights[0], group)):
            pairs = zip(weights, states, strict=True)
            fine = [fine_weight(weight, state.get("residual")) for weight, state in pairs]
            shape = (sum(len(weight) for weight in fine), *fine[0].shape[1:])
            W = [torch.cat(fine, out=self._workspace.get("weights", shape, fine[0].dtype, fine[0].device))]
        Chunk(
            W,
            [piece.of(piece.gradient) for piece in members],
            states,
            group,
            step=int(self.state[first]["step"]),
            dtype=product_dtype(first, group),
            workspace=self._workspace,
        ).rotate()
        parts = weights if W is weights else W[0].split([len(weight) for weight in weights])
        for piece, weight, state, part in zip(members, weights, states, parts, strict=True):
            if part is not weight:
                split_weight(part, weight, state.get("residual"))
            self._write_back(piece, weight, piece.parameter)
            for key, tensor in self._shaped(piece):
                self._write_back(piece, state[key], tensor)

    def _write_back(self, piece: Piece, value: Tensor, tensor: Tensor) -> None:
        # Strides that allow no view gave a copy; its values go back to where they were read.
        if value.untyped_storage().data_ptr() != tensor.untyped_storage().data_ptr():
            piece.block.write(tensor, value.view(piece.block.shape))

    def _shaped(self, piece: Piece) -> list[tuple[str, Tensor]]:
        """The entries of a parameter's state that have its shape."""
        state = self.state[piece.parameter]
        return [(key, state[key]) for key in ("momentum_buffer", "residual") if key in state]

    def state_of(self, piece: Piece, group: dict[str, Any]) -> dict[str, Tensor]:
        """The part of a parameter's state that belongs to one of its blocks."""
        p = piece.parameter
        parts = state_of_block(self.state[p], self._blocks[p], piece.block, group)
        return parts | {key: piece.of(tensor) for key, tensor in self._shaped(piece)}

    def report(self) -> Any:
        """What became of each matrix's spectrum and why, and what the gradient asks for that rotations cannot give.

        Call it after ``step`` and before ``zero_grad``. Singular values are decomposed, so it costs what they cost.

        Returns:
            A pandas frame, one row per block (the worst matrix of a batch), with ``matrix`` and ``shape``, and

            - ``angle_in``, ``angle_out``: the largest angle in radians by which the next step would turn a plane if its
              gradient were the same; 0 for a side whose turn it is not;
            - ``rms_ratio``: the root mean square of the change that step makes, over ``lr rms``;
            - ``tangential_in``, ``tangential_out``: ``||G_in||`` and ``||G_out||`` over ``||W||_2 ||G||``;
            - ``radial``: ``||diag(U^T G V)|| / ||G||``, the part of the gradient that would change singular values.

            With ``track=True`` also ``drift``, the largest change of a singular value since the first step over the
            largest of them, and ``norm_drift``, the logarithm of the Frobenius norm over the first one, which is the
            sum of ``truncation`` (added up from the exact law of the map), ``decay`` and ``rounding`` (the rest).

        Raises:
            ParameterError: No parameter holds a gradient and a state.

        Example:
            >>> W = torch.nn.Parameter(torch.eye(4))
            >>> optimizer = Pion([W], lr=0.01, track=True)
            >>> (W @ torch.arange(4.0)).sum().backward()
            >>> _ = optimizer.step()
            >>> bool(optimizer.report()["drift"].item() < 1e-4)
            True
        """
        return self._report(lambda: pion_report(self))


def step_chunks(pieces: list[Piece]) -> Iterator[list[Piece]]:
    """Pieces of one shape together, on a CPU only as many as the caches hold."""
    for chunk in chunks(pieces):
        count = len(chunk)
        if chunk[0].parameter.device.type == "cpu":
            # What is large is not the matrix but its generators, of the size of the longer side.
            count = max(1, _ROOM // max(1, chunk[0].block.count * max(chunk[0].block.shape[-2:]) ** 2))
        yield from (chunk[i : i + count] for i in range(0, len(chunk), count))
