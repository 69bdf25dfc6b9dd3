"""What all pages share, without a browser."""

from __future__ import annotations

import threading
import time

import param
from orthokit_widgets.fields import Settings
from orthokit_widgets.page import Page


class State(Settings):
    """One setting."""

    alpha = param.Number(1.0, bounds=(0.0, 1.0), step=0.01, label="Alpha")
    SETTINGS = ("alpha",)


class Slow(Page[State]):
    """A page whose look takes a while, and which notes how many are taken at once."""

    inside = most = looks = 0

    def paint(self) -> bool:
        self.inside += 1
        self.most = max(self.most, self.inside)
        time.sleep(0.05)
        self.inside -= 1
        self.looks += 1
        return False


def test_messages_and_looks_of_several_threads_are_dealt_with_one_at_a_time() -> None:
    page = Slow(State(), title="Slow", explanation="")
    page.looks = 0
    messages = [{"set": "alpha", "value": value} for value in (0.9, 0.8, 0.7)]
    threads = [threading.Thread(target=page._heard, args=(message,)) for message in messages]
    threads += [threading.Thread(target=page.repaint) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert page.most == 1 and page.looks == 6
    assert page.form.values == {"alpha": page.state.alpha}


def test_a_regular_look_does_not_wait_for_an_answer_that_is_on_its_way() -> None:
    page = Slow(State(), title="Slow", explanation="")
    page.looks = 0
    with page.turn:
        looking = threading.Thread(target=page._tick)
        looking.start()
        looking.join(60)
        assert not looking.is_alive() and page.looks == 0
    page._tick()
    assert page.looks == 1
