"""The options of a merging method, chosen on validation scores with the same number of trials for every method."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from orthokit.errors import MissingExtraError, NonFiniteError, OptionError, unknown_name
from orthokit.merging._registry import method_named

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["SPACES", "Tuned", "tune"]

SAMPLERS = ("tpe", "random")

_SCALE = {"scale": (0.1, 2.0, "log")}
SPACES: Mapping[str, Mapping[str, Any]] = {
    "linear": {"scale": (0.1, 2.0, "log")},
    "task_arithmetic": {"scale": (0.1, 1.5, "log")},
    "slerp": {"t": (0.0, 1.0)},
    "ties": {"density": (0.05, 1.0, "log"), **_SCALE},
    "dare": {"p": (0.1, 0.95), **_SCALE},
    "model_stock": _SCALE,
    "tsv": _SCALE,
    "iso_c": _SCALE,
    "knots": {"inner": ("linear", "ties"), **_SCALE},
    "wudi": _SCALE,
    "regmean": {"offdiagonal": (0.1, 1.0), **_SCALE},
    "fisher": _SCALE,
    "curvature": {"power": (0.0, 1.0), **_SCALE},
    "metrics_weighted": {"power": (0.0, 4.0), **_SCALE},
    "orthomerge": {"residual": ("linear", "ties", "tsv"), "target": ("global", "conflict"), **_SCALE},
    "fda": {"pull": (0.05, 2.0, "log"), **_SCALE},
}
"""What :func:`tune` varies by default: ``(least, most)``, ``(least, most, "log")`` or the names to choose from."""


@dataclass(frozen=True)
class Tuned:
    """The outcome of :func:`tune`.

    Args:
        options: The best options found.
        score: Their score.
        trials: One row per trial: the options and ``score``, in the order in which they were tried.
    """

    options: Mapping[str, Any]
    score: float
    trials: list[dict[str, Any]]

    def to_frame(self) -> pd.DataFrame:
        """The trials as a frame."""
        import pandas as pd

        return pd.DataFrame(self.trials)


def tune(
    method: str | None,
    scores: Callable[[Mapping[str, Any]], float | Mapping[str, float]],
    *,
    budget: int = 20,
    space: Mapping[str, Any] | None = None,
    sampler: str = "tpe",
    seed: int = 0,
) -> Tuned:
    """The options of a method with the best validation score among ``budget`` trials.

    The first trial are the method's defaults, so that tuning never gives less than they do. Options that were tried
    before are not scored again, but count: every method gets the same number of choices.

    Args:
        method: Name of a method; or ``None`` for anything else that ``scores`` does with the options of ``space``.
        scores: Takes the options of one trial and returns its score, higher is better; of a mapping (task to score)
            the mean counts. Usually it merges with them and evaluates on validation data.
        budget: Number of trials, ``>= 1``; default 20.
        space: What to vary; default :data:`SPACES` of the method. ``(least, most)`` or ``(least, most, "log")`` for
            numbers, a tuple of strings for names.
        sampler: ``"tpe"`` (default), a Bayesian search, or ``"random"``.
        seed: Of the sampler; default 0.

    Returns:
        :class:`Tuned`.

    Raises:
        UnknownNameError: Unknown method, sampler, or option in ``space``.
        OptionError: ``budget`` below 1, a space that is none, or neither method nor space.
        NonFiniteError: A score that is no finite number, with the options it belongs to.
        MissingExtraError: The package optuna is not installed.

    Example:
        >>> found = tune("task_arithmetic", lambda o: -((o.get("scale", 0.3) - 0.8) ** 2), budget=15)
        >>> abs(found.options["scale"] - 0.8) < 0.2, len(found.trials)
        (True, 15)

    Numerics:
        The sampler's own cost is milliseconds per trial.

    References:
        T. Akiba et al. (2019), Optuna, arXiv 1907.10902; J. Bergstra et al. (2011), Algorithms for hyper-parameter
        optimization, for the tree-structured Parzen estimator.
    """
    if method is not None:
        known = {"scale", *method_named(method).options}
        space = dict(SPACES[method] if space is None else space)
    elif space is not None:
        known = set(space)
    else:
        raise OptionError("method=None has no options of its own; say what to vary with space.")
    for name, values in space.items():
        if name not in known:
            raise unknown_name(f"option of {method}", name, sorted(known))
        _check_space(name, values)
    if sampler not in SAMPLERS:
        raise unknown_name("sampler", sampler, SAMPLERS)
    if isinstance(budget, bool) or not isinstance(budget, int) or budget < 1:
        raise OptionError(f"budget must be at least 1 trial; got {budget!r}.")
    trials: list[dict[str, Any]] = [{"score": _score(scores, {})}]
    seen: dict[tuple, float] = {}
    if space and budget > 1:
        study = _study(sampler, seed)
        for _ in range(budget - 1):
            trial = study.ask()
            options = {name: _suggested(trial, name, values) for name, values in space.items()}
            key = tuple(options.values())
            if key not in seen:
                seen[key] = _score(scores, options)
            study.tell(trial, seen[key])
            trials.append({**options, "score": seen[key]})
    best = max(trials, key=lambda row: row["score"])
    return Tuned({name: value for name, value in best.items() if name != "score"}, best["score"], trials)


def _study(sampler: str, seed: int) -> Any:
    if importlib.util.find_spec("optuna") is None:
        raise MissingExtraError("tune searches with the package optuna. Install it with: pip install 'orthokit[tune]'")
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    chosen = {"tpe": optuna.samplers.TPESampler, "random": optuna.samplers.RandomSampler}[sampler](seed=seed)
    return optuna.create_study(direction="maximize", sampler=chosen)


def _suggested(trial: Any, name: str, values: tuple) -> Any:
    if isinstance(values[0], str):
        return trial.suggest_categorical(name, values)
    return trial.suggest_float(name, values[0], values[1], log=len(values) == 3)


def _check_space(name: str, values: Any) -> None:
    names = isinstance(values, tuple) and values and all(isinstance(value, str) for value in values)
    numbers = (
        isinstance(values, tuple)
        and len(values) in (2, 3)
        and all(isinstance(value, int | float) for value in values[:2])
        and values[0] < values[1]
        and (len(values) == 2 or (values[2] == "log" and values[0] > 0))
    )
    if not (names or numbers):
        raise OptionError(
            f"space[{name!r}] must be (least, most), (least, most, 'log') with least > 0, or a tuple of names; got "
            f"{values!r}."
        )


def _score(scores: Callable[[Mapping[str, Any]], float | Mapping[str, float]], options: Mapping[str, Any]) -> float:
    found = scores(dict(options))
    value = float(found) if not isinstance(found, Mapping) else math.fsum(found.values()) / max(len(found), 1)
    if not math.isfinite(value):
        raise NonFiniteError(f"scores must return a finite number; got {found!r} for {dict(options)}.")
    return value
