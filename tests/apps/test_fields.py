"""Settings from addresses and controls: in range they are taken, out of range the sentence names the range."""

from __future__ import annotations

import math
from typing import ClassVar
from urllib.parse import urlencode

import param
import pytest
from hypothesis import given
from hypothesis import strategies as st
from orthokit_widgets.fields import Settings, describe, read, read_query, write_query

from orthokit.errors import OptionError, UnknownNameError


class Example(Settings):
    ratio = param.Number(0.5, bounds=(0.0, 0.995), step=0.005, label="Ratio")
    rate = param.Number(0.01, bounds=(1e-4, 0.1), label="Rate")
    count = param.Integer(20, bounds=(10, 50), step=10, label="Count")
    kind = param.Selector(default="a", objects=["a", "b", 3], label="Kind")

    SETTINGS = ("ratio", "rate", "count", "kind")
    LOGARITHMIC = frozenset({"rate"})
    SEGMENTS: ClassVar = {"kind": {"a": "first"}}


@given(st.floats(allow_nan=True, allow_infinity=True))
def test_a_number_is_moved_to_the_nearest_step_or_refused_with_its_range(value: float) -> None:
    state = Example()
    if 0 <= value <= 0.995:
        found = read(state, "ratio", repr(value))
        assert 0 <= found <= 0.995
        assert abs(found - value) <= 0.0025 + 1e-9
        assert math.isclose(found / 0.005, round(found / 0.005), abs_tol=1e-6)
    else:
        with pytest.raises(OptionError, match=r"Ratio must be a number from 0 to 0\.995; got"):
            read(state, "ratio", repr(value))


@pytest.mark.parametrize("text", ["", "many", "1e", None, "0,5", "0x2"])
def test_what_is_no_number_is_refused_with_the_range(text: str | None) -> None:
    with pytest.raises(OptionError, match=r"Count must be a number from 10 to 50; got"):
        read(Example(), "count", text)


def test_choices_are_found_by_their_text_and_keep_their_type() -> None:
    assert read(Example(), "kind", "3") == 3
    with pytest.raises(OptionError, match="Kind must be one of a, b, 3; got 'c'"):
        read(Example(), "kind", "c")


def test_an_unknown_setting_is_answered_with_the_closest_name() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'ratio'"):
        read(Example(), "ration", 1)


@given(
    st.integers(0, 199),
    st.floats(1e-4, 0.1),
    st.sampled_from([10, 20, 30, 40, 50]),
    st.sampled_from(["a", "b", 3]),
)
def test_an_address_brings_back_the_settings_that_wrote_it(at: int, rate: float, count: int, kind: str | int) -> None:
    state = Example(ratio=round(at * 0.005, 10), rate=float(f"{rate:.2g}"), count=count, kind=kind)
    again = Example()
    assert read_query(again, "?" + write_query(state)) == []
    assert again.values() == state.values()


def test_defaults_are_not_written_into_the_address() -> None:
    assert write_query(Example()) == ""
    assert write_query(Example(count=30)) == "count=30"


@given(st.dictionaries(st.text(max_size=8), st.text(max_size=8), max_size=6))
def test_no_address_makes_it_fail_and_every_bad_value_gets_one_sentence(query: dict[str, str]) -> None:
    state = Example()
    problems = read_query(state, "?" + urlencode(query))
    assert len(problems) <= len(query)
    assert all(problem.startswith("In the address: ") for problem in problems)
    foreign = sum(name.startswith(("bokeh-", "theme", "token")) for name in query)
    assert len(problems) >= sum(name not in state.SETTINGS for name in query) - foreign


def test_a_bad_value_in_the_address_leaves_the_default_and_says_so() -> None:
    state = Example()
    problems = read_query(state, "?ratio=2&count=40&theme=dark")
    assert state.values() == {"ratio": 0.5, "rate": 0.01, "count": 40, "kind": "a"}
    assert problems == [
        "In the address: Ratio must be a number from 0 to 0.995; got 2. The default 0.5 is used.",
    ]


def test_controls_are_described_by_the_parameters() -> None:
    fields = {field["name"]: field for field in describe(Example())}
    assert list(fields) == ["ratio", "rate", "count", "kind"]
    assert (fields["ratio"]["kind"], fields["ratio"]["max"], fields["ratio"]["digits"]) == ("range", 0.995, 3)
    assert fields["rate"]["scale"] == "log"
    assert fields["kind"]["choices"][0] == {"value": "a", "label": "first", "help": ""}


class Several(Settings):
    chosen = param.ListSelector(default=["a"], objects=["a", "b", 3], label="Letters")

    SETTINGS = ("chosen",)
    WORDS: ClassVar = {"chosen": {"a": "first"}}


def test_several_choices_are_read_from_text_and_lists_in_their_own_order() -> None:
    assert read(Several(), "chosen", "3,a") == ["a", 3]
    assert read(Several(), "chosen", ["b", "a"]) == ["a", "b"]
    for bad, found in (("", "none"), ([], "none"), ("a,c", "'c'")):
        with pytest.raises(OptionError, match=f"Letters must be one or more of a, b, 3; got {found}"):
            read(Several(), "chosen", bad)


def test_several_choices_go_into_an_address_and_come_back() -> None:
    state = Several(chosen=["b", 3])
    assert write_query(state) == "chosen=b,3"
    again = Several()
    assert read_query(again, "?chosen=b%2C3") == []
    assert again.chosen == ["b", 3] and write_query(Several()) == ""


def test_several_choices_are_described_with_their_words() -> None:
    (field,) = describe(Several())
    assert field["kind"] == "several"
    assert [choice["label"] for choice in field["choices"]] == ["first", "b", "3"]
