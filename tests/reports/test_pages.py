"""Pages as a reader meets them: in a browser, with no network."""

import json
import re

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from orthokit import figures as F
from orthokit.figures.display import PLOTLY
from orthokit.reports.claims import Claim
from orthokit.reports.index import write_index
from orthokit.reports.ledger import Entry, as_text, counts, error_bar
from orthokit.reports.outputs import Charts, output_html
from orthokit.reports.page import add_pictures, device_line, render
from orthokit.reports.status import Folder, Status

TEXT = r"""# A title with $\sigma_1$

The bound is $\lVert N \rVert_F^2 \le \frac{\eta}{2T-1}$.

<details><summary>Solution</summary>

It is **two**.

</details>
"""


def code(source, *outputs, **metadata):
    """An executed code cell."""
    cell = new_code_cell(source, metadata=metadata)
    cell.outputs = list(outputs)
    return cell


def chart(figure, **more):
    """A chart among a cell's outputs."""
    return new_output("display_data", data={PLOTLY: F.figure_json(figure), "text/plain": "chart", **more})


@pytest.fixture
def notebook():
    """A notebook with text, formulas, two charts, a table, messages and terminal colours."""
    made = new_notebook()
    made.cells = [
        new_markdown_cell(TEXT),
        code("setup()", new_output("stream", name="stdout", text="device: cpu, 2 threads · torch 2.13 · seed 0\n")),
        code("show()", chart(F.spectra({"</script><b>": [3.0, 1.0], "M": [2.0, 1.0]}, rank=1))),
        code("show()", chart(F.sphere([[1, 0, 0], [0, 1, 0], [0, 0, 1]]))),
        code("table", new_output("execute_result", data={"text/html": "<table><tr><td>1</td></tr></table>"})),
        code("log", new_output("stream", name="stderr", text="\x1b[31mcareful\x1b[0m <tag>\n")),
    ]
    return made


def status(**more):
    """A finished notebook's record."""
    return Status("01_demo", "A title", "ok", seconds=3.2, device="cpu", **more)


def test_a_page_names_no_address_but_its_own_index(notebook):
    page = render(notebook, status())
    without_scripts = re.sub(r"<script\b.*?</script>", "", page, flags=re.DOTALL)
    addresses = set(re.findall(r"""(?:src|href)=["']([^"']*)""", without_scripts))
    assert {a for a in addresses if not a.startswith(("#", "data:"))} == {"index.html"}
    assert "@import" not in without_scripts


def test_text_of_a_notebook_cannot_end_the_script_that_holds_a_chart(notebook):
    page = render(notebook, status())
    blocks = re.findall(r'<script type="application/json"[^>]*>(.*?)</script>', page, flags=re.DOTALL)
    figures = [json.loads(block) for block in blocks]
    assert figures[0]["data"][0]["name"] == "</script><b>"
    assert len(figures) == 2


def test_terminal_colours_go_and_markup_in_messages_is_shown_as_text(notebook):
    page = render(notebook, status())
    assert "careful &lt;tag&gt;" in page
    assert "\x1b" not in page


def test_plotly_is_inlined_once_and_only_where_a_chart_is(notebook):
    page = render(notebook, status())
    assert page.count("plotly.js v3") == 1
    notebook.cells = notebook.cells[:2]
    assert len(render(notebook, status())) < 100_000


def test_the_machinery_s_notices_are_left_out():
    text = "[IPKernelApp] WARNING | Kernel is running over TCP without encryption. More text\n"
    assert output_html(new_output("stream", name="stderr", text=text), Charts()) == ""
    assert "kept" in output_html(new_output("stream", name="stderr", text=text + "kept\n"), Charts())


def test_an_error_is_shown_with_its_name_and_traceback():
    output = new_output("error", ename="ValueError", evalue="a < b", traceback=["\x1b[0;31mTraceback\x1b[0m", "<x>"])
    made = output_html(output, Charts())
    assert "ValueError: a &lt; b" in made
    assert "&lt;x&gt;" in made
    assert "\x1b" not in made


def test_an_unfinished_notebook_says_so_and_links_to_where_it_stopped(notebook):
    cells = [{"index": 1, "state": "ok", "seconds": 1.0}, {"index": 2, "state": "failed", "seconds": 2.0}]
    record = Status("01_demo", "A title", "failed", reason="ValueError: x", seconds=3.0, cells=cells)
    page = render(notebook, record)
    assert "did not finish" in page
    assert page.index('href="#stopped-here"') < page.index('id="stopped-here"')


def test_the_device_is_read_from_the_set_up_line(notebook):
    assert device_line(notebook) == "cpu, 2 threads"
    assert device_line(new_notebook()) == ""


def test_without_a_browser_no_picture_is_drawn_and_nothing_fails(notebook, monkeypatch):
    monkeypatch.setenv("BROWSER_PATH", "/nowhere/chrome")
    assert add_pictures(notebook) == 0


def test_error_bars_put_middle_and_border_where_they_belong():
    drawn = error_bar(Claim("a", "A", measured=1.0, interval=(0.0, 2.0), reference=4.0))
    assert 'cx="42.5"' in drawn  # 10 + 1/4 of 130
    assert 'x1="140.0"' in drawn
    assert "interval from 0 to 2; held against 4" in drawn
    assert error_bar(Claim("a", "A", measured="much", interval=None)) == ""
    assert "svg" in error_bar(Claim("a", "A", measured=1.0, interval=(1.0, 1.0)))


def test_the_ledger_counts_and_prints_every_verdict():
    found = [Entry("01_a", Claim(v, f"It {v}", measured=1, verdict=v)) for v in ("holds", "fails", "undecided")]
    assert counts(found) == "3 claims: 1 holds, 1 fails, 1 undecided"
    text = as_text(found)
    assert "HOLDS" in text and "01_a / fails" in text
    assert counts([]) == "no claims"


def opened(browser, path, **context):
    """A page and what went wrong on it."""
    page = browser.new_context(**context).new_page()
    wrong = []
    local = ("file:", "data:", "blob:")
    page.on("request", lambda request: wrong.append(request.url) if not request.url.startswith(local) else None)
    page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.goto(path.as_uri())
    return page, wrong


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_page_opens_offline_with_charts_formulas_and_switches(notebook, browser, tmp_path, scheme):
    path = tmp_path / "page.html"
    path.write_text(render(notebook, status()), encoding="utf-8")
    page, wrong = opened(browser, path, offline=True, color_scheme=scheme)
    page.locator(".js-plotly-plot").nth(1).wait_for()
    assert page.locator(".js-plotly-plot").first.evaluate("e => e.data.length") == 2
    back = page.locator(".js-plotly-plot .main-svg").first.evaluate("e => getComputedStyle(e).backgroundColor")
    assert back == ("rgb(255, 255, 255)" if scheme == "light" else "rgb(20, 23, 27)")
    # A formula that was laid out has a size; its fraction stands higher than a line of text.
    assert page.locator("math mfrac").first.bounding_box()["height"] > 20
    solution = page.get_by_text("It is two.")
    assert not solution.is_visible()
    page.get_by_text("Solution").click()
    assert solution.is_visible()
    shown = page.locator("details.source[open]")
    assert shown.count() == 0
    page.get_by_role("button", name="Show all code").click()
    assert shown.count() == 5
    assert page.get_by_role("button", name="Hide all code").get_attribute("aria-pressed") == "true"
    assert page.get_by_role("main").count() == page.get_by_role("banner").count() == 1
    caption = page.locator("figcaption").first.inner_text()
    assert caption.startswith("Ratio σ₁/σ₂")
    assert page.locator("figure").first.evaluate("e => document.getElementById(e.getAttribute('aria-describedby'))")
    assert not wrong


@pytest.mark.browser
def test_a_page_does_not_scroll_sideways_on_a_phone(notebook, browser, tmp_path):
    path = tmp_path / "page.html"
    path.write_text(render(notebook, status()), encoding="utf-8")
    page, wrong = opened(browser, path, viewport={"width": 380, "height": 800})
    page.locator(".js-plotly-plot").nth(1).wait_for()
    assert page.evaluate("document.documentElement.scrollWidth") <= 380
    assert not wrong


@pytest.mark.browser
def test_the_index_shows_pictures_states_and_the_ledger_offline(notebook, browser, tmp_path):
    folder = Folder(tmp_path)
    (tmp_path / "notebooks").mkdir()
    assert add_pictures(notebook) == 2
    nbformat.write(notebook, folder.notebook("01_demo"))
    folder.page("01_demo").write_text("x")
    statuses = [status(), Status("02_b", "Another", "failed", reason="ValueError: <b>")]
    claim = Claim("gap", "The gap opens", measured=1.0, interval=(0.5, 1.5), reference=0, seeds=5, verdict="holds")
    write_index(folder, statuses, [Entry("01_demo", claim)], running=False)
    page, wrong = opened(browser, folder.index, offline=True)
    assert page.locator(".card img").evaluate("e => e.naturalWidth") > 400
    assert page.get_by_role("link", name="A title").get_attribute("href") == "01_demo.html"
    assert page.get_by_text("ValueError: <b>").is_visible()
    row = page.locator(".ledger-table tbody tr")
    assert row.count() == 1
    assert "holds" in row.inner_text() and "1 [0.5, 1.5]" in row.inner_text()
    assert row.locator("svg[role=img]").count() == 1
    assert not wrong
