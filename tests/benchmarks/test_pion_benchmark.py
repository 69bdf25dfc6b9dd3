"""The Pion benchmark runs, and the least it prints is counted and measured, not typed."""

import pytest

from benchmarks.harness import Options, Result
from benchmarks.pion import (
    BYTES_A_NUMBER,
    MOMENTS,
    PRODUCTS,
    cases,
    floor_lines,
    layouts,
    moment_numbers,
    pion_flop,
)


def test_flop_is_a_product_a_side_two_terms_a_side_and_a_restart():
    # 8 x 4: a product of the longer side takes 2 * 8 * 8 * 4, one of the shorter 2 * 8 * 4 * 4.
    assert pion_flop([(8, 4)]) == 3 * 512 + 4 * 256
    assert pion_flop([(8, 4)], sides="alternate") == 2 * 512 + 2 * 256
    assert moment_numbers([(8, 4)]) == 28 + 6


def test_cases_run_and_the_least_is_read_from_the_run():
    options = Options(threads=1, rounds=1, quick=True)
    case = next(cases(options))
    (shapes, _) = layouts(quick=True)[case.title]
    for call in case.candidates.values():
        call()
    # Two GFLOP/s and half a GB/s, against a baseline of a thousand seconds.
    seconds = dict.fromkeys(case.candidates, 1000.0)
    seconds[PRODUCTS] = pion_flop(shapes) / 2e9
    seconds[MOMENTS] = BYTES_A_NUMBER * moment_numbers(shapes) / 0.5e9
    result = Result(case, {name: [t] for name, t in seconds.items()}, {name: [t] for name, t in seconds.items()})
    head, both, alternate = floor_lines(result, shapes)
    assert " at 2 GFLOP/s " in head and " at 0.5 GB/s" in head
    assert both.endswith("measured 1.00") and "at least 0.00 of torch.optim.Muon" in alternate


def test_the_products_alone_are_those_that_are_counted():
    from benchmarks.pion import products_alone

    shapes = [(6, 4), (3, 7), (5, 5)]
    results = products_alone(shapes)()
    assert len(results) == 7 * len(shapes)
    count = 0.0
    for (m, n), products in zip(shapes, (results[i : i + 7] for i in range(0, 21, 7)), strict=True):
        inner = [m, n, n, m, n, m, m if n >= m else n]
        count += sum(2.0 * out.numel() * k for out, k in zip(products, inner, strict=True))
    assert count == pytest.approx(pion_flop(shapes))
