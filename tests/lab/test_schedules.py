"""Learning-rate schedules: shape, range and the errors."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orthokit.errors import OptionError, UnknownNameError
from orthokit.lab import SCHEDULES, lr_factor


def factors(**options) -> list[float]:
    return [lr_factor(step, **options) for step in range(options["steps"])]


@given(
    schedule=st.sampled_from(SCHEDULES),
    steps=st.integers(1, 60),
    share=st.floats(0, 1),
    final=st.floats(0, 1),
    decay=st.floats(0.01, 1),
)
def test_rises_to_one_then_never_rises_again(schedule, steps, share, final, decay):
    warmup = int(share * steps)
    found = factors(steps=steps, schedule=schedule, warmup=warmup, final=final, decay=decay)
    assert all(0 <= f <= 1 for f in found)
    assert found[:warmup] == pytest.approx([(i + 1) / warmup for i in range(warmup)])
    assert all(a >= b for a, b in zip(found[warmup:], found[warmup + 1 :], strict=False))
    assert all(f >= final for f in found[warmup:])


def test_constant_stays():
    assert factors(steps=5, warmup=2) == [0.5, 1, 1, 1, 1]


def test_cosine_is_half_way_in_the_middle():
    found = factors(steps=100, schedule="cosine", final=0.2)
    assert found[0] == 1 and found[50] == pytest.approx(0.6)
    assert found[25] == pytest.approx(0.2 + 0.8 * (1 + math.sqrt(0.5)) / 2)
    assert found[-1] == pytest.approx(0.2, abs=1e-3)


def test_wsd_is_flat_then_falls_in_a_line():
    found = factors(steps=10, schedule="wsd", warmup=2, decay=0.4)
    assert found == pytest.approx([0.5, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25])


@pytest.mark.parametrize(
    "bad",
    [{"warmup": -1}, {"warmup": 11}, {"final": -0.1}, {"final": 1.1}, {"decay": 0.0}, {"decay": 1.5}],
    ids=str,
)
def test_numbers_out_of_range_are_refused(bad):
    with pytest.raises(OptionError, match=f"got .*{next(iter(bad))}="):
        lr_factor(0, **{"steps": 10, **bad})


def test_unknown_schedule_is_refused():
    with pytest.raises(UnknownNameError, match="did you mean 'cosine'"):
        lr_factor(0, steps=10, schedule="cosin")
