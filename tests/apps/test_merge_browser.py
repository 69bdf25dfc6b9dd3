"""The page "Merge" in a real browser; ``watched`` also fails on an external request or an error in the console."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import merge_evidence as made
import pytest
from playwright.sync_api import expect
from safetensors.torch import load_file

pytestmark = pytest.mark.browser

TASKS, SCALES, RECORD = "How well does the merged model", "Which scale of the change", "What did each method reach"
# The server of the other pages, with a small record in the place of the checkout's and experts of a few steps.
SERVER = """
import functools, sys
from pathlib import Path
from orthokit.studies import _engine
from orthokit_widgets import merge_view, serve
_engine.evidence_root = lambda: Path(sys.argv[1])
merge_view.MergePage = functools.partial(merge_view.MergePage, small=True, steps=int(sys.argv[3]))
sys.exit(serve.main(["--port", "0", "--root", sys.argv[2]]))
"""


@pytest.fixture(scope="module")
def launch(started: Callable[..., str], tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], str]:
    """Starts a server whose experts are trained for so many steps; the address of the page."""
    evidence = made.write(tmp_path_factory.mktemp("evidence"))

    def begin(steps: int) -> str:
        folder = tmp_path_factory.mktemp("server")
        line = started(["-c", SERVER, str(evidence), str(folder), str(steps)], folder / "log.txt", "Live pages at")
        return line.split("Live pages at ")[1].split(" ")[0] + "merge"

    return begin


@pytest.fixture(scope="module")
def address(launch: Callable[[int], str]) -> str:
    """Address of the page, with experts of two steps."""
    return launch(2)


def plot(page: Any, question: str) -> Any:
    return page.get_by_role("figure", name=question).locator(".js-plotly-plot")


def wait_for(page: Any, question: str, condition: str) -> None:
    """Wait until ``condition`` holds of the plot's ``data``."""
    handle = plot(page, question).element_handle()
    page.wait_for_function(f"e => {{ const data = e.data; return data && ({condition}); }}", arg=handle)


def open_page(page: Any, address: str, query: str = "", *, status: str = "Ready: press") -> None:
    page.goto(address + query)
    page.get_by_text(status).wait_for()
    plot(page, RECORD).locator(".main-svg").first.wait_for()


def merged(page: Any, address: str, query: str = "?experts=footwear,low+digits&method=linear") -> None:
    """Open the page, press the button and wait for all scales."""
    open_page(page, address, query)
    page.get_by_role("button", name=re.compile("^(Train and merge|Merge)$")).click()
    page.get_by_text("Up to date: all 17 scales measured.").wait_for()


def test_the_record_is_there_at_once_and_a_press_merges(watched: Any, address: str) -> None:
    open_page(watched, address, "?experts=footwear,low+digits")
    wait_for(watched, RECORD, "data[0].y.length === 4")
    expect(watched.get_by_role("button", name="Save the merged model")).to_be_disabled()
    watched.get_by_role("button", name=re.compile("^(Train and merge|Merge)$")).click()
    watched.get_by_text("Up to date: all 17 scales measured.").wait_for()
    wait_for(watched, TASKS, "data.find(t => t.name === 'merged').y.length === 2")
    wait_for(watched, SCALES, "data[0].x.length === 17")
    watched.get_by_role("figure", name="In which layers do rows").locator(".main-svg").first.wait_for()
    watched.get_by_text("OrthoMerge of 2 experts at scale 1 (measured").wait_for()


def test_keys_on_the_slider_are_answered_from_the_grid(watched: Any, address: str) -> None:
    merged(watched, address)
    slider = watched.get_by_label("Scale of the merged change")
    # Each press to the slider itself: a busy machine may still draw the last scales, and a key that comes then is lost.
    for _ in range(5):
        slider.press("ArrowLeft")
    watched.get_by_text("at scale 0.875 (measured").wait_for()
    slider.press("ArrowLeft")
    watched.get_by_text("at scale 0.85 (between 0.75 and 0.875, which were measured").wait_for()
    wait_for(watched, SCALES, "data.find(t => t.name === 'scale').x[0] === 0.85")
    watched.wait_for_function("() => location.search.includes('scale=0.85')")
    assert slider.evaluate("e => e.matches(':focus')")
    watched.get_by_text("Up to date: all 17 scales measured.").wait_for()


def test_the_merged_model_is_saved(watched: Any, address: str) -> None:
    merged(watched, address)
    with watched.expect_download() as download:
        watched.get_by_role("button", name="Save the merged model").click()
    assert download.value.suggested_filename == "pictures-linear-footwear+low-digits-scale-1.safetensors"
    found = load_file(download.value.path())
    assert "blocks.0.attn.q.weight" in found and all(tensor.isfinite().all() for tensor in found.values())


def test_another_method_brings_its_options_and_keeps_the_focus(watched: Any, address: str) -> None:
    merged(watched, address)
    method = watched.get_by_label("Method", exact=True)
    method.focus()
    method.select_option("ties")
    watched.get_by_label("Density kept").wait_for()
    watched.get_by_text("TIES of 2 experts at scale 1").wait_for()
    watched.wait_for_function("() => location.search.includes('method=ties')")
    assert method.evaluate("e => e.matches(':focus')")


def test_a_recorded_point_that_is_pressed_brings_its_method(watched: Any, address: str) -> None:
    open_page(watched, address)
    box = plot(watched, RECORD).evaluate(
        """e => {
            const t = e.data[0], at = t.customdata.findIndex(each => each[0] === 'TIES');
            const area = e.getBoundingClientRect(), {xaxis, yaxis} = e._fullLayout;
            return [area.x + xaxis._offset + xaxis.d2p(t.x[at]), area.y + yaxis._offset + yaxis.d2p(t.y[at])];
        }"""
    )
    watched.mouse.move(*box)
    watched.mouse.click(*box)
    watched.get_by_label("Density kept").wait_for()
    watched.wait_for_function("() => location.search.includes('scale=0.75')")
    assert watched.get_by_label("Method", exact=True).input_value() == "ties"


def test_what_does_not_go_together_is_a_sentence(watched: Any, address: str) -> None:
    open_page(watched, address, "?method=slerp&scale=7", status="Not merged")
    alert = watched.get_by_role("alert")
    alert.get_by_text("Scale of the merged change must be a number from 0 to 2; got 7").wait_for()
    alert.get_by_text("merges exactly 2 experts; got 3").wait_for()
    expect(watched.get_by_role("button", name=re.compile("erge$")).first).to_be_disabled()
    boxes = [watched.get_by_role("checkbox", name=name) for name in ("footwear", "low digits", "high digits")]
    boxes[2].click()
    alert.wait_for(state="hidden")
    boxes[0].click()
    alert.get_by_text("got 1").wait_for()
    boxes[1].click()
    alert.get_by_text("Experts merged must be one or more of").wait_for()
    expect(boxes[1]).to_be_checked()


def test_weights_of_nought_are_a_sentence(watched: Any, address: str) -> None:
    open_page(watched, address, "?experts=footwear,low+digits&weight_1=0&weight_2=0.05")
    watched.get_by_label("Weight of low digits").focus()
    watched.keyboard.press("ArrowLeft")
    watched.get_by_role("alert").get_by_text("all 0").wait_for()


def test_a_training_is_stopped(watched: Any, launch: Callable[[int], str]) -> None:
    open_page(watched, launch(100_000))
    watched.get_by_role("button", name="Train and merge").click()
    watched.get_by_text("Training the expert footwear: step").wait_for()
    watched.get_by_role("button", name="Stop").click()
    watched.get_by_text("Stopped; 0 of 17 scales measured.").wait_for()
    expect(watched.get_by_role("button", name="Train and merge")).to_be_enabled()


def test_two_visitors_do_not_disturb_each_other(watched: Any, address: str) -> None:
    merged(watched, address)
    other = watched.context.new_page()
    open_page(other, address, "?experts=footwear,low+digits&method=ties")
    other.get_by_role("button", name=re.compile("^(Train and merge|Merge)$")).click()
    other.get_by_text("TIES of 2 experts at scale 1").wait_for()
    watched.get_by_label("Scale of the merged change").focus()
    watched.keyboard.press("ArrowRight")
    watched.get_by_text("Averaging of 2 experts at scale 1.025").wait_for()
    other.get_by_text("TIES of 2 experts at scale 1 (measured").wait_for()
    other.close()
    watched.keyboard.press("ArrowRight")
    watched.get_by_text("Averaging of 2 experts at scale 1.05").wait_for()


def test_every_control_has_a_name(watched: Any, address: str) -> None:
    open_page(watched, address)
    for role in ("slider", "combobox", "spinbutton", "button", "radio", "checkbox"):
        for control in watched.get_by_role(role).all():
            snapshot = control.aria_snapshot()
            assert re.match(rf'- {role} "[^"]+"', snapshot), snapshot


@pytest.mark.parametrize("width", [390, 760, 1280])
def test_nothing_sticks_out(watched: Any, address: str, width: int) -> None:
    watched.set_viewport_size({"width": width, "height": 800})
    merged(watched, address)
    watched.wait_for_timeout(300)
    assert watched.evaluate("() => document.documentElement.scrollWidth") <= width


def test_what_the_server_takes_from_a_path_is_left_alone(watched: Any, address: str, tmp_path: Path) -> None:
    """The page reads no path from its address: an unknown setting is told and nothing else."""
    open_page(watched, address, f"?evidence={tmp_path}")
    watched.get_by_role("alert").get_by_text("unknown setting").wait_for()
