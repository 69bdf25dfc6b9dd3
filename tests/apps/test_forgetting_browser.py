"""The page "Forgetting" in a real browser; ``watched`` also fails on an external request or an error in the console."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import forgetting_evidence as made
import pytest
from playwright.sync_api import expect

pytestmark = pytest.mark.browser

FRONT, WAYS, GEOMETRY = "Who learns more", "What would going back keep", "Which layers answer otherwise"
# The server of the other pages, with a small record in the place of the checkout's and models of the size for tests.
SERVER = """
import functools, sys
from pathlib import Path
from orthokit.studies import _engine
from orthokit_widgets import forgetting_view, serve
_engine.evidence_root = lambda: Path(sys.argv[1])
forgetting_view.ForgettingPage = functools.partial(forgetting_view.ForgettingPage, small=True)
sys.exit(serve.main(["--port", "0", "--root", sys.argv[2]]))
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Folders of evidence and of runs."""
    return made.write(tmp_path_factory.mktemp("evidence")), tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def address(started: Callable[..., str], folders: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> str:
    """Address of the page."""
    log = tmp_path_factory.mktemp("server") / "log.txt"
    line = started(["-c", SERVER, *map(str, folders)], log, "Live pages at")
    return line.split("Live pages at ")[1].split(" ")[0] + "forgetting"


def plot(page: Any, question: str) -> Any:
    return page.get_by_role("figure", name=question).locator(".js-plotly-plot")


def wait_for(page: Any, question: str, condition: str) -> None:
    """Wait until ``condition`` holds of the plot's ``data``; ``at`` is where the run that is looked at lies."""
    handle = plot(page, question).element_handle()
    at = "const shown = data && data.find(t => t.name === 'shown'); const at = shown && [shown.x[0], shown.y[0]];"
    page.wait_for_function(f"e => {{ const data = e.data; {at} return data && ({condition}); }}", arg=handle)


def open_page(page: Any, address: str, query: str = "") -> None:
    page.goto(address + query)
    page.get_by_text("Ready: choose a run").wait_for()
    plot(page, FRONT).locator(".main-svg").first.wait_for()


def test_a_point_that_is_pressed_is_shown_and_explained(watched: Any, address: str) -> None:
    open_page(watched, address)
    watched.get_by_text("OFT (blocks of 8").wait_for()
    box = plot(watched, FRONT).evaluate(
        """e => {
            const t = e.data.find(t => t.name === 'LoRA' && t.customdata && t.customdata[0][1] === 'mean');
            const area = e.getBoundingClientRect(), {xaxis, yaxis} = e._fullLayout;
            return [area.x + xaxis._offset + xaxis.d2p(t.x[0]), area.y + yaxis._offset + yaxis.d2p(t.y[0])];
        }"""
    )
    watched.mouse.move(*box)
    watched.mouse.click(*box)
    watched.get_by_text("LoRA (rank 8").wait_for()
    watched.wait_for_function("() => location.search.includes('shown=lora')")
    assert watched.get_by_label("Method or run shown").input_value() == "lora"
    wait_for(watched, FRONT, "Math.abs(at[0] - 0.6) < 1e-6 && Math.abs(at[1] - 0.2) < 1e-6")
    wait_for(watched, GEOMETRY, "data.length === 4")


def test_a_run_is_chosen_by_keyboard_alone(watched: Any, address: str) -> None:
    open_page(watched, address)
    watched.get_by_label("Method or run shown").focus()
    watched.keyboard.press("Home")
    watched.get_by_text("Full fine-tuning (").wait_for()
    seed = watched.get_by_role("radio", name="mean", exact=True)
    seed.focus()
    watched.keyboard.press("ArrowRight")
    watched.get_by_text("seed 0.").wait_for()
    watched.wait_for_function("() => location.search.includes('which=0')")


def test_keys_on_the_slider_move_the_point_along_its_path(watched: Any, address: str) -> None:
    open_page(watched, address)
    slider = watched.get_by_label("Rewind α")
    slider.focus()
    for _ in range(20):
        watched.keyboard.press("ArrowLeft")
    watched.wait_for_function("() => location.search.includes('alpha=0.8')")
    wait_for(watched, FRONT, "Math.abs(at[1] - 0.08) < 1e-6")
    wait_for(watched, WAYS, "data.find(t => t.name === 'α').x[0] === 0.8")
    watched.get_by_text("Where the slider is, at α = 0.80").wait_for()
    assert slider.evaluate("e => e.matches(':focus')")
    watched.get_by_role("radio", name="straight").check(force=True)
    wait_for(watched, FRONT, "Math.abs(at[0] - 0.56) < 1e-6")
    watched.keyboard.press("Tab")
    assert watched.evaluate("() => history.length") <= 2, "a slider must not fill the history"


def test_a_run_is_started_travels_and_is_explained(watched: Any, address: str) -> None:
    open_page(watched, address, "?method=lora&steps=40")
    watched.get_by_role("button", name="Start").click()
    wait_for(watched, FRONT, "(data.find(t => t.name === 'its way') || {x: []}).x.length > 2")
    watched.get_by_text("Finished all 40 steps.").wait_for()
    wait_for(watched, GEOMETRY, "data.length === 4")
    watched.get_by_text("your run.").wait_for()
    slider = watched.get_by_label("Rewind α")
    expect(slider).to_be_enabled()
    slider.focus()
    watched.keyboard.press("Home")
    wait_for(watched, FRONT, "Math.abs(at[0]) < 1e-9 && Math.abs(at[1]) < 1e-9")


def test_a_run_is_stopped_and_one_that_is_deleted_is_told(
    watched: Any, address: str, folders: tuple[Path, Path]
) -> None:
    open_page(watched, address, "?method=full&steps=500")
    watched.get_by_role("button", name="Start").click()
    watched.get_by_text("Running: step").wait_for()
    watched.get_by_role("button", name="Stop").click()
    watched.get_by_text("Stopped after step").wait_for()
    name = watched.get_by_label("Method or run shown").input_value()
    shutil.rmtree(folders[1] / name)
    watched.get_by_label("Rewind α").focus()
    watched.get_by_label("Model and tasks").focus()
    watched.get_by_label("Steps").fill("60")
    watched.get_by_label("Steps").press("Tab")
    watched.get_by_role("alert").get_by_text(f"The run {name} was deleted while it was shown").wait_for()
    watched.get_by_role("button", name="Start").wait_for()


def test_every_control_has_a_name(watched: Any, address: str) -> None:
    open_page(watched, address)
    for role in ("slider", "combobox", "spinbutton", "button", "radio"):
        for control in watched.get_by_role(role).all():
            snapshot = control.aria_snapshot()
            assert re.match(rf'- {role} "[^"]+"', snapshot), snapshot
    assert watched.get_by_role("status").count() == 1
    assert watched.get_by_role("form").count() == 3


@pytest.mark.parametrize("width", [760, 1280])
def test_nothing_sticks_out(watched: Any, address: str, width: int) -> None:
    watched.set_viewport_size({"width": width, "height": 800})
    open_page(watched, address)
    watched.wait_for_timeout(300)
    assert watched.evaluate("() => document.documentElement.scrollWidth") <= width
