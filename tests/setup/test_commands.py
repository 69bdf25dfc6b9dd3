"""The Makefile and .ci/run: the promised targets, one sentence for a missing Python, and failures that are not lost."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROMISED = {"report", "test", "lab", "dash", "bench", "clean", "lint", "help", "doctor", "setup"}


def make(*arguments: str, folder: Path = ROOT) -> subprocess.CompletedProcess:
    # Under `make test` this is a make within a make, which would take over the outer one's options and talk about it.
    outside = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    command = ["make", "--no-print-directory", *arguments]
    return subprocess.run(command, cwd=folder, env=outside, capture_output=True, text=True, timeout=60)


def test_make_alone_lists_every_target():
    done = make()
    assert done.returncode == 0
    assert set(re.findall(r"^  make (\w+) +\S", done.stdout, re.MULTILINE)) == PROMISED


def test_a_missing_python_is_one_sentence():
    done = make("test", "PYTHON=python-that-is-not-there")
    assert done.returncode != 0
    said = [line for line in done.stderr.splitlines() if not line.startswith("make")]
    assert len(said) == 1 and "no python-that-is-not-there on this machine" in said[0]


@pytest.mark.parametrize(
    ("target", "command"),
    [
        ("report", "orthokit report 02 --size smoke"),
        ("dash", "orthokit dash 02 --size smoke"),
        ("test", "python -m pytest -n auto --maxprocesses 4 --dist loadfile 02 --size smoke"),
        ("bench", "python -m benchmarks 02 --size smoke"),
        ("lab", "jupyter-lab notebooks/00_start_here.ipynb 02 --size smoke"),
        ("doctor", "orthokit doctor 02 --size smoke"),
    ],
)
def test_arguments_reach_the_command_after_the_set_up(target, command):
    lines = make("--dry-run", target, "ARGS=02 --size smoke").stdout.splitlines()
    (prepared,) = [number for number, line in enumerate(lines) if "tools/bootstrap.py" in line]
    assert lines[prepared + 1 :] == [f".venv/bin/{command}"]


def test_clean_keeps_what_people_made(tmp_path):
    shutil.copy(ROOT / "Makefile", tmp_path)
    for name in ("orthokit/__pycache__", "widgets", "tests", "tools", "benchmarks", "notebooks/.ipynb_checkpoints"):
        (tmp_path / name).mkdir(parents=True)
    for name in (".venv", "build", "dist", "runs", "reports"):
        (tmp_path / name).mkdir()
    assert make("clean", folder=tmp_path).returncode == 0
    left = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")}
    assert {"runs", "reports", "orthokit", "notebooks", "Makefile"} <= left
    assert not {".venv", "build", "dist", "orthokit/__pycache__", "notebooks/.ipynb_checkpoints"} & left


@pytest.fixture
def ci(tmp_path):
    """Runs .ci/run in a folder where make records its targets; ``failing`` names one that fails."""
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("bash", "dirname", "id", "env"):
        (tools / name).symlink_to(shutil.which(name))
    (tmp_path / ".ci").mkdir()
    shutil.copy(ROOT / ".ci" / "run", tmp_path / ".ci" / "run")

    def executable(path: Path, text: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!{tools}/bash\n{text}\n")
        path.chmod(0o755)

    executable(tmp_path / ".venv" / "bin" / "python", "echo torch")

    def run(*, browser: str | None = "chromium", failing: str = "none", apt: bool = False, **environment: str):
        record = tmp_path / "record"
        executable(tools / "make", f'echo "make $1" >> {record}; [ "$1" != {failing} ]')
        if browser:
            executable(tools / browser, "exit 0")
        if apt:
            # what a package manager does: afterwards the browser is there
            executable(tools / "chromium.new", "exit 0")
            install = f'[ "$1" = update ] || {shutil.which("ln")} -sf chromium.new {tools}/chromium'
            executable(tools / "apt-get", f'echo "apt-get $*" >> {record}; {install}')
            executable(tools / "sudo", 'shift; exec "$@"')
        done = subprocess.run(
            [str(tmp_path / ".ci" / "run")],
            env={"PATH": str(tools), **environment},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
        )
        return done, record.read_text().splitlines() if record.exists() else []

    return run


def test_ci_lints_and_then_tests(ci):
    done, calls = ci(CI="true")
    assert done.returncode == 0, done.stderr
    assert calls == ["make setup", "make lint", "make test"]


@pytest.mark.parametrize("failing", ["setup", "lint", "test"])
def test_ci_fails_when_a_stage_fails(ci, failing):
    done, calls = ci(CI="true", failing=failing)
    assert done.returncode != 0
    assert calls[-1] == f"make {failing}", "nothing runs after a failure"


def test_ci_without_a_browser_fails_instead_of_skipping(ci):
    done, calls = ci(CI="true", browser=None)
    assert done.returncode != 0 and "Chromium is not on PATH" in done.stderr
    assert calls == []


def test_a_laptop_without_a_browser_is_told_and_goes_on(ci):
    done, calls = ci(browser=None)
    assert done.returncode == 0 and "Chromium is not on PATH" in done.stderr
    assert calls[-1] == "make test"


def test_ci_installs_the_browser_from_the_systems_packages(ci):
    done, calls = ci(CI="true", browser=None, apt=True)
    assert done.returncode == 0, done.stderr
    assert calls[0].startswith("apt-get update") and "chromium" in calls[1]
    assert calls[2:] == ["make setup", "make lint", "make test"]


def test_ci_takes_chrome_under_its_other_names(ci):
    done, calls = ci(CI="true", browser="google-chrome", apt=True)
    assert done.returncode == 0 and calls[0] == "make setup"
