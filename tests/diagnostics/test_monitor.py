"""The monitor: right numbers, never in the way, never above its budget."""

import copy
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from orthokit.diagnostics import _live, bulk_fit, power_law_alpha
from orthokit.diagnostics._budget import Budget
from orthokit.diagnostics._live import DERIVED
from orthokit.diagnostics.energy import expected_energy, hyperspherical_energy
from orthokit.diagnostics.momentum import alignment, spectral_gap
from orthokit.diagnostics.monitor import QUANTITIES, USUAL, Monitor
from orthokit.diagnostics.spectrum import effective_rank, spectrum, stable_rank
from orthokit.errors import DtypeError, NothingMatchedWarning, OptionError, UnknownNameError
from orthokit.linalg import polar, random_orthogonal, singular_values
from orthokit.matrices import matrices


class Clock:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def small_model(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 6))


def heavy_model() -> nn.Sequential:
    """Its middle weight has eigenvalues that follow a power law with exponent 3."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 70), nn.Tanh(), nn.Linear(70, 70), nn.Tanh(), nn.Linear(70, 6))
    generator = torch.Generator().manual_seed(0)
    U, V = (random_orthogonal(70, 70, generator=generator) for _ in range(2))
    with torch.no_grad():
        model[2].weight.copy_(0.1 * U * (1 - (torch.arange(70) + 0.5) / 70) ** -0.25 @ V)
    return model


def train(model: nn.Module, optimizer, steps: int, *, monitor: Monitor | None = None, seed: int = 0) -> list:
    generator = torch.Generator().manual_seed(seed)
    looks = []
    for step in range(steps):
        x = torch.randn(16, 8, generator=generator)
        nn.functional.mse_loss(model(x), x[:, :6]).backward()
        optimizer.step()
        if monitor is not None:
            looks.append(monitor.observe(step))
        optimizer.zero_grad()
    return looks


def optimizers(model: nn.Module) -> dict:
    return {
        "momentum": torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9),
        "adam": torch.optim.AdamW(model.parameters(), lr=1e-2),
        "plain": torch.optim.SGD(model.parameters(), lr=0.05),
    }


@pytest.mark.parametrize("kind", ["momentum", "adam", "plain"])
def test_training_is_bit_for_bit_the_same_with_a_monitor(kind):
    plain, watched = small_model(), small_model()
    first, second = optimizers(plain)[kind], optimizers(watched)[kind]
    state = torch.get_rng_state()
    train(plain, first, 25)
    train(watched, second, 25, monitor=Monitor(watched, second, every=2, budget=1.0))
    assert torch.equal(torch.get_rng_state(), state)
    for a, b in zip(plain.parameters(), watched.parameters(), strict=True):
        assert torch.equal(a, b)
    one, two = first.state_dict()["state"], second.state_dict()["state"]
    assert one.keys() == two.keys()
    assert len(first.state) == len(second.state)
    for key in one:
        assert one[key].keys() == two[key].keys()
        for name, value in one[key].items():
            assert value is two[key][name] or torch.equal(value, two[key][name])


def test_gradients_are_left_as_they_are():
    model = small_model()
    optimizer = optimizers(model)["momentum"]
    monitor = Monitor(model, optimizer, every=1, budget=1.0)
    model(torch.randn(4, 8)).sum().backward()
    grads = [p.grad for p in model.parameters()]
    before = copy.deepcopy(grads)
    optimizer.step()
    monitor.observe(0)
    assert all(p.grad is g and torch.equal(g, b) for p, g, b in zip(model.parameters(), grads, before, strict=True))


def test_records_agree_with_the_diagnostics():
    model = small_model()
    optimizer = optimizers(model)["momentum"]
    monitor = Monitor(model, optimizer, every=1, budget=1.0, rank=3, signal_beta=0.9)
    gradients = []
    generator = torch.Generator().manual_seed(1)
    rows: list = []
    for step in range(12):
        x = torch.randn(16, 8, generator=generator)
        model(x).square().mean().backward()
        gradients.append(model[0].weight.grad.clone())
        optimizer.step()
        rows = monitor.observe(step) or []
        optimizer.zero_grad()
    W = model[0].weight.detach()
    M = optimizer.state[model[0].weight]["momentum_buffer"]
    row = rows[0]
    assert row["matrix"] == "0.weight" and row["step"] == 11
    exact = spectrum(W).numpy()
    # Gram eigenvalues: an absolute error of eps * sigma_1^2 in sigma_k^2.
    np.testing.assert_allclose(row["spectrum"] ** 2, exact**2, atol=20 * np.finfo(np.float32).eps * exact[0] ** 2)
    assert row["stable_rank"] == pytest.approx(stable_rank(W).item(), rel=1e-5)
    assert row["energy"] == pytest.approx(hyperspherical_energy(W).item() - expected_energy(8), abs=1e-6)
    assert row["gap"] == pytest.approx(spectral_gap(M, rank=3).item(), abs=1e-6)
    values = row["momentum_spectrum"]
    assert row["gap_ratio"] == pytest.approx(values[2] / values[3], rel=1e-5)
    signal = sum(0.1 * 0.9 ** (11 - t) * G for t, G in enumerate(gradients))
    assert row["alignment"] == pytest.approx(alignment(polar(M), signal).item(), abs=1e-5)
    assert list(monitor.signal_steps) == list(range(12))


def test_alignment_waits_for_ten_gradients():
    model = small_model()
    optimizer = optimizers(model)["momentum"]
    looks = train(model, optimizer, 12, monitor=Monitor(model, optimizer, every=1, budget=1.0))
    assert ["alignment" in look[0] for look in looks] == [False] * 9 + [True] * 3


def test_adam_momentum_is_found():
    model = small_model()
    optimizer = optimizers(model)["adam"]
    monitor = Monitor(model, optimizer, every=1, budget=1.0, rank=2)
    (look,) = train(model, optimizer, 1, monitor=monitor)
    assert look[1]["gap"] == pytest.approx(spectral_gap(optimizer.state[model[2].weight]["exp_avg"], rank=2).item())


COSTS = st.floats(0, 5, allow_nan=False)
STEPS = st.lists(st.floats(0, 2, allow_nan=False), min_size=1, max_size=120)


@given(STEPS, COSTS, st.lists(COSTS, min_size=1), COSTS, st.floats(0.01, 1), st.integers(1, 7))
@settings(max_examples=120, deadline=None)
def test_time_spent_never_exceeds_the_budget_by_more_than_one_cost(steps, feed, looks, spread, share, every):
    clock = Clock()
    model = nn.Linear(2, 2)
    monitor = Monitor(model, torch.optim.SGD(model.parameters(), lr=0.1), every=every, budget=share, clock=clock)
    costs, at, start = [], [], clock.now

    def spend(cost: float) -> None:
        clock.now += cost
        costs.append(cost)

    def measure(step: int) -> list:
        spend(looks[len(at) % len(looks)])
        at.append(step)
        return []

    monitor._measure = measure  # the look takes what the test says
    monitor._feed = lambda step: spend(feed + spread * (step % 2))
    for step, taken in enumerate(steps):
        clock.now += taken
        start = start if step else clock.now
        monitor.observe(step)
        total, slack = sum(costs), max(looks) + feed + spread
        assert total <= share * (clock.now - start) + slack + 1e-9
        assert monitor.share * (clock.now - start) == pytest.approx(total)
    assert at[0] == 0
    assert all(late - early >= every for early, late in pairwise(at))


@given(st.floats(0.1, 1), st.floats(0.001, 1), st.floats(0.05, 0.5))
@settings(max_examples=30, deadline=None)
def test_the_period_settles_on_what_the_budget_bears(step_time, look_time, share):
    budget, now, gaps, last = Budget(share=share, every=1), 0.0, [], 0
    wanted = max(1, look_time * (1 - share) / (share * step_time))
    for step in range(int(5 * wanted) + 30):
        now += step_time
        budget.arrive(now)
        if budget.due(step) and budget.affords_look():
            now += look_time
            budget.pay_look(step, look_time, upkeep=0.0, now=now)
            gaps.append(step - last)
            last = step
    assert budget.plan() == pytest.approx(wanted, abs=1 + 1e-6)
    assert gaps[-1] == pytest.approx(wanted, abs=1 + 1e-6)


def run(monitor: Monitor, clock: Clock, *, first: int, steps: int, step_time: float, look_time: float) -> list[int]:
    """Looks made while steps and looks take the given times."""
    looks = []

    def measure(step: int) -> list:
        clock.now += look_time
        looks.append(step)
        return []

    monitor._measure = measure
    for step in range(first, first + steps):
        clock.now += step_time
        monitor.observe(step)
    return looks


def test_a_stretched_period_is_told_once_and_told_back():
    clock = Clock()
    monitor = Monitor(small_model(), every=10, budget=0.05, quantities=["spectrum"], clock=clock)
    looks = run(monitor, clock, first=0, steps=300, step_time=1.0, look_time=2.0)
    assert monitor.period == looks[-1] - looks[-2] == 38
    assert monitor.notes == ["looking every 38 steps instead of 10 to stay within 5 % of the step time"]
    assert monitor.share <= 0.05
    run(monitor, clock, first=300, steps=300, step_time=20.0, look_time=2.0)
    assert monitor.period == 10
    assert monitor.notes[-1] == "looking every 10 steps again"
    assert len(monitor.notes) <= 6


def test_a_cheap_look_keeps_the_asked_period_and_says_nothing():
    clock = Clock()
    monitor = Monitor(small_model(), every=10, budget=0.05, quantities=["spectrum"], clock=clock)
    looks = run(monitor, clock, first=0, steps=200, step_time=1.0, look_time=0.1)
    assert looks == list(range(0, 200, 10)) and monitor.notes == [] and monitor.period == 10


def test_upkeep_of_the_signal_leaves_room_for_looks():
    clock = Clock()
    model = small_model()
    monitor = Monitor(model, optimizers(model)["momentum"], every=5, budget=0.1, clock=clock)

    def feed(step: int) -> None:
        clock.now += 0.2
        monitor._signal_steps.append(step)

    monitor._feed = feed
    looks = run(monitor, clock, first=0, steps=400, step_time=1.0, look_time=0.5)
    assert len(looks) >= 10 and monitor.share <= 0.1
    assert len(looks) < len(monitor.signal_steps) < 400
    assert set(looks) <= set(monitor.signal_steps.tolist())


def test_a_new_run_with_smaller_step_numbers_is_looked_at():
    clock = Clock()
    monitor = Monitor(small_model(), every=10, quantities=["spectrum"], clock=clock)
    run(monitor, clock, first=500, steps=5, step_time=1.0, look_time=0.01)
    assert run(monitor, clock, first=0, steps=5, step_time=1.0, look_time=0.01) == [0]


def test_without_an_optimizer_the_weights_are_measured_and_a_note_says_so():
    monitor = Monitor(small_model())
    rows = monitor.observe(0)
    assert rows is not None and set(rows[0]) == {"step", "matrix", "spectrum", "stable_rank", "energy"}
    assert "need the optimizer" in monitor.notes[0]


def test_what_cannot_be_measured_is_noted_once_and_the_rest_goes_on():
    model = small_model()
    optimizer = optimizers(model)["plain"]
    monitor = Monitor(model, optimizer, every=1, budget=1.0)
    train(model, optimizer, 3, monitor=monitor)
    assert len(monitor.records) == 6 and "gap" not in monitor.records[-1]
    assert sum("keeps no momentum" in note for note in monitor.notes) == 1
    with torch.no_grad():
        model[0].weight[0, 0] = float("nan")
    rows = monitor.observe(3)
    assert rows is not None and "spectrum" not in rows[0] and "energy" not in rows[0] and "spectrum" in rows[1]
    assert any(note.startswith("spectrum of '0.weight'") for note in monitor.notes)


def test_no_gradients_no_alignment():
    model = small_model()
    optimizer = optimizers(model)["momentum"]
    train(model, optimizer, 1)
    optimizer.zero_grad()
    monitor = Monitor(model, optimizer, every=1, budget=1.0)
    rows = monitor.observe(1)
    assert rows is not None and "gap" in rows[0] and "alignment" not in rows[0]
    assert len(monitor.signal_steps) == 0
    assert any("no gradient" in note for note in monitor.notes)


def test_a_bad_gradient_does_not_poison_the_signal_for_good():
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.5)
    monitor = Monitor(model, optimizer, every=1, budget=1.0)
    train(model, optimizer, 12, monitor=monitor)
    for p in model.parameters():
        p.grad = torch.full_like(p, float("inf"))
    monitor.observe(12)
    optimizer.zero_grad()
    looks = train(model, optimizer, 12, monitor=monitor)
    assert "alignment" in looks[-1][0]


@pytest.mark.parametrize("quantity", QUANTITIES)
def test_one_quantity_alone(quantity):
    model = heavy_model()
    optimizer = optimizers(model)["momentum"]
    looks = train(model, optimizer, 11, monitor=Monitor(model, optimizer, every=1, budget=1.0, quantities=[quantity]))
    wanted = {"gap": {"gap", "gap_ratio", "momentum_spectrum"}, "edge": {"mp_edge", "above_edge"}}
    assert set(looks[-1][1]) == {"step", "matrix"} | wanted.get(quantity, {quantity})


def test_what_follows_from_the_spectrum_is_what_an_inspection_measures():
    model = heavy_model()
    monitor = Monitor(model, quantities=[*DERIVED, "spectrum"])
    rows = monitor.observe(0)
    assert rows is not None
    W = model[2].weight.detach()
    sigma = torch.linalg.svdvals(W.double())
    bulk, tail = bulk_fit(sigma, shape=(70, 70)), power_law_alpha(W)
    row = rows[1]
    scalars = {"effective_rank", "condition", "orthogonality_error", "mp_edge", "above_edge", "alpha"}
    assert set(row) == {"step", "matrix", "spectrum"} | scalars
    assert row["effective_rank"] == pytest.approx(effective_rank(W.double()).item(), rel=1e-5)
    assert row["condition"] == pytest.approx(torch.linalg.cond(W.double()).item(), rel=1e-3)
    error = (1 - sigma.sum() ** 2 / (70 * sigma.square().sum())).sqrt().item()
    assert row["orthogonality_error"] == pytest.approx(error, rel=1e-5)
    assert (row["mp_edge"], row["above_edge"]) == (pytest.approx(bulk.edge, rel=1e-5), bulk.above)
    assert tail.refused is None and row["alpha"] == pytest.approx(tail.alpha, rel=1e-4)
    frame = monitor.frame()
    assert set(frame["quantity"]) == scalars
    alphas = frame[frame["quantity"] == "alpha"]
    assert list(alphas["matrix"]) == ["2.weight"] and alphas["value"].item() == row["alpha"]


def test_one_decomposition_of_a_weight_serves_all_quantities(monkeypatch):
    calls = []

    def counted(W, *, method="svd"):
        calls.append(method)
        return singular_values(W, method=method)

    monkeypatch.setattr(_live, "singular_values", counted)
    Monitor(heavy_model(), quantities=["spectrum", "stable_rank", *DERIVED]).observe(0)
    assert calls == ["gram64"] * 3
    Monitor(heavy_model()).observe(0)
    assert calls[3:] == ["gram"] * 3


def test_what_has_no_exponent_or_bulk_or_condition_is_left_out_and_noted_once():
    model = heavy_model()
    with torch.no_grad():
        model[2].weight.normal_(generator=torch.Generator().manual_seed(0))
        model[4].weight[1] = model[4].weight[0]
    monitor = Monitor(model, every=1, budget=1.0, quantities=list(DERIVED))
    for step in range(3):
        rows = monitor.observe(step)
        assert rows is not None
        assert "alpha" not in rows[1] and rows[1]["above_edge"] == 0
        assert "mp_edge" not in rows[2] and "condition" not in rows[2] and "orthogonality_error" in rows[2]
        with torch.no_grad():  # other numbers in the reasons
            model[2].weight += 0.1 * torch.randn(70, 70, generator=torch.Generator().manual_seed(step))
    started = [note.split(" of ")[0] for note in monitor.notes]
    assert sorted(started) == ["alpha", "condition", "edge"]
    with torch.no_grad():
        model[2].weight.zero_()
    rows = monitor.observe(3)
    assert rows is not None and rows[1] == {"step": 3, "matrix": "2.weight", "effective_rank": 0.0}
    assert sum(note.startswith("orthogonality_error") for note in monitor.notes) == 1


def test_the_usual_quantities_are_the_first_five_and_the_rest_has_to_be_asked_for():
    assert USUAL == ("spectrum", "stable_rank", "energy", "gap", "alignment") and (*USUAL, *DERIVED) == QUANTITIES
    model = small_model()
    assert Monitor(model, optimizers(model)["momentum"]).quantities == USUAL


@pytest.mark.parametrize("rank", [6, 7])
def test_a_rank_at_or_above_the_size_of_a_matrix(rank):
    model = small_model()
    optimizer = optimizers(model)["momentum"]
    (look,) = train(model, optimizer, 1, monitor=Monitor(model, optimizer, rank=rank))
    assert "gap" in look[0] and "gap_ratio" in look[0]
    if rank == 6:  # the last of six: the next one is 0
        assert look[1]["gap"] == look[1]["momentum_spectrum"][-1] and "gap_ratio" not in look[1]
    else:
        assert "gap" not in look[1] and "momentum_spectrum" in look[1]


def test_batches_are_measured_matrix_by_matrix():
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.Parameter(torch.randn(3, 5, 4))

    model = Experts()
    monitor = Monitor(model)
    rows = monitor.observe(0)
    assert rows is not None and [row["matrix"] for row in rows] == ["experts[0]", "experts[1]", "experts[2]"]
    np.testing.assert_allclose(rows[2]["spectrum"], spectrum(model.experts[2].detach()).numpy(), rtol=1e-4)


def test_split_parts_can_be_watched():
    model = nn.MultiheadAttention(8, 2)
    monitor = Monitor(model, matrices=matrices(model, split_fused=True))
    rows = monitor.observe(0)
    assert rows is not None and [row["matrix"] for row in rows][:2] == ["in_proj_weight[q]", "in_proj_weight[k]"]


def test_many_matrices_are_sampled_evenly_unless_chosen():
    model = nn.Sequential(*[nn.Linear(4, 4) for _ in range(9)])
    monitor = Monitor(model, max_matrices=3)
    assert monitor.matrices == ["0.weight", "4.weight", "8.weight"]
    assert monitor.notes[0].startswith("watching 3 of 9 matrices")
    assert len(Monitor(model, max_matrices=3, matrices="*").matrices) == 9
    assert Monitor(model, matrices=["[12].weight", "7.*"]).matrices == ["1.weight", "2.weight", "7.weight"]


def test_the_frame_is_long():
    monitor = Monitor(small_model(), quantities=["spectrum", "stable_rank"])
    rows = monitor.observe(7)
    assert rows is not None
    frame = monitor.frame()
    assert list(frame.columns) == ["step", "matrix", "quantity", "k", "value"]
    assert len(frame) == 2 and set(frame["quantity"]) == {"stable_rank"} and (frame["step"] == 7).all()
    full = monitor.frame(spectra=True)
    assert len(full) == 2 + 8 + 6
    values = full[(full["quantity"] == "spectrum") & (full["matrix"] == "0.weight")]
    assert list(values["k"]) == list(range(1, 9))
    np.testing.assert_array_equal(values["value"].to_numpy(dtype=np.float32), rows[0]["spectrum"])


def test_half_precision_and_frozen_and_complex_weights():
    model = nn.ModuleDict({"b": nn.Linear(6, 8, dtype=torch.bfloat16), "c": nn.Linear(6, 8, dtype=torch.complex64)})
    model["b"].requires_grad_(False)
    optimizer = torch.optim.SGD(model["c"].parameters(), lr=0.1, momentum=0.9)
    monitor = Monitor(model, optimizer, every=1, budget=1.0)
    for step in range(11):
        model["c"](torch.ones(2, 6, dtype=torch.complex64)).abs().sum().backward()
        optimizer.step()
        monitor.observe(step)
    half, complex_ = monitor.records[-2:]
    assert half["spectrum"].dtype == np.float32 and "energy" in half
    assert "gap" in complex_ and "energy" not in complex_ and "alignment" not in complex_
    assert sum("real weights" in note for note in monitor.notes) == 2


def test_an_outer_autocast_changes_nothing():
    model = small_model()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = Monitor(model).observe(0)
    outside = Monitor(model).observe(0)
    assert inside is not None and outside is not None
    np.testing.assert_array_equal(inside[0]["spectrum"], outside[0]["spectrum"])
    assert inside[0]["energy"] == outside[0]["energy"]


def test_a_replaced_parameter_is_followed():
    model = small_model()
    monitor = Monitor(model, every=1, budget=1.0, quantities=["spectrum"])
    monitor.observe(0)
    model[0].weight = nn.Parameter(torch.zeros(12, 8))
    rows = monitor.observe(1)
    assert rows is not None and not rows[0]["spectrum"].any()


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"every": 0}, OptionError),
        ({"budget": 0.0}, OptionError),
        ({"budget": 1.5}, OptionError),
        ({"budget": float("nan")}, OptionError),
        ({"rank": 0}, OptionError),
        ({"max_matrices": 0}, OptionError),
        ({"signal_beta": 1.0}, OptionError),
        ({"quantities": ["spectra"]}, UnknownNameError),
    ],
)
def test_options_out_of_range_are_refused(options, error):
    with pytest.raises(error):
        Monitor(small_model(), **options)


def test_other_bad_input(unchecked):
    with pytest.raises(DtypeError, match="found dict"):
        Monitor({"a": torch.zeros(2, 2)})  # pyright: ignore[reportArgumentType]
    with pytest.raises(UnknownNameError, match=r"0\.weight"):
        Monitor(nn.Sequential(nn.Bilinear(3, 3, 3)), matrices=matrices({"0.weigth": torch.zeros(3, 3)}))
    with pytest.warns(NothingMatchedWarning):
        assert Monitor(nn.LayerNorm(4)).observe(0) is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_the_numbers_are_those_of_the_cpu():
    model = small_model()
    there = copy.deepcopy(model).cuda()
    records = []
    for m in (model, there):
        optimizer = optimizers(m)["momentum"]
        monitor = Monitor(m, optimizer, every=1, budget=1.0)
        for step in range(11):
            m(torch.ones(4, 8, device=m[0].weight.device)).square().sum().backward()
            optimizer.step()
            monitor.observe(step)
            optimizer.zero_grad()
        records.append(monitor.records[-1])
    assert records[0].keys() == records[1].keys()
    np.testing.assert_allclose(records[0]["spectrum"], records[1]["spectrum"], atol=1e-3)
