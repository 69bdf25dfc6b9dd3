"""Shared test set-up: shape annotations are checked at run time in tests, and only there."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from jaxtyping import config, install_import_hook

# Several test processes share the cores: each torch with all of them would wait for the others. Read at its import.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# Must run before the first import of orthokit: the hook rewrites modules as they load.
install_import_hook("orthokit", "typecheck.checked")

# A test run never writes into the user's cache or run folders; both are inherited by every process a test starts.
_SCRATCH = Path(tempfile.mkdtemp(prefix="orthokit-tests-"))
os.environ["ORTHOKIT_CACHE"] = str(_SCRATCH / "cache")
os.environ["ORTHOKIT_RUNS"] = str(_SCRATCH / "runs")

# Shared machines stall: a deadline would fail tests for the weather. CI draws the same examples every time.
settings.register_profile("orthokit", deadline=None, derandomize=bool(os.environ.get("CI")))
settings.load_profile("orthokit")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what this machine cannot do, with the reason; in CI a missing browser is a failure, not a skip."""
    import torch

    from orthokit.figures import browser_path

    if browser_path() is None and not os.environ.get("CI"):
        missing = pytest.mark.skip(reason="no Chrome or Chromium on PATH; install one or set BROWSER_PATH")
        for item in items:
            if item.get_closest_marker("browser"):
                item.add_marker(missing)
    if not torch.cuda.is_available():
        no_gpu = pytest.mark.skip(reason="no CUDA device on this machine")
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(no_gpu)


def pytest_unconfigure() -> None:
    """Remove the scratch folder of the run."""
    shutil.rmtree(_SCRATCH, ignore_errors=True)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium without a window, for one module: playwright runs an event loop in this thread while it lives."""
    from playwright.sync_api import sync_playwright

    from orthokit.figures import browser_path

    program = browser_path()
    if program is None:
        pytest.fail("no Chrome or Chromium on PATH, and in CI the browser tests must run")
    quiet = ["background-networking", "component-update", "sync"]
    arguments = ["--no-sandbox", "--no-first-run", *(f"--disable-{name}" for name in quiet)]
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=program, args=arguments)
        yield chromium
        chromium.close()


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Switch the run-time annotation checks off, so that a test meets the library's own errors as a user does."""
    config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        config.update("jaxtyping_disable", False)
