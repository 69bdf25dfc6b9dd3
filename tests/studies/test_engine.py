"""The study engine: complete, resumable, and never a mixture of versions."""

import json

import pandas as pd
import pytest

from orthokit import studies
from orthokit.errors import OptionError, ReportError, UnknownNameError
from orthokit.studies._engine import Study, load_evidence, run_study

CALLS = []


def _units(size, seeds):
    return [{"x": x, "seed": seed} for x in (1, 2) for seed in range(seeds)]


def _measure(unit):
    CALLS.append(unit)
    if len(CALLS) == _measure.fail_at:
        raise KeyboardInterrupt
    return [{**unit, "value": unit["x"] * 10 + unit["seed"]}]


_measure.fail_at = 0


@pytest.fixture
def study():
    CALLS.clear()
    _measure.fail_at = 0
    return Study(name="toy", question="Does it add up?", units=_units, measure=_measure, seeds=3)


def test_records_every_unit_with_how_it_was_made(study, tmp_path):
    folder = run_study(study, out=tmp_path, progress=False)
    table, record = load_evidence("toy", root=tmp_path)
    assert folder == tmp_path / "toy"
    assert table["value"].tolist() == [10, 11, 12, 20, 21, 22]
    assert record["command"] == "orthokit study toy --jobs 1 --seeds 3"
    assert record["seeds"] == 3 and len(record["source"]) == 12 and record["machine"]["torch"]
    assert not (folder / "partial.jsonl").exists()


def test_an_interrupted_study_goes_on_where_it_stopped(study, tmp_path):
    _measure.fail_at = 4
    with pytest.raises(KeyboardInterrupt):
        run_study(study, out=tmp_path, progress=False)
    partial = tmp_path / "toy" / "partial.jsonl"
    with partial.open("a") as file:
        file.write('{"unit": {"x": 2, "se')  # a line that a kill cut short
    _measure.fail_at = 0
    CALLS.clear()
    run_study(study, out=tmp_path, progress=False)
    assert CALLS == [{"x": 2, "seed": 0}, {"x": 2, "seed": 1}, {"x": 2, "seed": 2}]
    assert len(load_evidence("toy", root=tmp_path)[0]) == 6


def test_results_of_two_versions_are_never_mixed(study, tmp_path):
    _measure.fail_at = 2
    with pytest.raises(KeyboardInterrupt):
        run_study(study, out=tmp_path, progress=False)
    partial = tmp_path / "toy" / "partial.jsonl"
    lines = partial.read_text().splitlines()
    header = json.loads(lines[0]) | {"source": "of-yesterday"}
    partial.write_text("\n".join([json.dumps(header), *lines[1:]]) + "\n")
    _measure.fail_at = 0
    with pytest.raises(ReportError, match="another version"):
        run_study(study, out=tmp_path, progress=False)
    CALLS.clear()
    run_study(study, out=tmp_path, progress=False, fresh=True)
    assert len(CALLS) == 6


def test_a_summary_replaces_the_rows(study, tmp_path):
    total = Study("toy", "?", _units, _measure, summarise=lambda rows: pd.DataFrame({"sum": [rows["value"].sum()]}))
    run_study(total, out=tmp_path, seeds=2, progress=False)
    assert load_evidence("toy", root=tmp_path)[0]["sum"].tolist() == [10 + 11 + 20 + 21]


@pytest.mark.parametrize("options", [{"jobs": 0}, {"seeds": 1}])
def test_numbers_out_of_range_are_refused(study, tmp_path, options):
    with pytest.raises(OptionError, match="jobs >= 1 and seeds >= 2"):
        run_study(study, out=tmp_path, **options)
    assert list(tmp_path.iterdir()) == []


def test_unknown_names_say_what_exists(tmp_path):
    with pytest.raises(UnknownNameError, match="did you mean 'pipelines'"):
        studies.run("pipeline", out=tmp_path)
    with pytest.raises(UnknownNameError, match="study size"):
        studies.run("pipelines", out=tmp_path, size="laptop")
    with pytest.raises(ReportError, match="orthokit study nothing"):
        load_evidence("nothing", root=tmp_path)


@pytest.mark.slow
def test_worker_processes_give_the_same_table(tmp_path):
    one = studies.run("synthetic_gap", out=tmp_path / "one", size="smoke", seeds=2, progress=False)
    two = studies.run("synthetic_gap", out=tmp_path / "two", size="smoke", seeds=2, jobs=2, progress=False)
    pd.testing.assert_frame_equal(
        pd.read_csv(one / "results.csv"), pd.read_csv(two / "results.csv"), rtol=1e-4, atol=1e-6
    )


def _told(*, seeds=2, factor=10, sources=("errors.py",)):
    """A study whose units carry their own hashes."""
    measured = []

    def units(size, seeds):
        return [{"x": x, "seeds": seeds} for x in (1, 2)]

    def measure(unit):
        measured.append(unit["x"])
        if unit["x"] == _told.fail_at:
            raise KeyboardInterrupt
        return [{"x": unit["x"], "value": unit["x"] * factor}]

    study = Study("told", "?", units, measure, seeds=seeds, depends=lambda unit: sources[: unit["x"]])
    return study, measured


_told.fail_at = 0


def test_a_unit_with_its_own_hash_survives_a_change_elsewhere_and_no_other(tmp_path):
    first, _ = _told(sources=("errors.py", "device.py"))
    run_study(first, out=tmp_path, progress=False)
    record = load_evidence("told", root=tmp_path)[1]
    assert [entry["unit"]["x"] for entry in record["measured"]] == [1, 2]
    # The files behind unit 2 are others now, those of unit 1 are not.
    second, measured = _told(sources=("errors.py", "linalg/*.py"), factor=100)
    run_study(second, out=tmp_path, progress=False)
    table, again = load_evidence("told", root=tmp_path)
    assert measured == [2] and table["value"].tolist() == [10, 200]
    assert again["source"] != record["source"] and again["measured"][0] == record["measured"][0]


def test_own_hashes_hold_for_an_interrupted_study_too_and_fresh_measures_all(tmp_path):
    _told.fail_at = 2
    try:
        first, _ = _told()
        with pytest.raises(KeyboardInterrupt):
            run_study(first, out=tmp_path, progress=False)
    finally:
        _told.fail_at = 0
    second, measured = _told(factor=100)
    run_study(second, out=tmp_path, progress=False)
    assert measured == [2] and load_evidence("told", root=tmp_path)[0]["value"].tolist() == [10, 200]
    third, measured = _told(factor=1)
    run_study(third, out=tmp_path, progress=False, fresh=True)
    assert measured == [1, 2] and load_evidence("told", root=tmp_path)[0]["value"].tolist() == [1, 2]


def test_a_file_that_is_not_there_cannot_vouch_for_a_unit(tmp_path):
    study, _ = _told(sources=("nowhere.py",))
    with pytest.raises(ReportError, match=r"no file of the library fits nowhere\.py"):
        run_study(study, out=tmp_path, progress=False)
