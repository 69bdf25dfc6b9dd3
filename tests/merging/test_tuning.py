"""Tuning: the defaults first, the same number of trials for all, and no global randomness."""

from __future__ import annotations

import math

import pytest

from orthokit.errors import MissingExtraError, NonFiniteError, OptionError, UnknownNameError
from orthokit.merging import methods, tune
from orthokit.merging.tuning import SPACES

pytest.importorskip("optuna", reason="optuna is not installed")


def test_every_method_has_a_space_of_its_own_options() -> None:
    assert SPACES.keys() == methods().keys()
    for name in methods():
        assert len(tune(name, lambda options: 0.0, budget=2).trials) == 2


@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_the_best_of_all_trials_is_returned_and_defaults_come_first(sampler: str) -> None:
    asked = []

    def scores(options):
        asked.append(options)
        return {"a": -abs(options.get("density", 0.2) - 0.6), "b": -abs(options.get("scale", 1.0) - 0.5)}

    found = tune("ties", scores, budget=12, sampler=sampler, seed=1)
    assert asked[0] == {} and len(found.trials) == 12
    assert found.score == max(row["score"] for row in found.trials)
    assert found.score == pytest.approx(sum(scores(found.options).values()) / 2)
    assert found.trials == tune("ties", scores, budget=12, sampler=sampler, seed=1).trials
    assert len(found.to_frame()) == 12


def test_no_options_to_vary_take_one_trial_and_repeats_are_not_scored_again() -> None:
    asked = []
    tune("ties", lambda options: asked.append(options) or 0.0, budget=9, space={})
    assert len(asked) == 1
    tune("knots", lambda options: asked.append(options) or 0.0, budget=9, space={"inner": ("linear", "ties")})
    assert len(asked) <= 1 + 1 + 2


def test_bad_input_is_refused(monkeypatch, unchecked) -> None:
    with pytest.raises(UnknownNameError):
        tune("mean", lambda options: 0.0)
    with pytest.raises(UnknownNameError, match="density"):
        tune("linear", lambda options: 0.0, space={"density": (0.1, 1.0)})
    with pytest.raises(UnknownNameError, match="sampler"):
        tune("ties", lambda options: 0.0, sampler="grid")
    for space in ({"scale": (2.0, 1.0)}, {"scale": (0.0, 1.0, "log")}, {"scale": 1.0}, {"scale": ()}):
        with pytest.raises(OptionError, match="space"):
            tune("ties", lambda options: 0.0, space=space)
    with pytest.raises(OptionError, match="budget"):
        tune("ties", lambda options: 0.0, budget=0)
    with pytest.raises(NonFiniteError, match="finite"):
        tune("ties", lambda options: math.nan)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match="optuna"):
        tune("ties", lambda options: 0.0)


def test_anything_can_be_tuned_over_a_space_of_its_own() -> None:
    found = tune(None, lambda o: -abs(math.log10(o.get("lr", 1.0)) + 2), budget=20, space={"lr": (1e-4, 1.0, "log")})
    assert found.score > -0.5 and found.trials[0] == {"score": -2.0}
    with pytest.raises(OptionError, match="space"):
        tune(None, lambda o: 0.0)
