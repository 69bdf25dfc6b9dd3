"""How many directions the features of a language model use: along its pretraining, at its end, after fine-tuning."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from orthokit.diagnostics._collect import collect_activations
from orthokit.diagnostics.features import decay_fit, feature_values, rankme
from orthokit.diagnostics.spectrum import effective_rank
from orthokit.errors import OptionError, ShapeError, unknown_name
from orthokit.lab.arena import enter
from orthokit.lab.contestants import contestant
from orthokit.lab.corpora import corpus
from orthokit.lab.models import TinyGPT
from orthokit.lab.pretrained import load_pretrained
from orthokit.lab.racer import Racer
from orthokit.lab.tasks import language_modelling
from orthokit.studies.adapter_study import ADAPTER_RATES

if TYPE_CHECKING:
    import pandas as pd

__all__ = [
    "FINETUNED",
    "MEASURES",
    "OPTIMIZER_RATES",
    "asset_features",
    "feature_geometry",
    "finetuned_features",
    "held_out_windows",
    "pretraining_features",
    "pretraining_looks",
    "representation_live",
    "window_features",
]

Row = dict[str, Any]
MEASURES = ("rankme_singular", "rankme_eigen", "rankme_centred", "effective_rank", "alpha")
"""What :func:`feature_geometry` gives."""

# The best rates of the recorded race over 400 steps of the smaller model.
OPTIMIZER_RATES = {"adamw": 4e-3, "muon_pre": 1e-2}
_REST_LR = 6e-3
# Of the rates that the study of adapters began with, the one nearest to where its search ended.
FINETUNED = {
    "full": ADAPTER_RATES["tinygpt"]["full"][-1],
    "oft": ADAPTER_RATES["tinygpt"]["oft"][1],
    "lora": ADAPTER_RATES["tinygpt"]["lora"][-1],
}
_LAST = "norm"
# Groups of neighbouring windows: every other one chooses the turning points, the rest measures the size of a phase.
_BLOCKS = 32
_AT_ONCE = 64


def held_out_windows(
    name: str = "addresses", *, count: int = 1024, context: int = 64
) -> Int64[Tensor, "count context"]:
    """Evenly spaced windows of a corpus's validation split, in the order of the text.

    Args:
        name: A corpus of the package; default ``"addresses"``.
        count: Windows, ``>= 1``; default 1024.
        context: Bytes of a window, ``>= 1``; default 64.

    Returns:
        Shape ``(count, context)``.

    Raises:
        OptionError: A size out of range.

    Example:
        >>> held_out_windows("moby_dick", count=3, context=5).shape
        torch.Size([3, 5])
    """
    text = corpus(name).validation
    if count < 1 or not 1 <= context <= len(text):
        raise OptionError(f"need count >= 1 and context in 1..{len(text)}; got count={count}, context={context}.")
    starts = torch.linspace(0, len(text) - context, count).long()
    return text[starts[:, None] + torch.arange(context)].long()


def window_features(
    model: TinyGPT, windows: Int64[Tensor, "count context"], *, layers: Sequence[str] = (_LAST,)
) -> dict[tuple[str, str], Float[Tensor, "count width"]]:
    """One feature vector a window for each layer, from its last token and as the mean over its tokens.

    Args:
        model: A TinyGPT.
        windows: Bytes, shape ``(count, context)``.
        layers: Names of modules; default ``("norm",)``, the last layer: what the head reads.

    Returns:
        ``(layer, "last" | "mean")`` to features, shape ``(count, width)``.

    Raises:
        UnknownNameError: No such layer.

    Example:
        >>> found = window_features(TinyGPT("0.2M"), held_out_windows(count=4, context=8))
        >>> found["norm", "last"].shape
        torch.Size([4, 64])
    """
    parts: dict[tuple[str, str], list[Tensor]] = {}
    for ids in windows.split(_AT_ONCE):
        for layer, rows in collect_activations(model, [ids], layers).items():
            tokens = rows.reshape(len(ids), -1, rows.shape[-1])
            parts.setdefault((layer, "last"), []).append(tokens[:, -1].clone())
            parts.setdefault((layer, "mean"), []).append(tokens.mean(1))
    return {key: torch.cat(found) for key, found in parts.items()}


def feature_geometry(Z: Float[Tensor, "samples width"]) -> dict[str, float]:
    r"""The two forms of RankMe, the second one also centred, effective rank, and the decay exponent of features.

    Args:
        Z: Features, one sample a row, shape ``(N, d)``.

    Returns:
        ``rankme_singular`` (singular values, the original), ``rankme_eigen`` (eigenvalues of the uncentred covariance),
        ``rankme_centred`` (eigenvalues, means subtracted), ``effective_rank`` (no epsilon), and ``alpha``: alpha-ReQ
        over the indices 5 to ``min(99, 3 d / 4)``, since the last eigenvalues of a sample lie too low.

    Raises:
        OptionError: Fewer than 12 directions, too few for the exponent.

    Example:
        >>> found = feature_geometry(torch.randn(500, 40, generator=torch.Generator().manual_seed(0)))
        >>> found["rankme_eigen"] < found["rankme_singular"] < 40
        True
    """
    work = Z.double()
    # Triangles with the spectra of the features, so that five measures cost two factorisations.
    R, centred = (torch.linalg.qr(x, mode="r").R for x in (work, work - work.mean(0)))
    last = min(99, 3 * min(Z.shape) // 4)
    return {
        "rankme_singular": float(rankme(R)),
        "rankme_eigen": float(rankme(R, values="eigen")),
        "rankme_centred": float(rankme(centred, values="eigen")),
        "effective_rank": float(effective_rank(R)),
        "alpha": decay_fit(feature_values(centred, values="eigen"), last=last).exponent,
    }


def pretraining_looks(steps: int, *, between: bool = True) -> list[int]:
    """The steps at which a run is looked at: 0, 1, 2, 4, 8 and so on, where its rate begins to decay, and the end.

    Args:
        steps: Length of the run, ``>= 1``.
        between: Also half-way between the powers of two from 8 on; default yes.

    Returns:
        Increasing.

    Raises:
        OptionError: ``steps`` below 1.

    Example:
        >>> pretraining_looks(20)
        [0, 1, 2, 4, 8, 12, 16, 20]
    """
    if steps < 1:
        raise OptionError(f"steps must be at least 1; got {steps}.")
    powers = [2**k for k in range(steps.bit_length()) if 2**k <= steps]
    more = [3 * 2**k for k in range(2, steps.bit_length()) if 3 * 2**k <= steps] if between else []
    # wsd holds its rate for four fifths of the run.
    return sorted({0, *powers, *more, steps - max(1, round(0.2 * steps)), steps})


def _half_rows(Z: Tensor) -> Iterator[Row]:
    """RankMe of the half of the windows that chooses (-2), of the half that measures (-1), and of that without each of
    its blocks (0, 1, ...)."""
    if len(Z) % _BLOCKS:
        raise ShapeError(f"the number of windows must be a multiple of {_BLOCKS}; got {len(Z)}.")
    blocks = Z.unflatten(0, (_BLOCKS, -1))
    measuring = blocks[1::2]
    parts = {-2: blocks[::2], -1: measuring}
    parts |= {k: torch.cat([measuring[:k], measuring[k + 1 :]]) for k in range(len(measuring))}
    for left_out, part in parts.items():
        R = torch.linalg.qr(part.flatten(0, 1).double(), mode="r").R
        yield {
            **{"kind": "half", "layer": _LAST, "tokens": "last", "left_out": left_out},
            **{"rankme_singular": float(rankme(R)), "rankme_eigen": float(rankme(R, values="eigen"))},
        }


def _layers(model: TinyGPT) -> list[str]:
    return ["embed", *(f"blocks.{k}" for k in range(model.config.layers)), _LAST]


def _bits(model: TinyGPT, text: str, context: int, count: int) -> float:
    task = language_modelling(text, context=context, validation_windows=min(count, 128))
    return task.evaluate(model)[task.metric]


def pretraining_features(
    size: str,
    optimizer: str,
    *,
    seed: int,
    steps: int,
    lr: float | None = None,
    context: int = 64,
    batch: int = 8,
    windows: int = 512,
    between: bool = True,
    deep: bool = True,
    layers: int | None = None,
) -> list[Row]:
    """One pretraining of TinyGPT on the addresses, looked at on held-out text.

    Args:
        size: Size of the model.
        optimizer: ``"adamw"`` or ``"muon_pre"``, as in the race.
        seed: Of the initial weights and of the batches, so that rivals share both.
        steps: Length of the run: 20 of warm-up, a stable rate, and its decay to zero over the last fifth.
        lr: Learning rate; default the one of :data:`OPTIMIZER_RATES`, which other optimizers lack.
        context: Bytes of a window, in training and in the looks; default 64.
        batch: Windows a step; default 8.
        windows: Held-out windows of a look, a multiple of 32; default 512.
        between: See :func:`pretraining_looks`.
        deep: All layers (default), or the last one alone.
        layers: Blocks of the model; default those of its size.

    Returns:
        ``kind="look"``: :func:`feature_geometry` at every look, layer and kind of token, and the validation
        ``bits`` per byte. ``kind="half"``: RankMe of the last layer and token on parts of the windows, which
        :func:`orthokit.studies.representation_phases` tests with.

    Raises:
        UnknownNameError: No such size or optimizer.
        ShapeError: The number of windows is no multiple of 32.

    Example:
        >>> rows = pretraining_features("0.2M", "adamw", seed=0, steps=1, context=8, batch=1, windows=96, deep=False)
        >>> {row["step"] for row in rows}
        {0, 1}
    """
    overrides = {} if layers is None else {"layers": layers}
    model = TinyGPT(size, seed=seed, **overrides)
    task = language_modelling("addresses", context=context, batch=batch, seed=seed)
    rate = _rate("optimizer", optimizer, OPTIMIZER_RATES) if lr is None else lr
    rivals = contestant(optimizer, model, lr=rate, rest_lr=_REST_LR)
    racer = Racer(model, task, rivals, steps=steps, schedule="wsd", warmup=min(20, steps))
    seen = held_out_windows(count=windows, context=context)
    rows: list[Row] = []
    for step in pretraining_looks(steps, between=between):
        while racer.step < step:
            racer.advance()
        labels = {"size": size, "optimizer": optimizer, "seed": seed, "step": step}
        bits = _bits(model, "addresses", context, windows)
        features = window_features(model, seen, layers=_layers(model) if deep else [_LAST])
        rows += [{"kind": "look", **labels, "bits": bits, **row} for row in _geometries(features)]
        rows += [{**labels, **row} for row in _half_rows(features[_LAST, "last"])]
    return rows


def _rate(kind: str, name: str, rates: Mapping[str, float]) -> float:
    if name not in rates:
        raise unknown_name(kind, name, rates)
    return rates[name]


def _geometries(features: dict[tuple[str, str], Tensor]) -> Iterator[Row]:
    for (layer, tokens), Z in features.items():
        # Inner layers are told by the last token alone: the mean is a variant, not another study.
        if tokens == "last" or layer == _LAST:
            yield {"layer": layer, "tokens": tokens, **feature_geometry(Z)}


def representation_live(
    optimizers: Sequence[str], *, seeds: Sequence[int], size: str = "0.2M", **options: Any
) -> pd.DataFrame:
    """Some pretrainings, in the form of the recorded study.

    Args:
        optimizers: Names, see :func:`pretraining_features`.
        seeds: The seeds, shared by the optimizers.
        size: Size of the model; default ``"0.2M"``.
        **options: ``steps`` and other options of :func:`pretraining_features`.

    Returns:
        The rows.
    """
    import pandas as pd

    rows = [
        row
        for optimizer in optimizers
        for seed in seeds
        for row in pretraining_features(size, optimizer, seed=seed, **options)
    ]
    return pd.DataFrame(rows)


def asset_features(*, windows: int = 768, context: int = 64, deep: bool = True) -> list[Row]:
    """The features of the pretrained TinyGPT of the package, on the text it knows and on one it does not.

    Args:
        windows: Held-out windows of each text; default 768.
        context: Bytes of a window; default 64.
        deep: All layers (default), or the last one alone.

    Returns:
        Rows ``text, bits, layer, tokens`` and :func:`feature_geometry`.

    Example:
        >>> {row["text"] for row in asset_features(windows=96, context=8, deep=False)} == {"addresses", "moby_dick"}
        True
    """
    return [dict(row) for row in _asset_rows(windows, context, deep)]


@lru_cache(maxsize=4)
def _asset_rows(windows: int, context: int, deep: bool) -> list[Row]:
    """Measured once: every fine-tuning begins there."""
    return list(_text_rows(load_pretrained(), windows, context, deep))


def _text_rows(model: TinyGPT, windows: int, context: int, deep: bool) -> Iterator[Row]:
    for text in ("addresses", "moby_dick"):
        bits = _bits(model, text, context, windows)
        seen = held_out_windows(text, count=windows, context=context)
        features = window_features(model, seen, layers=_layers(model) if deep else [_LAST])
        yield from ({"text": text, "bits": bits, **row} for row in _geometries(features))


def finetuned_features(
    method: str,
    *,
    seed: int,
    text: str = "moby_dick",
    lr: float | None = None,
    steps: int = 30,
    windows: int = 768,
    context: int = 64,
    small: bool = False,
) -> list[Row]:
    """The features of the pretrained TinyGPT before and after a fine-tuning, on the new text and on the old.

    Args:
        method: ``"full"``, ``"oft"`` or ``"lora"``, as in the arena.
        seed: Of the batches and of what a method draws.
        text: What is trained on: ``"moby_dick"`` (default), or ``"addresses"``, the control: more of the same text.
        lr: Learning rate; default the one of :data:`FINETUNED`.
        steps: Length, ``>= 1``; default 30.
        windows: Held-out windows of each text; default 768.
        context: Bytes of a window; default 64.
        small: Short batches and few layers, for tests.

    Returns:
        Rows ``kind="finetune"`` with ``method, trained_on, seed, step, text, bits`` and :func:`feature_geometry`.

    Raises:
        UnknownNameError: No such method or text.

    Example:
        >>> rows = finetuned_features("oft", seed=0, steps=1, windows=96, context=8, small=True)
        >>> {(row["step"], row["text"]) for row in rows} >= {(0, "addresses"), (1, "moby_dick")}
        True
    """
    rate = _rate("method of fine-tuning", method, FINETUNED) if lr is None else lr
    racer = enter("tinygpt", method, lr=rate, seed=seed, steps=steps, small=small)
    if text != "moby_dick":
        told = racer.task.describe()
        sizes = {"context": told["context"], "batch": told["batch"], "seed": told["data_seed"]}
        racer.task = language_modelling(text, **sizes)  # type: ignore[arg-type]
    for _ in range(steps):
        racer.advance()
    racer.model.eval()
    labels = {"kind": "finetune", "method": method, "trained_on": text, "seed": seed}
    before = asset_features(windows=windows, context=context, deep=False)
    after = _text_rows(racer.model, windows, context, False)  # type: ignore[arg-type]
    return [{**labels, "step": step, **row} for step, rows in ((0, before), (steps, after)) for row in rows]
