"""Make ``.venv`` ready for a make target: torch first, then orthokit with its extras, then the packaged weights.

    python3 tools/bootstrap.py EXTRA [EXTRA ...]

Standard library only. Every Python from 3.6 on can parse this file, so that one which is too old reads a sentence
instead of a syntax error. When nothing has to be done it does nothing and prints nothing; what went in is remembered
in ``.venv/orthokit-setup.json``. Whatever goes wrong ends in one sentence on standard error and exit code 1.
"""

import contextlib
import errno
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time

MINIMUM_PYTHON = (3, 11)
# The CPU build of everything takes about 2.5 GB, and pip unpacks each wheel beside its target first.
NEEDED_BYTES = 4 * 1024**3
ALMOST_NOTHING = 16 * 1024**2
NO_NETWORK = re.compile(
    "name resolution|name or service not known|NewConnectionError|Connection refused|Network is unreachable"
    "|ConnectTimeout|ReadTimeout|timed out|ProxyError|getaddrinfo failed|nodename nor servname|No route to host",
    re.IGNORECASE,
)
FULL_DISK = re.compile("No space left on device|Errno 28|Disk quota exceeded", re.IGNORECASE)


class SetupError(Exception):
    """What stops the set-up, as one sentence with the way out."""


def check_python(version, executable):
    """Refuse a Python that is too old for orthokit, naming a newer one if it is on PATH."""
    if tuple(version[:2]) >= MINIMUM_PYTHON:
        return
    needed = ".".join(map(str, MINIMUM_PYTHON))
    # A name on PATH may be a version manager's shim with nothing behind it: only one that starts counts.
    newer = [name for name in ("python3.13", "python3.12", "python3.11") if starts(name)]
    way_out = f"run the same command with PYTHON={newer[0]}" if newer else "install one and name it with PYTHON=..."
    found = ".".join(map(str, version[:3]))
    raise SetupError(f"orthokit needs Python {needed} or newer; {executable} is {found}: {way_out}.")


def starts(name):
    """Whether ``name`` is a Python on PATH that runs."""
    if not shutil.which(name):
        return False
    nowhere = subprocess.DEVNULL
    return subprocess.call([name, "-c", ""], stdin=nowhere, stdout=nowhere, stderr=nowhere) == 0


def check_venv_module(version):
    """Refuse a Python without ``venv`` or ``ensurepip``, which some systems package apart."""
    if importlib.util.find_spec("venv") is None or importlib.util.find_spec("ensurepip") is None:
        package = f"python{version[0]}.{version[1]}-venv"
        raise SetupError(
            f"this Python cannot make virtual environments, its venv module is missing: install it"
            f" (Debian, Ubuntu: apt-get install {package}) and run the same command again."
        )


def check_disk(folder):
    """Refuse to start an installation that cannot fit on the disk of ``folder``."""
    free = shutil.disk_usage(folder).free
    if free < NEEDED_BYTES:
        raise SetupError(
            f"the set-up needs about {NEEDED_BYTES / 1024**3:.0f} GB of free disk and {folder} has"
            f" {free / 1024**3:.1f} GB: free some space and run the same command again."
        )


def read_project(root):
    """The parts of pyproject.toml that say what is installed."""
    import tomllib  # here and not above: a Python without it has been refused before

    with open(os.path.join(root, "pyproject.toml"), "rb") as file:
        return tomllib.load(file)


def fingerprint(project):
    """A hash of everything in pyproject.toml that changes what an installation holds."""
    parts = [
        project["build-system"],
        project["tool"]["orthokit"]["setup"],
        project["tool"]["hatch"]["build"]["dev-mode-dirs"],
    ]
    parts += [project["project"].get(key) for key in ("dependencies", "optional-dependencies", "scripts")]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def expand(extras, project):
    """``extras`` with those that they contain: an extra may list ``orthokit[a,b]``."""
    known = project["project"]["optional-dependencies"]
    every, waiting = set(), list(extras)
    while waiting:
        extra = waiting.pop()
        if extra not in known:
            raise SetupError(f"there is no extra named {extra!r} in pyproject.toml; known: {', '.join(sorted(known))}.")
        if extra not in every:
            every.add(extra)
            for requirement in known[extra]:
                inner = re.match(r"orthokit\[(.*)\]", requirement)
                waiting += [name.strip() for name in inner.group(1).split(",")] if inner else []
    return every


def venv_python(root):
    """The path of the environment's own Python."""
    return os.path.join(root, ".venv", "bin", "python")


def venv_version(root):
    """Major and minor version of the Python in ``.venv``; None when there is no working one."""
    try:
        with open(os.path.join(root, ".venv", "pyvenv.cfg")) as file:
            found = re.search(r"^version\w*\s*=\s*(\d+)\.(\d+)", file.read(), re.MULTILINE)
    except OSError:
        return None
    # A link to a Python that was uninstalled does not exist.
    return tuple(map(int, found.groups())) if found and os.path.exists(venv_python(root)) else None


def read_stamp(root):
    """What the last finished set-up of this folder installed; empty when there was none, or in another folder."""
    try:
        with open(os.path.join(root, ".venv", "orthokit-setup.json")) as file:
            stamp = json.load(file)
    except (OSError, ValueError):
        return {}
    # Scripts and the editable install hold absolute paths: a copied or moved environment does not work.
    return stamp if isinstance(stamp, dict) and stamp.get("root") == root else {}


def write_stamp(root, **content):
    """Remember a finished set-up; replaced whole, so that a kill leaves the old one or none."""
    path = os.path.join(root, ".venv", "orthokit-setup.json")
    with open(path + ".tmp", "w") as file:
        json.dump(dict(content, root=root), file, indent=1)
    os.replace(path + ".tmp", path)


def explain(stage, output, log):
    """One sentence for a failed stage, from what the tool printed."""
    if FULL_DISK.search(output):
        return f"the disk is full ({stage} stopped): free some space and run the same command again."
    if NO_NETWORK.search(output):
        return f"the package index cannot be reached ({stage} stopped): check network and proxy, then run it again."
    errors = re.findall(r"^(?:ERROR|error|Error): *(.+)$", output, re.MULTILINE)
    reason = errors[-1].strip().rstrip(".") if errors else "no reason given"
    return f"{stage} failed: {reason}. Everything it printed is in {log}."


def run_stage(stage, command, log):
    """Run one command with its output kept in ``log``, showing one line with the seconds it takes."""
    start, live = time.time(), sys.stdout.isatty()
    # user installs are switched off because pip refuses them inside a virtual environment
    environment = dict(os.environ, PIP_USER="0", PIP_DISABLE_PIP_VERSION_CHECK="1", PIP_NO_INPUT="1")
    print(f"  {stage} ...", end="", flush=True)
    with open(log, "ab") as file:
        began = file.tell()
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, env=environment
        )
        try:
            while process.poll() is None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=1)
                if live:
                    print(f"\r  {stage} ... {time.time() - start:.0f} s", end="", flush=True)
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
    print("" if live else f" {time.time() - start:.0f} s", flush=True)
    if process.returncode:
        with open(log, "rb") as file:
            file.seek(began)
            output = file.read().decode("utf-8", "replace")
        if shutil.disk_usage(os.path.dirname(log)).free < ALMOST_NOTHING:
            output += "No space left on device"  # a full disk also swallows what the tool had to say
        raise SetupError(explain(stage, output, log))


def make_venv(root, log):
    """Make ``.venv``; one with this Python's version is kept, whoever made it."""
    here, folder = tuple(sys.version_info[:2]), os.path.join(root, ".venv")
    moved = os.path.exists(os.path.join(folder, "orthokit-setup.json")) and not read_stamp(root)
    keep = venv_version(root) == here and not moved
    has_pip = keep and os.path.exists(os.path.join(folder, "bin", "pip"))
    if not has_pip:
        check_venv_module(here)
    if not keep:
        shutil.rmtree(folder, ignore_errors=True)
    os.makedirs(folder, exist_ok=True)
    with open(log, "wb"):
        pass  # each set-up starts its own log
    if not keep:
        stage = "making .venv with Python {}".format(".".join(map(str, sys.version_info[:3])))
        run_stage(stage, [sys.executable, "-m", "venv", folder], log)
    elif not has_pip:
        run_stage("adding pip to .venv", [venv_python(root), "-m", "ensurepip", "--upgrade", "--default-pip"], log)


def install(root, extras, project):
    """Install torch, the project with ``extras`` and the packages that must come without their dependencies."""
    settings = project["tool"]["orthokit"]["setup"]
    check_disk(root)
    log = os.path.join(root, ".venv", "orthokit-setup.log")
    print(f"setting up .venv in {root} (once; the log is .venv/{os.path.basename(log)})", flush=True)
    make_venv(root, log)
    pip = [venv_python(root), "-m", "pip", "install", "--progress-bar", "off"]
    torch = settings["torch"]
    # torch goes first and alone: pip, unlike other resolvers, reads this machine's pip settings, and a machine that is
    # set to the CPU build gets it. The pin is repeated below so that no extra can replace it.
    run_stage("installing {}".format(torch.replace("==", " ")), [*pip, torch], log)
    with_extras = "{}[{}]".format(root, ",".join(sorted(extras)))
    stage = "installing orthokit with {}".format(", ".join(sorted(extras)))
    run_stage(stage, [*pip, torch, "--editable", with_extras], log)
    every = expand(extras, project)
    for extra, packages in sorted(settings["without-dependencies"].items()):
        if extra in every:
            stage = "installing {}".format(", ".join(packages).replace("==", " "))
            run_stage(stage, [*pip, "--no-deps", *packages], log)
    write_stamp(root, fingerprint=fingerprint(project), extras=sorted(extras), python=list(sys.version_info[:2]))


def missing(root, extras, project):
    """The extras to install so that ``.venv`` holds ``extras``; empty when it is ready as it is."""
    stamp = read_stamp(root)
    held = set(stamp.get("extras", []))
    fits = stamp.get("fingerprint") == fingerprint(project) and venv_version(root) == tuple(sys.version_info[:2])
    if fits and expand(extras, project) <= expand(held, project):
        return set()
    return set(extras) | held


@contextlib.contextmanager
def one_at_a_time(root):
    """Hold the folder's lock, so that two make calls on a fresh clone do not install over each other."""
    import fcntl

    folder = os.open(root, os.O_RDONLY)
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            print("waiting for another set-up of this folder to finish", flush=True)
            fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


def prepare(root, extras):
    """Bring ``.venv`` up to ``extras``; does nothing when it is."""
    check_python(sys.version_info, sys.executable)
    project = read_project(root)
    if missing(root, extras, project):
        with one_at_a_time(root):
            wanted = missing(root, extras, project)  # the one we waited for may have done it
            if wanted:
                install(root, wanted, project)


def main(arguments, root=None):
    """The command: returns 0 when ``.venv`` is ready, 1 with one sentence when it cannot be, 130 after Ctrl-C."""
    root = root or os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    try:
        prepare(root, arguments)
    except SetupError as problem:
        message = str(problem)
    except OSError as problem:
        full = problem.errno in (errno.ENOSPC, errno.EDQUOT)
        message = explain("the set-up", "No space left on device", "") if full else f"the set-up stopped: {problem}."
    except KeyboardInterrupt:
        print("\northokit: set-up interrupted; the same command goes on with it.", file=sys.stderr)
        return 130
    else:
        return 0
    print(f"\northokit: {message}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
