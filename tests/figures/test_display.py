"""Showing charts with and without a browser."""

import json

import pytest

from orthokit import figures as F
from orthokit.errors import OptionError, ReportError, UnknownNameError
from orthokit.figures.display import PLOTLY

FIGURE = F.spectra({"a": [2.0, 1.0]})


@pytest.fixture
def no_browser(monkeypatch):
    monkeypatch.setenv("BROWSER_PATH", "/nowhere/chrome")


@pytest.fixture(autouse=True)
def default_renderer(monkeypatch):
    monkeypatch.delenv("ORTHOKIT_RENDERER", raising=False)
    yield
    F.set_renderer(None)


def test_a_notebook_gets_an_interactive_chart_with_the_caption_in_it():
    bundle = F.show(FIGURE)._repr_mimebundle_()
    assert set(bundle) == {PLOTLY, "text/plain"}
    notes = bundle[PLOTLY]["layout"]["annotations"]
    assert notes[-1]["text"].replace("<br>", " ") == FIGURE["layout"]["meta"]["caption"]
    json.dumps(bundle, allow_nan=False)


def test_the_caption_can_be_taken_out_again():
    shown = F.figure_json(FIGURE)
    bare = F.without_caption(shown)
    assert bare["layout"].pop("annotations") == []
    assert bare == {"data": FIGURE["data"], "layout": FIGURE["layout"]}
    assert F.without_caption(FIGURE) == FIGURE


def test_display_never_fails_for_want_of_a_browser(no_browser):
    assert F.browser_path() is None
    bundle = F.show(FIGURE, renderer="png")._repr_mimebundle_()
    assert PLOTLY in bundle
    assert "image/png" not in bundle


def test_a_png_without_a_browser_says_what_to_do(no_browser):
    with pytest.raises(ReportError, match=r"Chrome or Chromium .* BROWSER_PATH"):
        F.png(FIGURE)


def test_unknown_renderer_and_wrong_figures_are_refused(unchecked):
    with pytest.raises(UnknownNameError, match="plotly"):
        F.show(FIGURE, renderer="plotli")
    with pytest.raises(UnknownNameError):
        F.set_renderer("svg")
    with pytest.raises(OptionError, match="'data' and 'layout'"):
        F.show({"data": []})


def test_the_environment_chooses_and_a_call_overrules(monkeypatch, no_browser):
    monkeypatch.setenv("ORTHOKIT_RENDERER", "nonsense")
    assert PLOTLY in F.show(FIGURE)._repr_mimebundle_()


@pytest.mark.browser
def test_a_browser_draws_a_png():
    if F.browser_path() is None:
        pytest.skip("no Chrome or Chromium on PATH")
    picture = F.png(FIGURE, width=400, scale=1)
    assert picture.startswith(b"\x89PNG")
    assert int.from_bytes(picture[16:20], "big") == 400
    F.set_renderer("plotly+png")
    assert {PLOTLY, "image/png"} <= set(F.show(FIGURE)._repr_mimebundle_())
    assert set(F.show(FIGURE, renderer="png")._repr_mimebundle_()) == {"image/png", "text/plain"}
