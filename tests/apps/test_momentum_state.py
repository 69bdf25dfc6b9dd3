"""The page "Momentum gap" without a browser: its fast numbers are the library's numbers."""

from __future__ import annotations

import json

import numpy as np
import pytest
from orthokit_widgets import momentum_state
from orthokit_widgets.momentum_data import BETAS, CURVE, PUBLISHED_GAPS, STEPS
from orthokit_widgets.momentum_state import MomentumState

from orthokit.diagnostics.momentum import alignment, momentum_buffers, pipelines, spectral_gap
from orthokit.diagnostics.synthetic import SignalPlusPerturbation, published_strengths
from orthokit.linalg import polar


def stream(state: MomentumState) -> SignalPlusPerturbation:
    return SignalPlusPerturbation(
        (state.size, state.size),
        strengths=published_strengths(state.rank),
        sigma=state.sigma,
        noise=state.noise,
        seed=state.seed,
    )


@pytest.mark.parametrize(
    ("beta", "sigma", "rank", "size", "noise", "seed"),
    [(0.9, 1.0, 3, 40, "iid", 0), (0.0, 0.4, 1, 20, "iid", 3), (0.995, 2.5, 10, 30, "arch", 1)],
)
def test_gap_and_alignment_are_those_of_the_momentum_of_the_stream(
    beta: float, sigma: float, rank: int, size: int, noise: str, seed: int
) -> None:
    state = MomentumState(beta=beta, sigma=sigma, rank=rank, size=size, noise=noise, seed=seed)
    found = state.wait()
    source = stream(state)
    M = momentum_buffers(source.stream(STEPS), beta)
    # float32 throughout: the fast path adds signal and noise buffers instead of averaging their sums.
    assert found["values"]["gap"] == pytest.approx(spectral_gap(M, rank=rank).item(), abs=2e-4 * sigma * size**0.5)
    assert found["values"]["alignment"] == pytest.approx(alignment(polar(M), source.signal).item(), abs=2e-4)
    curve = found["figures"]["gap"]["data"][0]["y"]
    assert len(curve) == len(CURVE)
    at = int(np.abs(BETAS[CURVE] - beta).argmin())
    assert curve[at] == pytest.approx(found["values"]["gap"], abs=1e-4)


def test_post_and_none_are_those_of_the_pipelines() -> None:
    state = MomentumState(beta=0.8, size=20, order="post")
    found = state.wait()
    source = stream(state)
    truth = pipelines(source.stream(STEPS), 0.8)
    assert found["values"]["alignment"] == pytest.approx(alignment(truth["post"], source.signal).item(), abs=1e-4)
    state.order = "none"
    none = state.wait()["values"]["alignment"]
    assert none == pytest.approx(alignment(truth["none"], source.signal).item(), abs=1e-4)
    names = [trace["name"] for trace in state.wait()["figures"]["gap"]["data"]]
    assert {"momentum, then polar", "polar, no momentum", "polar, then momentum"} <= set(names)


def test_the_standard_setting_shows_the_published_gaps_and_agrees_with_them() -> None:
    state = MomentumState()
    figure = state.wait()["figures"]["gap"]
    shown = {trace["name"]: trace for trace in figure["data"]}
    assert shown["gap, published"]["y"] == PUBLISHED_GAPS[1]
    ours = np.interp(PUBLISHED_GAPS[0], BETAS[CURVE], shown["gap"]["y"])
    # One seed against the mean of ten: gaps differ by the spread of a singular value, about 0.15 at 100 x 100.
    assert np.abs(ours - PUBLISHED_GAPS[1]).max() < 0.25
    state.sigma = 1.1
    assert "gap, published" not in {trace["name"] for trace in state.wait()["figures"]["gap"]["data"]}


def test_every_figure_is_json_and_changes_with_its_slider() -> None:
    state = MomentumState(size=30)
    before = state.wait()["figures"]
    for name, value in (("beta", 0.5), ("sigma", 2.0), ("rank", 5), ("seed", 4)):
        setattr(state, name, value)
        after = state.wait()["figures"]
        assert after["spectrum"]["data"] != before["spectrum"]["data"], name
        assert after["arrows"]["data"] != before["arrows"]["data"], name
        json.dumps(after, allow_nan=False)
        before = after
    assert state.last_ms > 0


def test_a_moved_beta_computes_no_curve_again(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    original = momentum_state.filter_curves
    monkeypatch.setattr(momentum_state, "filter_curves", lambda *a: calls.append(1) or original(*a))
    state = MomentumState(size=20, seed=77, sigma=0.77)
    state.wait()
    for beta in (0.1, 0.5, 0.9):
        state.beta = beta
        state.snapshot()
    assert len(calls) == 1
    state.sigma = 0.78
    state.snapshot()
    assert len(calls) == 2


def test_while_gradients_are_drawn_the_last_figures_stay_with_their_settings() -> None:
    state = MomentumState(size=30)
    before = state.wait()
    state.size, state.seed = 190, 98
    during = state.snapshot()
    assert "Drawing 1000 gradients of 190 × 190" in during["busy"]
    assert during["figures"] is before["figures"]
    assert during["settings"]["size"] == 30
    state.size, state.seed = 30, 0
    assert state.wait()["busy"] == ""


def test_a_failed_computation_is_told_and_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def fail(*args: object) -> None:
        calls.append(1)
        raise MemoryError("no room for 1000 gradients")

    monkeypatch.setattr(momentum_state, "draw", fail)
    state = MomentumState(size=20, seed=91)
    found = state.wait(10)
    state.wait(10)
    assert (found["figures"], calls) == ({}, [1])
    assert state.error == "MemoryError: no room for 1000 gradients"


def test_a_closed_page_gives_up_its_computation() -> None:
    state = MomentumState(size=60, order="post", seed=55)
    while "Orthogonalising" not in state.snapshot()["busy"]:
        state.worker.join(0.05)
    state.close()
    assert state.worker.job is None
    assert state.worker.join(20)


def test_rank_fifteen_fits_into_the_smallest_matrix() -> None:
    found = MomentumState(size=20, rank=15).wait()
    assert found["values"]["gap"] >= 0
    assert np.isfinite(found["values"]["alignment"])


def test_a_result_that_arrives_while_the_charts_are_drawn_is_not_forgotten(monkeypatch) -> None:
    """The thread may finish between the look that found nothing and the answer: the page must look once more."""
    state = MomentumState(size=40, seed=77)
    state.wait()
    state.order = "post"
    drawn = state._gap_figure

    def slowly(curves, post):
        assert state.worker.join(60.0)
        return drawn(curves, post)

    monkeypatch.setattr(state, "_gap_figure", slowly)
    first = state.snapshot()
    assert first["busy"], "nothing would repaint the page"
    second = state.snapshot()
    assert not second["busy"]
    assert [trace["name"] for trace in second["figures"]["gap"]["data"]].count("polar, then momentum") == 1
