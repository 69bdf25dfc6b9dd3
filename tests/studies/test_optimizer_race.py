"""The race itself at its smallest size: equal starts, rates that are widened, costs measured in turns."""

import itertools
import math
from pathlib import Path

import pytest
import torch
from imported import imports

import orthokit
from orthokit.errors import NonFiniteError, UnknownNameError
from orthokit.lab import CONTESTANTS, Racer
from orthokit.studies import TRACKS, enter, load_evidence, optimizer_race, race_once, run
from orthokit.studies.optimizer_race import next_rate
from orthokit.studies.race_study import RACE, RATES


@pytest.mark.parametrize("track", TRACKS)
def test_every_contestant_has_rates_on_every_track_a_factor_of_two_apart(track):
    rates = RATES[track]
    assert list(rates) == list(CONTESTANTS)
    for name, grid in rates.items():
        assert len(grid) == 4
        assert all(b / a == pytest.approx(2) for a, b in itertools.pairwise(grid)), name


@pytest.mark.parametrize("track", TRACKS)
def test_rivals_of_a_seed_start_from_the_same_loss(track):
    starts = {name: enter(track, name, lr=1e-3, seed=3, steps=2, small=True).evaluate() for name in CONTESTANTS}
    values = [found[TRACKS[track].loss] for found in starts.values()]
    assert values == pytest.approx([values[0]] * len(values), rel=1e-5)
    other = enter(track, "adamw", lr=1e-3, seed=4, steps=2, small=True).evaluate()[TRACKS[track].loss]
    assert other != pytest.approx(values[0], rel=1e-5)


@pytest.mark.parametrize("name", CONTESTANTS)
def test_every_contestant_lowers_the_loss_of_its_batch(name):
    racer = enter("tinygpt", name, lr=RATES["tinygpt"][name][0], seed=0, steps=40, small=True)
    batch = racer.task.batch(0)
    racer.task.batch = lambda step: batch
    losses = [racer.advance() for _ in range(30)]
    assert losses[-1] < losses[0] - 0.3
    assert racer.step == 30 and 0 < racer.update_seconds < racer.seconds


def test_a_run_is_the_same_twice_and_another_seed_is_another_run():
    options = {"lr": 1e-2, "steps": 3, "evaluations": 1, "small": True}
    a, b, c = (race_once("cnn", "muon_pre", seed=seed, **options) for seed in (0, 0, 1))
    assert [row["value"] for row in a] == [row["value"] for row in b]
    assert a[-1]["value"] != c[-1]["value"]
    assert [row["step"] for row in a] == [0, 3] and a[0]["seconds"] == 0 < a[1]["seconds"]
    assert 0 <= a[1]["error"] <= 1


def test_a_run_that_diverges_is_recorded_as_such():
    rows = race_once("cnn", "sgd", lr=1e30, seed=0, steps=6, evaluations=3, small=True)
    assert [row["step"] for row in rows] == [0, 2, 4, 6]
    assert math.isfinite(rows[0]["value"]) and math.isnan(rows[-1]["value"])


def test_a_racer_stops_before_a_step_that_is_not_finite():
    racer = enter("cnn", "sgd", lr=0.1, seed=0, steps=3, small=True)
    with torch.no_grad():
        racer.model.head.bias.fill_(math.nan)
    before = racer.model.conv1.weight.clone()
    with pytest.raises(NonFiniteError, match="Lower the learning rate"):
        racer.advance()
    assert torch.equal(before, racer.model.conv1.weight) and racer.step == 0


def test_the_schedule_warms_up_and_ends_near_zero():
    racer = enter("cnn", "lion", lr=1.0, seed=0, steps=40, small=True)
    rates = []
    for _ in range(40):
        racer.optimizer.step = lambda: rates.append(racer.optimizer.param_groups[0]["lr"])
        racer.advance()
    assert rates[0] == 0.5 and rates[2] == 1.0 and rates[-1] < 0.01


@pytest.mark.parametrize(
    ("scores", "further"),
    [
        ({1.0: 3.0, 2.0: 1.0, 4.0: 2.0}, None),
        ({1.0: 1.0, 2.0: 2.0}, 0.5),
        ({1.0: 2.0, 2.0: 1.0}, 4.0),
        ({1.0: 2.0, 2.0: math.nan}, 0.5),
        ({1.0: math.inf, 2.0: math.nan}, 0.5),
    ],
)
def test_the_grid_is_widened_where_the_best_rate_lies_at_its_edge(scores, further):
    assert next_rate(scores) == further


def test_tuning_widens_the_grid_until_the_best_lies_inside(monkeypatch):
    tried = []

    def once(*, lr, seed, **_):
        tried.append(lr)
        return [{"value": abs(math.log2(lr) + 5)}]

    monkeypatch.setattr(optimizer_race, "race_once", once)
    unit = {"rates": [0.25, 0.5], "tuning_seeds": [7], "extensions": 8}
    best, rows = optimizer_race._tune(unit, {})
    assert best == 2**-5 and min(tried) == 2**-6 and len(rows) == len(tried) == 6
    unit["extensions"] = 1
    assert optimizer_race._tune(unit, {})[0] == 0.125


def test_tuning_and_evaluation_share_no_seed():
    for unit in RACE.units("full", RACE.seeds):
        assert not set(unit["tuning_seeds"]) & set(unit["seeds"])


def test_the_smallest_race_records_tuning_races_and_costs(tmp_path):
    folder = run("race", out=tmp_path, size="smoke", seeds=2, progress=False)
    table, record = load_evidence("race", root=tmp_path)
    assert folder == tmp_path / "race" and len(record["measured"]) == record["units"]
    races = table[table["kind"] == "race"]
    assert set(races["name"]) == set(CONTESTANTS) and set(races["track"]) == set(TRACKS)
    assert (races.groupby(["track", "name"])["seed"].nunique() == 2).all()
    assert (races.groupby(["track", "name"])["lr"].nunique() == 1).all()
    costs = table[table["kind"] == "cost"]
    assert len(costs) == len(TRACKS) * len(CONTESTANTS)
    assert (costs["update_ms"] > 0).all() and (costs["update_ms"] < costs["step_ms"]).all()
    timed = table[table["kind"] == "timed"].groupby(["track", "name"])["step"].max()
    for key, cost in costs.set_index(["track", "name"]).iterrows():
        if key[1] == "adamw":
            assert key not in timed.index
        else:
            assert timed[key] == max(1, round(4 / cost["ratio"]))


def test_unknown_names_say_what_exists():
    with pytest.raises(UnknownNameError, match="did you mean 'cnn'"):
        enter("cn", "adamw", lr=1.0, seed=0)
    with pytest.raises(UnknownNameError, match="did you mean 'muon_pre'"):
        enter("cnn", "muon_pro", lr=1.0, seed=0)


@pytest.mark.parametrize("name", CONTESTANTS)
def test_the_hash_of_a_unit_covers_what_its_optimizer_imports(name):
    root = Path(orthokit.__file__).parent
    unit = next(u for u in RACE.units("full", 5) if u.get("name") == name)
    covered = {path for pattern in RACE.depends(unit) for path in root.glob(pattern)}
    # Reports, the texts of errors, and what several processes do: nothing that a race of one process computes.
    apart = {root / "optim" / "_report.py", root / "errors.py", *root.glob("optim/*sharded*.py")}
    needed, todo = set(), [path for path in covered if path.parent.name in ("optim", "adapters", "linalg")]
    while todo:
        path = todo.pop()
        if path.name == "routing.py":  # imports every optimizer to know their names
            continue
        new = imports(path, root) - needed - apart
        needed |= new
        todo += new
    missing = sorted(str(p.relative_to(root)) for p in needed - covered if not p.name.startswith("_check"))
    assert not missing, f"units of {name} do not notice changes of {missing}"


def test_a_racer_refuses_options_out_of_range():
    racer = enter("cnn", "sgd", lr=0.1, seed=0, steps=3, small=True)
    with pytest.raises(orthokit.errors.OptionError, match="steps >= 1"):
        Racer(racer.model, racer.task, racer.optimizer, steps=0)
