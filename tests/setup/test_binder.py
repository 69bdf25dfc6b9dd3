"""binder/: the image is planned as intended and opens the start notebook."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BINDER = ROOT / "binder"
START_PAGE = "/lab/tree/notebooks/00_start_here.ipynb"


def dry_run(folder: Path) -> subprocess.CompletedProcess:
    command = [str(Path(sys.executable).with_name("repo2docker")), "--no-build", "--debug", "."]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def copied(tmp_path_factory):
    """A folder with nothing but binder/, which is all that a dry run reads."""
    folder = tmp_path_factory.mktemp("repository")
    shutil.copytree(BINDER, folder / "binder")
    return folder


def test_repo2docker_plans_the_image(copied):
    done = dry_run(copied)
    assert done.returncode == 0, done.stderr[-2000:]
    plan = done.stdout + done.stderr
    for step in ('--file "binder/environment.yml"', "RUN ./binder/postBuild", "/binder/start"):
        assert step in plan
    assert "environment-2epy-2d3-2e11" in plan, "the lock file of Python 3.11 is not the one taken"


def test_the_dry_run_would_notice_a_broken_environment(copied, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(copied, broken)
    (broken / "binder" / "environment.yml").write_text("dependencies: [python=3.11, {pip: [}")
    assert dry_run(broken).returncode != 0


def test_the_scripts_are_plain_bash_and_executable():
    for name in ("postBuild", "start"):
        script = BINDER / name
        assert os.access(script, os.X_OK), f"{name} is not executable"
        subprocess.run(["bash", "-n", str(script)], check=True)


def test_post_build_installs_the_project_without_touching_the_pins(tmp_path):
    """Run it for real, with pip and jupyter replaced by recorders."""
    recorder = '#!/bin/sh\necho "$(basename "$0") $*" >> "$RECORD"\n'
    for name in ("pip", "jupyter"):
        (tmp_path / name).write_text(recorder)
        (tmp_path / name).chmod(0o755)
    record = tmp_path / "record"
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "RECORD": str(record)}
    subprocess.run([str(BINDER / "postBuild")], cwd=ROOT, env=environment, check=True)
    calls = record.read_text().splitlines()
    assert "pip install --no-cache-dir --no-deps -e ." in calls
    assert all("--no-cache-dir --no-deps" in call for call in calls if call.startswith("pip"))
    assert "jupyter server extension enable --sys-prefix panel.io.jupyter_server_extension" in calls


def test_start_runs_the_command_it_is_given_on_one_thread():
    done = subprocess.run(
        [str(BINDER / "start"), "sh", "-c", 'echo "$OMP_NUM_THREADS $JUPYTER_CONFIG_PATH"; exit 7'],
        capture_output=True,
        text=True,
        env={"PATH": "/usr/bin:/bin"},
    )
    assert done.returncode == 7, "the command's exit code is the launch's"
    assert done.stdout.split() == ["1", str(BINDER)]


def test_every_server_opens_the_start_notebook():
    settings = json.loads((BINDER / "jupyter_server_config.json").read_text())
    assert {app["default_url"] for app in settings.values()} == {START_PAGE}


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *arguments, **options):
        return None


@pytest.mark.slow
@pytest.mark.parametrize("command", ["jupyter-lab", "jupyter-server"])
def test_a_launch_lands_on_the_start_notebook(command, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = [str(BINDER / "start"), str(Path(sys.executable).with_name(command)), "--no-browser", "--allow-root"]
    arguments += ["--ip=127.0.0.1", f"--port={port}", f"--ServerApp.root_dir={ROOT}"]
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), _NoRedirect)
    environment = {**os.environ, "HOME": str(tmp_path), "JUPYTER_RUNTIME_DIR": str(tmp_path), "JUPYTER_TOKEN": "t"}
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(arguments, stdout=log, stderr=log, env=environment)
        try:
            deadline = time.monotonic() + 60
            while time.monotonic() < deadline and server.poll() is None:
                try:
                    opener.open(f"http://127.0.0.1:{port}/?token=t", timeout=10)
                except urllib.error.HTTPError as redirect:
                    assert redirect.code == 302
                    assert redirect.headers["Location"].split("?")[0] == START_PAGE
                    return
                except OSError:
                    time.sleep(0.2)
            pytest.fail(f"no answer:\n{(tmp_path / 'log').read_text()[-2000:]}")
        finally:
            server.terminate()
            server.wait(timeout=20)
