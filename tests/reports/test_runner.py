"""Reports tell the truth: about failures, timeouts, missing results, kills and versions."""

import io
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import nbformat
import pytest

from orthokit.errors import OptionError, ReportError, UnknownNameError
from orthokit.reports.progress import Console, last_step
from orthokit.reports.status import Folder


def alive(pid: int) -> bool:
    """Whether a process still runs (a zombie does not)."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return False
    return state != "Z"


def until(condition, seconds=60):
    """Waits for a condition; fails the test when it does not come."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError("the condition did not come true")


def test_a_report_runs_notebooks_with_their_parameters(make, run, tmp_path):
    make(
        "01_good",
        "import os, sys\nprint('flag is', flag is True, 'seed', seed + 1)",
        "print(sys.executable, os.getcwd(), os.environ['ORTHOKIT_RUNS'], os.environ['OMP_NUM_THREADS'])",
        parameters='size: str = "laptop"\nseed: int = 0\nflag: bool = False  # a flag',
    )
    made = run(parameters={"flag": "true", "seed": "4"}, size="smoke")
    assert made.ok
    status = made.statuses[0]
    assert (status.state, status.parameters) == ("ok", {"flag": True, "seed": 4, "size": "smoke"})
    assert [cell["state"] for cell in status.cells] == ["ok"] * 5
    notebook = nbformat.read(made.folder / "notebooks" / "01_good.ipynb", as_version=4)
    printed = "".join(o.text for cell in notebook.cells for o in cell.get("outputs", []) if o.output_type == "stream")
    work = made.folder / "work" / "01_good"
    assert "flag is True seed 5" in printed
    assert f"{sys.executable} {work} {work / 'runs'}" in printed
    assert "papermill" not in notebook.metadata
    for name in ("index.html", "01_good.html", "ledger.json", "report.json"):
        assert (made.folder / name).stat().st_size
    assert json.loads((work / "status.json").read_text())["state"] == "ok"
    assert "done   01_good" in made.log
    assert "running over TCP" not in (work / "kernel.log").read_text()
    assert not list(made.folder.rglob("*.tmp"))


def test_each_way_to_fail_has_its_own_truthful_status(make, run):
    make("01_good")
    make("02_raises", "1 / 0", "print('never')")
    make("03_silent", "x = 1", finish=False)
    make("04_slow", "import time; time.sleep(60)")
    make("05_dies", "import os; os._exit(3)")
    make("06_bad_metrics", "import os; open(os.environ['ORTHOKIT_METRICS'], 'w').write('{')", finish=False)
    made = run(jobs=3, timeout=4)
    assert not made.ok
    told = {status.name: (status.state, status.reason) for status in made.statuses}
    assert told["01_good"] == ("ok", "")
    assert told["02_raises"] == ("failed", "ZeroDivisionError: division by zero")
    assert told["03_silent"][0] == "failed" and "metrics.json" in told["03_silent"][1]
    assert told["04_slow"] == ("timeout", "a cell took longer than 4 s")
    assert told["05_dies"][0] == "failed" and "died" in told["05_dies"][1]
    assert told["06_bad_metrics"][0] == "failed"
    cells = {status.name: [cell["state"] for cell in status.cells] for status in made.statuses}
    assert cells["02_raises"] == ["failed", "not run", "not run"]
    assert cells["04_slow"] == ["timeout", "not run"]
    page = (made.folder / "02_raises.html").read_text()
    assert "This notebook did not finish" in page and 'id="stopped-here"' in page
    assert "\x1b" not in page
    index = (made.folder / "index.html").read_text()
    assert "1 of 6 notebooks finished" in index and "http-equiv" not in index


def test_a_cell_that_is_meant_to_raise_is_no_failure(make, run, sources):
    path = make("01_shows_an_error", "1 / 0", "print('after')")
    notebook = nbformat.read(path, as_version=4)
    notebook.cells[1].metadata["tags"] = ["raises-exception"]
    nbformat.write(notebook, path)
    assert run().ok


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"parameters": {"sed": "1"}}, UnknownNameError, "did you mean 'seed'"),
        ({"parameters": {"seed": "many"}}, ReportError, "seed takes a whole number"),
        ({"size": "huge"}, UnknownNameError, "unknown size"),
        ({"jobs": 0}, OptionError, "jobs"),
        ({"timeout": 0}, OptionError, "timeout"),
    ],
)
def test_a_bad_request_starts_nothing_and_leaves_nothing(make, run, tmp_path, options, error, words):
    make("01_a", "raise SystemError", parameters="seed: int = 0")
    with pytest.raises(error, match=words):
        run(**options)
    assert not (tmp_path / "report").exists()


def test_an_unknown_notebook_is_refused(make, run):
    make("01_a")
    with pytest.raises(UnknownNameError, match="notebook 'b'"):
        run("b")


def test_a_finished_report_is_not_overwritten_by_accident(make, run):
    make("01_a")
    run()
    with pytest.raises(ReportError, match="--resume"):
        run()


def test_a_folder_that_cannot_be_made_is_one_sentence(make, run, tmp_path):
    make("01_a")
    (tmp_path / "file").write_text("")
    with pytest.raises(ReportError, match="cannot make"):
        run(out=tmp_path / "file" / "report")


def test_resume_keeps_what_is_the_same_and_runs_what_changed(make, run, tmp_path, monkeypatch):
    count = tmp_path / "count"
    tally = "open({!r}, 'a').write({!r})"
    make("01_same", tally.format(str(count), "a"), parameters="n: int = 1")
    make("02_edited", tally.format(str(count), "b"), parameters="n: int = 1")
    run()
    make("02_edited", tally.format(str(count), "B"), parameters="n: int = 1")
    (tmp_path / "report" / "work" / "02_edited" / "left-over").write_text("of the old version")
    made = run(resume=True)
    assert count.read_text() == "abB"
    assert [status.reused for status in made.statuses] == [True, False]
    assert "kept   01_same" in made.log
    assert not (tmp_path / "report" / "work" / "02_edited" / "left-over").exists()
    # Other parameters and other code are other results too.
    run(resume=True, parameters={"01:n": 2})
    assert count.read_text() == "abBa"
    monkeypatch.setattr("orthokit.reports.sources.code_version", lambda: "newer")
    run(resume=True, parameters={"01:n": 2})
    assert sorted(count.read_text()) == sorted("abBa" + "aB")


def test_notebooks_left_out_of_a_resumed_report_do_not_count(make, run):
    make("01_a")
    make("02_b")
    run()
    made = run("01", resume=True)
    assert [status.name for status in made.statuses] == ["01_a"]
    assert "02_b" not in (made.folder / "index.html").read_text()
    assert [status.name for status in Folder(made.folder).statuses()] == ["01_a"]


def child(sources, out, tmp_path, *, jobs=1, resume=False):
    """A report in a process of its own, which can be killed."""
    script = textwrap.dedent(f"""
        import signal, sys
        import orthokit.reports.sources as s, orthokit.reports.runner as r
        # A shell that runs the tests in the background has its children ignore the interrupt.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        s.code_version = r.code_version = lambda: "test"
        made = r.report([], notebooks={str(sources)!r}, out={str(out)!r}, jobs={jobs}, resume={resume})
        sys.exit(130 if made.interrupted else 0 if made.ok else 1)
    """)
    return subprocess.Popen([sys.executable, "-c", script], cwd=tmp_path, stderr=subprocess.DEVNULL)


def waiting_notebook(make, tmp_path):
    """A quick notebook, and one that waits until a file appears and tells its process id."""
    make("01_quick", f"open({str(tmp_path / 'quick')!r}, 'a').write('x')")
    make(
        "02_waits",
        f"import os, time, pathlib\npathlib.Path({str(tmp_path / 'pid')!r}).write_text(str(os.getpid()))",
        f"while not os.path.exists({str(tmp_path / 'go')!r}): time.sleep(0.05)",
    )


def test_a_killed_report_is_resumed_without_repeating_what_was_finished(make, run, sources, tmp_path):
    waiting_notebook(make, tmp_path)
    out = tmp_path / "report"
    process = child(sources, out, tmp_path)
    try:
        until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text())
        with pytest.raises(ReportError, match="another process"):
            run(resume=True)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    kernel = int((tmp_path / "pid").read_text())
    until(lambda: not alive(kernel), seconds=20)
    told = {status.name: status.state for status in Folder(out).statuses()}
    assert told == {"01_quick": "ok", "02_waits": "interrupted"}
    (tmp_path / "go").touch()
    made = run(resume=True)
    assert made.ok
    assert (tmp_path / "quick").read_text() == "x"
    assert [status.reused for status in made.statuses] == [True, False]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_report_leaves_truthful_states_and_no_kernel(make, sources, tmp_path, number):
    waiting_notebook(make, tmp_path)
    make("03_never")
    process = child(sources, tmp_path / "report", tmp_path)
    until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text())
    process.send_signal(number)
    assert process.wait(timeout=60) == 130
    assert not alive(int((tmp_path / "pid").read_text()))
    told = {status.name: status.state for status in Folder(tmp_path / "report").statuses()}
    assert told == {"01_quick": "ok", "02_waits": "interrupted", "03_never": "interrupted"}
    record = json.loads((tmp_path / "report" / "work" / "02_waits" / "status.json").read_text())
    assert record["state"] == "interrupted"
    assert "interrupted" in (tmp_path / "report" / "02_waits.html").read_text()


def test_a_kernel_that_fails_to_start_is_tried_once_more(make, run, tmp_path, monkeypatch):
    make("01_a")
    broken = tmp_path / "python"
    broken.write_text(f"""#!/bin/sh
echo x >> {tmp_path}/starts
[ "$(wc -l < {tmp_path}/starts)" -gt 1 ] && exec {sys.executable} "$@"
exit 1
""")
    broken.chmod(0o755)
    monkeypatch.setattr("orthokit.reports.execution.sys.executable", str(broken))
    assert run().ok
    assert (tmp_path / "starts").read_text() == "x\nx\n"


def test_a_kernel_that_never_starts_is_a_failure_not_a_crash(make, run, monkeypatch):
    make("01_a")
    monkeypatch.setattr("orthokit.reports.execution.sys.executable", "/bin/false")
    made = run()
    assert made.statuses[0].state == "failed"
    assert "kernel did not start" in made.statuses[0].reason


def test_progress_reads_the_last_whole_line(tmp_path):
    path = tmp_path / "progress.jsonl"
    assert last_step(path) == ""
    line = json.dumps({"label": "Muon", "step": 120, "steps": 300, "loss": 2.312})
    path.write_text(f'{line}\n{{"label": "Muon", "st')
    assert last_step(path) == "Muon, step 120 of 300, loss 2.312"
    path.write_text("x" * 9000 + f"\n{line}\n")
    assert "step 120" in last_step(path)


def test_a_terminal_gets_one_changing_line_and_a_log_gets_few_lines():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    console = Console(terminal)
    console.status("step 1")
    console.status("step 1")
    console.status("2")
    console.line("done")
    assert terminal.getvalue() == "step 1\r      \r2\r \rdone\n"
    log = io.StringIO()
    console = Console(log, every=3600)
    for step in range(5):
        console.status(f"step {step}")
    console.line("done")
    assert log.getvalue() == "  step 0\ndone\n"


def test_training_steps_are_shown_while_a_notebook_runs(make, run, monkeypatch):
    make(
        "01_trains",
        "import json, os, time\n"
        "for step in range(12):\n"
        "    line = json.dumps({'label': 'pre', 'step': step, 'steps': 12, 'loss': 2.0})\n"
        "    open(os.environ['ORTHOKIT_PROGRESS_FILE'], 'a').write(line + '\\n')\n"
        "    time.sleep(0.2)",
    )
    monkeypatch.setattr("orthokit.reports.progress.PLAIN_SECONDS", 0.0)
    made = run()
    assert made.ok
    assert "of 12, loss 2" in made.log


def test_the_ledger_holds_claims_of_finished_notebooks_only(make, run):
    claim = {"id": "c", "text": "It holds", "verdict": "holds", "source": "live", "interval": [0.5, 1.5]}
    write = (
        "import json, os\n"
        f"record = {{'format': 1, 'claims': [{claim!r}], 'numbers': {{}}}}\n"
        "open(os.environ['ORTHOKIT_METRICS'], 'w').write(json.dumps(record))"
    )
    make("01_good", write, finish=False)
    make("02_bad", write, "1 / 0", finish=False)
    made = run(jobs=2)
    claims = json.loads((made.folder / "ledger.json").read_text())["claims"]
    assert [(entry["origin"], entry["id"]) for entry in claims] == [("01_good", "c")]
    assert "1 claim: 1 holds" in (made.folder / "index.html").read_text()


def test_a_new_report_gets_a_folder_of_its_own(make, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make("01_a")
    first, second = run(out=None), run(out=None)
    assert first.folder.parent == second.folder.parent == tmp_path / "reports"
    assert second.folder.name == f"{first.folder.name}-2"
    assert run(out=None, resume=True).folder == second.folder


def test_environment_of_the_user_wins(make, run, tmp_path, monkeypatch):
    monkeypatch.setenv("ORTHOKIT_RUNS", str(tmp_path / "mine"))
    make("01_a", "import os; print(os.environ['ORTHOKIT_RUNS'])")
    made = run()
    assert str(tmp_path / "mine") in (made.folder / "notebooks" / "01_a.ipynb").read_text()
    assert os.environ["ORTHOKIT_RUNS"] == str(tmp_path / "mine")
