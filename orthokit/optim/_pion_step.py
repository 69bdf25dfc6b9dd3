"""One Pion step on whole matrices of one shape: gradients and state in, rotated weights out."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from orthokit.linalg._workspace import Workspace
from orthokit.linalg.polar import orthogonalize_
from orthokit.linalg.skew import packed_size
from orthokit.optim._pieces import core_rate, like, shrink, strips
from orthokit.optim._pion_halves import Halves, halved_product, unfold_halves
from orthokit.optim._pion_maps import cayley_change, gram_coefficients, map_coefficients
from orthokit.optim._pion_skew import fold, skew_product, transposed, unfold

__all__ = ["Chunk", "Side", "active_sides", "kept_sides", "takes_parts"]

# A step count at which Adam's bias corrections are 1 to rounding.
_FAR = 1e9
# Entries from which a matrix is added with a factor of its own; many small ones go through one broadcast product.
_LARGE = 1 << 12
# From which size on a matrix by itself is handled in blocks.
_HALVED = 768
# From which size on a matrix is transposed at a rate that can be told beforehand, and the seconds that an entry takes.
_TURNED, _TURN_SECONDS = 128, 1e-9
# The part of a folded matrix whose norm is looked at first; being a lower bound, it mostly settles the matter.
_SAMPLE = 16


class Side(NamedTuple):
    """One of the two rotations: of the columns (``"in"``) or of the rows (``"out"``)."""

    name: str
    size: int

    def turn(self, X: Tensor, A: Tensor | Halves, out: Tensor) -> Tensor:
        """``X A`` or ``A X``."""
        if isinstance(A, Halves):
            return A.times(X, out, left=self.name == "out")
        left, right = (X, A) if self.name == "in" else (A, X)
        if len(X) > 1:
            return torch.bmm(left, right, out=out)
        torch.mm(left[0], right[0], out=out[0])  # on CPUs a batch of one is slower for tall matrices
        return out

    def add(self, X: Tensor, A: Tensor | Halves, to: Tensor) -> Tensor:
        """``to + X A``, or with ``A X``, in place of ``to``."""
        if isinstance(A, Halves):
            return A.times(X, to, left=self.name == "out", add=True)
        left, right = (X, A) if self.name == "in" else (A, X)
        if len(X) > 1:
            return to.baddbmm_(left, right)
        to[0].addmm_(left[0], right[0])
        return to


def kept_sides(sides: str, shape: tuple[int, int]) -> list[Side]:
    """The sides whose moments are kept, larger first; a matrix of one column or row has nothing to turn there."""
    both = [Side("in", shape[1]), Side("out", shape[0])]
    wanted = [side for side in both if sides in ("both", "alternate", side.name) and side.size > 1]
    # The first side needs one product less: what its size is measured with is already its first term.
    return sorted(wanted, key=lambda side: -side.size)


def active_sides(sides: str, shape: tuple[int, int], step: int) -> list[Side]:
    """The sides that are turned at a step: with ``"alternate"`` the in-side at odd ones, the out-side at even ones."""
    kept = kept_sides(sides, shape)
    if sides != "alternate":
        return kept
    return [side for side in kept if side.name == ("in" if step % 2 else "out")]


class Chunk:
    """Matrices of one shape during one step.

    Args:
        W: ``(N, out, in)`` in float32 or float64; turned in place by :meth:`rotate`. Where :func:`takes_parts` says so
            it may come in parts ``(matrices, out, in)``, like ``grads``.
        grads: ``(matrices, out, in)`` each, ``N`` in all, in any dtype.
        states: What the state holds of these matrices, in the order of ``grads``: ``m_in``, ``m_out``, ``v_in``,
            ``v_out`` (folded, or the mean squares alone) and ``momentum_buffer``, as far as the options need them.
        group: Options.
        step: The number of this step, from 1.
        dtype: That of the products.
        workspace: Scratch memory.
    """

    def __init__(
        self,
        W: Tensor | list[Tensor],
        grads: list[Tensor],
        states: list[dict[str, Tensor]],
        group: dict[str, Any],
        *,
        step: int,
        dtype: torch.dtype,
        workspace: Workspace,
    ) -> None:
        self.parts = [W] if isinstance(W, Tensor) else W
        self.W = self.parts[0]
        self.grads, self.states, self.group, self.step = grads, states, group, step
        self.dtype, self.workspace = dtype, workspace
        self.counts = [len(grad) for grad in grads]
        self.lr = float(group["lr"])
        self.shape = (self.W.shape[-2], self.W.shape[-1])
        self.size = sum(self.counts)
        self.turns: list[tuple[Side, Tensor | Halves, Tensor]] = []
        """The generators of the last :meth:`rotate` and their scales, until the scratch memory is used again."""

    def rotate(self) -> None:
        """The step."""
        group, W = self.group, self.W
        if self.step == 1 and (group["track"] or group["restore_every"]):
            found = torch.linalg.svdvals(W)
            torch._foreach_copy_([state["spectrum"] for state in self.states], list(found.split(self.counts)))
        if group["track"]:
            for state in self.states:
                state["causes"][:, 1] += math.log1p(-self.lr * group["weight_decay"])
        if group["weight_decay"]:
            shrink(self.parts, 1 - self.lr * group["weight_decay"])
        inputs = self.grads if group["momentum"] == "lie" else self._ambient()
        weight, gradient = self._narrow("weight", self.parts), self._narrow("gradient", inputs)
        # The products round once, and gradients come with the rounding of everything before them.
        unit = max(torch.finfo(self.dtype).eps, 8 * torch.finfo(W.dtype).eps)
        quiet = unit * _norms(weight) * _norms(gradient)
        active = active_sides(group["sides"], self.shape, self.step)
        generators, strengths = {}, []
        for side in kept_sides(group["sides"], self.shape):
            folded, strength = self._generator(side, weight, gradient, quiet)
            if side in active:
                generators[side] = self._unfolded(side, folded)
                strengths.append(strength)
        if generators and self.lr:
            self._turn(generators, weight, torch.stack(strengths).amax(0))
        if group["restore_every"] and self.step % group["restore_every"] == 0:
            self._restore()

    def _buffer(self, name: str, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return self.workspace.get(f"pion {name}", shape, dtype or self.dtype, self.W.device)

    def _like(self, name: str) -> Tensor:
        return self._buffer(name, self.size, *self.shape)

    def _halved(self, side: Side) -> bool:
        """Whether the matrices of a side are handled in blocks; below this size calls cost more than copies."""
        return self.size == 1 and side.size >= _HALVED and self.W.device.type == "cpu"

    def _turning(self, side: Side, summands: int) -> bool:
        """Whether it costs less to transpose a product of that many summands than to multiply once more."""
        if self.W.device.type != "cpu":
            return self.size == 1 and summands >= side.size
        return side.size >= _TURNED and 2 * summands > _TURN_SECONDS * core_rate(self.dtype, self.group)

    def _unfolded(self, side: Side, folded: Tensor) -> Tensor | Halves:
        name = f"turn {side.name}"
        if self._halved(side):
            return unfold_halves(folded, side.size, self.dtype, self.workspace, name)
        return unfold(folded, side.size, self._buffer(name, len(folded), side.size, side.size), self.workspace)

    def _narrow(self, name: str, tensors: list[Tensor]) -> Tensor:
        """The tensors as one batch in the dtype of the products; itself if it is that already."""
        if len(tensors) == 1 and tensors[0].dtype == self.dtype:
            return tensors[0]
        batch = self._like(name)
        torch._foreach_copy_(list(batch.split([len(x) for x in tensors])), tensors)
        return batch

    def _ambient(self) -> list[Tensor]:
        """The filtered gradients."""
        moments = [state["momentum_buffer"] for state in self.states]
        torch._foreach_lerp_(moments, [g.to(self.W.dtype) for g in self.grads], 1 - self.group["betas"][0])
        return moments

    def _generator(self, side: Side, weight: Tensor, gradient: Tensor, quiet: Tensor) -> tuple[Tensor, Tensor]:
        """The folded generator of a side before its scale, and its strength; the moments of the side are updated."""
        group = self.group
        S = self._buffer("generator", self.size, packed_size(side.size), dtype=self.W.dtype)
        # W^T G - G^T W for the in-side, G W^T - W G^T for the out-side.
        P, Q = (weight.mT, gradient.mT) if side.name == "in" else (gradient, weight)
        summands, right = P.shape[-1], (P.mT, Q.mT)
        if side.name == "in" and side.size > summands:
            # On CPUs a wide product whose left factor is read across its rows takes several times as long.
            P, Q = (transposed(X.mT, self._buffer(name, *X.shape)) for name, X in (("left", P), ("right", Q)))
        turn = self._turning(side, summands)
        multiply = halved_product if self._halved(side) and not (turn and summands >= side.size) else skew_product
        multiply(P, Q, S, self.workspace, turn=turn, right=right)
        _silence(S, quiet / math.sqrt(2 * summands))
        parts, size = list(S.split(self.counts)), S.shape[1]
        seconds = [state[f"v_{side.name}"] for state in self.states]
        if group["second_moment"]:
            self._divide(side, parts, seconds)
            return S, _norms(S, enough=self._usual() * math.sqrt(size)) / math.sqrt(size)
        mean = _norms(S).square() / size
        torch._foreach_lerp_(seconds, list(mean.unsqueeze(1).split(self.counts)), 1 - group["betas"][1])
        if group["momentum"] == "lie":
            firsts = [state[f"m_{side.name}"] for state in self.states]
            torch._foreach_lerp_(firsts, parts, 1 - group["betas"][0])
            torch._foreach_copy_(parts, firsts)
        strength = _norms(S) / math.sqrt(size) / (torch.cat(seconds).squeeze(1).sqrt() + group["eps"])
        if group["variant"] == "sign":
            self._equalize(side, S)
        return S.neg_(), strength

    def _divide(self, side: Side, parts: list[Tensor], seconds: list[Tensor]) -> None:
        """Moments of the generators, then ``-m / (sqrt(v) + eps)`` in their place."""
        group = self.group
        beta1, beta2 = group["betas"]
        eps = group["eps"]
        if group["rms"] is None:
            eps *= math.sqrt(1 - beta2**self.step)  # so that the correction of the scale corrects eps as well
        if group["momentum"] != "lie":
            torch._foreach_mul_(seconds, beta2)
            torch._foreach_addcmul_(seconds, parts, parts, value=1 - beta2)
            roots = torch._foreach_sqrt(seconds)
            torch._foreach_add_(roots, eps)
            torch._foreach_div_(parts, roots)
            torch._foreach_neg_(parts)
            return
        # AdamW's fused kernel does it in one pass over memory: with lr = weight_decay = 1 a parameter first becomes
        # exactly 0 and then -m / (sqrt(v) + eps), so the gradient may serve as the parameter.
        far = torch.full((), _FAR, dtype=torch.float32, device=self.W.device)
        adamw(
            parts,
            parts,
            [state[f"m_{side.name}"] for state in self.states],
            seconds,
            [],
            [far] * len(parts),
            fused=True,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=1.0,
            weight_decay=1.0,
            eps=eps,
            maximize=False,
        )

    def _equalize(self, side: Side, S: Tensor) -> None:
        """The matrix sign of the generators: all planes turn by nearly one angle."""
        full = unfold(S, side.size, self._buffer(f"turn {side.name}", len(S), side.size, side.size), self.workspace)
        X = orthogonalize_(
            full, method="newton_schulz", steps=5, polish=0, coefficients=None, scaling="frobenius", eps=1e-7
        )
        fold(X - X.mT, S).div_(2)

    def _usual(self) -> float:
        """The strength at which a step still has its full size: a share of what pure noise has."""
        beta1 = self.group["betas"][0]
        return self.group["floor"] * math.sqrt((1 - beta1) / (1 + beta1))

    def _turn(self, generators: dict[Side, Tensor | Halves], weight: Tensor, strength: Tensor) -> None:
        sides = list(generators.items())
        starts = [self._like(f"first {side.name}") for side, _ in sides]
        # The first side starts from the product that measures it; the second finds the weight turned.
        total = sides[0][0].turn(weight, sides[0][1], starts[0])
        if len(sides) > 1 and self.group["rms"] is not None:
            total = sides[1][0].add(weight, sides[1][1], starts[1].copy_(total))
        scale = self._scale(total, strength)
        for i, (side, A) in enumerate(sides):
            if self.group["track"]:
                self._track(side, A, scale)
            if i:
                side.turn(self._narrow("weight", self.parts), A, starts[i])
            self._apply(self.parts, side, A, starts[i], scale)
            self.turns.append((side, A, scale))
            if self.group["momentum"] == "transported":
                self._transport(side, A, scale)

    def _apply(self, parts: list[Tensor], side: Side, A: Tensor | Halves, start: Tensor, scale: Tensor) -> None:
        """Turn the parts of a batch in place; ``start`` is their product with ``A`` and may be overwritten."""
        group = self.group
        if group["map"] == "cayley":
            X = parts[0]
            X.add_(cayley_change(X, A.to(X.dtype) * (scale.to(X.dtype).view(-1, 1, 1) / 2), side.name))
            return
        term, other, terms = start, self._like("term"), []
        coefficients = map_coefficients(group["map"], group["exp_order"], group["polish"])[1:]
        for k, c in enumerate(coefficients):
            if k:
                term, other = side.turn(term, A, other), term
            if c:
                terms.append((term, c * scale ** (k + 1)))
            # Two terms fit into the two buffers. Only these sums touch the weight: what is rounded to the dtype of the
            # products is its change.
            if k % 2 or k == len(coefficients) - 1:
                self._add_scaled(parts, terms)
                terms = []

    def _add_scaled(self, parts: list[Tensor], terms: list[tuple[Tensor, Tensor]]) -> None:
        """``X_i += factors_i term_i`` for the matrices of a batch and each term, which may have a narrower dtype."""
        if not _large(parts[0]):
            for term, factors in terms:
                parts[0].addcmul_(term.to(self.W.dtype), factors.to(self.W.dtype).view(-1, 1, 1))
            return
        scratch = self._buffer("wide", parts[0][0].numel(), dtype=self.W.dtype)
        changes, factors = [term for term, _ in terms], [factor.tolist() for _, factor in terms]
        for i, x in enumerate(x for part in parts for x in part):
            for piece, *strip in strips(x, *(change[i] for change in changes)):
                for change, factor in zip(strip, factors, strict=True):
                    # A sum of two dtypes takes longer than to widen one of them.
                    wide = change if change.dtype == piece.dtype else like(piece, scratch).copy_(change)
                    piece.add_(wide, alpha=factor[i])

    def _transport(self, side: Side, A: Tensor | Halves, scale: Tensor) -> None:
        """Carry the ambient moments along with the weights."""
        moments = [state["momentum_buffer"] for state in self.states]
        M = moments[0] if len(moments) == 1 else torch.cat(moments)
        self._apply([M], side, A, side.turn(self._narrow("moment", [M]), A, self._like("moment start")), scale)
        if len(moments) > 1:
            torch._foreach_copy_(moments, list(M.split(self.counts)))

    def _scale(self, change: Tensor, strength: Tensor) -> Tensor:
        """What the generators of each matrix are multiplied by, ``(N,)`` in float64; ``change`` is what all make."""
        group = self.group
        usual = self._usual()
        taper = (strength.double() / usual).clamp(max=1) if usual else torch.ones_like(strength, dtype=torch.float64)
        if group["rms"] is None:
            beta1, beta2 = group["betas"]
            correction = 1.0
            if group["variant"] == "adaptive":
                root = math.sqrt(1 - beta2**self.step) if group["second_moment"] else 1.0
                correction = root / (1 - beta1**self.step)
            return taper * (self.lr * correction)
        norm = _norms(change).double()
        target = self.lr * group["rms"] * math.sqrt(self.shape[0] * self.shape[1])
        return taper * target / norm.clamp(min=torch.finfo(torch.float32).tiny)

    def _restore(self) -> None:
        """Give every matrix its first singular values back; its singular vectors stay."""
        U, _, Vh = torch.linalg.svd(self.W, full_matrices=False)
        spectrum = torch.cat([state["spectrum"] for state in self.states])
        torch.bmm(U * spectrum.unsqueeze(1), Vh, out=self.W)
        for state in self.states:
            if "causes" in state:
                state["causes"].zero_()

    def _track(self, side: Side, A: Tensor | Halves, scale: Tensor) -> None:
        """Note how much the factor about to be applied changes the norm because its series is cut, which is exact.

        ``||W f(A)||^2 = tr W f(-A) f(A) W^T`` and ``tr W A^{2j} W^T = (-1)^j ||W A^j||^2``.
        """
        if self.group["map"] == "cayley":
            return
        coefficients = map_coefficients(self.group["map"], self.group["exp_order"], self.group["polish"])
        term = self.W.to(torch.float64)
        A = A.to(torch.float64) * scale.view(-1, 1, 1)
        before, change = _norms(term).square(), torch.zeros_like(scale)
        for j, g in enumerate(gram_coefficients(coefficients)[::2]):
            if j:
                term = side.turn(term, A, torch.empty_like(term))
                change += (-1) ** j * g * _norms(term).square()
        growth = torch.log1p(change / before.clamp(min=torch.finfo(torch.float64).tiny)) / 2
        for state, part in zip(self.states, growth.split(self.counts), strict=True):
            state["causes"][:, 0] += part


def _silence(S: Tensor, noise: Tensor) -> None:
    """Set generators to zero that do not stand above the rounding of the products they come from."""
    loud = _norms(S, enough=noise) > noise
    if S.device.type != "cpu" or not bool(loud.all()):
        S.mul_(loud.unsqueeze(1))


def takes_parts(W: Tensor, group: dict[str, Any]) -> bool:
    """Whether a step goes through weights like these one by one, so that they need not lie in one batch."""
    return _large(W) and group["map"] != "cayley" and not (group["track"] or group["restore_every"])


def _large(X: Tensor) -> bool:
    """Whether the matrices of a batch are better taken one by one, with factors that the processor holds."""
    return X.device.type == "cpu" and X[0].numel() >= _LARGE


def _norms(X: Tensor, *, enough: Tensor | float | None = None) -> Tensor:
    """Euclidean norms of the matrices of a batch, or lower bounds of them where those are above ``enough``."""
    if enough is not None and X.device.type == "cpu":
        bounds = torch.linalg.vector_norm(X[:, : X.shape[1] // _SAMPLE], dim=1)
        if bool((bounds > enough).all()):
            return bounds
    if X.dtype in (torch.bfloat16, torch.float16):
        # Row by row in the narrow dtype, whose rounding averages out over the rows; a wide copy costs more than this.
        return torch.linalg.vector_norm(torch.linalg.vector_norm(X, dim=-1).to(torch.float32), dim=-1)
    return torch.linalg.vector_norm(X.flatten(1), dim=1)
