"""The page "Inspect" in a real browser; ``watched`` also fails on an external request or an error in the console."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from playwright.sync_api import expect
from safetensors.torch import save, save_file

from orthokit.diagnostics import Inspection

pytestmark = pytest.mark.browser

MAP, SPECTRA, DENSITY = "Which layers and roles stand out", "How do the singular values fall off", "Is the spectrum of"
COMPARE = "Where do the models differ"
# The server of the other pages whose looks at models take their time.
SLOW = """
import sys, time
from orthokit_widgets import inspect_run, serve
real = inspect_run.inspect
def slow(*given, progress, **options):
    return real(*given, progress=lambda step: (progress(step), time.sleep(0.2)), **options)
inspect_run.inspect = slow
sys.exit(serve.main(["--port", "0", "--root", sys.argv[1]]))
"""
# As on a public address: whoever reaches it must not read files of the machine.
PUBLIC = """
import sys
from orthokit_widgets import serve
serve._is_local = lambda address: False
sys.exit(serve.main(["--port", "0", "--root", sys.argv[1]]))
"""


@pytest.fixture(scope="module")
def address(server: str) -> str:
    """Address of the page."""
    return server + "inspect"


@pytest.fixture(scope="module")
def launch(started: Callable[..., str], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """Starts another server; the address of its page."""

    def begin(code: str) -> str:
        folder = tmp_path_factory.mktemp("server")
        line = started(["-c", code, str(folder)], folder / "log.txt", "Live pages at")
        return line.split("Live pages at ")[1].split(" ")[0] + "inspect"

    return begin


def plot(page: Any, question: str) -> Any:
    return page.get_by_role("figure", name=question).locator(".js-plotly-plot")


def wait_for(page: Any, question: str, condition: str) -> None:
    """Wait until ``condition`` holds of the plot's ``data``."""
    handle = plot(page, question).element_handle()
    page.wait_for_function(f"e => {{ const data = e.data; return data && ({condition}); }}", arg=handle)


def open_page(page: Any, address: str, query: str = "", *, status: str = "Up to date: 35 matrices") -> None:
    page.goto(address + query)
    page.get_by_role("status").first.get_by_text(status).wait_for()


def rows(page: Any) -> list[str]:
    """The names in the table, from top to bottom."""
    return page.get_by_role("region", name="Matrices, measured").get_by_role("rowheader").all_inner_texts()


def cells(page: Any, head: str) -> list[str]:
    """A column of the table."""
    table = page.get_by_role("region", name="Matrices, measured").get_by_role("table")
    heads = table.get_by_role("columnheader").all_inner_texts()
    column = [re.sub("[ ▼▲]+$", "", text) for text in heads].index(head) + 2  # the tick stands before
    return table.locator(f"tbody tr > :nth-child({column})").all_inner_texts()


def model() -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return {f"layers.{n}.up.weight": torch.randn(40, 24, generator=g) for n in range(3)}


def test_the_page_measures_a_model_by_itself(watched: Any, address: str) -> None:
    open_page(watched, address)
    assert len(rows(watched)) == 35 and rows(watched)[0] == "blocks.0.attn.q.weight"
    wait_for(watched, MAP, "data[0].type === 'heatmap' && data[0].z.length === 7")
    wait_for(watched, SPECTRA, "data.length === 6")  # three matrices with their noise edges
    watched.get_by_text("TinyGPT: 35 matrices hold 988,160 numbers").wait_for()
    expect(watched.get_by_role("checkbox", name="draw the spectrum of", checked=True)).to_have_count(3)
    assert not watched.get_by_role("alert", include_hidden=True).inner_text()
    watched.get_by_text("13 parameters that are no matrices").click()
    watched.get_by_text("embed.weight, 256 x 128: embedding").wait_for()


def test_a_press_on_a_head_sorts_by_it(watched: Any, address: str) -> None:
    open_page(watched, address)
    head = watched.get_by_role("button", name="stable rank", exact=True)
    head.focus()
    watched.keyboard.press("Enter")
    column = watched.get_by_role("columnheader", name="stable rank", exact=True)
    expect(column).to_have_attribute("aria-sort", "descending")
    values = [float(text) for text in cells(watched, "stable rank")]
    assert values == sorted(values, reverse=True) and len(set(values)) > 20
    assert head.evaluate("e => e.matches(':focus')")
    watched.keyboard.press("Enter")
    expect(column).to_have_attribute("aria-sort", "ascending")
    assert [float(text) for text in cells(watched, "stable rank")] == values[::-1]
    watched.wait_for_function("() => location.search === '?sort=stable_rank&falling=no'")
    watched.get_by_role("searchbox", name="Names with").fill("1 attn")
    watched.get_by_text("4 of 35", exact=True).wait_for()
    assert all(name.startswith("blocks.1.attn") for name in rows(watched))


def test_an_address_brings_table_and_charts_back(watched: Any, address: str) -> None:
    query = (
        "?model=tinygpt-lora&base=tinygpt&groups=change&sort=relative_change&column=change_rank&chosen=2,5&of=changes"
    )
    open_page(watched, address, query)
    changes = [float(text) for text in cells(watched, "change")]
    assert changes == sorted(changes, reverse=True)
    assert set(cells(watched, "its rank")) == {"8"}
    watched.get_by_text("All 35 matrices are consistent with LoRA (rank 8).").wait_for()
    question = "How many directions does the change have"
    wait_for(watched, question, "data.length === 2 && data[0].name === 'blocks.0.attn.v'")
    assert not watched.get_by_role("alert", include_hidden=True).inner_text()


def test_a_synthetic_model_brings_its_base_and_its_verdicts(watched: Any, address: str) -> None:
    open_page(watched, address)
    watched.get_by_label("Model", exact=True).select_option("tinygpt-oft")
    watched.get_by_text("All 35 matrices are consistent with OFT (block 8).").wait_for()
    assert watched.get_by_label("Base it was trained from").input_value() == "tinygpt"
    watched.wait_for_function("() => location.search.includes('base=tinygpt')")
    assert all(text.endswith("consistent with OFT") for text in cells(watched, "verdict"))
    plot(watched, "Which singular directions of").locator(".main-svg").first.wait_for()


def test_ticks_and_cells_of_the_map_draw_spectra(watched: Any, address: str) -> None:
    open_page(watched, address)
    wait_for(watched, SPECTRA, "data.length === 6")
    watched.get_by_role("checkbox", name="draw the spectrum of blocks.0.attn.o.weight").check()
    wait_for(watched, SPECTRA, "data.some(t => t.name === 'blocks.0.attn.o')")
    assert watched.evaluate("() => document.activeElement !== document.body")
    plot(watched, MAP).scroll_into_view_if_needed()
    place = plot(watched, MAP).evaluate(
        """e => {
            const area = e.getBoundingClientRect(), {xaxis, yaxis} = e._fullLayout;
            return [area.x + xaxis._offset + xaxis.d2p('1'), area.y + yaxis._offset + yaxis.d2p('mlp.down')];
        }"""
    )
    before = plot(watched, SPECTRA).evaluate("e => e.data.map(t => t.name)")
    watched.mouse.move(*place)
    watched.mouse.click(*place)
    wait_for(watched, SPECTRA, f"data.length !== {len(before)}")
    wait_for(watched, SPECTRA, "data.some(t => t.name === 'blocks.1.mlp.down')")
    watched.wait_for_function("() => location.search.includes('chosen=')")
    watched.get_by_role("radio", name="share").check(force=True)
    wait_for(watched, SPECTRA, "data[0].x.at(-1) < 1")


def test_models_are_compared(watched: Any, address: str) -> None:
    open_page(watched, address)
    watched.get_by_label("Compare with", exact=True).select_option("tinygpt-full")
    watched.get_by_text("1 more beside it").wait_for()
    wait_for(watched, COMPARE, "data.length === 2 && data[0].x.length === 35")
    watched.get_by_label("Measurement in the charts").select_option("condition")
    wait_for(watched, "Where do the models differ in condition", "data.length === 2")
    plot(watched, "Which layers and roles stand out in condition").wait_for()


def test_what_was_measured_is_saved(watched: Any, address: str, tmp_path: Path) -> None:
    open_page(watched, address)
    found = {}
    for kind, label in (("html", "report"), ("json", "JSON"), ("csv", "table")):
        watched.get_by_role("radio", name=label, exact=True).check(force=True)
        with watched.expect_download() as download:
            watched.get_by_role("button", name="Save what was measured").click()
        assert download.value.suggested_filename == f"tinygpt-inspection.{kind}"
        found[kind] = Path(download.value.path()).read_bytes()
    (tmp_path / "found.json").write_bytes(found["json"])
    assert len(Inspection.from_json(tmp_path / "found.json").spectra) == 35
    assert len(list(csv.reader(io.StringIO(found["csv"].decode())))) == 36
    (tmp_path / "page.html").write_bytes(found["html"])
    report = watched.context.new_page()
    report.goto((tmp_path / "page.html").as_uri())
    report.get_by_text("blocks.0.attn.q").first.wait_for()
    report.close()


def test_a_file_is_uploaded_and_deleted_with_the_page(watched: Any, address: str, tmp_path: Path) -> None:
    open_page(watched, address)
    for name, use in (("mine.safetensors", "model"), ("other.safetensors", "base")):
        watched.get_by_role("radio", name=use, exact=True).check(force=True)
        content = {"name": name, "mimeType": "application/octet-stream", "buffer": save(model())}
        watched.get_by_label("Upload a file").set_input_files(content)
        watched.get_by_text(f"compared with {name}" if use == "base" else f"3 matrices of {name}").first.wait_for()
    watched.get_by_text("All 3 matrices are unchanged.").wait_for()
    expect(watched.get_by_label("Model", exact=True).locator("option:checked")).to_have_text("mine.safetensors")
    assert watched.evaluate("() => location.search") == "?groups=change&column=relative_change"


def test_a_large_upload_comes_in_pieces(watched: Any, address: str, tmp_path: Path) -> None:
    g = torch.Generator().manual_seed(0)
    weights = {f"layers.{n}.up.weight": torch.randn(512, 512, generator=g) for n in range(6)}
    save_file(weights, tmp_path / "large.safetensors")
    open_page(watched, address, "?detail=norms")
    watched.get_by_label("Upload a file").set_input_files(tmp_path / "large.safetensors")
    watched.get_by_text("Up to date: 6 matrices of large.safetensors").wait_for()


def test_a_file_that_is_no_model_is_told(watched: Any, address: str) -> None:
    open_page(watched, address)
    content = {"name": "letter.gguf", "mimeType": "text/plain", "buffer": b"Dear friend, this is no model. " * 50}
    watched.get_by_label("Upload a file").set_input_files(content)
    watched.get_by_role("alert").get_by_text("Not opened: letter.gguf is no whole safetensors file").wait_for()
    watched.get_by_text("Up to date: 35 matrices of TinyGPT").wait_for()


def test_a_path_is_opened_on_the_own_machine(watched: Any, address: str, tmp_path: Path) -> None:
    save_file(model(), tmp_path / "here.safetensors")
    open_page(watched, address)
    box = watched.get_by_label("Path on this machine")
    box.fill(str(tmp_path / "nowhere"))
    box.press("Enter")
    watched.get_by_role("alert").get_by_text("is not there").wait_for()
    box.fill(str(tmp_path / "here.safetensors"))
    watched.get_by_role("button", name="Open", exact=True).click()
    watched.get_by_text("Up to date: 3 matrices of here.safetensors").wait_for()
    watched.get_by_role("alert").wait_for(state="hidden")


def test_no_path_is_asked_for_where_others_reach_the_server(watched: Any, launch: Callable[[str], str]) -> None:
    open_page(watched, launch(PUBLIC))
    watched.get_by_role("button", name="Upload a file").wait_for()
    assert watched.get_by_label("Path on this machine").is_hidden()


def test_a_look_is_stopped_and_gone_on_with(watched: Any, launch: Callable[[str], str]) -> None:
    open_page(watched, launch(SLOW), status="First look at TinyGPT")
    watched.get_by_role("button", name="Stop").click()
    watched.get_by_text(re.compile(r"Stopped: 0 of 35 matrices measured in full\.")).wait_for()
    assert len(rows(watched)) == 35
    expect(watched.get_by_role("button", name="Inspect")).to_be_enabled()
    watched.get_by_role("button", name="Inspect").click()
    watched.get_by_text(re.compile("All singular values of TinyGPT: [1-9]")).wait_for()
    expect(watched.get_by_role("checkbox", name="draw the spectrum of").first).to_be_disabled()
    watched.get_by_text("Up to date: 35 matrices of TinyGPT").wait_for()


def test_what_does_not_fit_is_a_sentence(watched: Any, address: str) -> None:
    open_page(watched, address, "?model=file-1&sample=0&path=/etc")
    alert = watched.get_by_role("alert")
    for told in ("Model must be one of tinygpt", "Matrices at most must be a number from 1 to 2000", "unknown setting"):
        alert.get_by_text(told).wait_for()


def test_two_visitors_do_not_disturb_each_other(watched: Any, address: str) -> None:
    open_page(watched, address)
    other = watched.context.new_page()
    open_page(other, address, "?model=tinygpt-bfloat16", status="Up to date: 35 matrices of TinyGPT in bfloat16")
    content = {"name": "secret.safetensors", "mimeType": "application/octet-stream", "buffer": save(model())}
    other.get_by_label("Upload a file").set_input_files(content)
    other.get_by_text("Up to date: 3 matrices of secret.safetensors").wait_for()
    watched.get_by_role("button", name="condition", exact=True).click()
    expect(watched.get_by_role("columnheader", name="condition")).to_have_attribute("aria-sort", "descending")
    assert len(rows(watched)) == 35 and watched.get_by_text("secret").count() == 0
    other.close()


@pytest.mark.parametrize("width", [390, 760, 1280])
@pytest.mark.parametrize("query", ["", "?model=tinygpt-oft&base=tinygpt&groups=change&second=tinygpt-lora"])
def test_nothing_sticks_out(watched: Any, address: str, width: int, query: str) -> None:
    watched.set_viewport_size({"width": width, "height": 800})
    open_page(watched, address, query)
    watched.wait_for_timeout(300)
    assert watched.evaluate("() => document.documentElement.scrollWidth") <= width
