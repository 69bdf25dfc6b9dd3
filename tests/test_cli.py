"""The command line: exit codes, one sentence per mistake, nothing loaded that is not needed."""

import json
import subprocess
import sys
import types

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook

from orthokit import cli
from orthokit.errors import MissingExtraError

FINISH = (
    "import json, os\n"
    "claim = dict(id='c', text='Two is two', measured=count, verdict='holds', source='live', interval=None)\n"
    "record = {'format': 1, 'claims': [claim], 'numbers': {}}\n"
    "open(os.environ['ORTHOKIT_METRICS'], 'w').write(json.dumps(record))"
)


@pytest.fixture
def sources(tmp_path, monkeypatch):
    """A folder with one notebook that works and one that fails; the working directory is fresh."""
    folder = tmp_path / "sources"
    folder.mkdir()
    for name, last in (("01_good", FINISH), ("02_bad", "1 / 0")):
        notebook = new_notebook()
        parameters = new_code_cell("count: int = 2  # how many", metadata={"tags": ["parameters"]})
        notebook.cells = [parameters, new_code_cell(last)]
        nbformat.write(notebook, folder / f"{name}.ipynb")
    monkeypatch.chdir(tmp_path)
    return folder


def test_report_prints_the_index_and_tells_the_truth_by_its_exit_code(sources, tmp_path, capsys):
    out = str(tmp_path / "report")
    assert cli.main(["report", "01", "--notebooks", str(sources), "--out", out, "-p", "count=3"]) == 0
    printed = capsys.readouterr()
    assert printed.out.strip() == f"{out}/index.html"
    assert "done   01_good" in printed.err
    assert cli.main(["ledger", out]) == 0
    assert "HOLDS      Two is two" in capsys.readouterr().out
    assert cli.main(["report", "02", "--notebooks", str(sources), "--out", f"{out}-2"]) == 1


def test_run_prints_the_page_of_one_notebook(sources, tmp_path, capsys):
    out = tmp_path / "one"
    assert cli.main(["run", "01_good", "--notebooks", str(sources), "--out", str(out), "-p", "count=7"]) == 0
    assert capsys.readouterr().out.strip() == str(out / "01_good.html")
    assert json.loads((out / "ledger.json").read_text())["claims"][0]["measured"] == 7


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["report", "-p", "cuont=3"], "did you mean 'count'"),
        (["report", "-p", "count=two"], "parameter count takes a whole number; got 'two'"),
        (["report", "-p", "n"], "NAME=VALUE"),
        (["report", "-p", "n=1", "-p", "n=2"], "given twice"),
        (["report", "03"], "unknown notebook '03'"),
        (["report", "--size", "tiny"], "unknown size 'tiny'"),
        (["report", "--resume"], "there is no report"),
        (["ledger", "nowhere"], "nowhere is not a report"),
        (["ledger"], "there is no report"),
        (["audit", "nowhere"], "nowhere has no adapter.json; there is no such folder"),
    ],
)
def test_a_bad_request_is_one_sentence_and_exit_code_2(sources, capsys, arguments, words):
    if arguments[0] == "report":
        arguments = [*arguments, "--notebooks", str(sources)]
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("orthokit: ")
    assert words in error
    assert "Traceback" not in error
    assert not (sources.parent / "reports").exists()


def test_help_and_version(capsys):
    for command in ("report", "run", "study", "inspect", "merge", "ledger", "audit", ""):
        with pytest.raises(SystemExit) as stop:
            cli.main([command, "--help"] if command else ["--help"])
        assert stop.value.code == 0
    shown = capsys.readouterr().out
    for command in ("report", "run", "study", "inspect", "merge", "dash", "runs", "ledger", "audit", "doctor"):
        assert f"\n    {command} " in shown
    for later in ("sweep",):
        assert f"\n    {later} " not in shown
    with pytest.raises(SystemExit) as stop:
        cli.main(["--version"])
    assert stop.value.code == 0
    import orthokit

    assert capsys.readouterr().out == f"orthokit {orthokit.__version__}\n"


def test_no_command_or_an_unknown_one_is_a_usage_error(capsys):
    for arguments in ([], ["frobnicate"]):
        with pytest.raises(SystemExit) as stop:
            cli.main(arguments)
        assert stop.value.code == 2


def test_study_passes_its_options_on(monkeypatch, capsys):
    seen = {}
    fake = types.ModuleType("orthokit.studies")
    fake.names = lambda: ["pipelines", "synthetic"]
    fake.run = lambda name, **options: seen.update(name=name, **options) or "evidence/pipelines"
    monkeypatch.setitem(sys.modules, "orthokit.studies", fake)
    monkeypatch.setattr("orthokit.studies", fake, raising=False)
    assert cli.main(["study", "--list"]) == 0
    assert capsys.readouterr().out == "pipelines\nsynthetic\n"
    assert cli.main(["study", "pipelines", "--jobs", "2", "--seeds", "5"]) == 0
    assert capsys.readouterr().out == "evidence/pipelines\n"
    assert seen == {"name": "pipelines", "out": None, "jobs": 2, "seeds": 5, "size": "full", "fresh": False}
    assert cli.main(["study"]) == 2
    assert "pipelines, synthetic" in capsys.readouterr().err


def test_dash_hands_its_arguments_over_or_names_the_missing_extra(monkeypatch, capsys):
    seen = []
    package, serve = types.ModuleType("orthokit_widgets"), types.ModuleType("orthokit_widgets.serve")
    serve.main = lambda arguments: seen.append(arguments) or 0
    package.serve = serve
    monkeypatch.setitem(sys.modules, "orthokit_widgets", package)
    monkeypatch.setitem(sys.modules, "orthokit_widgets.serve", serve)
    assert cli.main(["dash", "--port", "5007"]) == 0
    assert seen == [["--port", "5007"]]
    monkeypatch.setitem(sys.modules, "orthokit_widgets", None)
    assert cli.main(["dash"]) == 2
    assert "pip install 'orthokit[widgets]'" in capsys.readouterr().err
    with pytest.raises(MissingExtraError):
        cli._dash([])


@pytest.mark.parametrize(("map", "code"), [("cayley", 0), ("cayley_neumann", 1)])
def test_audit_prints_the_report_and_tells_by_its_exit_code_whether_something_is_broken(tmp_path, capsys, map, code):
    import torch

    from orthokit.adapters.attach import attach
    from orthokit.adapters.files import save
    from orthokit.adapters.oft import OFT

    config = OFT(4, map=map, terms=1, tolerance=None, init_std=0.3)
    folder = str(save(attach(torch.nn.Sequential(torch.nn.Linear(8, 4)), config), tmp_path))
    assert cli.main(["audit", folder]) == code
    assert ("not orthogonal" in capsys.readouterr().out) == bool(code)
    assert cli.main(["audit", folder, "--json"]) == code
    assert json.loads(capsys.readouterr().out)["ok"] is not bool(code)


def test_doctor_hands_its_arguments_over(monkeypatch):
    import orthokit.doctor

    seen = []
    monkeypatch.setattr(orthokit.doctor, "main", lambda arguments: seen.append(arguments) or 1)
    assert cli.main(["doctor", "--json"]) == 1
    assert seen == [["--json"]]


def test_an_interrupt_is_130(monkeypatch, capsys):
    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_ledger", interrupted)
    assert cli.main(["ledger"]) == 130


def test_help_loads_neither_pandas_nor_the_notebook_machinery():
    script = (
        "import sys, contextlib\n"
        "from orthokit import cli\n"
        "with contextlib.suppress(SystemExit): cli.main(['report', '--help'])\n"
        "heavy = {'pandas', 'plotly', 'nbclient', 'papermill', 'IPython', 'panel'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
