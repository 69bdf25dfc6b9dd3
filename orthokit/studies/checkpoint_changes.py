"""What fine-tuning leaves behind in a checkpoint, by method and by how it is stored, and what four bits leave of it."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from orthokit.adapters.attach import merge
from orthokit.adapters.quantization import dequantize_nf4, group_absmax, quantize_nf4
from orthokit.diagnostics.entries import noise_floor
from orthokit.diagnostics.inspection import Inspection, inspect
from orthokit.diagnostics.spectrum import low_rank_part
from orthokit.errors import OptionError, unknown_name
from orthokit.lab.arena import METHODS, enter, first_rate
from orthokit.lab.arena.weights import target_names
from orthokit.lab.pretrained import load_pretrained
from orthokit.linalg import singular_values
from orthokit.matrices import matrices

if TYPE_CHECKING:
    import pandas as pd

__all__ = [
    "FINETUNED_KINDS",
    "finetuned_looks",
    "finetuned_tinygpts",
    "four_bit_spectra",
    "told_apart",
]

FINETUNED_KINDS: dict[str, str] = {
    "full": "general",
    "lora": "lora",
    "pissa": "pissa",
    "dora": "dora",
    "oft": "oft",
    "hra": "hra",
}
"""Method of the arena to the kind that an inspection should give to what it changed."""
_SIZES = {"full": 0, "lora": 4, "pissa": 4, "dora": 4, "oft": 16, "hra": 8}
_GROUND = "tinygpt"
_KEPT = "unchanged"


def finetuned_tinygpts(
    methods: Sequence[str] | None = None, *, seed: int = 0, steps: int = 10, small: bool = False
) -> dict[str, nn.Module]:
    """The pretrained TinyGPT after a short fine-tuning on Moby-Dick with each method, adapters merged.

    Args:
        methods: Some of :data:`FINETUNED_KINDS`; default all. Rank 4, blocks of 16, 8 reflections.
        seed: Of the batches and of what a method draws.
        steps: Of each, ``>= 1``; default 10.
        small: Few layers and shorter texts, for tests and the smallest notebooks.

    Returns:
        Method to the model, whose parameters have the names of the pretrained one.

    Raises:
        UnknownNameError: No such method.

    Example:
        >>> model = finetuned_tinygpts(["oft"], steps=1, small=True)["oft"]
        >>> [name for name, _ in model.named_parameters()] == [name for name, _ in load_pretrained().named_parameters()]
        True
    """
    found: dict[str, nn.Module] = {}
    for method in FINETUNED_KINDS if methods is None else methods:
        if method not in FINETUNED_KINDS:
            raise unknown_name("method", method, FINETUNED_KINDS)
        options: dict[str, Any] = {"size": _SIZES[method], "seed": seed, "steps": steps, "small": small}
        racer = enter(_GROUND, method, lr=first_rate(_GROUND, method), **options)
        for _ in range(steps):
            racer.advance()
        found[method] = merge(racer.model).requires_grad_(False)
    return found


def finetuned_looks(
    models: Mapping[str, nn.Module], *, dtype: torch.dtype | None = None, include: Any = None
) -> dict[str, Inspection]:
    """Each fine-tuned TinyGPT beside the pretrained one.

    Args:
        models: Method to model.
        dtype: Write both to files of this type and inspect the files; default: inspect the models as they are.
        include: Name patterns of the matrices to look at, as of :func:`orthokit.diagnostics.inspect`; default all.

    Returns:
        Method to inspection.

    Example:
        >>> models = finetuned_tinygpts(["hra"], steps=1, small=True)
        >>> looks = finetuned_looks(models, dtype=torch.bfloat16, include="blocks.0.attn.*")
        >>> looks["hra"].rows[0]["stored"], len(looks["hra"].rows)
        ('bfloat16', 4)
    """
    base = load_pretrained()
    if dtype is None:
        return {method: inspect(model, base=base, include=include) for method, model in models.items()}
    with tempfile.TemporaryDirectory() as folder:
        start = _saved(base, Path(folder) / "base.safetensors", dtype)
        looks = {}
        for method, model in models.items():
            path = _saved(model, Path(folder) / f"{method}.safetensors", dtype)
            looks[method] = inspect(path, base=start, include=include, cache=False)
        return looks


def told_apart(looks: Mapping[str, Inspection], *, small: bool = False) -> pd.DataFrame:
    """Whether the kind of every matrix is named right, and what it was told by.

    Args:
        looks: Method to inspection, of :func:`finetuned_looks`.
        small: As the models were fine-tuned.

    Returns:
        By label of the method: ``trained`` (matrices), ``named`` (of these, how many by their method), ``still``
        (matrices that were not trained), ``unchanged`` (of these, how many are called so); over the trained ones the
        means of ``change`` and ``rotation-like`` and the largest ``spectrum change``; ``rank`` of the changes, if it
        is the same in all; ``kinds``: the wrong names that occur.

    Example:
        >>> looks = finetuned_looks(finetuned_tinygpts(["lora"], steps=1, small=True))
        >>> row = told_apart(looks, small=True).loc["LoRA"]
        >>> bool(row["trained"] == row["named"]), bool(row["still"] == row["unchanged"]), row["rank"]
        (True, True, '4')
    """
    import pandas as pd

    targets = {f"{name}.weight" for name in target_names(_GROUND, small)}
    rows = {}
    for method, found in looks.items():
        trained = [row for row in found.rows if row["name"] in targets]
        still = [row for row in found.rows if row["name"] not in targets]
        named = [row["kind"] == FINETUNED_KINDS[method] for row in trained]
        ranks = {row["change_rank"] for row in trained}
        rows[METHODS[method].label] = {
            **{"trained": len(trained), "named": sum(named), "still": len(still)},
            "unchanged": sum(row["kind"] == _KEPT for row in still),
            "change": float(np.mean([row["relative_change"] for row in trained])),
            "spectrum change": max(row["spectrum_change"] for row in trained),
            "rotation-like": float(np.mean([row["rotation_fraction"] for row in trained])),
            "rank": _one(ranks),
            "kinds": ", ".join(sorted({r["kind"] for r, right in zip(trained, named, strict=True) if not right})),
        }
    return pd.DataFrame.from_dict(rows, orient="index")


def four_bit_spectra(
    weights: nn.Module | Mapping[str, Tensor],
    names: Sequence[str] | None = None,
    *,
    rank: int | None = None,
    group_size: int = 64,
) -> tuple[pd.DataFrame, dict[str, dict[str, np.ndarray]]]:
    r"""What a spectrum is after its matrix was rounded to four bits (NF4), above and below the floor of the rounding.

    .. math:: \text{floor} = \mathrm{rms}(W_4 - W) \cdot (\sqrt{out} + \sqrt{in})

    Args:
        weights: A model or its tensors.
        names: Matrices; default all.
        rank: Keep so many singular values of each matrix before it is rounded, ``>= 1``; default all.
        group_size: Entries with one scale; default 64.

    Returns:
        By matrix: ``floor``, ``values``, ``above`` (singular values of the rounded matrix above the floor), ``off
        above`` and ``off below`` (median of :math:`|\sigma_4 - \sigma| / \sigma` of those above and below
        the floor, NaN without one); and by matrix the spectra ``"before"`` and ``"four bits"``.

    Raises:
        UnknownNameError: No such matrix.
        OptionError: ``rank`` below 1.

    Example:
        >>> W = torch.randn(96, 64, generator=torch.Generator().manual_seed(0))
        >>> table, spectra = four_bit_spectra({"W.weight": W}, rank=16)
        >>> int(table.loc["W.weight", "above"]), bool(spectra["W.weight"]["four bits"][-1] > 0)
        (16, True)
    """
    import pandas as pd

    if rank is not None and rank < 1:
        raise OptionError(f"rank must be at least 1; got {rank}. Leave it out to keep all singular values.")
    blocks = {block.name: block for block in matrices(weights)}
    state = weights.state_dict() if isinstance(weights, nn.Module) else weights
    rows, spectra = {}, {}
    for name in blocks if names is None else names:
        if name not in blocks:
            raise unknown_name("matrix", name, blocks)
        W = blocks[name].read(state[blocks[name].parameter]).detach().float()
        W = W if rank is None else low_rank_part(W.double(), rank=rank).float()
        scales = group_absmax(W, group_size=group_size)
        packed = quantize_nf4(W, scales, group_size=group_size)
        rounded = dequantize_nf4(packed, scales, columns=W.shape[1], group_size=group_size)
        before, every = (singular_values(part, method="gram64").double().numpy() for part in (W, rounded))
        before, after = before[:rank], every[:rank]
        floor = noise_floor(float((rounded - W).square().mean().sqrt()), (W.shape[0], W.shape[1]))
        off, above = np.abs(after - before) / before, after > floor
        rows[name] = {
            **{"floor": floor, "values": len(every), "above": int((every > floor).sum())},
            "off above": float(np.median(off[above])) if above.any() else np.nan,
            "off below": float(np.median(off[~above])) if not above.all() else np.nan,
        }
        spectra[name] = {"before": before, "four bits": every}
    return pd.DataFrame.from_dict(rows, orient="index"), spectra


def _saved(model: nn.Module, path: Path, dtype: torch.dtype) -> Path:
    from safetensors.torch import save_file

    save_file({name: p.detach().to(dtype).contiguous() for name, p in model.named_parameters()}, path)
    return path


def _one(values: set[int | None]) -> str:
    """The value that all share, in words."""
    if len(values) > 1:
        return "several"
    return "full" if values == {None} else str(next(iter(values)))
