"""The page of a look at a checkpoint: one offline file, small, honest about what is missing, usable by keyboard."""

import base64
import json
import re

import numpy as np
import pytest
import torch

from orthokit.diagnostics import inspect
from orthokit.diagnostics.inspection import COLUMNS, Inspection
from orthokit.errors import OptionError, ReportError
from orthokit.reports import inspection_page
from orthokit.reports._packing import pack, pack_profiles, places

ROLES = ("attn.q_proj", "attn.k_proj", "mlp.up")


def looked(name="tuned", *, base=None, layers=4, size=24, seed=0, roles=ROLES):
    """An inspection of random matrices: what NumPy measures in a line, and ``None`` for the rest."""
    rng = np.random.default_rng(seed)
    found = Inspection(name=name, base_name=base, seconds=0.4)
    places = [(f"h.{n}.{role}.weight", n, role) for n in range(layers) for role in roles]
    for key, layer, role in [("embed.weight", None, "embed"), *places]:
        W = rng.standard_normal((size, 2 * size)) * (1 + (layer or 0))
        sigma = np.linalg.svd(W, compute_uv=False)
        row = dict.fromkeys(COLUMNS) | {
            **{"name": key, "shape": f"{size} x {2 * size}", "rule": "linear", "stored": "float32", "numel": W.size},
            **{"nonfinite": 0, "layer": layer, "role": role, "measured": "full"},
            **{"frobenius": float(np.linalg.norm(W)), "spectral_norm": float(sigma[0]), "condition": float("inf")},
            **{"stable_rank": float((sigma**2).sum() / sigma[0] ** 2), "mp_edge": float(sigma[1]), "above_edge": 1},
            **{"energy_excess": float(rng.normal()), "alpha_refused": "only 24 singular values"},
        }
        found.spectra[key] = sigma.astype(np.float32)
        if base:
            found.base_spectra[key] = (sigma * 1.1).astype(np.float32)
            drift = np.linspace(0.3, 0, size, dtype=np.float32)
            found.profiles[key] = {"retention_drift": drift, "adaptation": drift[::-1].copy()}
            row |= {"relative_change": 0.01 * (1 + (layer or 0)), "kind": "general", "verdict": "a general change"}
            row |= {"energy_change": 1e-4, "spectrum_change": 0.01}
        found.rows.append(row)
    found.left_out = [{"name": "norm.weight", "shape": "24", "reason": "a vector"}]
    return found


def data_of(text):
    return json.loads(re.findall(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)[0])


def test_a_page_has_one_model_s_words_and_all_its_numbers(tmp_path):
    found = looked()
    found.notes, found.interrupted = ["Two tensors were read as one."], True
    path = inspection_page(found, tmp_path / "page.html")
    text = path.read_text(encoding="utf-8")
    assert found.summary() in text
    assert "Two tensors were read as one." in text
    assert "was interrupted" in text
    assert "norm.weight" in text
    cells = data_of(text)["models"][0]["cells"]
    assert cells["name"] == [row["name"] for row in found.rows]
    np.testing.assert_allclose(cells["frobenius"], [row["frobenius"] for row in found.rows], rtol=1e-5)
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]


def test_no_address_is_fetched_and_names_cannot_end_the_script(tmp_path):
    found = looked("</script><b>x")
    found.rows[0]["name"] = '</script><img src="http://example.org/x.png" onerror=alert(1)>'
    found.spectra[found.rows[0]["name"]] = found.spectra["embed.weight"]
    text = inspection_page(found, tmp_path / "page.html").read_text(encoding="utf-8")
    own = text.split("<script>/**")[0]  # what stands before plotly.js
    assert not re.search(r'<(?:script|link|img|iframe)[^>]+(?:src|href)="(?:https?:)?//', own)
    assert "default-src 'none'" in own
    assert "</script><img" not in text and "</script><b" not in text
    assert data_of(text)["models"][0]["cells"]["name"][0] == found.rows[0]["name"]


def test_a_missing_value_has_its_reason_and_an_infinite_one_its_word(tmp_path):
    model = data_of(inspection_page(looked(), tmp_path / "p.html").read_text(encoding="utf-8"))["models"][0]
    assert model["texts"]["condition"]["0"] == "inf"
    assert model["cells"]["condition"][0] is None
    assert "alpha" not in model["cells"]
    found = looked()
    found.rows[1] |= {"alpha": 3.0, "alpha_refused": None}
    model = data_of(inspection_page(found, tmp_path / "p.html").read_text(encoding="utf-8"))["models"][0]
    why = model["why"]["alpha"]
    assert model["reasons"][why if isinstance(why, int) else why["0"]] == "only 24 singular values"


def test_every_column_that_has_values_is_explained_and_drawn(tmp_path):
    text = inspection_page(looked(base="start"), tmp_path / "p.html").read_text(encoding="utf-8")
    data = data_of(text)
    names = {column["name"] for column in data["columns"]}
    assert {"relative_change", "verdict", "stable_rank"} <= names
    for name in COLUMNS:
        assert f"<code>{name}</code>" in text
    patches = data["charts"]["map"][0]["patches"]
    assert {"stable_rank", "relative_change", "energy_excess"} <= patches.keys()
    assert {"name", "role", "verdict", "layer"}.isdisjoint(patches)
    assert patches.keys() == data["charts"]["depth"]["patches"].keys()


def test_a_packed_spectrum_comes_back_to_a_thousandth():
    rng = np.random.default_rng(0)
    full = np.sort(10.0 ** rng.uniform(-8, 3, 500))[::-1].copy()
    full[-1] = 0
    spectra = {"a": full, "b": np.array([2.0]), "zero": np.zeros(3)}
    packed = pack(spectra, ["a", "none", "b", "zero"], 96)
    assert packed is not None
    codes = np.frombuffer(base64.b64decode(packed["codes"]), dtype="<u2")
    assert packed["k"] == [500, 0, 1, 3]
    kept = places(500, 96)
    assert (kept[0], kept[-1]) == (0, 499) and 64 <= len(kept) <= 96
    low, high = packed["ends"][0]
    mine = codes[: len(kept)].astype(float)
    back = np.where(mine > 0, 10 ** (low + (high - low) * (mine - 1) / 65534), 0)
    np.testing.assert_allclose(back, full[kept], rtol=1e-3)
    assert 10 ** packed["ends"][1][0] == pytest.approx(2)
    assert codes[-3:].tolist() == [0, 0, 0]
    assert pack({}, ["a"], 96) is None


def test_a_packed_profile_has_both_parts_of_each_matrix():
    profiles = {"a": {"retention_drift": np.linspace(0, 0.5, 40), "adaptation": np.linspace(1, 0, 40)}}
    packed = pack_profiles(profiles, ["none", "a"], 16)
    assert packed is not None
    kept = packed["places"][40]
    codes = np.frombuffer(base64.b64decode(packed["codes"]), dtype="<u2").astype(float)
    drift, moved = profiles["a"].values()
    ranges = list(zip(kept, [*kept[1:], 40], strict=True))
    stands = [[drift[i:j].max() for i, j in ranges], [(moved[i:j] ** 2).mean() ** 0.5 for i, j in ranges]]
    for part, expected in enumerate(stands):
        low, high = packed["ends"][part]
        back = low + (high - low) * (codes[part * len(kept) : (part + 1) * len(kept)] - 1) / 65534
        np.testing.assert_allclose(back, expected, atol=1e-4)
    assert packed["peaks"] == [None, [40, 0.5]]


def test_two_hundred_matrices_of_two_models_stay_under_six_megabytes(tmp_path):
    roles = ("q", "k", "v", "o", "gate", "up", "down")
    pair = [looked("a", base="base", layers=30, size=12, roles=roles), looked("b", base="base", layers=30, size=12)]
    for one in pair:
        for row in one.rows:
            one.spectra[row["name"]] = one.base_spectra[row["name"]] = np.geomspace(9, 1e-3, 576, dtype=np.float32)
            drift = np.random.default_rng(0).random(576).astype(np.float32)
            one.profiles[row["name"]] = {"retention_drift": drift, "adaptation": drift}
            row |= {name: row[name] or 0.123456 for name, c in COLUMNS.items() if c.kind not in ("text", "count")}
    assert inspection_page(pair, tmp_path / "p.html").stat().st_size < 6_000_000


def test_what_does_not_fit_is_left_out_and_said(tmp_path, monkeypatch):
    from orthokit.reports import inspection as module

    sizes = {}
    for room in (200_000, 45_000):
        monkeypatch.setattr(module, "_ROOM", room)
        text = inspection_page(looked(layers=40), tmp_path / "p.html").read_text(encoding="utf-8")
        sizes[room] = len(text.split('id="data">')[1].split("</script>")[0])
        assert sizes[room] < room + 500
    data = data_of(text)
    kept = len(data["models"][0]["cells"]["name"])
    assert kept < 121
    assert f"Only the {kept} largest matrices of each model are in this page, of 121" in text
    assert data["models"][0]["spectra"] is None


def test_two_models_of_one_name_are_told_apart_and_five_are_refused(tmp_path):
    text = inspection_page([looked("m"), looked("m")], tmp_path / "p.html").read_text(encoding="utf-8")
    assert [model["name"] for model in data_of(text)["models"]] == ["m", "m (2)"]
    assert "Inspection of m and m (2)" in text
    with pytest.raises(OptionError, match="one to four models; got 5"):
        inspection_page([looked()] * 5, tmp_path / "p.html")
    with pytest.raises(OptionError, match="no matrix"):
        inspection_page(Inspection(name="empty"), tmp_path / "p.html")
    with pytest.raises(OptionError, match="got 0"):
        inspection_page([], tmp_path / "p.html")


def test_a_place_that_cannot_be_written_is_said(tmp_path):
    with pytest.raises(ReportError, match="cannot write"):
        inspection_page(looked(), tmp_path / "none" / "p.html")


def test_a_model_without_layers_has_no_depth_section(tmp_path):
    text = inspection_page(looked(layers=0), tmp_path / "p.html").read_text(encoding="utf-8")
    assert 'id="depth-plot"' not in text
    assert 'id="map-plot"' in text


def trained(tmp_path):
    """A real look at two tiny layers, before and after a turn of the inputs."""
    generator = torch.Generator().manual_seed(0)
    base = {f"h.{n}.{role}.weight": torch.randn(32, 24, generator=generator) for n in range(3) for role in ("q", "up")}
    turn = torch.linalg.matrix_exp(0.05 * torch.randn(24, 24, generator=generator).triu(1).sub(0))
    turn = torch.linalg.qr(turn).Q
    return inspect({name: W @ turn for name, W in base.items()}, base=base)


def test_a_real_comparison_says_in_words_what_changed(tmp_path):
    found = trained(tmp_path)
    text = inspection_page(found, tmp_path / "p.html").read_text(encoding="utf-8")
    from markupsafe import escape

    from orthokit.diagnostics import describe_changes

    assert all(str(escape(said)) in text for said in describe_changes(found.rows))
    assert data_of(text)["models"][0]["base_spectra"]["k"] == [24] * 6


def opened(browser, path, **context):
    """A page and what went wrong on it."""
    page = browser.new_context(offline=True, **context).new_page()
    wrong = []
    page.on("request", lambda request: wrong.append(request.url) if not request.url.startswith(LOCAL) else None)
    page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.goto(path.as_uri())
    page.locator(".js-plotly-plot").first.wait_for()
    return page, wrong


def alike(mine, theirs):
    """Equal words, or numbers equal to the six digits of the page."""
    mine, theirs = (np.ravel(np.array([] if v is None else v, dtype=object)) for v in (mine, theirs))
    if any(isinstance(v, str) for v in theirs):
        return mine.tolist() == theirs.tolist()
    return np.allclose(mine.astype(float), theirs.astype(float), rtol=1e-5, atol=0, equal_nan=True)


LOCAL = ("file:", "data:", "blob:")


def column(page, name):
    head = page.locator(f'#rows thead th[data-column="{name}"]')
    at = head.evaluate("e => [...e.parentElement.children].indexOf(e)")
    return page.locator(f"#rows tbody tr > :nth-child({at + 1})").all_inner_texts()


@pytest.mark.browser
def test_the_table_sorts_by_keyboard_filters_and_shows_groups(browser, tmp_path):
    page, wrong = opened(browser, inspection_page(looked(base="start"), tmp_path / "p.html"))
    assert page.locator("#rows tbody tr").count() == 13
    head = page.locator('#rows thead th[data-column="frobenius"]')
    head.get_by_role("button").focus()
    page.keyboard.press("Enter")
    assert head.get_attribute("aria-sort") == "descending"
    values = [float(v) for v in column(page, "frobenius")]
    assert values == sorted(values, reverse=True)
    page.keyboard.press("Enter")
    assert head.get_attribute("aria-sort") == "ascending"
    assert [float(v) for v in column(page, "frobenius")] == sorted(values)
    page.fill("#filter", "q_proj frobenius>50")
    assert all("q_proj" in name for name in column(page, "name"))
    assert all(float(v) > 50 for v in column(page, "frobenius"))
    assert "of 13 matrices, sorted by ‖W‖F, rising" in page.locator("#status").inner_text()
    assert page.locator('th[data-column="energy_excess"]').count() == 0
    page.get_by_label("rows and columns", exact=True).check()
    assert page.locator('th[data-column="energy_excess"]').count() == 1
    page.locator("#csv").focus()
    saved = page.evaluate("decodeURIComponent(document.getElementById('csv').href.split(',').slice(1).join(','))")
    lines = saved.split("\r\n")
    assert lines[0].startswith("name,shape,")
    assert len(lines) == 1 + page.locator("#rows tbody tr").count()
    assert not wrong


@pytest.mark.browser
def test_every_cell_reads_as_its_column_writes_it(browser, tmp_path):
    found = looked(base="start", layers=5)
    values = [
        0.0,
        -0.5,
        12345.0,
        1234.5,
        0.00098765,
        1e-12,
        3e7,
        0.99995,
        9999.5,
        100.0,
        2.0,
        float("inf"),
        0.1 + 0.2,
        None,
    ]
    for index, row in enumerate(found.rows):
        for name, column_ in COLUMNS.items():
            value = values[index % len(values)]
            if column_.kind in ("number", "ratio", "degrees"):
                row[name] = value
            elif column_.kind == "count" and name != "layer" and value is not None and value < 1e9:
                row[name] = abs(int(value))
    page, wrong = opened(browser, inspection_page(found, tmp_path / "p.html"))
    for box in page.locator("[name=group]").all():
        box.check()
    for name in page.evaluate("D.columns.map(c => c.name)"):
        texts = [COLUMNS[name].text(row[name]) for row in found.rows]
        assert column(page, name) == ([text.removesuffix(".weight") for text in texts] if name == "name" else texts), (
            name
        )
    assert not wrong


@pytest.mark.browser
def test_charts_follow_their_choosers_and_equal_those_of_the_library(browser, tmp_path):
    from orthokit.figures import inspection_compare, inspection_depth, inspection_map

    pair = [looked("a", base="start"), looked("b", base="start", seed=1)]
    page, wrong = opened(browser, inspection_page(pair, tmp_path / "p.html"))
    models = {"a": pair[0].rows, "b": pair[1].rows}
    for name in ("stable_rank", "energy_excess", "frobenius"):
        for chart in ("map", "depth", "compare"):
            page.select_option(f"#{chart}-column", name)
        figures = {
            "map": inspection_map(pair[0].rows, name),
            "depth": inspection_depth(None, name, models=models),
            "compare": inspection_compare(models, name),
        }
        for chart, figure in figures.items():
            drawn = page.evaluate(f"(({{data, layout}}) => [data, layout])(document.getElementById('{chart}-plot'))")
            for mine, theirs in zip(drawn[0], figure["data"], strict=True):
                for key in ("x", "y", "z"):
                    assert alike(mine.get(key), theirs.get(key)), (chart, name, key)
                assert mine.get("text") == theirs.get("text")
            assert page.locator(f"#{chart}-caption").inner_text() == figure["layout"]["meta"]["caption"]
            title = figure["layout"]["title"]["text"].replace("<br>", " ")
            assert page.locator(f"#{chart}-title").inner_text() == title
    assert not wrong


@pytest.mark.browser
def test_a_ticked_matrix_joins_the_spectra_and_switches_redraw_them(browser, tmp_path):
    found = looked(base="start")
    page, wrong = opened(browser, inspection_page(found, tmp_path / "p.html"))
    lines = "document.getElementById('spectra-plot').data.filter(t => t.showlegend).map(t => t.name)"
    assert len(page.evaluate(lines)) == 3
    for name in list(page.evaluate("state.picked")):
        page.get_by_role("button", name=f"Remove {name}").click()
    assert page.evaluate(lines) == []
    page.locator('[data-pick="h.2.mlp.up.weight"]').check()
    assert page.evaluate(lines) == ["h.2.mlp.up"]
    drawn = page.evaluate("document.getElementById('spectra-plot').data[0].y")
    np.testing.assert_allclose(drawn, found.spectra["h.2.mlp.up.weight"], rtol=1e-3)
    assert len(page.evaluate("document.getElementById('spectra-plot').data")) == 3  # with base and edge
    page.select_option("#unit", "first")
    assert page.evaluate("document.getElementById('spectra-plot').data[0].y[0]") == pytest.approx(1, rel=1e-3)
    page.get_by_label("logarithmic values").uncheck()
    assert page.evaluate("document.getElementById('spectra-plot').layout.yaxis.type") == "linear"
    page.get_by_label("noise edge (dashed)").uncheck()
    page.get_by_label("base (dotted)").uncheck()
    assert len(page.evaluate("document.getElementById('spectra-plot').data")) == 1
    page.select_option("#add", "embed.weight")
    assert page.evaluate(lines) == ["h.2.mlp.up", "embed"]
    assert page.locator('[data-pick="embed.weight"]').is_checked()
    assert page.evaluate("document.getElementById('profiles-plot').data.length") == 4
    assert not wrong


@pytest.mark.browser
@pytest.mark.parametrize("width", [1280, 700, 380])
def test_no_width_scrolls_sideways_and_no_name_runs_as_markup(browser, tmp_path, width):
    found = looked("a model with <i>markup</i>")
    bad = '<img src=x onerror="window.broken = 1"><a href="http://example.org">x</a>'
    found.rows[2]["name"] = bad
    found.spectra[bad] = found.spectra["embed.weight"]
    page, wrong = opened(browser, inspection_page(found, tmp_path / "p.html"), viewport={"width": width, "height": 900})
    page.evaluate("name => pick(name, true)", bad)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate("window.broken") is None
    assert page.locator("a[href^=http]").count() == 0
    assert not wrong


@pytest.mark.browser
def test_every_control_has_a_name_and_the_parts_of_the_page_are_landmarks(browser, tmp_path):
    page, wrong = opened(browser, inspection_page([looked("a"), looked("b", base="s")], tmp_path / "p.html"))
    named = "e.closest('label, .plot') || e.ariaLabel || e.getAttribute('aria-labelledby') || e.textContent.trim()"
    controls = "[...document.querySelectorAll('input, select, button, a, [role=region]')]"
    unnamed = page.evaluate(f"{controls}.filter(e => !({named})).length")
    assert unnamed == 0
    assert page.get_by_role("main").count() == page.get_by_role("banner").count() == 1
    page.select_option("#model", "1")
    assert page.locator(".model-name").inner_text() == "b"
    assert not wrong
