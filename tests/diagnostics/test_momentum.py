"""Momentum as a spectral filter: the invariants of the theory, and the recurrences themselves."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from orthokit.diagnostics import _stream
from orthokit.diagnostics.momentum import (
    alignment,
    beta_for_window,
    effective_samples,
    momentum_buffers,
    noise_suppression,
    pipelines,
    signal_persistence,
    spectral_gap,
    white_noise_suppression,
)
from orthokit.diagnostics.subspace import subspace_error
from orthokit.diagnostics.synthetic import SignalPlusPerturbation
from orthokit.errors import DtypeError, NonFiniteError, OptionError, ShapeError
from orthokit.linalg import orthogonalize, polar, random_orthogonal

BETAS = [0.0, 0.5, 0.9, 0.99]


def gaussian(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def reference(gradients, beta):
    """The recurrence, step by step."""
    M = torch.zeros_like(gradients[0])
    for G in gradients:
        M = beta * M + (1 - beta) * G
    return M


@settings(max_examples=30, deadline=None)
@given(
    steps=st.integers(1, 20), seed=st.integers(0, 10**6), block=st.integers(1, 100),
    betas=st.lists(st.floats(0, 0.999), min_size=1, max_size=4),
)  # fmt: skip
def test_buffers_follow_the_recurrence_for_tensors_iterators_and_any_block(steps, seed, block, betas):
    G = gaussian(steps, 3, 4, seed=seed)
    expected = torch.stack([reference(G, b) for b in betas])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_stream, "_BLOCK", block)
        torch.testing.assert_close(momentum_buffers(G, betas), expected, rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(momentum_buffers(iter(G), betas), expected, rtol=1e-12, atol=1e-13)
    trajectory = momentum_buffers(G, betas, return_all=True)
    assert trajectory.shape == (len(betas), steps, 3, 4)
    torch.testing.assert_close(trajectory[:, -1], expected, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(trajectory[0, 0], (1 - betas[0]) * G[0], rtol=1e-12, atol=1e-13)


def test_a_single_beta_has_no_beta_dimension():
    G = gaussian(6, 2, 3)
    assert momentum_buffers(G, 0.5).shape == (2, 3)
    assert momentum_buffers(G, 0.5, return_all=True).shape == (6, 2, 3)
    assert momentum_buffers(G, torch.tensor([0.5])).shape == (1, 2, 3)


def test_two_steps_by_hand():
    G = torch.tensor([[[1.0]], [[3.0]]])
    assert momentum_buffers(G, 0.5).item() == 0.25 * 1 + 0.5 * 3


def test_an_iterator_is_taken_in_blocks_of_bounded_size():
    read = []

    def stream():
        for k in range(95):
            read.append(k)
            yield torch.full((4, 5), float(k))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_stream, "_BLOCK", 10 * 4 * 5)
        sizes = []
        for block in _stream.blocks(stream()):
            sizes.append(len(block))
            assert len(read) == sum(sizes)  # nothing is read ahead
    assert sizes == [10] * 9 + [5]


def test_low_precision_gradients_are_averaged_in_float32():
    G = gaussian(50, 3, 3).bfloat16()
    M = momentum_buffers(G, 0.9)
    assert M.dtype == torch.float32
    torch.testing.assert_close(M.double(), reference(G.double(), 0.9), rtol=1e-5, atol=1e-6)


def test_an_alternating_component_is_damped_to_one_over_effective_samples():
    A = gaussian(4, 4)
    G = torch.stack([(-1) ** t * A for t in range(4000)])
    for beta in (0.5, 0.9, 0.99):
        ratio = momentum_buffers(G, beta).norm() / A.norm()
        assert ratio.item() == pytest.approx(1 / effective_samples(beta).item(), rel=1e-9)


def test_window_and_samples_agree():
    assert effective_samples([0.0, 0.5, 0.9]).tolist() == pytest.approx([1, 3, 19])
    T = torch.tensor([1.0, 2.0, 40.0], dtype=torch.float64)
    torch.testing.assert_close(effective_samples(beta_for_window(T)), 2 * T - 1)
    assert signal_persistence([0.0, 0.5], steps=3).tolist() == [1.0, 0.875]
    constant = torch.ones(7, 1, 1, dtype=torch.float64)
    torch.testing.assert_close(momentum_buffers(constant, BETAS)[:, 0, 0], signal_persistence(BETAS, steps=7))


# 1.6.1
@pytest.mark.parametrize("shape", [(5, 5), (7, 3), (3, 7), (2, 4, 3)])
def test_without_momentum_all_three_pipelines_agree(shape):
    G = gaussian(4, *shape)
    out = pipelines(G, 0.0)
    torch.testing.assert_close(momentum_buffers(G, 0.0), G[-1], rtol=0, atol=0)
    for direction in out.values():
        torch.testing.assert_close(direction, polar(G[-1]), rtol=0, atol=1e-12)


# 1.6.2
def test_without_noise_every_pipeline_recovers_the_signal():
    source = SignalPlusPerturbation((12, 9), sigma=0.0, dtype=torch.float64)
    out = pipelines(source.stream(30), 0.9)
    target = source.U @ source.V.mT
    share = signal_persistence(0.9, steps=30)
    torch.testing.assert_close(out["pre"], target, rtol=0, atol=1e-12)
    torch.testing.assert_close(out["none"], target, rtol=0, atol=1e-12)
    torch.testing.assert_close(out["post"], share * target, rtol=0, atol=1e-12)
    assert alignment(out["pre"], source.signal).item() == pytest.approx(1, abs=1e-12)
    assert alignment(out["none"], source.signal).item() == pytest.approx(1, abs=1e-12)
    assert alignment(out["post"] / share, source.signal).item() == pytest.approx(1, abs=1e-12)


def test_pipelines_equal_their_definitions_for_streams_and_several_betas():
    G = gaussian(15, 6, 4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_stream, "_BLOCK", 100)
        out = pipelines(iter(G), [0.5, 0.9])
    factors = torch.stack([polar(g) for g in G])
    for k, beta in enumerate((0.5, 0.9)):
        torch.testing.assert_close(out["pre"][k], polar(reference(G, beta)), rtol=0, atol=1e-11)
        torch.testing.assert_close(out["post"][k], reference(factors, beta), rtol=0, atol=1e-12)
    torch.testing.assert_close(out["none"], factors[-1], rtol=0, atol=1e-12)


def test_another_polar_is_used_throughout():
    G = gaussian(3, 6, 4)
    out = pipelines(G, 0.5, polar=lambda X: orthogonalize(X, method="newton_schulz"))
    torch.testing.assert_close(out["none"], orthogonalize(G[-1], method="newton_schulz"), rtol=0, atol=1e-5)
    assert (out["none"] - polar(G[-1])).abs().max() > 1e-3


# 1.6.3
@pytest.mark.parametrize("noise", ["iid", "arch"])
def test_noise_energy_shrinks_by_effective_samples_and_keeps_the_markov_bound(noise):
    m = n = 10
    eta, trials, steps = m * n, 40, 400
    betas = torch.tensor([0.5, 0.9, 0.97], dtype=torch.float64)
    sources = [SignalPlusPerturbation((m, n), noise=noise, seed=k) for k in range(trials)]
    norms = torch.stack([source.noise_buffers(betas, steps=steps).flatten(1).norm(dim=1) for source in sources])
    samples = effective_samples(betas)
    mean = norms.double().square().mean(0)
    # trials * m * n squared normals in each mean: relative standard error sqrt(2 / 4000) = 2 %, more for heavy tails.
    torch.testing.assert_close(mean, eta / samples, rtol=0.10, atol=0)
    frequency = (norms > math.sqrt(eta) * samples**-0.25).double().mean(0)
    assert (frequency <= samples**-0.5).all()


# 1.6.6
@settings(max_examples=40, deadline=None)
@given(m=st.integers(1, 7), n=st.integers(1, 7), rank=st.integers(1, 7), seed=st.integers(0, 10**6))
def test_alignment_of_contractions_lies_between_minus_one_and_one(m, n, rank, seed):
    S = gaussian(m, min(rank, m, n), seed=seed) @ gaussian(min(rank, m, n), n, seed=seed + 1)
    X = gaussian(m, n, seed=seed + 2)
    X = X / torch.linalg.matrix_norm(X, ord=2)
    assert -1 - 1e-12 <= alignment(X, S) <= 1 + 1e-12
    assert alignment(polar(S), S).item() == pytest.approx(1, abs=1e-9)
    assert alignment(-polar(S), S).item() == pytest.approx(-1, abs=1e-9)


def test_alignment_is_linear_and_broadcasts():
    X, S = gaussian(3, 2, 5, 4), gaussian(5, 4, seed=1)
    a = alignment(X, S)
    assert a.shape == (3, 2)
    torch.testing.assert_close(alignment(2 * X, S), 2 * a)
    torch.testing.assert_close(alignment(X, 7 * S), a)
    torch.testing.assert_close(alignment(X.bfloat16(), S.bfloat16()), a.float(), rtol=0.1, atol=0.02)


# 1.6.7
def test_post_polar_recovers_on_average_what_polar_only_does_times_the_persistence():
    beta, steps, trials = 0.8, 12, 150
    share = signal_persistence(beta, steps=steps).item()
    differences = []
    for seed in range(trials):
        source = SignalPlusPerturbation((10, 8), strengths=[4.0, 3.0], seed=seed, dtype=torch.float64)
        out = pipelines(source.stream(steps), beta)
        differences.append(alignment(out["post"], source.signal) - share * alignment(out["none"], source.signal))
    d = torch.stack(differences)
    assert d.mean().abs() < 4 * d.std() / math.sqrt(trials)
    assert d.std() < 0.2  # the check above can fail


def test_momentum_before_the_polar_factor_beats_both_others():
    source = SignalPlusPerturbation((40, 40))
    out = pipelines(source.stream(200), 0.95)
    a = {name: alignment(direction, source.signal).item() for name, direction in out.items()}
    assert a["pre"] > a["post"] + 0.05
    assert a["pre"] > a["none"] + 0.05


# 1.6.8
def test_alignment_gap_and_subspace_error_ignore_orthogonal_changes_of_basis():
    source = SignalPlusPerturbation((9, 7), strengths=[4.0, 3.0], dtype=torch.float64)
    g = torch.Generator().manual_seed(4)
    P, Q = (
        random_orthogonal(9, 9, generator=g, dtype=torch.float64),
        random_orthogonal(7, 7, generator=g, dtype=torch.float64),
    )
    G, S = source.gradients(25), source.signal
    for A, B, name in zip(
        pipelines(G, 0.8).values(), pipelines(P @ G @ Q, 0.8).values(), ("pre", "post", "none"), strict=True
    ):
        torch.testing.assert_close(P @ A @ Q, B, rtol=0, atol=1e-9, msg=name)
        torch.testing.assert_close(alignment(A, S), alignment(B, P @ S @ Q), rtol=0, atol=1e-10)
    M, N = momentum_buffers(G, 0.8), momentum_buffers(P @ G @ Q, 0.8)
    torch.testing.assert_close(spectral_gap(M, rank=2), spectral_gap(N, rank=2))
    for side in ("left", "right"):
        torch.testing.assert_close(
            subspace_error(M, S, rank=2, side=side), subspace_error(N, P @ S @ Q, rank=2, side=side)
        )


def test_spectral_gap_by_hand_batched_and_at_full_rank():
    M = torch.stack([torch.diag(torch.tensor([5.0, 3.0, 1.0])), torch.zeros(3, 3)])
    assert spectral_gap(M, rank=1).tolist() == [2.0, 0.0]
    assert spectral_gap(M, rank=3).tolist() == [1.0, 0.0]


def test_noise_suppression_equals_its_definition_and_reads_a_stream_once():
    G = 100 + gaussian(40, 3, 5)
    windows = [1.0, 2.0, 8.0]
    mean = G.mean(0)
    raw = (G - mean).square().sum(dim=(1, 2)).mean().sqrt()
    expected = []
    for T in windows:
        beta = 1 - 1 / T
        expected.append(raw / (reference(G, beta) - (1 - beta**40) * mean).norm())
    ratio = noise_suppression(iter(G), windows)
    torch.testing.assert_close(ratio, torch.stack(expected), rtol=1e-9, atol=0)
    torch.testing.assert_close(noise_suppression(G, 2.0), ratio[1])


def test_noise_suppression_survives_a_mean_far_above_the_noise_in_float32():
    noise = gaussian(60, 4, 4)
    clean = noise_suppression(noise, 5)
    # Rounding G to float32 at 1e4 leaves noise of 5e-4 an entry: 0.1 % of the ratio.
    assert noise_suppression((1e4 + noise).float(), 5).item() == pytest.approx(clean.item(), rel=5e-3)


def test_white_noise_is_suppressed_as_predicted():
    windows, steps = [1.0, 3.0, 10.0, 30.0], 200
    ratio = noise_suppression(SignalPlusPerturbation((60, 60)).stream(steps), windows)
    # 3600 squared normals in each norm: relative standard error 1.2 %.
    torch.testing.assert_close(ratio, white_noise_suppression(windows, steps=steps), rtol=0.05, atol=0)
    torch.testing.assert_close(
        white_noise_suppression(windows, steps=10**7).square(),
        2 * torch.tensor(windows).double() - 1,
        rtol=1e-4,
        atol=0,
    )


def test_a_stream_without_noise_is_infinitely_suppressed_or_undefined_never_nan():
    assert noise_suppression(torch.ones(5, 2, 2), [1.0, 2.0]).tolist() == [math.inf, math.inf]


def test_bad_input_is_named(unchecked):
    G = gaussian(4, 3, 3)
    for beta in (-0.1, 1.0, float("nan"), [0.5, 1.2]):
        with pytest.raises(OptionError, match="0 <= beta < 1"):
            momentum_buffers(G, beta)
    with pytest.raises(OptionError, match="one-dimensional"):
        momentum_buffers(G, torch.zeros(2, 2))
    for empty in (G[:0], iter([])):
        with pytest.raises(OptionError, match="at least one gradient"):
            momentum_buffers(empty, 0.5)
        with pytest.raises(OptionError, match="at least one gradient"):
            pipelines(empty, 0.5)
    with pytest.raises(ShapeError, match="one shape"):
        momentum_buffers(iter([G[0], G[0, :2]]), 0.5)
    with pytest.raises(DtypeError, match="int64"):
        momentum_buffers(torch.ones(3, 2, 2, dtype=torch.int64), 0.5)
    with pytest.raises(DtypeError, match="int64"):
        momentum_buffers(iter([torch.ones(2, 2, dtype=torch.int64)]), 0.5)
    with pytest.raises(ShapeError, match="must be matrices"):
        pipelines(gaussian(4, 3), 0.5)
    with pytest.raises(OptionError, match="signal other than zero"):
        alignment(G[0], torch.zeros(3, 3))
    with pytest.raises(NonFiniteError, match="finite"):
        alignment(G[0], G[0] * float("nan"))
    with pytest.raises(ShapeError, match="one shape"):
        alignment(G[0], torch.eye(4))
    with pytest.raises(OptionError, match="rank must satisfy"):
        spectral_gap(G[0], rank=4)
    with pytest.raises(OptionError, match="windows"):
        noise_suppression(G, [0.5])
    with pytest.raises(OptionError, match="at least 2 gradients"):
        noise_suppression(G[:1], [1.0])
    with pytest.raises(OptionError, match="steps"):
        signal_persistence(0.5, steps=0)
    with pytest.raises(OptionError, match="steps"):
        white_noise_suppression(2.0, steps=1)
