"""Random-matrix laws against measured spectra."""

import math

import pytest
import torch

from orthokit.diagnostics.momentum import alignment, momentum_buffers
from orthokit.diagnostics.randommatrix import (
    buffer_noise,
    noise_edge,
    polar_only_threshold,
    rank_one_alignment,
    spike_cosines,
    spike_positions,
    survival_threshold,
)
from orthokit.diagnostics.spectrum import spectrum
from orthokit.diagnostics.synthetic import SignalPlusPerturbation
from orthokit.errors import OptionError, ShapeError
from orthokit.linalg import polar

SHAPES = [(100, 100), (200, 60), (60, 200)]


def trials(shape, strengths, betas, steps, count=4):
    sources = [SignalPlusPerturbation(shape, strengths=strengths, seed=k) for k in range(count)]
    return sources, torch.stack([source.final_buffers(betas, [1.0], steps=steps)[:, 0] for source in sources])


def test_noise_of_the_buffer_is_the_finite_sum():
    beta, steps = 0.9, 7
    weights = (1 - beta) * beta ** torch.arange(steps, dtype=torch.float64)
    assert buffer_noise(2.0, beta, steps=steps).item() == pytest.approx(2 * weights.norm().item(), rel=1e-12)
    assert buffer_noise(2.0, beta).item() == pytest.approx(2 / math.sqrt(19), rel=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
def test_edge_and_spikes_are_where_the_law_says(shape):
    strengths, betas, steps = [12.0, 8.0, 5.0], [0.9, 0.95, 0.98], 300
    _, M = trials(shape, strengths, betas, steps)
    measured = spectrum(M).mean(0).double()
    # Finite size: the edge fluctuates and lies below its limit by order n^(-2/3), about 4 % here.
    predicted = spike_positions(strengths, shape, 1.0, betas, steps=steps)
    torch.testing.assert_close(measured[:, :3], predicted, rtol=0.05, atol=0)
    torch.testing.assert_close(measured[:, 3], noise_edge(shape, 1.0, betas, steps=steps), rtol=0.06, atol=0)


@pytest.mark.parametrize("shape", SHAPES)
def test_cosines_of_singular_vectors_are_what_the_law_says(shape):
    strengths, betas, steps = [12.0, 5.0], [0.9, 0.98], 300
    sources, M = trials(shape, strengths, betas, steps, count=6)
    left, right = spike_cosines(strengths, shape, 1.0, betas, steps=steps)
    U, _, Vh = torch.linalg.svd(M, full_matrices=False)
    for measured, predicted in (
        ((U[..., :2] * sources[0].U).sum(-2).abs(), left),
        ((Vh[..., :2, :].mT * sources[0].V).sum(-2).abs(), right),
    ):
        torch.testing.assert_close(measured.mean(0).double(), predicted, rtol=0, atol=0.03)


def test_weak_spikes_sink_into_the_noise():
    shape, beta = (100, 100), 0.5
    threshold = survival_threshold(shape, 1.0, beta).item()
    weak, strong = 0.9 * threshold, 1.1 * threshold
    edge = noise_edge(shape, 1.0, beta).item()
    assert spike_positions([weak], shape, 1.0, beta).item() == edge
    assert spike_positions([strong], shape, 1.0, beta).item() > edge
    assert spike_positions([threshold * 1.0001], shape, 1.0, beta).item() == pytest.approx(edge, rel=1e-3)
    assert [c.item() for c in spike_cosines([weak], shape, 1.0, beta)] == [0, 0]
    assert all(c.item() > 0.3 for c in spike_cosines([strong], shape, 1.0, beta))


def test_without_noise_the_laws_return_the_signal():
    assert spike_positions([3.0, 2.0], (10, 5), 0.0, 0.9).tolist() == [3.0, 2.0]
    assert [c.tolist() for c in spike_cosines([3.0], (10, 5), 0.0, 0.9)] == [[1.0], [1.0]]


def test_laws_broadcast_over_noise_levels_and_betas():
    sigma, beta = torch.tensor([[0.5], [1.0]]), [0.0, 0.9, 0.99]
    grid = spike_positions([12.0, 8.0], (50, 40), sigma, beta, steps=100)
    assert grid.shape == (2, 3, 2)
    assert grid[1, 2, 0] == spike_positions([12.0, 8.0], (50, 40), 1.0, 0.99, steps=100)[0]
    assert noise_edge((50, 40), sigma, beta).shape == (2, 3)
    assert rank_one_alignment(2.0, (400, 100), sigma, beta).shape == (2, 3)


# The rank-one table: (shape, beta, approximation).
RANK_ONE = [
    ((400, 100), (0.0, 0.9, 0.95, 0.99), (0.100, 0.400, 0.530, 0.816)),
    ((1600, 100), (0.0, 0.9, 0.95, 0.99), (0.050, 0.213, 0.298, 0.576)),
]
MEASURED = {(400, 100): (0.097, 0.389, 0.518, 0.819), (1600, 100): (0.049, 0.223, 0.304, 0.563)}


@pytest.mark.parametrize(("shape", "betas", "approximation"), RANK_ONE)
def test_rank_one_alignment_equals_the_table_and_the_measurement(shape, betas, approximation):
    assert rank_one_alignment(2.0, shape, 1.0, betas).tolist() == pytest.approx(approximation, abs=6e-4)
    count = 40 if shape[0] == 400 else 16
    level = buffer_noise(1.0, betas).float()
    values = []
    for seed in range(count):
        # In the limit of many steps the buffer is S plus Gaussian noise of this level: no stream is needed.
        source = SignalPlusPerturbation(shape, strengths=[2.0], seed=seed)
        M = source.signal + level[:, None, None] * next(source.noise(1))
        values.append(alignment(polar(M), source.signal))
    a = torch.stack(values)
    error = a.std(0) / math.sqrt(count)
    mean = a.mean(0)
    # 4 standard errors, and 3 % for the finite ratio of the sizes.
    expected = torch.tensor(approximation)
    assert ((mean - expected).abs() < 4 * error + 0.03 * expected).all(), mean
    # The recorded measurement may be of a single trial.
    assert ((mean - torch.tensor(MEASURED[shape])).abs() < 4 * a.std(0)).all(), mean


def test_polar_only_is_marginal_below_the_threshold_where_momentum_is_not():
    shape = (400, 25)
    threshold = polar_only_threshold(shape, 1.0)
    assert threshold == pytest.approx((20 - 5) / 4)
    assert polar_only_threshold((100, 100), 1.0) == 0
    source = SignalPlusPerturbation(shape, strengths=[0.5 * threshold])
    raw, pre = (
        alignment(polar(momentum_buffers(source.stream(400), beta)), source.signal).item() for beta in (0.0, 0.99)
    )
    assert raw < 0.3
    assert pre > 0.6


def test_bad_input_is_named(unchecked):
    with pytest.raises(ShapeError, match="sizes >= 1"):
        noise_edge((0, 3), 1.0, 0.5)
    with pytest.raises(OptionError, match="sigma"):
        noise_edge((3, 3), -1.0, 0.5)
    with pytest.raises(OptionError, match="0 <= beta < 1"):
        noise_edge((3, 3), 1.0, 1.0)
    with pytest.raises(OptionError, match="strengths must be positive"):
        spike_positions([0.0], (3, 3), 1.0, 0.5)
    with pytest.raises(OptionError, match="strength must be positive"):
        rank_one_alignment(-1.0, (3, 3), 1.0, 0.5)
    with pytest.raises(OptionError, match="steps"):
        noise_edge((3, 3), 1.0, 0.5, steps=0)
