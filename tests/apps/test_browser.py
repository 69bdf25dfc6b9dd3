"""The pages in a real browser; ``watched`` also fails a test on an external request or an error in the console."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from orthokit_widgets.page import PAGES
from playwright.sync_api import expect

pytestmark = pytest.mark.browser


def plot(page: Any, question: str) -> Any:
    """The plot under a heading."""
    return page.get_by_role("figure", name=question).locator(".js-plotly-plot")


def data(page: Any, question: str) -> list[dict[str, Any]]:
    """Names and vertical values of the traces of a plot."""
    return plot(page, question).evaluate("e => e.data.map(t => ({name: t.name, x: [...t.x], y: [...(t.z || t.y)]}))")


def wait_for(page: Any, question: str, condition: str) -> None:
    """Wait until ``condition`` holds of the plot's ``data``."""
    handle = plot(page, question).element_handle()
    page.wait_for_function(f"e => {{ const data = e.data; return data && ({condition}); }}", arg=handle)


def open_momentum(page: Any, server: str, query: str = "?size=40") -> None:
    page.goto(f"{server}momentum{query}")
    page.get_by_text("Up to date.").wait_for()
    plot(page, "Does the signal stand out").locator(".main-svg").first.wait_for()


def open_training(page: Any, server: str, query: str = "?model=cnn&data=digits&budget=0.5&steps=5000") -> None:
    page.goto(f"{server}training{query}")
    page.get_by_role("button", name="Start").wait_for()
    page.get_by_text("Ready: press Start.").wait_for()


def step(page: Any) -> int:
    """The step the page shows."""
    return int(re.search(r"step\s*(\d+)", page.locator("dl").inner_text()).group(1))  # type: ignore[union-attr]


def query(page: Any) -> dict[str, list[str]]:
    return parse_qs(urlsplit(page.url).query)


def test_a_moved_slider_changes_figures_numbers_and_the_address(watched: Any, server: str) -> None:
    open_momentum(watched, server)
    before = data(watched, "Does the signal stand out")
    slider = watched.get_by_label("Momentum β")
    slider.focus()
    for _ in range(4):
        watched.keyboard.press("ArrowRight")
    watched.wait_for_function("() => location.search.includes('beta=0.92')")
    wait_for(watched, "Does the signal stand out", f"data[0].y[0] !== {before[0]['y'][0]}")
    expect(watched.get_by_text("0.920")).to_be_visible()
    assert query(watched) == {"size": ["40"], "beta": ["0.92"]}
    watched.get_by_role("radio", name="5", exact=True).check(force=True)
    wait_for(watched, "Does the signal stand out", "data[0].y.length === 5")
    assert watched.evaluate("() => history.length") <= 2, "a slider must not fill the history"


def test_the_order_post_is_computed_aside_and_then_drawn(watched: Any, server: str) -> None:
    open_momentum(watched, server)
    assert len(data(watched, "When does momentum open the gap")) == 3
    watched.get_by_role("radio", name="post", exact=True).check(force=True)
    wait_for(watched, "When does momentum open the gap", "data.some(t => t.name === 'polar, then momentum')")
    watched.get_by_text("Up to date.").wait_for()


def test_an_address_brings_its_settings_back(watched: Any, server: str) -> None:
    open_momentum(watched, server, "?size=40&beta=0.95&rank=1&noise=arch&sigma=0.5")
    assert watched.get_by_label("Momentum β").input_value() == "0.95"
    expect(watched.get_by_role("radio", name="ARCH")).to_be_checked()
    assert len(data(watched, "Does the signal stand out")[0]["y"]) == 1
    assert not watched.get_by_role("alert", include_hidden=True).inner_text()


@pytest.mark.parametrize(
    ("page", "bad", "sentence"),
    [
        ("momentum", "?beta=2&size=40", "Momentum β must be a number from 0 to 0.995; got 2. The default 0.9 is used."),
        ("momentum", "?sigma=lots&size=40", "Noise σ must be a number from 0.2 to 5; got 'lots'"),
        ("momentum", "?betta=0.5&size=40", "unknown setting 'betta'; did you mean 'beta'?"),
        ("training", "?steps=0", "Steps must be a number from 20 to 5000; got 0. The default 400 is used."),
        ("training", "?model=cnn&data=addresses", "Data must be one of fashion, digits; got 'addresses'"),
        ("training", "?optimizer=<b>x</b>", "Optimizer must be one of muon, adamw; got '<b>x</b>'"),
        ("race", "?racers=adamw,<b>x</b>", "Optimizers must be one or more of adamw, sgd, lion"),
        (
            "adapters",
            "?angle=9",
            "Largest angle, rad must be a number from 0.001 to 3; got 9. The default 0.3",
        ),
        (
            "adapters",
            "?matrix=tinygpt/0.mlp.down",
            "block_size must divide the 344 inputs of '0.mlp.down'; 32",
        ),
        ("race", "?rate_sgd=99&track=cnn", "SGD must be a number from 0.03125 to 32; got 99. The default 1.0 is used."),
    ],
)
def test_a_bad_value_in_the_address_is_told_and_the_page_works(
    watched: Any, server: str, page: str, bad: str, sentence: str
) -> None:
    watched.goto(server + page + bad)
    watched.get_by_role("alert").get_by_text(sentence).wait_for()
    watched.get_by_role("heading", level=1).wait_for()


def test_a_bad_value_in_a_control_is_told_and_put_back(watched: Any, server: str) -> None:
    open_training(watched, server)
    steps = watched.get_by_label("Steps")
    for bad in ("7", "", "1e9"):
        steps.fill(bad)
        steps.press("Tab")
        watched.get_by_role("alert").get_by_text("Steps must be a number from 20 to 5000; got").wait_for()
        watched.wait_for_function("e => e.value === '5000'", arg=steps.element_handle())
    steps.fill("30")
    steps.press("Tab")
    watched.get_by_role("alert").wait_for(state="hidden")
    assert query(watched)["steps"] == ["30"]


def test_start_pause_resume_stop(watched: Any, server: str) -> None:
    open_training(watched, server)
    start, pause, stop = (watched.get_by_role("button", name=name) for name in ("Start", "Pause", "Stop"))
    assert stop.is_disabled()
    start.click()
    watched.get_by_text("Running.").wait_for()
    wait_for(watched, "How fast does the loss fall", "data[0].x.length > 5")
    wait_for(watched, "How does the spectrum of", "data[0].type === 'heatmap' && data[0].z.length > 1")
    assert start.is_disabled()
    pause.click()
    watched.get_by_text("Paused after step").wait_for()
    watched.wait_for_timeout(600)  # the step under way, and the last look at it
    held = step(watched)
    watched.wait_for_timeout(600)
    assert step(watched) == held
    watched.get_by_role("button", name="Resume").click()
    watched.get_by_text("Running.").wait_for()
    wait_for(watched, "How fast does the loss fall", f"data[0].x.at(-1) > {held}")
    stop.click()
    watched.get_by_text("Stopped after step").wait_for()  # not "Finished"
    ended = step(watched)
    watched.wait_for_timeout(600)
    assert step(watched) == ended
    expect(start).to_be_enabled()


def test_a_second_run_is_drawn_over_the_first_and_can_be_taken_away(watched: Any, server: str) -> None:
    open_training(watched, server, "?model=cnn&data=digits&steps=20&budget=0.5")
    for number in (1, 2):
        watched.get_by_role("button", name="Start").click()
        watched.get_by_text("Finished all 20 steps.").wait_for()
        wait_for(watched, "How fast does the loss fall", f"data.length === {number}")
        watched.get_by_role("radio", name="AdamW").check(force=True)
    names = [trace["name"] for trace in data(watched, "How fast does the loss fall")]
    assert any("adamw" in name for name in names)
    row = watched.get_by_role("checkbox", name=re.compile("draw muon")).first
    row.wait_for()
    checked = watched.get_by_role("checkbox", checked=True)
    expect(checked).to_have_count(2)
    checked.last.uncheck()
    wait_for(watched, "How fast does the loss fall", "data.length === 1")


def test_keyboard_alone_starts_and_stops_a_run(watched: Any, server: str) -> None:
    open_training(watched, server)
    watched.locator("body").click(position={"x": 5, "y": 5})
    for _ in range(12):
        watched.keyboard.press("Tab")
        if watched.get_by_role("button", name="Start").evaluate("e => e.matches(':focus')"):
            break
    else:
        pytest.fail("Tab does not reach Start")
    watched.keyboard.press("Space")
    watched.get_by_text("Running.").wait_for()
    # Start is off now; the focus went on to the next button instead of the top of the page.
    assert watched.get_by_role("button", name="Pause").evaluate("e => e.matches(':focus')")
    watched.keyboard.press("Tab")
    watched.keyboard.press("Space")
    watched.get_by_text("Stopped after step").wait_for()


def test_a_race_is_chosen_started_paused_and_stopped(watched: Any, server: str) -> None:
    watched.goto(f"{server}race?track=cnn&racers=adamw,muon_pre&steps=2000")
    watched.get_by_text("Ready: press Start.").wait_for()
    expect(watched.get_by_role("checkbox", checked=True)).to_have_count(2)
    watched.get_by_role("checkbox", name="SGD").check()
    watched.wait_for_function("() => location.search.includes('racers=adamw,sgd,muon_pre')")
    watched.get_by_label("SGD ×").wait_for()
    start, pause, stop = (watched.get_by_role("button", name=name) for name in ("Start", "Pause", "Stop"))
    start.click()
    watched.get_by_text("Running: step").wait_for()
    wait_for(watched, "Which one is ahead", "data.length === 3 && data.every(t => t.x.length > 3)")
    wait_for(watched, "How far have the singular values moved", "data.length === 3")
    names = [trace["name"] for trace in data(watched, "Which one is ahead")]
    assert names == ["AdamW", "SGD", "Muon"]
    pause.click()
    held = watched.get_by_text("Paused after step")
    held.wait_for()
    watched.wait_for_timeout(600)
    text = held.inner_text()
    watched.wait_for_timeout(600)
    assert held.inner_text() == text
    # How it is drawn can be changed while it waits.
    watched.get_by_role("radio", name="seconds").check(force=True)
    wait_for(watched, "Which one is ahead", "data[0].x[0] < 1")
    stop.click()
    watched.get_by_text("Stopped after step").wait_for()  # not "Finished"
    expect(start).to_be_enabled()


@pytest.mark.parametrize("page", list(PAGES.values()))
def test_every_control_has_a_name_and_every_page_its_landmarks(watched: Any, server: str, page: str) -> None:
    watched.goto(server + page)
    watched.get_by_role("heading", level=1).wait_for()
    watched.locator("form").first.wait_for()
    if page == "inspect":  # It measures by itself, and draws its table anew until it has.
        watched.get_by_text("Up to date:").first.wait_for()
    for role in ("slider", "combobox", "spinbutton", "button", "radio", "checkbox"):
        for control in watched.get_by_role(role).all():
            snapshot = control.aria_snapshot()
            assert re.match(rf'- {role} "[^"]+"', snapshot), snapshot
    # A button that saves a file tells below itself how far that is.
    assert watched.get_by_role("status").count() == (2 if page in ("merge", "inspect") else 1)
    assert watched.get_by_role("alert", include_hidden=True).count() == 1
    assert watched.get_by_role("navigation", name="Pages").get_by_role("link").count() == len(PAGES)
    assert watched.locator("html").get_attribute("lang") == "en"


def test_a_closed_tab_stops_its_training(browser: Any, server: str, runs_folder: Path) -> None:
    from orthokit.lab.runs import runs

    page = browser.new_page()
    page.set_default_timeout(60_000)
    open_training(page, server)
    page.get_by_role("button", name="Start").click()
    wait_for(page, "How fast does the loss fall", "data[0].x.length > 3")
    assert "running" in set(runs(runs_folder)["status"])
    page.close()
    end = time.monotonic() + 60
    while "running" in set(runs(runs_folder)["status"]):
        assert time.monotonic() < end, "it trains on after the page was closed"
        time.sleep(0.2)


def test_two_sessions_do_not_see_each_other(watched: Any, browser: Any, server: str) -> None:
    open_training(watched, server)
    watched.get_by_role("button", name="Start").click()
    watched.get_by_text("Running.").wait_for()
    other = browser.new_page()
    other.set_default_timeout(60_000)
    open_training(other, server)
    assert other.get_by_role("button", name="Stop").is_disabled()
    other.close()
    watched.get_by_role("button", name="Stop").click()
    watched.get_by_text("Stopped after step").wait_for()


@pytest.mark.parametrize("width", [760, 1280, 1400])
@pytest.mark.parametrize("page", list(PAGES.values()))
def test_nothing_sticks_out_at_the_width_of_a_laptop_or_half_of_it(
    watched: Any, server: str, page: str, width: int
) -> None:
    watched.set_viewport_size({"width": width, "height": 800})
    watched.goto(server + page)
    watched.get_by_role("figure").first.wait_for()
    watched.wait_for_timeout(300)
    assert watched.evaluate("() => document.documentElement.scrollWidth") <= width
