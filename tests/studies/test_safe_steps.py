"""Steps against a protected space, and one step that is far too long."""

import pytest

from orthokit.errors import OptionError, UnknownNameError
from orthokit.studies.safe_steps import steps_in_span, survive_spike


def test_only_a_projected_step_keeps_every_optimizer_out():
    found = steps_in_span(["sgd", "adamw", "pion"], steps=4)
    assert (found["projected step"] < 1e-4).all()
    assert found.loc["adamw", "projected gradient"] > 1e-2
    # Plain descent with momentum stays where its gradients are.
    assert found.loc["sgd", "projected gradient"] < 1e-4 < 1e-2 < found.loc["sgd", "free"]


def test_a_controlled_run_survives_what_a_free_one_does_not():
    found = survive_spike([1.0, 1e4], seeds=[0], steps=24).set_index(["factor", "way"])["error"]
    assert found[1e4, "free"] > 0.7
    assert found[1e4, "controlled"] < found[1e4, "free"] - 0.2
    assert found[1.0, "controlled"] < 0.7


def test_bad_input_is_named():
    with pytest.raises(UnknownNameError, match="did you mean 'adamw'"):
        steps_in_span(["adam"])
    with pytest.raises(OptionError, match="factors >= 1"):
        survive_spike([0.5], seeds=[0])
    with pytest.raises(OptionError, match="steps >= 2"):
        survive_spike([2.0], seeds=[0], steps=1)
