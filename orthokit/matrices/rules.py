"""Which parameters are matrices, and how each is read; first by the module that owns it, then by name and shape."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from orthokit.matrices.collect import Entry, is_number
from orthokit.matrices.layout import BATCH, IN, OUT, Axes
from orthokit.matrices.names import EMBEDDING, GPT2_PROJECTION, HEAD, NORM, POSITION, STATE_BUFFER, TOKEN

__all__ = ["Context", "Verdict", "decide"]

_CONV = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_CONV_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.LocalResponseNorm, nn.RMSNorm)
# Kernel sizes above this are unheard of; a trailing dimension beyond it is a feature dimension.
_LARGEST_KERNEL = 31
# What PEFT trains in place of a matrix, by a part of the name.
_GENERATORS = {
    "oft_R": "generators of rotations: packed skew matrices (PEFT's OFT)",
    "boft_R": "generators of rotations: their skew parts count (PEFT's BOFT)",
    "hra_u": "directions of reflections: their lengths do not matter (PEFT's HRA)",
}


@dataclass(frozen=True)
class Verdict:
    """What happens to one parameter: ``axes`` is ``None`` where it is left out."""

    rule: str
    reason: str
    axes: Axes | None = None


class Context:
    """What the other parameters of the model say about one of them.

    Args:
        entries: All entries of the model.
    """

    def __init__(self, entries: Sequence[Entry]) -> None:
        self.by_path = {entry.path: entry for entry in entries}
        aliases: dict[str, list[Entry]] = {}
        for entry in entries:
            aliases.setdefault(entry.tied_to or entry.name, []).append(entry)
        self.aliases = aliases
        tables = [entry for entry in entries if not entry.tied_to and self.is_embedding(entry)]
        #: (rows, width) -> name of the first table of tokens with that shape
        self.vocabularies: dict[tuple[int, ...], str] = {}
        for entry in tables:
            if len(entry.shape) == 2 and not POSITION.match(entry.role):
                self.vocabularies.setdefault(entry.shape, entry.name)
        self.gpt2_transposed = self._gpt2_convention(entries)

    def sibling(self, entry: Entry, name: str) -> Entry | None:
        """The parameter of another name beside this one."""
        return self.by_path.get(".".join([*entry.segments[:-1], name]))

    def is_embedding(self, entry: Entry) -> bool:
        """Whether any name of this tensor is a table that is looked up."""
        return any(_is_embedding(alias) for alias in self.aliases.get(entry.name, [entry]))

    def _gpt2_convention(self, entries: Sequence[Entry]) -> bool | None:
        """Whether ``h.N.attn.c_attn`` and its like are (in, out); ``None`` without evidence."""
        votes = 0
        for entry in entries:
            if not (GPT2_PROJECTION.search(entry.path) and len(entry.shape) == 2 and entry.shape[0] != entry.shape[1]):
                continue
            rows, columns = entry.shape
            bias = self.sibling(entry, "bias")
            if bias is not None and len(bias.shape) == 1 and bias.shape[0] in (rows, columns):
                votes += 1 if bias.shape[0] == columns else -1
            elif entry.role == "c_fc" or (entry.role == "c_attn" and 3 * min(rows, columns) == max(rows, columns)):
                votes += 1 if columns > rows else -1
        return None if votes == 0 else votes > 0


def _is_embedding(entry: Entry) -> bool:
    rank, bare = len(entry.shape), entry.leaf == entry.role
    if isinstance(entry.owner, nn.Embedding | nn.EmbeddingBag):
        return True
    if bare:
        # A position table held as a parameter of its own is often (1, length, width).
        return rank in (2, 3) and bool(EMBEDDING.match(entry.role) or TOKEN.match(entry.role))
    if entry.owner is not None:
        named = "Embedding" in type(entry.owner).__name__ and not isinstance(entry.owner, nn.Linear)
        return rank == 2 and entry.leaf == "weight" and named
    return rank == 2 and bool(EMBEDDING.match(entry.role))


def _has_class(owner: nn.Module | None, name: str) -> bool:
    return any(name == cls.__name__ for cls in type(owner).__mro__)


def decide(entry: Entry, context: Context) -> Verdict:
    """Rule and reason for one entry.

    Args:
        entry: The parameter.
        context: The rest of the model.

    Returns:
        The verdict; its axes are ``None`` where the parameter is left out.
    """
    verdict = _left_out(entry, context) or _matrix(entry, context)
    if verdict.axes is not None and min(verdict.axes.size(OUT), verdict.axes.size(IN)) == 1:
        depthwise = ", one channel per group" if verdict.rule == "conv" and verdict.axes.size(BATCH) > 1 else ""
        kind = "every block" if BATCH in verdict.axes.labels else "the matrix"
        sides = f"{verdict.axes.size(OUT)} x {verdict.axes.size(IN)}"
        verdict = Verdict("vector", f"a vector in effect: {kind} is {sides}{depthwise}")
    if entry.trainable is False:
        verdict = Verdict(verdict.rule, f"{verdict.reason}; frozen (requires_grad is False)", verdict.axes)
    return verdict


def _left_out(entry: Entry, context: Context) -> Verdict | None:
    rank, leaf, shape = len(entry.shape), entry.leaf, entry.shape
    if entry.tensor is None:
        return Verdict("buffer", "extra state: not a tensor")
    if not entry.initialised:
        return Verdict("uninitialised", "not initialised yet: its shape is known after the first batch")
    if entry.tied_to:
        what = "output head: " if _is_head_name(entry) else ""
        return Verdict("tied", f"{what}tied to {entry.tied_to!r}")
    if 0 in shape:
        return Verdict("empty", "empty: it has no entries")
    if not is_number(entry.tensor.dtype):
        return Verdict("buffer", f"a table of {str(entry.tensor.dtype).removeprefix('torch.')}: not weights")
    if entry.owner is None and (STATE_BUFFER.match(leaf) or (leaf == "bias" and rank == 4)):
        return Verdict("buffer", "a constant or a running statistic kept in the state dict: not learned")
    if context.is_embedding(entry):
        head = [alias.name for alias in context.aliases.get(entry.name, []) if alias is not entry]
        also = f"; also {', '.join(map(repr, head))}" if head else ""
        if rank > 1 and shape[-2] > 1:
            return Verdict("embedding", f"embedding: rows are looked up, not multiplied{also}")
        return Verdict("embedding", f"embedding: a learned vector put into the sequence{also}")
    if "bias" in leaf:
        return Verdict("bias", "bias: added, not multiplied")
    if rank == 0:
        return Verdict("scalar", "a scalar")
    # Adapters say themselves which of their numbers only look like a matrix.
    if reason := getattr(type(entry.owner), "no_matrices", {}).get(leaf):
        return Verdict("generator", reason)
    if reason := next((_GENERATORS[part] for part in entry.name.split(".") if part in _GENERATORS), None):
        return Verdict("generator", reason)
    if isinstance(entry.owner, _NORMS) or _norm_by_name(entry):
        return Verdict("norm", "norm scale: a vector" if rank == 1 else "norm scale: multiplied entry by entry")
    if rank == 1:
        return Verdict("vector", "a vector")
    if rank == 2 and (reason := _head(entry, context)):
        return Verdict("head", reason)
    return None


def _norm_by_name(entry: Entry) -> bool:
    if entry.owner is not None and entry.leaf != entry.role:
        return type(entry.owner).__name__.endswith("Norm")
    return len(entry.shape) <= 2 and entry.leaf in ("weight", "scale") and bool(NORM.match(entry.role))


def _is_head_name(entry: Entry) -> bool:
    return any(HEAD.match(segment) for segment in entry.segments[-2:])


def _head(entry: Entry, context: Context) -> str | None:
    """Why a matrix is the output head, or ``None``."""
    table = context.vocabularies.get(entry.shape)
    if _is_head_name(entry):
        return "output head: one row of scores per vocabulary entry"
    # Inside a numbered block a matrix with as many rows as the vocabulary is a coincidence (256 bytes, width 256).
    if table is None or any(segment.isdigit() for segment in entry.segments[:-2]):
        return None
    named = entry.role in ("head", "output", "decoder", "logits", "to_logits", "fc_out", "proj_out", "out")
    if named or entry.shape[0] != entry.shape[1]:
        return f"output head: one row of scores per row of {table!r}"
    return None


def _matrix(entry: Entry, context: Context) -> Verdict:
    if entry.owner is not None and entry.leaf.split("_")[0] == "weight":
        if isinstance(entry.owner, _CONV):
            return _conv(entry.shape, entry.owner.groups)
        if isinstance(entry.owner, _CONV_TRANSPOSED):
            return _conv_transposed(entry.shape, entry.owner.groups)
        if _has_class(entry.owner, "Conv1D") and len(entry.shape) == 2:
            return Verdict("conv1d_transposed", "Conv1D: stored (in, out), transposed", Axes(entry.shape, (IN, OUT)))
        if isinstance(entry.owner, nn.Bilinear):
            return _bilinear(entry.shape)
    rank = len(entry.shape)
    if rank == 2:
        return _plain(entry, context)
    if rank == 3 and "bilinear" in entry.role.lower():
        return _bilinear(entry.shape)
    if entry.owner is None or entry.leaf == "weight":
        conv = _looks_like_conv(entry)
        if conv:
            return _conv_by_shape(entry)
    return _stack(entry, context)


def _plain(entry: Entry, context: Context) -> Verdict:
    axes = Axes(entry.shape, (OUT, IN))
    if entry.leaf.startswith(("weight_ih", "weight_hh", "weight_hr")):
        return Verdict("recurrent", "recurrent: gates stacked by rows, read as one (gates x hidden, in)", axes)
    if entry.leaf == "in_proj_weight":
        return Verdict("fused", "attention input: q, k and v stacked by rows, read as one", axes)
    if entry.owner is None and GPT2_PROJECTION.search(entry.path):
        if context.gpt2_transposed:
            axes = Axes(entry.shape, (IN, OUT))
            return Verdict("conv1d_transposed", "GPT-2 Conv1D by name and shape: stored (in, out), transposed", axes)
        if context.gpt2_transposed is None:
            return Verdict("linear", "linear: (out, in) assumed, since names and shapes do not tell Conv1D apart", axes)
    if entry.owner is not None and not isinstance(entry.owner, nn.Linear) and entry.leaf != "weight":
        return Verdict("linear", "a bare matrix: read as (out, in)", axes)
    return Verdict("linear", "linear: (out, in) as it is", axes)


def _bilinear(shape: tuple[int, ...]) -> Verdict:
    return Verdict("bilinear", "bilinear: one (in1, in2) form per output", Axes(shape, (BATCH, OUT, IN)))


def _conv(shape: tuple[int, ...], groups: int, note: str = "") -> Verdict:
    axes = Axes(shape, (OUT,) + (IN,) * (len(shape) - 1))
    if groups == 1:
        return Verdict("conv", f"convolution: (out, in, kernel) flattened to (out, in x kernel){note}", axes)
    axes.split(0, (groups, shape[0] // groups), (BATCH, OUT))
    return Verdict("conv", f"grouped convolution: one (out, in x kernel) block per group of {groups}", axes)


def _conv_transposed(shape: tuple[int, ...], groups: int) -> Verdict:
    axes = Axes(shape, (IN,) + (OUT,) * (len(shape) - 1))
    if groups > 1:
        axes.split(0, (groups, shape[0] // groups), (BATCH, IN))
    per = f" per group of {groups}" if groups > 1 else ""
    reason = f"transposed convolution: stored (in, out, kernel), read as (out x kernel, in){per}"
    return Verdict("conv_transposed", reason, axes)


def _looks_like_conv(entry: Entry) -> bool:
    rank, path = len(entry.shape), entry.path.lower()
    small = all(size <= _LARGEST_KERNEL for size in entry.shape[2:])
    if not small or rank > 5 or "expert" in path:
        return False
    if rank == 3:
        return "conv" in path or (entry.leaf == "weight" and entry.shape[2] < min(entry.shape[:2]))
    return True


def _conv_by_shape(entry: Entry) -> Verdict:
    if any(hint in entry.path.lower() for hint in ("convtranspose", "conv_transpose", "deconv")):
        return _conv_transposed(entry.shape, 1)
    if entry.shape[1] == 1 and any(hint in entry.path.lower() for hint in ("depthwise", "dwconv", "dw_conv")):
        return _conv(entry.shape, entry.shape[0])
    return _conv(entry.shape, 1, "; names and shapes do not tell groups or transposition, none assumed")


def _stack(entry: Entry, context: Context) -> Verdict:
    shape = entry.shape
    lead = (BATCH,) * (len(shape) - 2)
    count = " x ".join(map(str, shape[:-2]))
    if len(shape) == 3 and _expert_is_transposed(entry, context):
        axes = Axes(shape, (*lead, IN, OUT))
        return Verdict("stack_transposed", f"stack of {count} matrices stored (in, out), transposed", axes)
    return Verdict("stack", f"stack of {count} matrices", Axes(shape, (*lead, OUT, IN)))


def _expert_is_transposed(entry: Entry, context: Context) -> bool:
    """Whether an expert stack is (experts, in, out), as its gate-up and down halves together show."""
    if entry.leaf not in ("gate_up_proj", "down_proj"):
        return False
    gate, down = context.sibling(entry, "gate_up_proj"), context.sibling(entry, "down_proj")
    if gate is None or down is None:
        return False
    if len(gate.shape) != 3 or len(down.shape) != 3:
        return False
    return gate.shape[2] == 2 * down.shape[1] and gate.shape[1] == down.shape[2]
