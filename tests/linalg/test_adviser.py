"""The adviser: what it names keeps the tolerance, costs what it says, and nothing cheaper would do."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from orthokit import linalg
from orthokit.errors import OptionError, UnknownNameError


class TestAdviser:
    @given(st.floats(0, 2), st.sampled_from([1e-1, 1e-3, 1e-6]), st.sampled_from(["cayley", "exp"]))
    def test_what_it_names_keeps_the_tolerance_on_a_real_generator(self, theta, tolerance, family):
        choice = linalg.recommended_map(theta, tolerance=tolerance, family=family)
        Q = linalg.unpack_skew(theta * torch.linspace(0, 1, 41, dtype=torch.float64)[:, None])
        s = linalg.singular_values(choice.apply(Q))
        assert float((s - 1).abs().max()) <= tolerance + 1e-12
        assert choice.error <= tolerance and choice.map.startswith(family)

    @given(st.floats(0.01, 1.2), st.sampled_from([1e-1, 1e-3, 1e-6]))
    def test_nothing_cheaper_keeps_it(self, theta, tolerance):
        choice = linalg.recommended_map(theta, tolerance=tolerance)
        for terms in range(1, 8):
            for polish in range(3):
                products = linalg.map_products("cayley_neumann", terms=terms, polish=polish)
                if choice.products is None or products < choice.products:
                    low, high = linalg.polished_bounds("cayley_neumann", theta, terms=terms, polish=polish)
                    too_many = choice.products is None and products > 6
                    assert max(1 - low, high - 1) > tolerance or too_many

    def test_products_are_those_that_are_made(self, monkeypatch):
        counted = []
        plain = torch.Tensor.__matmul__
        monkeypatch.setattr(torch.Tensor, "__matmul__", lambda a, b: counted.append(1) or plain(a, b))
        Q = linalg.unpack_skew(torch.tensor([0.3, 0.1, 0.2]))
        for theta in (0.05, 0.3, 0.6, 0.75, 0.9):
            counted.clear()
            choice = linalg.recommended_map(theta, tolerance=1e-2)
            choice.apply(Q)
            assert len(counted) == choice.products, choice

    def test_it_says_what_it_chose(self):
        assert str(linalg.recommended_map(0.05, tolerance=1e-2)).startswith("cayley_neumann, terms=1 (1 product)")
        assert "exact, one solve" in str(linalg.recommended_map(3.0))
        assert "exp (exact)" in str(linalg.recommended_map(50.0, family="exp"))
        assert "polish=1" in str(linalg.recommended_map(0.9, tolerance=1e-2))

    def test_bad_input_is_refused(self, unchecked):
        with pytest.raises(UnknownNameError, match="family"):
            linalg.recommended_map(0.1, family="householder")
        with pytest.raises(OptionError, match="tolerance"):
            linalg.recommended_map(0.1, tolerance=0.0)
        with pytest.raises(OptionError, match="theta"):
            linalg.recommended_map(-0.1)
        assert linalg.map_products("exp") is None
