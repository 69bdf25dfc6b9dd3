"""The recorded arena: every method has rates, units are tuned and raced, hashes cover what a unit runs."""

import itertools
import math
from pathlib import Path

import pytest
from imported import imports

import orthokit
from orthokit.lab.arena import DIAGNOSTICS, GROUNDS, METHODS, PATHS, SCALES
from orthokit.lab.arena.rates import FIRST_RATES, first_rate
from orthokit.studies import arena_study, arena_unit
from orthokit.studies._engine import source_hash
from orthokit.studies.arena_study import ARENA, ARENA_GROUNDS


@pytest.fixture
def language(monkeypatch):
    """Units of the ground that needs nothing but the package."""
    monkeypatch.setattr(arena_study, "ARENA_GROUNDS", ("tinygpt",))
    return lambda size, seeds=2: {unit["method"]: unit for unit in ARENA.units(size, seeds)}


@pytest.mark.parametrize("ground", GROUNDS)
def test_every_method_has_first_rates_a_factor_of_two_apart(ground):
    rates = FIRST_RATES[ground]
    assert set(rates) == set(METHODS)
    for method, grid in rates.items():
        assert len(grid) == 3 and all(b / a == pytest.approx(2) for a, b in itertools.pairwise(grid)), method
        assert first_rate(ground, method) == grid[1]


def test_a_unit_has_all_kinds_of_rows(language):
    rows = ARENA.measure(language("smoke")["oft"])
    counts = {kind: sum(row["kind"] == kind for row in rows) for kind in ("tune", "run", "layer", "profile", "path")}
    # One rate; two seeds at steps 0, 1, 2; four layers and three profiles of the first seed; all its paths.
    assert counts == {"tune": 1, "run": 6, "layer": 4, "profile": 3 * 128, "path": 3 * len(PATHS) + len(SCALES)}
    last = [row for row in rows if row["kind"] == "run" and row["step"] == 2]
    assert {row["seed"] for row in last} == {0, 1} and all(set(DIAGNOSTICS) <= set(row) for row in last)
    assert {row["seed"] for row in rows if row["kind"] == "tune"} == {arena_unit.TUNING_SEED}
    assert len({row["lr"] for row in rows}) == 1


def test_profiles_of_wide_layers_are_thinned():
    rows = [{"kind": "profile", "layer": "a", "index": i} for i in range(384)]
    kept = [row["index"] for row in rows if arena_unit._kept(row, rows)]
    assert kept == list(range(0, 384, 3))


def test_tuning_goes_on_until_the_best_rate_lies_inside(monkeypatch):
    tried = []

    def run(*, lr, seed, **options):
        tried.append(lr)
        assert seed == arena_unit.TUNING_SEED
        return [{"kind": "run", "target": math.nan if lr > 4 else abs(math.log2(lr))}]

    monkeypatch.setattr(arena_unit, "compete", run)
    best, rows = arena_unit._tuned({"rates": [4.0, 8.0], "extensions": 6}, {})
    assert tried == [4.0, 8.0, 2.0, 1.0, 0.5] and best == 1.0 and {row["kind"] for row in rows} == {"tune"}


def test_tuning_seeds_are_not_raced_and_packages_are_not_needed_for_the_smallest_size(language, monkeypatch):
    full = language("full", 5)
    assert set(full) == set(METHODS) and all(arena_unit.TUNING_SEED not in unit["seeds"] for unit in full.values())
    monkeypatch.setattr(arena_study.importlib.util, "find_spec", lambda name: None)
    assert set(language("smoke")) == {name for name, method in METHODS.items() if not method.package}


def test_every_ground_and_method_names_files_that_are_there():
    for ground in ARENA_GROUNDS:
        for method in METHODS:
            assert len(source_hash(ARENA.depends({"ground": ground, "method": method}))) == 12


@pytest.mark.parametrize("ground", ARENA_GROUNDS)
def test_the_hash_of_a_unit_covers_the_arena_and_the_diagnostics_it_imports(ground):
    root = Path(orthokit.__file__).parent
    covered = {path for pattern in ARENA.depends({"ground": ground, "method": "lora"}) for path in root.glob(pattern)}
    # Of other grounds, and without numbers of their own.
    apart = {f"lab/arena/{name}.py" for name in ("language", "pictures", "texts")}
    needed, todo = set(), [root / "lab" / "arena" / "contest.py"]
    while todo:
        inside = {p for p in imports(todo.pop(), root) if p.parent.name in ("arena", "diagnostics")}
        new = {p for p in inside - needed if str(p.relative_to(root)) not in apart}
        needed |= new
        todo += new
    missing = sorted(str(path.relative_to(root)) for path in needed - covered)
    assert not missing, f"units of {ground} do not notice changes of {missing}"
