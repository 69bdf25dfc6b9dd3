"""The POET benchmark runs, and its paper table is next to what was published."""

from benchmarks.harness import Options
from benchmarks.poet import CANDIDATES, cases, paper


def test_cases_run_and_carry_the_measured_bytes():
    case = next(cases(Options(threads=1, rounds=1, quick=True)))
    for call in case.candidates.values():
        assert len(call()) in (2, 3)  # the input's gradient, and the weight's or both generators'
    assert case.columns["moments"].keys() == CANDIDATES.keys()
    moments = {name: float(size) for name, size in case.columns["moments"].items()}
    assert moments["POET-X low"] < moments["nn.Linear"] / 3


def test_the_counted_trainable_numbers_are_the_published_ones():
    rows = [line for line in paper().splitlines() if line.startswith("trained by POET")]
    pairs = [(float(line.split(": ")[1].split(" M")[0]), float(line.split("published ")[1][:-2])) for line in rows]
    assert len(pairs) == 3 and all(abs(counted / published - 1) < 1e-3 for counted, published in pairs)
