"""The arena of the small language model: from the addresses to Moby-Dick."""

from __future__ import annotations

from torch import Tensor, nn

from orthokit.lab.arena.ground import Ground
from orthokit.lab.pretrained import load_pretrained
from orthokit.lab.tasks import LanguageModelling, language_modelling

__all__ = ["LANGUAGE"]

_BITS = "validation_bits_per_byte"


def _moby_dick(seed: int, small: bool) -> LanguageModelling:
    context, batch, windows = (32, 2, 4) if small else (128, 8, 64)
    return language_modelling("moby_dick", context=context, batch=batch, seed=seed, validation_windows=windows)


def _addresses(small: bool) -> LanguageModelling:
    context, windows = (32, 4) if small else (128, 64)
    return language_modelling("addresses", context=context, validation_windows=windows)


def _general(model: nn.Module, small: bool) -> dict[str, float]:
    return {"general": _addresses(small).evaluate(model)[_BITS]}


def _inputs(which: str, small: bool) -> list[Tensor]:
    task = _addresses(small) if which == "general" else _moby_dick(0, small)
    return list(task._windows(task.validation, task.validation_starts)[0].split(16))


LANGUAGE: dict[str, Ground] = {
    "tinygpt": Ground(
        label="TinyGPT, from the addresses to Moby-Dick",
        model=lambda _: load_pretrained(),
        task=_moby_dick,
        general=_general,
        # Every input is 128 wide there; the 344 of the down projections have no block of 32.
        targets=("blocks.*.attn.?", "blocks.*.mlp.gate", "blocks.*.mlp.up"),
        few=("blocks.0.attn.?",),
        steps=50,
        loss=_BITS,
        unit="bits per byte",
        error="",
        other="bits per byte of the addresses",
        inputs=_inputs,
        seen=("blocks.*.attn.?",),
        tokens=1024,
    ),
}
"""Grounds of language models, by name."""
