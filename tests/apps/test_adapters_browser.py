"""The page "Adapters" in a real browser; ``watched`` also fails on an external request or an error in the console."""

from __future__ import annotations

from typing import Any

import pytest
from playwright.sync_api import expect

pytestmark = pytest.mark.browser

ERROR, ANGLES = "How far from orthogonal", "Do the angles between neurons stay"


def plot(page: Any, question: str) -> Any:
    return page.get_by_role("figure", name=question).locator(".js-plotly-plot")


def wait_for(page: Any, question: str, condition: str) -> None:
    """Wait until ``condition`` holds of the plot's ``data``."""
    handle = plot(page, question).element_handle()
    page.wait_for_function(f"e => {{ const data = e.data; return data && ({condition}); }}", arg=handle)


def open_page(page: Any, server: str, query: str = "") -> None:
    page.goto(f"{server}adapters{query}")
    page.get_by_text("Up to date.").wait_for()
    plot(page, ERROR).locator(".main-svg").first.wait_for()


def star(page: Any) -> list[float]:
    """Angle and error of the marker."""
    return plot(page, ERROR).evaluate(
        "e => { const t = e.data.find(t => t.name === 'measured'); return [t.x[0], t.y[0]]; }"
    )


def test_keys_on_the_angle_move_the_marker_along_the_law_and_go_into_the_address(watched: Any, server: str) -> None:
    open_page(watched, server, "?map=cayley_neumann&terms=3")
    before = star(watched)
    slider = watched.get_by_label("Largest angle, rad")
    slider.focus()
    for _ in range(12):
        watched.keyboard.press("ArrowRight")
    watched.wait_for_function("() => location.search.includes('angle=')")
    wait_for(watched, ERROR, f"data.find(t => t.name === 'measured').x[0] > {1.4 * before[0]}")
    angle, error = star(watched)
    assert error == pytest.approx(1 - (1 - angle**4) ** 2, rel=1e-3)
    assert slider.evaluate("e => e.matches(':focus')")
    watched.get_by_text("but R is").wait_for()


def test_another_adapter_brings_its_own_controls_and_keeps_the_focus(watched: Any, server: str) -> None:
    open_page(watched, server)
    expect(watched.get_by_label("Terms of the series")).to_be_disabled()
    adapter = watched.get_by_role("radio", name="OFT", exact=True)
    adapter.focus()
    watched.keyboard.press("ArrowRight")
    watched.get_by_label("Butterfly factors m").wait_for()
    watched.get_by_text("BOFT turns by up to").wait_for()
    assert watched.get_by_role("radio", name="BOFT").evaluate("e => e.matches(':focus')")
    watched.keyboard.press("ArrowRight")
    watched.get_by_label("Rank r").wait_for()
    expect(watched.get_by_label("Butterfly factors m")).to_have_count(0)
    watched.keyboard.press("ArrowRight")
    watched.get_by_text("LoRA adds").wait_for()
    wait_for(watched, ANGLES, "data.some(t => t.name === 'OFT, as long')")
    watched.wait_for_function("() => location.search.includes('adapter=lora')")


def test_a_block_size_that_does_not_divide_is_told_until_one_does(watched: Any, server: str) -> None:
    open_page(watched, server)
    watched.get_by_label("Matrix").select_option("tinygpt/0.mlp.down")
    watched.get_by_role("alert").get_by_text("block_size must divide the 344 inputs").wait_for()
    watched.get_by_text("The charts show the last settings.").wait_for()
    watched.get_by_role("radio", name="8", exact=True).check(force=True)
    watched.get_by_text("Up to date.").wait_for()
    watched.get_by_role("alert").wait_for(state="hidden")
