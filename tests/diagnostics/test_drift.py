"""Capability-conditioned drift: against its definition token by token, its scaling laws, and every error."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from orthokit.diagnostics import drift as module
from orthokit.diagnostics.drift import capability_drift
from orthokit.errors import DtypeError, NonFiniteError, OptionError, ShapeError


def gaussian(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def reference(W0, W, H, eps=1e-12):
    """The three published formulas, one token at a time."""
    delta = W - W0
    moved = sum((delta @ h).norm() ** 2 for h in H) / len(H)
    output = sum((W0 @ h).norm() ** 2 for h in H) / len(H)
    size = sum(h.norm() ** 2 for h in H) / len(H)
    return moved, moved / (output + eps), moved / ((delta.norm() ** 2 + eps) * (size + eps))


@pytest.mark.parametrize("shape", [(4, 4), (7, 3), (3, 7), (1, 5), (5, 1)])
@pytest.mark.parametrize("tokens", [1, 2, 9])
def test_it_follows_its_definition_in_blocks_of_any_size(shape, tokens, monkeypatch):
    W0, W, H = gaussian(*shape), gaussian(*shape, seed=1), gaussian(tokens, shape[1], seed=2)
    for rows in (4096, 2):
        monkeypatch.setattr(module, "_ROWS", rows)
        found = capability_drift(W0, W, H)
        for value, expected in zip((found.absolute, found.relative, found.unaligned), reference(W0, W, H), strict=True):
            torch.testing.assert_close(value, expected)


@settings(max_examples=40, deadline=None)
@given(out=st.integers(1, 6), width=st.integers(1, 6), tokens=st.integers(1, 9), seed=st.integers(0, 10**6),
       c=st.floats(0.01, 10))  # fmt: skip
def test_scaling_laws_and_bounds(out, width, tokens, seed, c):
    W0, D, H = (
        gaussian(out, width, seed=seed),
        gaussian(out, width, seed=seed + 1),
        gaussian(tokens, width, seed=seed + 2),
    )
    # A stretch is felt as its square; eps is negligible unless the tokens happen to meet a null direction.
    assert capability_drift(W0, (1 + c) * W0, H, eps=0).relative.item() == pytest.approx(c**2, rel=1e-9)
    once, scaled = (capability_drift(W0, W0 + s * D, H, eps=0) for s in (1, c))
    assert scaled.absolute.item() == pytest.approx(c**2 * once.absolute.item(), rel=1e-6)
    assert scaled.unaligned.item() == pytest.approx(once.unaligned.item(), rel=1e-6)
    assert 0 <= once.unaligned <= 1 + 1e-12


def test_a_change_that_avoids_the_inputs_is_not_felt_and_one_along_them_is_felt_whole():
    h = torch.tensor([[3.0, 4.0, 0.0]], dtype=torch.float64)
    W0 = gaussian(2, 3)
    unit = h / 5
    along, across = torch.ones(2, 1, dtype=torch.float64) @ unit, torch.zeros(2, 3, dtype=torch.float64)
    across[:, 2] = 1.0
    assert capability_drift(W0, W0 + along, h).unaligned.item() == pytest.approx(1, abs=1e-9)
    assert capability_drift(W0, W0 + across, h).absolute.item() == 0


def test_a_change_that_almost_avoids_the_inputs_keeps_its_digits_in_float32():
    # The trace form tr(D C D^T) would end in rounding error of size 1e-7 of ||D||^2 ||C||.
    H = torch.tensor([[1.0, 1.0]]) * torch.linspace(0.5, 2, 64)[:, None]
    delta = torch.tensor([[1.0, -1.0 + 2**-12]])
    W0 = torch.zeros(1, 2)
    expected = reference(W0.double(), (W0 + delta).double(), H.double())
    assert capability_drift(W0, W0 + delta, H).absolute.item() == pytest.approx(expected[0].item(), rel=1e-5)


def test_batches_broadcast_against_one_pretrained_matrix():
    W0, W, H = gaussian(4, 5), gaussian(3, 2, 4, 5, seed=1), gaussian(6, 5, seed=2)
    found = capability_drift(W0, W, H)
    one = capability_drift(W0, W[2, 1], H)
    for name in ("absolute", "relative", "unaligned"):
        assert getattr(found, name).shape == (3, 2)
        torch.testing.assert_close(getattr(found, name)[2, 1], getattr(one, name))


def test_nothing_changed_and_zero_weights_give_zero_even_without_a_guard():
    W, H = gaussian(4, 3), gaussian(5, 3, seed=1)
    for eps in (0.0, 1e-12):
        for W0 in (W, torch.zeros_like(W)):
            found = capability_drift(W0, W0, H, eps=eps)
            assert found.absolute == found.relative == found.unaligned == 0
    assert capability_drift(torch.zeros_like(W), W, H, eps=0).relative == float("inf")


def test_half_precision_is_computed_in_float32_and_layout_does_not_matter():
    W0, W, H = gaussian(4, 6), gaussian(4, 6, seed=1), gaussian(5, 6, seed=2)
    halves = [X.bfloat16() for X in (W0, W, H)]
    found = capability_drift(*halves)
    assert found.relative.dtype == torch.float32
    expected = reference(*(X.double() for X in halves))
    assert found.relative.item() == pytest.approx(expected[1].item(), rel=1e-5)
    turned = capability_drift(W0.mT.contiguous().mT, W, H.mT.contiguous().mT)
    torch.testing.assert_close(turned.relative, capability_drift(W0, W, H).relative)


def test_bad_input_is_named(unchecked):
    W, H = gaussian(4, 3), gaussian(5, 3)
    with pytest.raises(ShapeError, match="one shape"):
        capability_drift(W, W.mT, H)
    with pytest.raises(ShapeError, match=r"\(tokens, in=3\).*got \(5, 2\)"):
        capability_drift(W, W, H[:, :2])
    with pytest.raises(ShapeError, match="at least one token"):
        capability_drift(W, W, H[:0])
    with pytest.raises(ShapeError, match="tokens, in=3"):
        capability_drift(W, W, H[None])
    with pytest.raises(ShapeError, match="at least 2 dimensions"):
        capability_drift(W, W, H[0])
    for name, arguments in (("W0", (W / 0, W, H)), ("W", (W, W / 0, H)), ("H", (W, W, H / 0))):
        with pytest.raises(NonFiniteError, match=f"{name} must be finite"):
            capability_drift(*arguments)
    with pytest.raises(DtypeError, match="H must be floating"):
        capability_drift(W, W, H.long())
    with pytest.raises(DtypeError, match="W must be real"):
        capability_drift(W, W * 1j, H)
    for eps in (-1.0, float("nan")):
        with pytest.raises(OptionError, match="eps must be >= 0"):
            capability_drift(W, W, H, eps=eps)
