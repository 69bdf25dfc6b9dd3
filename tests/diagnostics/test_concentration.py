"""Top-k mass and entropy of predictions."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from orthokit.diagnostics.concentration import concentration, token_entropy, top_k_mass
from orthokit.errors import DtypeError, NonFiniteError, OptionError, ShapeError


def logits(*shape, seed=0, scale=3.0):
    g = torch.Generator().manual_seed(seed)
    return scale * torch.randn(*shape, generator=g, dtype=torch.float64)


@given(st.integers(1, 9), st.integers(0, 10**6), st.floats(0, 50))
def test_mass_and_entropy_are_their_definitions(classes, seed, scale):
    z = logits(classes, seed=seed, scale=scale)
    weights = [math.exp(v - float(z.max())) for v in z.tolist()]
    p = sorted((w / sum(weights) for w in weights), reverse=True)
    for k in range(1, classes + 1):
        assert top_k_mass(z, k=k).item() == pytest.approx(sum(p[:k]), abs=1e-12)
    assert token_entropy(z).item() == pytest.approx(-sum(q * math.log(q) for q in p if q > 0), abs=1e-11)
    shifted = z + 7.0
    torch.testing.assert_close(token_entropy(shifted), token_entropy(z))


def test_the_ends_of_the_range():
    z = torch.zeros(2, 3, 8)
    assert top_k_mass(z, k=8).eq(1).all()
    assert token_entropy(z)[0, 0].item() == pytest.approx(math.log(8))
    sure = torch.full((8,), -math.inf)
    sure[3] = 2.0
    assert token_entropy(sure).item() == 0 and not math.copysign(1, token_entropy(sure).item()) < 0
    assert top_k_mass(sure).item() == 1


def test_a_mass_never_exceeds_one_in_half_precision():
    assert bool((top_k_mass(logits(200, 50).bfloat16(), k=50) <= 1).all())
    assert top_k_mass(logits(3, 4).half()).dtype == torch.float32


def test_means_are_over_the_tokens_that_count():
    z = logits(2, 5, 6)
    keep = torch.zeros(2, 5, dtype=torch.bool)
    keep[0, :2] = True
    found = concentration(z, k=2, keep=keep)
    assert found.tokens == 2
    assert found.mean_mass == pytest.approx(float(top_k_mass(z[0, :2], k=2).mean()))
    assert found.mean_entropy == pytest.approx(float(token_entropy(z[0, :2]).mean()))
    assert concentration(z, k=2).tokens == 10


def test_bad_logits_are_named(unchecked):
    with pytest.raises(OptionError, match="1 <= k <= classes = 4"):
        top_k_mass(torch.zeros(4), k=5)
    with pytest.raises(OptionError, match="k must"):
        top_k_mass(torch.zeros(4), k=0)
    with pytest.raises(DtypeError, match="floating"):
        token_entropy(torch.zeros(4, dtype=torch.long))
    for bad in ([float("nan"), 0.0], [math.inf, 0.0], [-math.inf, -math.inf]):
        with pytest.raises(NonFiniteError, match="1 of 1 tokens"):
            token_entropy(torch.tensor([bad]))
    with pytest.raises(ShapeError, match="keep must have shape"):
        concentration(torch.zeros(2, 3, 4), keep=torch.ones(2, dtype=torch.bool), k=1)
    with pytest.raises(OptionError, match="at least one token"):
        concentration(torch.zeros(2, 3, 4), keep=torch.zeros(2, 3, dtype=torch.bool), k=1)
