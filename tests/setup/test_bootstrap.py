"""tools/bootstrap.py: one sentence for whatever a machine lacks, and nothing to do the second time."""

import ast
import importlib.util
import json
import shutil
import subprocess
import sys
import tomllib
from collections import namedtuple
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "tools" / "bootstrap.py"

PYPROJECT = """
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "orthokit"
dependencies = ["einops>=0.8"]

[project.optional-dependencies]
notebooks = ["jupyterlab>=4.6"]
pretrained = ["tokenizers>=0.23"]
dev = ["orthokit[notebooks, pretrained]", "pytest>=9"]

[tool.hatch.build]
dev-mode-dirs = ["."]

[tool.orthokit.setup]
torch = "torch==2.13.0"
without-dependencies = { pretrained = ["weights==1.0"] }
"""


@pytest.fixture
def bootstrap():
    spec = importlib.util.spec_from_file_location("bootstrap", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def project(tmp_path, bootstrap, monkeypatch):
    """A folder with a pyproject.toml, and a bootstrap whose commands are recorded instead of run."""
    (tmp_path / "pyproject.toml").write_text(PYPROJECT)
    calls = []

    def record(stage, command, log):
        calls.append(command)
        if "venv" in command:
            binaries = tmp_path / ".venv" / "bin"
            binaries.mkdir(parents=True)
            (binaries / "python").symlink_to(sys.executable)
            (binaries / "pip").touch()
            version = ".".join(map(str, sys.version_info[:3]))
            (tmp_path / ".venv" / "pyvenv.cfg").write_text(f"home = /usr\nversion = {version}\n")

    monkeypatch.setattr(bootstrap, "run_stage", record)
    return namedtuple("Project", "root calls")(tmp_path, calls)


def installed(calls):
    """What the pip calls asked for, without the options."""
    return [[part for part in call[4:] if part not in ("--progress-bar", "off")] for call in calls if "pip" in call]


def test_python_3_6_can_parse_it():
    tree = ast.parse(SCRIPT.read_text(), feature_version=(3, 6))
    # feature_version does not refuse everything that came later; these two would also stop an old Python.
    assert not any(isinstance(node, ast.NamedExpr) for node in ast.walk(tree))
    assert not any(isinstance(node, ast.ImportFrom) and node.module == "__future__" for node in ast.walk(tree))


def test_only_the_standard_library_is_imported():
    imports = {
        (node.module if isinstance(node, ast.ImportFrom) else node.names[0].name).split(".")[0]
        for node in ast.walk(ast.parse(SCRIPT.read_text()))
        if isinstance(node, ast.Import | ast.ImportFrom)
    }
    assert imports <= set(sys.stdlib_module_names)


def test_its_minimum_python_is_that_of_the_project(bootstrap):
    required = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"]
    assert required == ">=" + ".".join(map(str, bootstrap.MINIMUM_PYTHON))


def test_an_old_python_is_refused_in_one_sentence(bootstrap, project, monkeypatch, capsys):
    monkeypatch.setattr(bootstrap.sys, "version_info", (3, 9, 18, "final", 0))
    monkeypatch.setattr(bootstrap, "starts", lambda name: name == "python3.12")
    assert bootstrap.main(["dev"], root=str(project.root)) == 1
    said = capsys.readouterr().err.strip()
    assert said.startswith("orthokit: ") and "\n" not in said
    assert "3.11 or newer" in said and "3.9.18" in said and "PYTHON=python3.12" in said
    assert project.calls == []


def test_a_real_old_python_reads_the_same_sentence():
    old = next(filter(None, map(shutil.which, ("python3.6", "python3.8", "python3.9", "python3.10"))), None)
    if old is None or subprocess.run([old, "-c", ""], capture_output=True).returncode:
        pytest.skip("no Python from 3.6 to 3.10 on PATH")
    done = subprocess.run([old, str(SCRIPT), "dev"], capture_output=True, text=True)
    assert done.returncode == 1
    assert "needs Python 3.11 or newer" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("absent", ["venv", "ensurepip"])
def test_a_python_without_venv_is_refused_in_one_sentence(bootstrap, project, monkeypatch, capsys, absent):
    real = importlib.util.find_spec
    monkeypatch.setattr(bootstrap.importlib.util, "find_spec", lambda name: None if name == absent else real(name))
    assert bootstrap.main(["dev"], root=str(project.root)) == 1
    said = capsys.readouterr().err.strip()
    assert "\n" not in said and "apt-get install python3." in said and "-venv" in said
    assert project.calls == [] and not (project.root / ".venv").exists()


def test_too_little_disk_is_refused_before_anything_is_written(bootstrap, project, monkeypatch, capsys):
    usage = namedtuple("usage", "total used free")(10**10, 10**10, 10**9)
    monkeypatch.setattr(bootstrap.shutil, "disk_usage", lambda path: usage)
    assert bootstrap.main(["dev"], root=str(project.root)) == 1
    said = capsys.readouterr().err.strip()
    assert "\n" not in said and "0.9 GB" in said and "free some space" in said
    assert project.calls == [] and not (project.root / ".venv").exists()


def test_a_disk_that_fills_up_meanwhile_is_named(bootstrap, project, monkeypatch, capsys):
    def fill(*_):
        raise OSError(bootstrap.errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(bootstrap, "run_stage", fill)
    assert bootstrap.main(["dev"], root=str(project.root)) == 1
    said = capsys.readouterr().err.strip()
    assert "\n" not in said and "disk is full" in said


@pytest.mark.parametrize(
    ("printed", "expected"),
    [
        ("WARNING: Retrying after connection broken by 'NewConnectionError(...)'\nERROR: none found", "network"),
        ("ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device", "disk is full"),
        ("ERROR: Could not find a version that satisfies torch==99\nERROR: No matching distribution", "No matching"),
        ("Segmentation fault", "no reason given"),
    ],
)
def test_a_failing_tool_becomes_one_sentence(bootstrap, tmp_path, capsys, printed, expected):
    log = tmp_path / "log"
    command = [sys.executable, "-c", f"import sys; print({printed!r}); sys.exit(3)"]
    with pytest.raises(bootstrap.SetupError, match=expected) as problem:
        bootstrap.run_stage("installing torch 2.13.0", command, str(log))
    assert "\n" not in str(problem.value) and "installing torch 2.13.0" in str(problem.value)
    assert printed in log.read_text()
    assert capsys.readouterr().out.startswith("  installing torch 2.13.0 ...")


def test_a_stage_that_works_says_how_long_it_took(bootstrap, tmp_path, capsys):
    bootstrap.run_stage("waiting", [sys.executable, "-c", "print('hidden')"], str(tmp_path / "log"))
    said = capsys.readouterr().out
    assert said.startswith("  waiting ...") and said.rstrip().endswith(" s") and "hidden" not in said


def test_torch_goes_first_then_the_project_then_the_weights(bootstrap, project):
    assert bootstrap.main(["dev"], root=str(project.root)) == 0
    assert project.calls[0][1:3] == ["-m", "venv"]
    assert installed(project.calls) == [
        ["torch==2.13.0"],
        ["torch==2.13.0", "--editable", f"{project.root}[dev]"],
        ["--no-deps", "weights==1.0"],
    ]


def test_weights_are_left_out_when_no_extra_asks_for_them(bootstrap, project):
    assert bootstrap.main(["notebooks"], root=str(project.root)) == 0
    assert not any("--no-deps" in call for call in project.calls)


def test_the_second_call_does_and_says_nothing(bootstrap, project, capsys):
    bootstrap.main(["dev"], root=str(project.root))
    project.calls.clear()
    capsys.readouterr()
    assert bootstrap.main(["dev"], root=str(project.root)) == 0
    assert bootstrap.main(["notebooks", "pretrained"], root=str(project.root)) == 0, "dev contains both"
    assert project.calls == [] and capsys.readouterr() == ("", "")


def test_a_further_extra_is_added_to_those_already_there(bootstrap, project):
    bootstrap.main(["notebooks"], root=str(project.root))
    project.calls.clear()
    assert bootstrap.main(["pretrained"], root=str(project.root)) == 0
    assert installed(project.calls)[1][-1].endswith("[notebooks,pretrained]")
    assert "venv" not in project.calls[0], "the environment itself is kept"


@pytest.mark.parametrize(
    ("old", "new"), [("einops>=0.8", "einops>=0.9"), ("torch==2.13.0", "torch==2.14.0"), ("pytest>=9", "pytest>=10")]
)
def test_a_changed_pin_installs_again(bootstrap, project, old, new):
    bootstrap.main(["dev"], root=str(project.root))
    project.calls.clear()
    (project.root / "pyproject.toml").write_text(PYPROJECT.replace(old, new))
    assert bootstrap.main(["dev"], root=str(project.root)) == 0
    assert len(installed(project.calls)) == 3


def test_settings_of_other_tools_do_not_install_again(bootstrap, project):
    bootstrap.main(["dev"], root=str(project.root))
    project.calls.clear()
    (project.root / "pyproject.toml").write_text(PYPROJECT + "\n[tool.ruff]\nline-length = 100\n")
    assert bootstrap.main(["dev"], root=str(project.root)) == 0
    assert project.calls == []


def test_an_interrupted_set_up_goes_on(bootstrap, project, monkeypatch, capsys):
    record = bootstrap.run_stage

    def interrupt(stage, command, log):
        if "--editable" in command:
            raise KeyboardInterrupt
        record(stage, command, log)

    monkeypatch.setattr(bootstrap, "run_stage", interrupt)
    assert bootstrap.main(["dev"], root=str(project.root)) == 130
    assert "same command goes on" in capsys.readouterr().err
    monkeypatch.setattr(bootstrap, "run_stage", record)
    project.calls.clear()
    assert bootstrap.main(["dev"], root=str(project.root)) == 0
    assert "venv" not in project.calls[0] and len(installed(project.calls)) == 3


def test_a_copied_environment_is_made_again(bootstrap, project, tmp_path_factory):
    bootstrap.main(["dev"], root=str(project.root))
    stamp = project.root / ".venv" / "orthokit-setup.json"
    stamp.write_text(json.dumps(json.loads(stamp.read_text()) | {"root": "/elsewhere"}))
    project.calls.clear()
    assert bootstrap.main(["dev"], root=str(project.root)) == 0
    assert project.calls[0][1:3] == ["-m", "venv"]


def test_an_environment_of_another_python_is_made_again(bootstrap, project):
    bootstrap.main(["dev"], root=str(project.root))
    (project.root / ".venv" / "pyvenv.cfg").write_text("version = 3.10.2\n")
    project.calls.clear()
    assert bootstrap.main(["dev"], root=str(project.root)) == 0
    assert project.calls[0][1:3] == ["-m", "venv"]


def test_an_environment_without_pip_gets_one(bootstrap, project):
    bootstrap.main(["dev"], root=str(project.root))
    (project.root / ".venv" / "bin" / "pip").unlink()
    (project.root / ".venv" / "orthokit-setup.json").unlink()
    project.calls.clear()
    assert bootstrap.main(["dev"], root=str(project.root)) == 0
    assert "ensurepip" in project.calls[0]


@pytest.mark.parametrize("content", ["", "{", "[]", "null"])
def test_a_damaged_stamp_means_install_again(bootstrap, project, content):
    bootstrap.main(["dev"], root=str(project.root))
    (project.root / ".venv" / "orthokit-setup.json").write_text(content)
    project.calls.clear()
    assert bootstrap.main(["dev"], root=str(project.root)) == 0
    assert len(installed(project.calls)) == 3


def test_an_unknown_extra_is_refused_with_the_known_ones(bootstrap, project, capsys):
    assert bootstrap.main(["notebok"], root=str(project.root)) == 1
    assert "dev, notebooks, pretrained" in capsys.readouterr().err


def test_the_tools_own_settings_are_kept_but_user_installs_are_off(bootstrap, tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_FIND_LINKS", "/wheels")
    monkeypatch.setenv("PIP_USER", "1")
    log = tmp_path / "log"
    show = "import os; print(os.environ['PIP_FIND_LINKS'], os.environ['PIP_USER'])"
    bootstrap.run_stage("showing", [sys.executable, "-c", show], str(log))
    assert log.read_text().split() == ["/wheels", "0"]
