"""The synthetic generator, and the published numbers it reproduces."""

import itertools
import math

import pytest
import torch

from orthokit.diagnostics.momentum import alignment, momentum_buffers, pipelines, spectral_gap
from orthokit.diagnostics.spectrum import spectrum
from orthokit.diagnostics.subspace import subspace_error
from orthokit.diagnostics.synthetic import SignalPlusPerturbation, published_sigmas, published_strengths
from orthokit.errors import OptionError, ShapeError, UnknownNameError

# Published singular values 1 to 4 at rank 3, sigma 1, 10 trials of 1000 steps (arXiv 2606.03899, project page).
PUBLISHED = {
    0.0: (20.30, 19.43, 18.91, 18.38),
    0.5: (14.65, 12.05, 11.27, 10.84),
    0.9: (12.43, 8.56, 6.00, 4.42),
    0.95: (12.22, 8.25, 5.50, 3.09),
    0.99: (12.06, 8.03, 5.09, 1.36),
    0.995: (11.95, 7.97, 5.02, 0.97),
}
# Alignment, left subspace error and relative deviation after 600 steps, from an independent implementation, 2 seeds.
CHECKED = {  # beta: (pre-polar alignment, sin Theta, ||M - S||_F / (sigma sqrt(mn)))
    0.8: (0.891, 0.645, 0.333),
    0.9: (0.941, 0.446, 0.228),
    0.95: (0.970, 0.308, 0.159),
    0.98: (0.987, 0.189, 0.100),
    0.99: (0.993, 0.137, 0.071),
}


def test_the_published_table_is_reproduced_within_three_per_cent():
    betas = list(PUBLISHED)
    buffers = [SignalPlusPerturbation(noise="arch", seed=k).final_buffers(betas, [1.0], steps=1000) for k in range(10)]
    values = spectrum(torch.stack(buffers)[:, :, 0]).mean(0)[:, :4]
    expected = torch.tensor(list(PUBLISHED.values()))
    assert ((values / expected - 1).abs() < 0.03).all(), values


def test_the_gap_opens_monotonically_for_long_windows_and_not_for_short_ones():
    betas = [0.0, 0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995]
    buffers = [SignalPlusPerturbation(noise="arch", seed=k).final_buffers(betas, [1.0], steps=1000) for k in range(3)]
    gap = spectral_gap(torch.stack(buffers)[:, :, 0], rank=3).mean(0)
    assert (gap[2:].diff() > 0).all()
    assert gap[1] < gap[7]


def test_alignment_and_subspace_error_match_an_independent_implementation():
    betas = list(CHECKED)
    rows = []
    for seed in range(3):
        source = SignalPlusPerturbation(noise="arch", seed=seed)
        M = source.final_buffers(betas, [1.0], steps=600)[:, 0]
        pre = pipelines(M.unsqueeze(0), 0.0)["pre"]
        deviation = (M - source.signal).flatten(1).norm(dim=1) / 100
        rows.append(
            torch.stack([alignment(pre, source.signal), subspace_error(M, source.signal, rank=3), deviation], 1)
        )
    measured = torch.stack(rows).mean(0)
    expected = torch.tensor(list(CHECKED.values()))
    # Other directions and other noise: alignment is self-averaging, the largest angle of three is not.
    assert ((measured - expected)[:, 0].abs() < 0.01).all(), measured
    assert ((measured / expected - 1)[:, 1].abs() < 0.12).all(), measured
    assert ((measured / expected - 1)[:, 2].abs() < 0.02).all(), measured


def test_polar_only_alignment_matches_an_independent_implementation():
    values = []
    for seed in range(20):
        source = SignalPlusPerturbation(seed=seed)
        values.append(alignment(pipelines(source.stream(1), 0.0)["none"], source.signal))
    assert torch.stack(values).mean().item() == pytest.approx(0.598, abs=0.03)


@pytest.mark.parametrize("noise", ["iid", "arch"])
def test_unit_noise_has_unit_variance_at_every_step_and_no_memory_of_sign(noise):
    xi = torch.stack(list(SignalPlusPerturbation((200, 100), noise=noise).noise(6))).double().flatten(1)
    # 20000 entries: standard error 1 % of the variance (1.3 % with ARCH tails), 0.7 % of a correlation.
    assert (xi.square().mean(1) - 1).abs().max() < 0.06
    assert xi.mean(1).abs().max() < 0.03
    correlation = xi @ xi.T / xi.shape[1] - torch.diag(xi.square().mean(1))
    assert correlation.abs().max() < 0.035


def test_arch_remembers_the_size_of_the_last_step_and_iid_does_not():
    def memory(noise):
        xi = torch.stack(list(SignalPlusPerturbation((200, 200), noise=noise).noise(3))).double().flatten(1)
        return torch.corrcoef(xi[1:].square())[0, 1].item()

    assert memory("arch") > 0.15
    assert abs(memory("iid")) < 0.03


def test_arch_follows_its_recursion():
    source = SignalPlusPerturbation((3, 2), strengths=[1.0], noise="arch", arch_alpha=0.6, seed=5)
    unit = list(SignalPlusPerturbation((3, 2), strengths=[1.0], seed=5).noise(4))
    previous = torch.ones(3, 2)
    for z, xi in zip(unit, source.noise(4), strict=True):
        torch.testing.assert_close(xi, (0.4 + 0.6 * previous.square()).sqrt() * z)
        previous = xi


def test_signal_has_the_strengths_and_the_bases():
    source = SignalPlusPerturbation((20, 12), strengths=published_strengths(5), dtype=torch.float64)
    assert spectrum(source.signal)[:6].tolist() == pytest.approx([12, 10, 8, 6, 4, 0], abs=1e-12)
    assert (source.U.mT @ source.U - torch.eye(5)).abs().max() < 1e-12
    assert (source.V.mT @ source.V - torch.eye(5)).abs().max() < 1e-12
    torch.testing.assert_close(
        source.U.mT @ source.signal @ source.V, torch.diag(torch.tensor(source.strengths)).double()
    )


def test_streams_repeat_are_prefixes_and_depend_on_their_own_seed_only():
    source = SignalPlusPerturbation((6, 5), noise="arch")
    torch.testing.assert_close(source.gradients(9)[:4], source.gradients(4), rtol=0, atol=0)
    torch.testing.assert_close(torch.stack(list(source.stream(4))), source.gradients(4), rtol=0, atol=0)
    other = SignalPlusPerturbation((6, 5), noise="arch", seed=1)
    torch.testing.assert_close(other.signal, source.signal, rtol=0, atol=0)
    assert (other.gradients(1) - source.gradients(1)).abs().max() > 0.1
    moved = SignalPlusPerturbation((6, 5), noise="arch", signal_seed=1)
    assert (moved.signal - source.signal).abs().max() > 0.1
    torch.testing.assert_close(next(moved.noise(1)), next(source.noise(1)), rtol=0, atol=0)
    state = torch.random.get_rng_state()
    source.gradients(2)
    assert torch.equal(state, torch.random.get_rng_state())


def test_noise_is_exactly_linear_in_sigma():
    quiet, loud = (SignalPlusPerturbation((6, 5), sigma=s, noise="arch", dtype=torch.float64) for s in (0.5, 2.0))
    torch.testing.assert_close(4 * (quiet.gradients(5) - quiet.signal), loud.gradients(5) - loud.signal)


def test_final_buffers_serve_a_grid_of_noise_levels():
    betas, sigmas = [0.0, 0.7, 0.95], published_sigmas()[::10]
    grid = SignalPlusPerturbation((7, 6), noise="arch", dtype=torch.float64).final_buffers(betas, sigmas, steps=30)
    assert grid.shape == (3, 3, 7, 6)
    for j, sigma in enumerate(sigmas):
        source = SignalPlusPerturbation((7, 6), sigma=sigma, noise="arch", dtype=torch.float64)
        torch.testing.assert_close(grid[:, j], momentum_buffers(source.stream(30), betas))


def test_published_grids():
    assert published_strengths(10) == [12 - k for k in range(10)]
    assert published_strengths(15)[-1] == 5
    assert {r: len(published_strengths(r)) for r in (1, 3, 5, 10, 15)} == {1: 1, 3: 3, 5: 5, 10: 10, 15: 15}
    sigmas = published_sigmas()
    assert (sigmas[0], sigmas[-1]) == (0.2, 5.0)
    ratios = [b / a for a, b in itertools.pairwise(sigmas)]
    assert ratios == pytest.approx([25 ** (1 / 20)] * 20)


def test_the_description_names_the_setting():
    text = repr(SignalPlusPerturbation((4, 3), strengths=[1], noise="arch"))
    assert "(4, 3)" in text
    assert "arch(alpha=0.3)" in text


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"shape": (4,)}, ShapeError, "must be"),
        ({"shape": (0, 3)}, ShapeError, "sizes >= 1"),
        ({"shape": (2, 2)}, ShapeError, "1 to 2 strengths; got 3"),
        ({"strengths": []}, ShapeError, "got 0"),
        ({"strengths": [1.0, -1.0]}, OptionError, "positive"),
        ({"strengths": [math.nan]}, OptionError, "positive"),
        ({"sigma": -1.0}, OptionError, "sigma"),
        ({"noise": "iidd"}, UnknownNameError, "did you mean 'iid'"),
        ({"arch_alpha": 1.0}, OptionError, "variance grows"),
    ],
)
def test_bad_settings_are_named(unchecked, options, error, match):
    with pytest.raises(error, match=match):
        SignalPlusPerturbation(**options)


def test_bad_requests_are_named():
    source = SignalPlusPerturbation((4, 4))
    with pytest.raises(OptionError, match="steps"):
        source.gradients(0)
    with pytest.raises(OptionError, match="sigmas"):
        source.final_buffers([0.5], [-1.0], steps=2)
    with pytest.raises(OptionError, match="0 <= beta < 1"):
        source.final_buffers([1.0], [1.0], steps=2)
    with pytest.raises(OptionError, match="published ranks"):
        published_strengths(4)
