"""Weight changes: against their definitions in float64, every method of the package, invariances, and every error."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import orthokit as ok
from orthokit.adapters import BOFT, HRA, OFT, POET, DoRA, FullFineTuning, LoRA
from orthokit.diagnostics import (
    WeightChange,
    hyperspherical_energy,
    random_rotation_fraction,
    weight_change,
    weight_profiles,
)
from orthokit.diagnostics._change_parts import block_residual, factor, row_scaled_rank
from orthokit.errors import DtypeError, NonFiniteError, OptionError, ShapeError
from orthokit.linalg import apply_blocks, random_orthogonal

SHAPES = [(24, 24), (16, 40), (40, 16)]
BF16 = torch.bfloat16


def source(seed=0):
    return torch.Generator().manual_seed(seed)


def gaussian(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=source(seed), dtype=torch.float64).to(dtype)


def rotation(n, *, angle=0.1, seed=0):
    """Cayley rotation, orthogonal to the last digit; small angles are about ``angle``."""
    A = gaussian(n, n, seed=seed)
    Q, eye = (A - A.mT) * angle / math.sqrt(8 * n), torch.eye(n, dtype=torch.float64)
    return torch.linalg.solve(eye - Q, eye + Q)


def same(row, other, *, rel=1e-6, absolute=1e-8):
    """Whether two rows agree, words and missing values included."""
    assert row.keys() == other.keys()
    for name, value in row.items():
        expected = pytest.approx(value, rel=rel, abs=absolute) if isinstance(value, float) else value
        assert other[name] == expected, name


def weights(m, n, *, seed=0):
    """Like a trained matrix: columns of different size, a decaying spectrum."""
    return gaussian(m, n, seed=seed) @ torch.diag(torch.linspace(2, 0.2, n, dtype=torch.float64)) / math.sqrt(n)


def reference(W0, W, rank=8):
    """Everything by its definition: the full rotation of ``in`` dimensions, NumPy, float64."""
    W0, W = W0.double().numpy(), W.double().numpy()
    U, _, Vh = np.linalg.svd(W0.T @ W)
    turned, D = W0 @ (U @ Vh), W - W0
    s0, s, sD = (np.linalg.svd(part, compute_uv=False) for part in (W0, W, D))
    size, change = np.linalg.norm(W0), np.linalg.norm(D)
    (U0, _, V0h), (U1, _, V1h) = (np.linalg.svd(part, full_matrices=False) for part in (W0, W))

    def angle(A, B):
        cosine = np.linalg.svd(A.T @ B, compute_uv=False)[-1]
        return np.degrees(np.arccos(min(1.0, cosine)))

    energies = [float(hyperspherical_energy(torch.tensor(part))) for part in (W0, W)]
    return {
        "relative_change": change / size,
        "spectrum_change": np.linalg.norm(s - s0) / size,
        "energy_change": energies[1] - energies[0],
        "change_stable_rank": (change / sD[0]) ** 2,
        "rotation_fraction": 1 - (np.linalg.norm(turned - W) / change) ** 2,
        "rotation_angle": np.degrees(2 * np.arcsin(np.linalg.norm(turned - W0) / (2 * size))),
        "rotation_residual": np.linalg.norm(turned - W) / size,
        "left_angle": angle(U0[:, :rank], U1[:, :rank]),
        "right_angle": angle(V0h[:rank].T, V1h[:rank].T),
    }


@pytest.mark.parametrize("shape", [*SHAPES, (9, 8), (8, 9)])
@pytest.mark.parametrize("size", [0.003, 0.3, 3.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_number_follows_its_definition(shape, size, dtype):
    W0 = weights(*shape).to(dtype)
    W = (W0 + size * gaussian(*shape, seed=1, dtype=dtype) / math.sqrt(shape[1])).to(dtype)
    found = weight_change(W0, W, rank=5)
    # The reference loses half of its digits where arccos meets a small angle; the energy is float32 of about 0.7.
    loose = {"left_angle": 2e-6, "right_angle": 2e-6, "energy_change": 1e-7 if dtype == torch.float32 else 1e-12}
    for name, value in reference(W0, W, rank=5).items():
        assert getattr(found, name) == pytest.approx(value, rel=1e-6, abs=loose.get(name, 1e-9)), name


@pytest.mark.parametrize("shape", SHAPES)
def test_spectra_and_profiles_are_those_of_the_matrices(shape):
    W0 = weights(*shape).float()
    W = W0 + 0.01 * gaussian(*shape, seed=1, dtype=torch.float32)
    found = weight_change(W0, W)
    for values, of in (
        (found.singular_values, W.double() - W0.double()),
        (found.base_singular_values, W0.double()),
        (found.tuned_singular_values, W.double()),
    ):
        assert values.dtype == torch.float32
        torch.testing.assert_close(values.double(), torch.linalg.svdvals(of), rtol=1e-6, atol=1e-6)
    profiles = weight_profiles(W0.double(), W.double())
    # Vectors of the same SVD up to sign, of which both profiles know nothing.
    torch.testing.assert_close(
        found.retention_drift.double(), profiles.drift / found.base_singular_values[0].double(), rtol=1e-4, atol=1e-6
    )
    torch.testing.assert_close(found.adaptation.double(), profiles.adaptation / profiles.change, rtol=1e-4, atol=1e-6)


def trained(config, m, n, *, steps=25):
    """Base weight and what the adapter makes of it after some steps towards another weight."""
    layer = nn.Linear(n, m, bias=False)
    with torch.no_grad():
        layer.weight.copy_(weights(m, n).float())
    W0 = layer.weight.detach().clone()
    target = W0 + 0.3 * gaussian(m, n, seed=1, dtype=torch.float32) / math.sqrt(n)
    X = gaussian(192, n, seed=2, dtype=torch.float32)
    adapted = config.wrap(layer)
    optimizer = torch.optim.Adam([p for p in adapted.parameters() if p.requires_grad], lr=3e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        (adapted(X) - X @ target.mT).square().mean().backward()
        optimizer.step()
    return W0, adapted.effective_weight().detach()


METHODS = {
    "oft8": (OFT(block_size=8), "oft", 8, None),
    "oft32": (OFT(block_size=32), "oft", 32, None),
    "oft16": (OFT(block_size=16), "oft", 16, None),
    "boft": (BOFT(block_size=8, factors=2), "oft", 16, None),
    "hra": (HRA(rank=6), "hra", None, 6),
    "lora": (LoRA(rank=6), "lora", None, 6),
    "pissa": (LoRA(rank=6, init="pissa"), "pissa", None, 6),
    "dora": (DoRA(rank=6), "dora", None, 6),
    "poet": (POET(block_size=16, map="cayley"), "orthogonal_both", None, None),
    "poet, as published": (POET(block_size=16), "orthogonal_both", None, None),
    "full": (FullFineTuning(), "general", None, None),
}


@pytest.mark.parametrize("shape", [(128, 128), (96, 192), (192, 96)])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_told_from_its_weights_alone_in_float32_and_saved_in_bfloat16(method, shape):
    config, kind, block, rank = METHODS[method]
    W0, W = trained(config, *shape)
    for dtype in (torch.float32, BF16):
        found = weight_change(W0.to(dtype), W.to(dtype))
        assert (found.kind, found.block_size, found.adapter_rank) == (kind, block, rank), (dtype, found)
        # The same file, widened on reading: only the dtype tells what the zeros at the end of the mantissa mean.
        widened = weight_change(W0.to(dtype).float(), W.to(dtype).float(), dtype=dtype)
        same(found.row(), widened.row())


def test_optimizer_steps_are_told_apart():
    def after(make):
        layer = nn.Linear(96, 64, bias=False)
        with torch.no_grad():
            layer.weight.copy_(weights(64, 96).float())
        W0, optimizer = layer.weight.detach().clone(), make(layer.parameters())
        for i in range(4):
            optimizer.zero_grad()
            layer.weight.grad = gaussian(64, 96, seed=10 + i, dtype=torch.float32)
            optimizer.step()
        return weight_change(W0, layer.weight.detach())

    assert after(lambda weights: ok.optim.Pion(weights, lr=0.05)).kind == "orthogonal_both"
    assert after(lambda weights: ok.optim.Muon(weights, lr=0.02, weight_decay=0.0)).kind == "general"


@pytest.mark.parametrize("shape", [(96, 96), (64, 160), (160, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, BF16])
def test_simple_changes_have_simple_names(shape, dtype):
    W0 = weights(*shape).to(dtype)
    wide = W0.double()
    rows, columns = (0.9 + 0.2 * torch.rand(n, generator=source(), dtype=torch.float64) for n in shape)
    cases = {
        "unchanged": wide,
        "scaled": 0.97 * wide,
        "rows": rows[:, None] * wide,
        "columns": wide * columns,
        "orthogonal_in": wide @ rotation(shape[1]),
        "orthogonal_both": rotation(shape[0], seed=1) @ wide @ rotation(shape[1]),
        "general": wide + 0.02 * gaussian(*shape, seed=1),
    }
    assert {name: weight_change(W0, W.to(dtype)).kind for name, W in cases.items()} == {name: name for name in cases}


@pytest.mark.parametrize("lower", [BF16, torch.float16, torch.float8_e4m3fn])
def test_a_copy_in_a_shorter_format_is_only_rounded_either_way_round(lower):
    W0 = weights(32, 48).float()
    for pair in ((W0, W0.to(lower).float()), (W0.to(lower).float(), W0)):
        assert weight_change(*pair).kind == "rounded"
    assert weight_change(W0, W0 + 0.05 * gaussian(32, 48, seed=1, dtype=torch.float32)).kind == "general"


def test_below_the_rounding_of_the_file_nothing_is_claimed():
    W0 = weights(96, 96).to(BF16)
    noise = weight_change(W0, (W0.double() * (1 + 1e-3 * gaussian(96, 96, seed=1))).to(BF16))
    assert noise.kind == "rounded"
    assert noise.change_rank is None
    assert 0 < noise.relative_change < noise.noise
    small = weight_change(W0, (W0.double() + 3e-3 * W0.double().std() * gaussian(96, 96, seed=1)).to(BF16))
    assert small.kind in ("general", "rounded")


@pytest.mark.parametrize("shape", [(160, 160), (96, 240), (240, 96)])
@pytest.mark.parametrize("size", [0.005, 0.03])
def test_in_bfloat16_a_low_rank_stands_out_of_rounding_and_a_full_one_does_not_pass_for_it(shape, size):
    W0 = weights(*shape).to(BF16)
    norm = torch.linalg.matrix_norm(W0.double())
    low, full = gaussian(shape[0], 8, seed=1) @ gaussian(8, shape[1], seed=2), gaussian(*shape, seed=3)
    found = [
        weight_change(W0, (W0.double() + size * norm * D / torch.linalg.matrix_norm(D)).to(BF16)) for D in (low, full)
    ]
    assert (found[0].kind, found[0].change_rank) == ("lora", 8)
    assert (found[1].kind, found[1].change_rank) == ("general", None)


@pytest.mark.parametrize("shape", [(160, 160), (64, 200), (200, 64)])
@pytest.mark.parametrize("used", [64, 20])
def test_the_rotation_fraction_of_a_random_change_is_as_computed(shape, used):
    U, S, Vh = torch.linalg.svd(gaussian(*shape), full_matrices=False)
    W0 = (U[:, :used] * (1 + S[:used])) @ Vh[:used]
    found = weight_change(W0, W0 + 1e-4 * gaussian(*shape, seed=1))
    expected = random_rotation_fraction(*shape, rank=used)
    assert found.random_rotation == pytest.approx(expected)
    # A share of size independent squares scatters by at most 1/sqrt(2 size); five of these.
    assert found.rotation_fraction == pytest.approx(expected, abs=5 / math.sqrt(2 * shape[0] * shape[1]))


def test_a_rotation_leaves_nothing_however_small_its_angle():
    for angle in (1.0, 1e-2, 1e-4, 1e-6):
        for shape in SHAPES:
            W0 = weights(*shape)
            found = weight_change(W0, W0 @ rotation(shape[1], angle=angle))
            assert found.rotation_residual < 1e-13, (angle, shape)
            assert found.rotation_fraction > 1 - 1e-10
            assert found.kind == "orthogonal_in"
            # A chord below 1e-8 drowns in rounding of the energies; a chord is no longer than the change it is part of.
            bound = math.degrees(2 * math.asin(min(1, found.relative_change / 2)))
            assert found.rotation_angle <= bound * (1 + 1e-9) + 2e-6


@pytest.mark.parametrize("shape", SHAPES)
def test_the_angle_is_that_of_the_rotation_where_the_base_fills_the_input_space(shape):
    W0, R = weights(*shape), rotation(shape[1], angle=0.3)
    found = weight_change(W0, W0 @ R)
    chord = torch.linalg.matrix_norm(W0 @ R - W0) / torch.linalg.matrix_norm(W0)
    assert found.rotation_angle == pytest.approx(math.degrees(2 * math.asin(float(chord) / 2)), rel=1e-9)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ill_conditioned_and_deficient_bases_are_turned_exactly(shape, dtype):
    U, _, Vh = torch.linalg.svd(gaussian(*shape), full_matrices=False)
    k = min(shape)
    half = torch.cat([torch.ones(k // 2), torch.zeros(k - k // 2)])
    # Below the root of epsilon the cross product does not know which direction belongs to which.
    for S, exact in ((torch.logspace(0, -9, k), 1e-8), (half, 1e-13)):
        W0 = ((U * S.double()) @ Vh).to(dtype)
        W = (W0.double() @ rotation(shape[1])).to(dtype)
        found = weight_change(W0, W)
        assert found.rotation_residual < (2e-7 if dtype == torch.float32 else exact)
        assert found.kind == "orthogonal_in"
        expected = reference(W0, W)
        assert found.rotation_angle == pytest.approx(expected["rotation_angle"], rel=1e-3)
        assert found.spectrum_change < (1e-6 if dtype == torch.float32 else 1e-14)


@pytest.mark.parametrize(("width", "b"), [(48, 2), (48, 3), (48, 16), (100, 12), (97, 10), (30, 15)])
def test_the_smallest_block_is_found_whether_it_divides_the_columns_or_not(width, b):
    sizes = [min(b, width - start) for start in range(0, width, b)]
    blocks = [rotation(size, seed=i, angle=0.2) for i, size in enumerate(sizes)]
    W0 = weights(40, width)
    W = W0 @ torch.block_diag(*blocks)
    found = weight_change(W0, W)
    assert (found.kind, found.block_size) == ("oft", b)
    assert block_residual(W0, W, b) < 1e-13
    by_hand = sum(
        torch.linalg.matrix_norm(A0 @ ok.linalg.procrustes(A0, A) - A).square()
        for A0, A in zip(W0.split(b + 1, dim=1), W.split(b + 1, dim=1), strict=True)
    )
    assert block_residual(W0, W, b + 1) == pytest.approx(float(by_hand.sqrt()))


def test_blocks_of_orthokit_itself():
    blocks = torch.stack([rotation(8, seed=i).float() for i in range(6)])
    W0 = weights(30, 48).float()
    assert weight_change(W0, apply_blocks(blocks, W0)).block_size == 8


def test_row_scaled_low_rank_is_found_with_its_rank_and_nothing_else_is():
    W0 = weights(96, 80)
    D = 1 + 0.1 * gaussian(96, 1, seed=1)
    for r in (1, 3, 4, 6, 9):
        L = 0.05 * gaussian(96, r, seed=2) @ gaussian(r, 80, seed=3)
        assert row_scaled_rank(W0, D * (W0 + L), limit=1e-9, most=10) == r
    # Strengths far apart, as training leaves them.
    L = 0.05 * (gaussian(96, 5, seed=2) * torch.logspace(0, -1, 5, dtype=torch.float64)) @ gaussian(5, 80, seed=3)
    assert row_scaled_rank(W0, D * (W0 + L), limit=1e-9, most=10) == 5
    general = D * W0 + 0.05 * gaussian(96, 80, seed=4)
    assert row_scaled_rank(W0, general, limit=1e-9, most=10) is None
    assert weight_change(W0, general).kind == "general"


def test_a_common_rotation_of_the_inputs_changes_no_number_but_the_block_size():
    for shape in SHAPES:
        W0 = weights(*shape)
        W = W0 + 0.05 * gaussian(*shape, seed=1)
        Q = random_orthogonal(shape[1], shape[1], generator=source(5), dtype=torch.float64)
        before, after = weight_change(W0, W), weight_change(W0 @ Q, W @ Q)
        same(before.row(), after.row())
        for name in ("singular_values", "retention_drift", "adaptation"):
            torch.testing.assert_close(getattr(after, name), getattr(before, name), rtol=1e-5, atol=1e-6)
    blocks = torch.block_diag(*(rotation(4, seed=i) for i in range(6)))
    W0 = weights(24, 24)
    turned = random_orthogonal(24, 24, generator=source(6), dtype=torch.float64)
    assert weight_change(W0, W0 @ blocks).block_size == 4
    assert weight_change(W0 @ turned, W0 @ blocks @ turned).kind == "orthogonal_in"


@settings(max_examples=40)
@given(
    m=st.integers(1, 14),
    n=st.integers(1, 14),
    seed=st.integers(0, 10**6),
    size=st.sampled_from([0.0, 1e-6, 1e-2, 1.0, 30.0]),
    deficient=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64, BF16]),
)
def test_inequalities_hold_for_any_pair(m, n, seed, size, deficient, dtype):
    W0 = gaussian(m, n, seed=seed)
    if deficient:
        W0[:, : n // 2] = 0
        W0[m // 2 :] = 0
    W0 = W0.to(dtype)
    W = (W0.double() + size * gaussian(m, n, seed=seed + 1)).to(dtype)
    found = weight_change(W0, W)
    slack = 1e-6
    if float(W0.double().abs().max()) == 0:
        assert found.relative_change is None
        return
    assert 0 <= found.rotation_residual <= found.relative_change * (1 + slack) + 1e-13
    # Singular values move by no more than the matrices are apart, after the best rotation as before (Mirsky).
    assert found.spectrum_change <= found.rotation_residual * (1 + slack) + slack
    assert 0 <= found.rotation_angle <= 180
    assert found.rotation_fraction is None or 0 <= found.rotation_fraction <= 1
    assert 0 <= found.random_rotation < 1
    assert found.change_rank is None or 0 <= found.change_rank <= min(m, n)
    assert found.block_size is None or 2 <= found.block_size <= n // 2
    assert found.change_stable_rank <= min(m, n) * (1 + slack)
    assert found.verdict
    assert (found.kind == "unchanged") == torch.equal(W0, W)


def test_zero_and_tiny_matrices_have_what_is_defined():
    zero, W = torch.zeros(6, 9), gaussian(6, 9, dtype=torch.float32)
    from_zero = weight_change(zero, W)
    assert from_zero.kind == "general"
    assert "base is zero" in from_zero.verdict
    assert [from_zero.relative_change, from_zero.rotation_angle, from_zero.left_angle] == [None] * 3
    to_zero = weight_change(W, zero)
    assert to_zero.kind == "scaled"
    assert (to_zero.relative_change, to_zero.scale) == (pytest.approx(1), 0.0)
    # All of it is below the smallest number of an 8-bit format, but it was not rounded, it was deleted.
    assert weight_change(1e-6 * W, zero).kind == "scaled"
    nothing = weight_change(zero, zero)
    assert (nothing.kind, nothing.change_rank, nothing.change_stable_rank) == ("unchanged", 0, 0.0)
    one = weight_change(W[:1], 1.5 * W[:1])
    assert (one.kind, one.energy_change) == ("scaled", None)
    assert one.relative_change == pytest.approx(0.5)
    assert weight_change(W[:, :1], W[:, :1] + 1).left_angle is not None
    single = weight_change(torch.tensor([[2.0]]), torch.tensor([[-2.0]]))
    assert single.rotation_residual == 0.0
    assert single.rotation_angle == pytest.approx(180)


def test_one_row_of_the_same_length_is_no_proof_of_a_rotation_but_equal_rows_are():
    W0 = gaussian(1, 64)
    assert weight_change(W0, W0 + 0.1 * gaussian(1, 64, seed=1)).kind == "general"
    assert weight_change(W0, W0 @ rotation(64)).kind == "orthogonal_in"


def test_zero_rows_and_repeated_rows_do_no_harm():
    W0 = weights(20, 30).float()
    W0[3] = 0
    W0[5] = W0[4]
    found = weight_change(W0, W0 @ rotation(30).float())
    assert found.kind == "orthogonal_in"
    assert all(math.isfinite(v) for v in found.row().values() if isinstance(v, float))


def test_a_heavy_row_carries_its_own_rounding():
    W0 = weights(128, 128)
    W0[7] *= 300
    D = 0.02 * gaussian(128, 4, seed=1) @ gaussian(4, 128, seed=2)
    found = weight_change(W0.to(BF16), (W0.to(BF16).double() + D * W0.norm(dim=1, keepdim=True)).to(BF16))
    assert found.change_rank == 4


@pytest.mark.parametrize("scale", [2.0**-80, 2.0**80])
@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_the_unit_of_the_weights_does_not_matter(scale, dtype):
    W0 = weights(48, 64)
    W = W0 + 0.02 * gaussian(48, 3, seed=1) @ gaussian(3, 64, seed=2)
    plain = weight_change(W0.to(dtype), W.to(dtype))
    scaled = weight_change(scale * W0.to(dtype), scale * W.to(dtype))
    assert (plain.kind, plain.change_rank) == ("lora", 3)
    # Rows as short as 1e-24 have no directions, hence no energy.
    same(plain.row() | {"energy_change": 0.0}, scaled.row() | {"energy_change": 0.0})


def test_known_values_are_used_as_given():
    W0, W = weights(12, 20).float(), weights(12, 20, seed=1).float()
    own = weight_change(W0, W)
    given_ = weight_change(
        W0, W, sigma0=own.base_singular_values, sigma=own.tuned_singular_values, energies=(0.25, 0.75)
    )
    assert given_.energy_change == 0.5
    assert given_.spectrum_change == pytest.approx(own.spectrum_change, rel=1e-5)
    assert weight_change(W0, W, sigma=2 * own.tuned_singular_values).spectrum_change > own.spectrum_change


def test_the_rounding_of_a_quantised_file_decides_what_counts():
    W0 = weights(48, 64).float()
    step = 0.01
    W = (W0 / step).round() * step
    rms = step / math.sqrt(12)
    assert weight_change(W0, W).kind == "general"
    assert weight_change(W0, W, rounding=rms).kind == "rounded"
    assert "storing it in these files" in weight_change(W0, W, rounding=rms).verdict
    assert weight_change(W0, W, rounding=rms).noise == pytest.approx(
        rms * math.sqrt(48 * 64) / float(W0.norm()), rel=1e-4
    )


def test_strides_and_gradients_do_not_matter():
    W0 = weights(20, 12).float()
    W = (W0 + 0.1).requires_grad_()
    expected = weight_change(W0, W.detach()).row()
    assert weight_change(W0.T.contiguous().T, W).row() == expected
    both = torch.stack([W0, W.detach()], dim=-1)
    assert weight_change(both[..., 0], both[..., 1]).row() == expected


def test_the_energy_of_very_many_rows_is_that_of_some(monkeypatch):
    import orthokit.diagnostics.change as module

    W0, W = weights(64, 8).float(), weights(64, 8, seed=1).float()
    monkeypatch.setattr(module, "_ROWS", 16)
    chosen = torch.linspace(0, 63, 16).round().long()
    expected = hyperspherical_energy(W[chosen]) - hyperspherical_energy(W0[chosen])
    assert weight_change(W0, W).energy_change == pytest.approx(float(expected), abs=1e-6)


def test_the_gram_route_gives_the_svd():
    for shape in SHAPES:
        W = weights(*shape)
        U, S, Vh = factor(W)
        torch.testing.assert_close(S, torch.linalg.svdvals(W))
        torch.testing.assert_close((U * S) @ Vh, W)
        top = factor(W, top=3)
        assert (top.U if shape[0] > shape[1] else top.Vh.mT).shape[1] == 3


def test_the_columns_of_a_table_are_the_row():
    from orthokit.diagnostics.inspection.columns import COLUMNS

    found = weight_change(weights(6, 9), weights(6, 9, seed=1))
    assert isinstance(found, WeightChange)
    assert list(found.row()) == [name for name, column in COLUMNS.items() if column.group == "change"]


def test_random_rotation_fraction_in_known_cases():
    assert random_rotation_fraction(1, 1) == 0
    assert random_rotation_fraction(1, 10) == pytest.approx(0.9)  # all but the direction of the row itself
    assert random_rotation_fraction(10, 1) == 0
    assert random_rotation_fraction(50, 50) == pytest.approx(49 / 100)
    assert random_rotation_fraction(50, 50, rank=0) == 0
    for bad in ({"out": 0, "width": 3}, {"out": 3, "width": 3, "rank": 4}, {"out": 3, "width": 3, "rank": -1}):
        with pytest.raises(OptionError, match="rank"):
            random_rotation_fraction(**bad)


def test_bad_input_is_refused_in_words(unchecked):
    W = weights(4, 6)
    bad = W.clone()
    bad[1, 2] = float("nan")
    for pair in ((bad, W), (W, bad)):
        with pytest.raises(NonFiniteError, match="finite"):
            weight_change(*pair)
    for pair in ((W, W.T), (W[None], W[None]), (W[:0], W[:0]), (W[0], W[0])):
        with pytest.raises(ShapeError):
            weight_change(*pair)
    with pytest.raises(ShapeError, match="singular values"):
        weight_change(W, W, sigma=torch.ones(3))
    with pytest.raises(DtypeError):
        weight_change(W, W.long())
    with pytest.raises(DtypeError, match="real"):
        weight_change(W, W.to(torch.complex64))
    with pytest.raises(DtypeError, match="floating"):
        weight_change(W, W + 1, dtype=torch.int8)
    with pytest.raises(OptionError, match="rank"):
        weight_change(W, W, rank=0)
    for rounding in (-1.0, float("nan")):
        with pytest.raises(OptionError, match="rounding"):
            weight_change(W, W, rounding=rounding)
