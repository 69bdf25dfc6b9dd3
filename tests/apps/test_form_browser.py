"""A form in a real browser, in front of a server that takes its time: no move of a control is lost or undone."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest

pytestmark = pytest.mark.browser

# What was heard comes back as text; every other message takes long, in a server of several threads.
SERVER = """
import json, sys, threading, time
import panel as pn
from panel.io.server import get_server
from orthokit_widgets.components import Form, Message

pn.config.nthreads = 4
SLIDER = {"kind": "range", "help": "", "min": 0.0, "max": 1.0, "step": 0.01, "scale": "linear", "digits": 2}

def page():
    heard, settings = [], {"alpha": 1.0, "beta": 1.0}
    told = Message(text="[]")
    def hear(message):
        if "ready" in message:
            form.resend()
            form.answered = True
            return
        time.sleep(1.0 if len(heard) % 2 == 0 else 0.0)
        if message.get("value", 1.0) >= 0.5:
            settings.update({message["set"]: message["value"]} if "set" in message else {})
        heard.append(message.get("set", message.get("action")))
        if message.get("action") == "rename":
            form.fields = [SLIDER | {"name": name, "label": name.upper()} for name in settings]
        form.values = dict(settings)
        told.text = json.dumps([settings, heard])
    fields = [SLIDER | {"name": name, "label": name} for name in settings]
    actions = [{"name": "rename", "label": "Rename", "primary": False, "disabled": False}]
    form = Form(heard=hear, fields=fields, values=dict(settings), actions=actions)
    return pn.Column(form, told)

server = get_server({"form": page}, port=0, address="127.0.0.1", websocket_origin=["*"])
print(f"Served at http://127.0.0.1:{server.port}/form", flush=True)
server.run_until_shutdown()
"""


@pytest.fixture(scope="module")
def address(started: Callable[..., str], tmp_path_factory: pytest.TempPathFactory) -> str:
    """Address of the form."""
    log = tmp_path_factory.mktemp("server") / "log.txt"
    return started(["-c", SERVER], log, "Served at").split("Served at ")[1]


@pytest.fixture
def form(watched: Any, address: str) -> Iterator[Any]:
    """The page with the form, drawn."""
    watched.goto(address)
    watched.get_by_label("alpha", exact=True).wait_for()
    watched.get_by_text("[]").wait_for()
    yield watched


def heard(page: Any, count: int) -> tuple[dict[str, float], list[str]]:
    """The settings and the names of what was heard, once the server has answered ``count`` messages."""
    told = page.get_by_role("status")
    found = "([told, count]) => JSON.parse(told.textContent)[1]?.length >= count"
    page.wait_for_function(found, arg=[told.element_handle(), count])
    settings, names = json.loads(told.inner_text())
    return settings, names


def test_keys_that_are_pressed_while_the_server_is_busy_all_count(form: Any) -> None:
    slider = form.get_by_label("alpha", exact=True)
    slider.focus()
    for wait in (0, 100, 1700, 100, 0):
        form.wait_for_timeout(wait)  # longer than the server takes, and shorter
        form.keyboard.press("ArrowLeft")
    form.get_by_role("status").filter(has_text='"alpha": 0.95').wait_for()
    form.wait_for_timeout(1500)  # nothing may follow
    settings, names = heard(form, 3)
    assert settings["alpha"] == 0.95 and float(slider.input_value()) == 0.95
    assert len(names) <= 5


def test_messages_are_heard_one_by_one_in_their_order(form: Any) -> None:
    for name, presses in (("alpha", 3), ("beta", 2), ("alpha", 1)):
        form.get_by_label(name, exact=True).focus()
        for _ in range(presses):
            form.keyboard.press("ArrowLeft")
    form.get_by_role("button", name="Rename").click()
    form.get_by_label("ALPHA", exact=True).wait_for()
    settings, names = heard(form, 4)
    assert settings == {"alpha": 0.96, "beta": 0.98}
    assert names[-1] == "rename" and [a for a, b in zip(names, [*names[1:], ""], strict=True) if a != b] == [
        "alpha",
        "beta",
        "alpha",
        "rename",
    ]
    assert float(form.get_by_label("ALPHA", exact=True).input_value()) == 0.96


def test_a_value_that_is_refused_goes_back_to_the_one_that_holds(form: Any) -> None:
    slider = form.get_by_label("beta", exact=True)
    slider.focus()
    form.keyboard.press("Home")  # 0, which the server does not take
    heard(form, 1)
    form.wait_for_function("e => e.value === '1'", arg=slider.element_handle())


def test_the_focus_stays_on_a_control_that_is_made_anew(form: Any) -> None:
    form.get_by_role("button", name="Rename").click()
    slider = form.get_by_label("beta", exact=True)
    slider.focus()
    form.get_by_label("BETA", exact=True).wait_for()
    assert form.get_by_label("BETA", exact=True).evaluate("e => e.matches(':focus')")
