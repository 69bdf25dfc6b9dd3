"""OrthoMerge on tensors: against its definition, its invariants, the trap of the null space, and bad input."""

from __future__ import annotations

import dataclasses
import inspect

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from orthokit.diagnostics import hyperspherical_energy
from orthokit.errors import NonFiniteError, OptionError, ShapeError, UnknownNameError
from orthokit.linalg import cayley, random_orthogonal, singular_values
from orthokit.merging import _turns, merge_generators, merge_rotations, orthomerge, orthomerge_parts
from orthokit.merging.decoupling import _Options

SHAPES = [(6, 6), (9, 4), (4, 9), (160, 160), (300, 150), (150, 400), (1, 5), (5, 1)]


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def small_turn(n: int, angle: float, seed: int) -> Tensor:
    A = normal(n, n, seed=seed) / n**0.5
    return cayley(angle * (A - A.mT) / 2)


def experts_of(W0: Tensor, *, count: int = 3, size: float = 0.02, seed: int = 1) -> list[Tensor]:
    scale = W0.norm() / W0.numel() ** 0.5
    return [W0 + size * scale * normal(*W0.shape, seed=seed + i) for i in range(count)]


def reference(W0: Tensor, experts: list[Tensor], prior: float = 1e-3) -> Tensor:
    """The definition, with an SVD and a solve per expert and the mean of the residuals."""
    n = W0.shape[1]
    eye, mu = torch.eye(n, dtype=W0.dtype), prior * W0.square().sum() / n
    generators, residuals = [], []
    for W in experts:
        U, _, Vh = torch.linalg.svd(W0.mT @ W + mu * eye)
        R = U @ Vh
        generators.append(torch.linalg.solve(R + eye, R - eye))
        residuals.append(W - W0 @ R)
    mean = sum(generators) / len(experts)
    c = sum(Q.norm() for Q in generators) / len(experts) / mean.norm() if mean.any() else 1.0
    R = torch.linalg.solve(eye - c * mean, eye + c * mean)
    return W0 @ R + sum(residuals) / len(experts)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", [0.005, 0.02, 0.2])
def test_agrees_with_the_definition(shape: tuple[int, int], size: float) -> None:
    W0 = normal(*shape)
    experts = experts_of(W0, size=size)
    wanted = reference(W0, experts)
    moved = (wanted - W0).norm()
    assert (orthomerge(W0, experts) - wanted).norm() <= 1e-8 * moved
    # In float32 the weights themselves are rounded to 6e-8 of themselves, a hundredth of that against the change.
    single = orthomerge(W0.float(), [W.float() for W in experts])
    assert (single - wanted).norm() <= 2e-4 * moved


@pytest.mark.parametrize("shape", [(160, 160), (300, 150), (150, 400), (200, 260)])
@pytest.mark.parametrize("size", [0.003, 0.012])
def test_the_iteration_gives_the_generator_of_the_svd(shape: tuple[int, int], size: float) -> None:
    W0 = normal(*shape, dtype=torch.float32)
    change = size * normal(*shape, seed=5, dtype=torch.float32)
    exact = _turns.shared_side(W0.double(), prior=1e-3 * shape[0], route="svd")
    wanted = _turns.turns(exact, change.double(), route="svd", name="it").generator
    side = _turns.shared_side(W0, prior=1e-3 * shape[0], route="iteration")
    turn = _turns.turns(side, side.into(change), route="iteration", name="it")
    assert side.vectors is not None and turn.route == "iteration" and 0 <= turn.contraction < 1
    found = side.vectors.double() @ turn.generator.double() @ side.vectors.double().mT
    # The tolerance of the iteration is 3e-5; another factor of four is for the rounding of the basis.
    assert (found - wanted).norm() <= 1.2e-4 * wanted.norm()
    assert torch.equal(turn.generator, -turn.generator.mT)


def test_a_change_too_large_for_the_iteration_is_decomposed_and_says_so() -> None:
    W0 = normal(140, 300)
    experts = [normal(140, 300, seed=3), W0 + 0.001 * normal(140, 300, seed=4)]
    parts = orthomerge_parts(W0, experts)
    assert parts.routes == ("svd", "iteration")
    assert torch.allclose(parts.merged, reference(W0, experts), atol=1e-8)
    with pytest.raises(OptionError, match="route='auto'"):
        orthomerge(W0, experts, route="iteration")


@pytest.mark.parametrize("shape", [(7, 5), (5, 7), (160, 160)])
def test_equal_experts_give_themselves(shape: tuple[int, int]) -> None:
    W0 = normal(*shape)
    expert = experts_of(W0, count=1, size=0.1)[0]
    parts = orthomerge_parts(W0, [expert] * 3)
    assert torch.allclose(parts.merged, expert, atol=1e-9)
    assert torch.allclose(parts.correction, torch.ones(()).double())


@given(st.integers(2, 8), st.integers(2, 8), st.integers(1, 4), st.integers(0, 10**6))
@settings(max_examples=40, deadline=None)
def test_invariants(rows: int, columns: int, count: int, seed: int) -> None:
    W0 = normal(rows, columns, seed=seed)
    experts = experts_of(W0, count=count, size=0.2, seed=seed + 1)
    try:
        parts = orthomerge_parts(W0, experts)
    except OptionError:
        assume(False)  # a reflection lies nearest to the change of a matrix that is nearly singular
    assert torch.allclose(singular_values(parts.rotated), singular_values(W0), rtol=1e-9, atol=1e-12)
    assert torch.allclose(hyperspherical_energy(parts.rotated), hyperspherical_energy(W0), rtol=1e-9)
    assert parts.correction >= 1 - 1e-12
    assert torch.allclose(orthomerge(W0, experts[::-1]), parts.merged, atol=1e-9)
    # A rotation of all inputs rotates the result.
    R = random_orthogonal(columns, columns, generator=torch.Generator().manual_seed(seed)).double()
    R, _ = torch.linalg.qr(R)
    assert torch.allclose(orthomerge(W0 @ R, [W @ R for W in experts]), parts.merged @ R, atol=1e-8)


def test_a_pure_rotation_is_recovered_without_residual() -> None:
    W0, R = normal(9, 5), small_turn(5, 0.3, 2)
    parts = orthomerge_parts(W0, [W0 @ R], prior=0.0)
    assert torch.allclose(parts.rotated, W0 @ R, atol=1e-12)
    assert torch.allclose(parts.rotation_fractions, torch.ones(1).double())


def test_the_length_of_the_merged_generator_is_the_mean_length() -> None:
    Q = [A - A.mT for A in normal(4, 6, 6)]
    merged = merge_generators(Q)
    lengths = torch.stack([q.norm() for q in Q])
    assert torch.allclose(merged.norms, lengths)
    assert torch.allclose(merged.generator.norm(), lengths.mean())
    assert torch.allclose(merge_generators(Q, intensity="max").generator.norm(), lengths.max())
    assert torch.allclose(merge_generators(Q, intensity="median").generator.norm(), lengths.quantile(0.5))
    weighted = merge_generators(Q, weights=[1, 0, 0, 3])
    assert torch.allclose(weighted.generator.norm(), (lengths[0] + 3 * lengths[3]) / 4)
    assert torch.allclose(merge_generators(Q, weights=[0, 0, 2, 0]).generator, Q[2])


def test_blocks_of_one_rotation_share_one_correction_and_a_stack_does_not() -> None:
    Q = normal(3, 2, 4, 4)
    Q = Q - Q.mT
    together, apart = merge_generators(Q), merge_generators(Q, joint=False)
    assert together.correction.shape == () and apart.correction.shape == (2,)
    for block in range(2):
        assert torch.allclose(apart.generator[block], merge_generators(Q[:, block]).generator)
    assert torch.allclose(together.generator, together.correction * Q.mean(0))


def test_opposed_generators_are_clipped_and_reported() -> None:
    A = normal(5, 5)
    Q = A - A.mT
    nearly = merge_generators([Q, -0.99 * Q])
    assert nearly.clipped and nearly.correction > 100
    assert torch.allclose(nearly.generator, 10 * 0.005 * Q)
    exactly = merge_generators([Q, -Q])
    assert exactly.clipped and exactly.correction == torch.inf and not exactly.generator.any()
    still = merge_generators([0 * Q, 0 * Q])
    assert not still.clipped and still.correction == 1 and not still.generator.any()


def test_rotations_merge_to_the_mean_angle() -> None:
    R = [small_turn(6, angle, 4) for angle in (0.1, 0.2, 0.6)]
    assert torch.allclose(merge_rotations(R), small_turn(6, 0.3, 4))


def test_without_the_prior_the_null_space_ruins_wide_matrices() -> None:
    W0 = normal(32, 64)
    experts = experts_of(W0, count=3, size=0.01)
    moved = {}
    for prior in (0.0, 1e-3):
        # Reflections have no generator, so that some experts cannot be merged at all without the prior.
        try:
            parts = orthomerge_parts(W0, experts, prior=prior)
        except OptionError as error:
            assert prior == 0 and "prior" in str(error)
            moved[prior] = torch.inf
            continue
        moved[prior] = float((parts.rotated - W0).norm() / (experts[0] - W0).norm())
    assert moved[0.0] > 5 and moved[1e-3] < 1


def test_rows_in_conflict_are_those_against_the_mean_change() -> None:
    W0 = normal(4, 3)
    up, down = normal(4, 3, seed=1) * 0.1, normal(4, 3, seed=1) * 0.1
    down[0] *= -0.5
    parts = orthomerge_parts(W0, [W0 + up, W0 + up, W0 + down], target="conflict")
    assert parts.conflicts.tolist() == [0, 0, 0.25]
    assert parts.generator_norms[0] < 1e-14 and parts.generator_norms[2] > 1e-3
    # Where nothing is in conflict nothing turns, and the mean of the changes is left.
    calm = orthomerge_parts(W0, [W0 + up, W0 + 2 * up], target="conflict")
    assert torch.allclose(calm.merged, W0 + 1.5 * up) and torch.allclose(calm.rotated, W0)


@pytest.mark.parametrize("residual", ["linear", "task_arithmetic", "ties", "dare", "tsv", "iso_c", "model_stock"])
def test_any_residual_method_merges_what_is_no_rotation(residual: str) -> None:
    from orthokit.merging.decoupling import RESIDUALS

    W0 = normal(150, 140)
    experts = experts_of(W0, size=0.05)
    parts = orthomerge_parts(W0, experts, residual=residual, scale=0.7)
    alone = [orthomerge_parts(W0, [W]) for W in experts]
    rests = [W - one.rotated for W, one in zip(experts, alone, strict=True)]
    wanted = RESIDUALS[residual](torch.zeros_like(W0), rests, scale=0.7, weights=None)
    assert torch.allclose(parts.merged - parts.rotated, wanted, atol=1e-7)


def test_vectors_have_no_rotation() -> None:
    base, experts = torch.zeros(4), [torch.ones(4), 3 * torch.ones(4)]
    parts = orthomerge_parts(base, experts)
    assert parts.merged.tolist() == [2.0] * 4 and parts.routes == ("none", "none")
    assert orthomerge(base, experts, residual="tsv", scale=0.5).tolist() == [1.0] * 4
    assert orthomerge(base, experts, residual="task_arithmetic", scale=0.5).tolist() == [2.0] * 4


def test_a_stack_is_merged_matrix_by_matrix() -> None:
    W0 = normal(2, 3, 5, 4)
    experts = experts_of(W0, count=2, size=0.1)
    parts = orthomerge_parts(W0, experts)
    assert parts.merged.shape == W0.shape and parts.correction.shape == (2, 3)
    assert parts.generator_norms.shape == (2, 3, 2)
    assert torch.allclose(parts.merged[1, 2], orthomerge(W0[1, 2], [W[1, 2] for W in experts]))


def test_zeros_low_rank_and_strided_matrices() -> None:
    zero = torch.zeros(5, 4).double()
    change = normal(5, 4)
    assert torch.allclose(orthomerge(zero, [change, change], prior=0.0), change)
    thin = normal(8, 2) @ normal(2, 6, seed=1)
    assert torch.isfinite(orthomerge(thin, experts_of(thin))).all()
    W0 = normal(6, 9).mT
    experts = experts_of(W0)
    assert torch.allclose(orthomerge(W0, experts), orthomerge(W0.contiguous(), experts))


def test_half_precision_is_computed_in_single_and_returned_as_it_was() -> None:
    W0 = normal(8, 6, dtype=torch.bfloat16)
    experts = [W.to(torch.bfloat16) for W in experts_of(W0.double(), size=0.2)]
    merged = orthomerge(W0, experts)
    assert merged.dtype == torch.bfloat16
    exact = orthomerge(W0.double(), [W.double() for W in experts])
    assert (merged.double() - exact).abs().max() <= 2**-8 * exact.abs().max()


def test_inputs_are_not_changed() -> None:
    W0 = normal(150, 140)
    experts = experts_of(W0)
    before = [W.clone() for W in (W0, *experts)]
    for residual in ("linear", "ties"):
        orthomerge(W0, experts, residual=residual)
    assert all(torch.equal(a, b) for a, b in zip(before, (W0, *experts), strict=True))


def test_the_options_are_the_same_everywhere() -> None:
    signature = inspect.signature(orthomerge).parameters
    for field in dataclasses.fields(_Options):
        assert signature[field.name].default == field.default
    assert len(dataclasses.fields(_Options)) == len(signature) - 2


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"target": "all"}, UnknownNameError, "target"),
        ({"residual": "mean"}, UnknownNameError, "residual"),
        ({"route": "fast"}, UnknownNameError, "route"),
        ({"intensity": "least"}, UnknownNameError, "intensity"),
        ({"prior": -1.0}, OptionError, "prior"),
        ({"clip": 0.5}, OptionError, "clip"),
        ({"threshold": 2.0}, OptionError, "threshold"),
        ({"weights": [1.0]}, OptionError, "weights"),
        ({"weights": [-1.0, 1.0]}, OptionError, "weights"),
    ],
)
def test_bad_options_are_refused(options: dict[str, object], error: type[Exception], words: str) -> None:
    W0 = normal(4, 3)
    with pytest.raises(error, match=words):
        orthomerge(W0, experts_of(W0, count=2), **options)  # type: ignore[arg-type]


def test_bad_tensors_are_refused_by_name(unchecked: None) -> None:
    W0 = normal(4, 3)
    with pytest.raises(ShapeError, match="expert 1"):
        orthomerge(W0, [W0, normal(3, 4)])
    broken = W0.clone()
    broken[0, 0] = torch.nan
    with pytest.raises(NonFiniteError, match="expert 0"):
        orthomerge(W0, [broken])
    with pytest.raises(OptionError, match="empty"):
        orthomerge(W0, [])
    with pytest.raises(UnknownNameError, match="option"):
        orthomerge_parts(W0, [W0], angle=1.0)
    with pytest.raises(OptionError, match="prior"):
        orthomerge(W0, [-W0], prior=0.0)
