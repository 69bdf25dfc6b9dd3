"""Pareto fronts and the area they dominate."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from orthokit.diagnostics.front import hypervolume, pareto_front
from orthokit.errors import DtypeError, NonFiniteError, ShapeError

# Few values, so that ties and duplicates are common.
COORDINATE = st.integers(-3, 3).map(float)
PLANE = st.lists(st.tuples(COORDINATE, COORDINATE), min_size=0, max_size=14)


def table(points, axes=2):
    return torch.tensor(points, dtype=torch.float64).reshape(-1, axes)


def reference_front(x):
    beats = lambda p, q: all(a >= b for a, b in zip(p, q)) and any(a > b for a, b in zip(p, q))  # noqa: E731, B905
    return [not any(beats(p, q) for p in x) for q in x]


def reference_area(x, r):
    """Cells of the grid through all coordinates that some point covers."""
    xs, ys = (sorted({r[k], *(max(p[k], r[k]) for p in x)}) for k in range(2))
    cells = ((a, b, c, d) for a, b in itertools.pairwise(xs) for c, d in itertools.pairwise(ys))
    return sum((b - a) * (d - c) for a, b, c, d in cells if any(p[0] >= b and p[1] >= d for p in x))


@given(PLANE)
def test_the_front_is_the_definition_point_by_point(points):
    assert pareto_front(table(points)).tolist() == reference_front(points)


@given(st.lists(st.tuples(COORDINATE, COORDINATE, COORDINATE), min_size=0, max_size=10))
def test_more_than_two_axes_follow_the_same_definition(points):
    assert pareto_front(table(points, 3)).tolist() == reference_front(points)


@given(st.lists(COORDINATE, min_size=1, max_size=8))
def test_on_one_axis_the_front_is_the_maximum_with_its_ties(points):
    assert pareto_front(table(points, 1)).tolist() == [p == max(points) for p in points]


@given(PLANE, st.tuples(COORDINATE, COORDINATE))
def test_the_area_is_that_of_the_cells_that_are_covered(points, corner):
    assert hypervolume(table(points), reference=corner).item() == reference_area(points, corner)


@given(PLANE, st.randoms(use_true_random=False))
def test_only_the_front_counts_and_order_does_not(points, random):
    x = table(points)
    area = hypervolume(x, reference=(-4.0, -4.0))
    assert hypervolume(x[pareto_front(x)], reference=(-4.0, -4.0)) == area
    order = list(range(len(points)))
    random.shuffle(order)
    assert hypervolume(x[order], reference=(-4.0, -4.0)) == area
    assert pareto_front(x[order]).tolist() == [pareto_front(x).tolist()[i] for i in order]


def test_one_point_more_never_shrinks_the_area():
    g = torch.Generator().manual_seed(0)
    x = torch.rand(40, 2, generator=g, dtype=torch.float64)
    areas = [hypervolume(x[:n], reference=torch.zeros(2)).item() for n in range(41)]
    assert areas[0] == 0 and all(b >= a - 1e-12 for a, b in itertools.pairwise(areas)) and areas[-1] < 1


def test_integers_half_precision_and_views_are_taken():
    points = [[1, 3], [2, 2], [2, 1], [3, 0]]
    want = [True, True, False, True]
    for x in (torch.tensor(points), torch.tensor(points).bfloat16(), torch.tensor(points).repeat(1, 2)[:, :2]):
        assert pareto_front(x).tolist() == want
        assert hypervolume(x, reference=(0, 0)).item() == 5.0


def test_bad_points_are_named(unchecked):
    with pytest.raises(NonFiniteError, match="1 of 2 are not"):
        pareto_front(torch.tensor([[1.0, float("nan")], [0.0, 0.0]]))
    with pytest.raises(ShapeError, match="table"):
        pareto_front(torch.ones(3))
    with pytest.raises(DtypeError, match="real"):
        pareto_front(torch.ones(2, 2, dtype=torch.complex64))
    with pytest.raises(ShapeError, match="two axes"):
        hypervolume(torch.ones(3, 3), reference=(0.0, 0.0))
    with pytest.raises(NonFiniteError, match="reference"):
        hypervolume(torch.ones(3, 2), reference=(float("inf"), 0.0))
