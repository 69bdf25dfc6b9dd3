"""What the page "Forgetting" says of one run, in sentences and numbers for someone who has never seen it."""

from __future__ import annotations

import math

import numpy as np

from orthokit.figures.template import number
from orthokit.lab.arena import METHODS, Ground
from orthokit_widgets.forgetting_data import Portrait, Walk

__all__ = ["PATH_WORDS", "explained", "facts"]

#: Paths back, in words.
PATH_WORDS = {"cayley_sqrt": "turn, √α", "cayley_linear": "turn, α", "dense": "straight"}
_ROUNDING = 1e-4  # relative changes of singular values below this are rounding of float32, layer after layer
_LITTLE = 0.02  # of the gain; less forgetting than that is hardly any
_KEPT = 0.9  # share of the gain that a way back may not fall below
_FINE = 101


def explained(portrait: Portrait, place: Ground, *, path: str, alpha: float) -> str:
    """One run in a few sentences: what it learnt and forgot, what became of the weights, what going back would give.

    Args:
        portrait: The run.
        place: Its ground, which names the units.
        path: The way back that is shown.
        alpha: How far along it the page is, 1 the finished model.

    Returns:
        Sentences on lines of their own.
    """
    gain, forgetting = portrait.point
    lines = [_who(portrait), _learnt(portrait, place), _forgot(portrait, place), _inside(portrait)]
    walk = portrait.walks.get(path)
    if walk is not None:
        lines.append(_back(walk, path))
        if alpha < 1 and gain > 0:
            g, f = walk.at(alpha)
            left = f" and {_share(f, forgetting)} of the forgetting is left" if forgetting > 0 else ""
            lines.append(f"Where the slider is, at α = {alpha:.2f}, {_share(g, gain)} of the gain is kept{left}.")
    return "\n".join(line for line in lines if line)


def facts(portrait: Portrait, place: Ground, *, path: str, alpha: float) -> list[dict[str, str]]:
    """The same in numbers; the first two move with the slider."""
    walk = portrait.walks.get(path)
    gain, forgetting = portrait.point if walk is None else walk.at(alpha)
    found = portrait.diagnostics
    shares = {
        "moved": "weights moved",
        "spectrum": "σ moved",
        "raw": "outputs moved",
        "procrustes": "left, turned back",
    }
    told = [("learnt", _signed(gain), place.unit), ("forgot", _signed(forgetting), place.unit)]
    told += [(label, _percent(found[name]) if name in found else "–", "") for name, label in shares.items()]
    rank = found.get("stable_rank")
    told.append(("rank of ΔW", "–" if rank is None else number(rank), "stable"))
    return [{"name": label, "value": value, "unit": unit} for label, value, unit in told]


def _who(portrait: Portrait) -> str:
    entry = METHODS[portrait.method]
    size = entry.says.format(portrait.size) if portrait.size is not None else ""
    counted = f"{portrait.trainable:,} trained numbers".replace(",", "\u00a0") if portrait.trainable else ""
    inside = ", ".join(part for part in (size, counted) if part)
    name = f"{entry.label[:1].upper()}{entry.label[1:]}"
    who = f"{name} ({inside})" if inside else name
    rate = f" at the learning rate {portrait.lr:g}" if math.isfinite(portrait.lr) else ""
    layers = "" if portrait.of_seed is None else f" (its layers are those of seed {portrait.of_seed})"
    return f"{who}, {portrait.steps} steps{rate}; {portrait.label}{layers}."


def _learnt(portrait: Portrait, place: Ground) -> str:
    gain, first = portrait.point[0], portrait.start[0]
    losses = f"from {first:.3f} to {first - gain:.3f} {place.unit}"
    error = ""
    if all(map(math.isfinite, portrait.errors)):
        error = (
            f"; it is wrong in {_percent(portrait.errors[1])} of the cases, and was in {_percent(portrait.errors[0])}"
        )
    if gain <= 0:
        return f"It learnt nothing: the loss on the new task went {losses}{error}."
    return f"What it learnt: the loss on the new task fell {losses}{error}."


def _forgot(portrait: Portrait, place: Ground) -> str:
    (gain, forgetting), before = portrait.point, portrait.start[1]
    losses = f"from {before:.3f} to {before + forgetting:.3f} {place.other}"
    if forgetting <= 0:
        return f"It forgot nothing: the loss on what it could before fell {losses}."
    little = "What it forgot is little" if forgetting < _LITTLE * gain else "What it forgot"
    share = f": {number(forgetting / gain)} for every 1 gained" if gain > 0 else ""
    return f"{little}: the loss on what it could before rose {losses}{share}."


def _inside(portrait: Portrait) -> str:
    found, said = portrait.diagnostics, []
    if "moved" in found:
        said.append(f"the weights moved by {_percent(found['moved'])} of their length")
    if "spectrum" in found:
        kept = found["spectrum"] < _ROUNDING
        said.append(
            "their singular values stayed, as a rotation keeps them"
            if kept
            else f"singular values changed by up to {_percent(found['spectrum'])} of the largest"
        )
    first = f"How the geometry changed: {' and '.join(said)}." if said else ""
    raw, rest = found.get("raw"), found.get("procrustes")
    if raw is None or rest is None or raw <= 0:
        return first
    much = "much of that is" if rest < 0.5 * raw else "some of that is" if rest < 0.9 * raw else "hardly any of that is"
    second = (
        f"On inputs it knew before, the outputs of its layers moved by {_percent(raw)} of their length; {much} one "
        f"common turn, which would keep all distances between them: {_percent(rest)} is left when it is undone."
    )
    return f"{first} {second}".strip()


def _back(walk: Walk, path: str) -> str:
    """What the way back gives for a small part of the gain."""
    alphas = np.linspace(0, 1, _FINE)
    gain, forgetting = (np.interp(alphas, walk.alphas, values) for values in (walk.gain, walk.forgetting))
    way = f"the path “{PATH_WORDS[path]}”"
    if gain[-1] <= 0:
        return ""
    if forgetting[-1] <= 0:
        return "What rewinding would give back: nothing, as nothing was forgotten."
    enough = np.flatnonzero(gain >= _KEPT * gain[-1])
    # From the end on without a gap: the nearest place that still has that much.
    at = int(enough[0]) if len(enough) == enough[-1] - enough[0] + 1 else int(enough[-1])
    returned = 1 - forgetting[at] / forgetting[-1]
    best = int(gain.argmax())
    more = ""
    if gain[best] > 1.01 * gain[-1]:
        there = f"at α = {alphas[best]:.2f} the gain is {number(gain[best])}"
        more = f" The last stretch went too far even for the new task: {there}."
    if returned <= 0:
        return f"What rewinding would give back: nothing for a tenth of the gain, along {way}.{more}"
    return (
        f"What rewinding would give back: at α = {alphas[at]:.2f} along {way}, {_share(gain[at], gain[-1])} of the "
        f"gain is kept and {_share(returned, 1.0)} of the forgetting undone.{more}"
    )


def _share(part: float, whole: float) -> str:
    return f"{100 * part / whole:.0f} %".replace("-", "−")


def _percent(value: float) -> str:
    if 0 < value < 1e-5:
        return "≈ 0 %"
    return f"{number(100 * value)} %"


def _signed(value: float) -> str:
    return f"{value:.3f}".replace("-", "−")
