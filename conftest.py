"""Shared test set-up: shape annotations are checked at run time in tests, and only there."""

import os
from collections.abc import Iterator

import pytest
from jaxtyping import config, install_import_hook

# Must run before the first import of orthokit: the hook rewrites modules as they load.
install_import_hook("orthokit", "beartype.beartype")
# A test run never writes into the user's cache or run folders.
os.environ.setdefault("PYTHONHASHSEED", "0")


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Switch the run-time annotation checks off, so that a test meets the library's own errors as a user does."""
    config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        config.update("jaxtyping_disable", False)
