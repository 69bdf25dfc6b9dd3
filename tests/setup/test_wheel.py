"""A wheel carries the whole workbench: it works from an empty folder, with no checkout anywhere near."""

import json
import os
import socket
import subprocess
import sys
import sysconfig
import time
import urllib.error
import urllib.request
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# What a checkout holds and a wheel must not.
LEFT_OUT = {"__pycache__", ".ipynb_checkpoints", ".gitkeep"}

pytestmark = pytest.mark.slow


def carried(folder: str, suffixes: tuple[str, ...] = ()) -> set[str]:
    """The files below ``folder`` that belong into the wheel, relative to it."""
    files = (path for path in (ROOT / folder).rglob("*") if path.is_file() and path.suffix != ".tmp")
    return {
        path.relative_to(ROOT / folder).as_posix()
        for path in files
        if not LEFT_OUT & set(path.parts) and (not suffixes or path.suffix in suffixes)
    }


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel, built with the build tools that are installed: nothing is downloaded."""
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=out)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (built,) = out.glob("orthokit-*.whl")
    return built


@pytest.fixture(scope="module")
def contents(wheel) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        assert archive.testzip() is None
        return set(archive.namelist())


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """An environment with the wheel and, behind it, the packages that the tests run with; returns its bin folder."""
    home = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(home)], check=True, timeout=120)
    python = home / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", "--no-index", "--quiet"]
    subprocess.run([*pip, str(wheel)], check=True, timeout=300)
    # Names a folder of packages but is not a site folder: the checkout's editable install behind it is not activated.
    (site,) = home.glob("lib/python*/site-packages")
    (site / "dependencies.pth").write_text("\n".join({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}))
    return home / "bin"


@pytest.fixture
def environment(tmp_path) -> dict[str, str]:
    """A user's environment with a home of its own, and nothing that leads back to the checkout."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "ORTHOKIT", "JUPYTER"))}
    home = tmp_path / "home"
    home.mkdir()
    # Jupyter's own data files (templates, kernels) lie beside the dependencies, not beside the wheel.
    data = str(Path(sys.prefix) / "share" / "jupyter")
    return kept | {"HOME": str(home), "JUPYTER_PATH": data, "BROWSER": "true", "OMP_NUM_THREADS": "1"}


@pytest.fixture
def empty(tmp_path) -> Path:
    folder = tmp_path / "empty"
    folder.mkdir()
    return folder


def test_the_wheel_carries_the_library_with_its_data(contents):
    wanted = {f"orthokit/{name}" for name in carried("orthokit")}
    assert wanted <= contents, f"left out: {sorted(wanted - contents)[:10]}"
    assert any(name.startswith("orthokit/assets/addresses/") for name in contents)


def test_the_wheel_carries_the_pages(contents):
    wanted = {f"orthokit_widgets/{name}" for name in carried("widgets/orthokit_widgets")}
    assert wanted <= contents, f"left out: {sorted(wanted - contents)[:10]}"


def test_the_wheel_carries_the_notebooks_and_the_recorded_studies(contents):
    for folder, inside in {"notebooks": "orthokit/_notebooks", "evidence": "orthokit/_evidence"}.items():
        wanted = {f"{inside}/{name}" for name in carried(folder)}
        assert wanted, f"{folder}/ is empty"
        assert wanted == {name for name in contents if name.startswith(inside + "/")}


def test_the_wheel_carries_nothing_else(contents):
    tops = {name.split("/")[0] for name in contents}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"orthokit", "orthokit_widgets"}
    assert not [name for name in contents if LEFT_OUT & set(name.split("/")) or name.endswith((".tmp", ".pyc"))]
    assert any(name.endswith("licenses/LICENSE") for name in contents)


def test_doctor_works_from_an_empty_folder(installed, environment, empty):
    code = "import orthokit, orthokit_widgets; print(orthokit.__file__); print(orthokit_widgets.__file__)"
    where = subprocess.check_output([installed / "python", "-c", code], cwd=empty, env=environment, text=True)
    assert all(Path(line).is_relative_to(installed.parent) for line in where.split()), "this is not the wheel's copy"
    done = subprocess.run(
        [installed / "orthokit", "doctor", "--json"],
        cwd=empty,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    shown = json.loads(done.stdout)
    assert shown["core_works"]
    assert {row["name"]: row["status"] for row in shown["findings"]}["assets"] == "ok"
    assert list(empty.iterdir()) == [], "doctor leaves nothing in the folder it is called from"


def test_report_works_from_an_empty_folder(installed, environment, empty):
    done = subprocess.run(
        [installed / "orthokit", "report", "00_start_here", "--size", "smoke"],
        cwd=empty,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (index,) = (empty / "reports").rglob("index.html")
    assert str(index.relative_to(empty)) in done.stdout, "the path of the index is printed"
    assert "00_start_here" in index.read_text()
    assert list(index.parent.rglob("00_start_here*.html"))


def test_dash_answers_from_an_empty_folder(installed, environment, empty):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    log = empty.parent / "log"
    with log.open("w") as output:
        command = [installed / "orthokit", "dash", "--port", str(port)]
        server = subprocess.Popen(command, cwd=empty, env=environment, stdout=output, stderr=output, process_group=0)
        try:
            deadline = time.monotonic() + 90
            while time.monotonic() < deadline and server.poll() is None:
                try:
                    with opener.open(f"http://127.0.0.1:{port}/", timeout=30) as answer:
                        assert answer.status == 200
                        assert "text/html" in answer.headers["Content-Type"]
                        return
                except urllib.error.HTTPError:
                    raise
                except OSError:
                    time.sleep(0.3)
            pytest.fail(f"no answer on port {port}:\n{log.read_text()[-3000:]}")
        finally:
            if server.poll() is None:
                os.killpg(server.pid, 15)  # the group: orthokit dash may run its server as a child
            server.wait(timeout=30)
