"""Charts of a look at a checkpoint: every matrix in its cell, scales that fit, missing values named."""

import math

import numpy as np
import plotly.graph_objects as go
import pytest
import torch

from orthokit import figures as F
from orthokit.diagnostics import COLUMNS, bulk_fit
from orthokit.errors import OptionError, ShapeError, UnknownNameError
from orthokit.figures._inspection import PLOTTED, map_cells, words
from orthokit.figures.checkpoint_spectra import spread_indices

ROLES = ("q", "k", "up")


def rows(values=None, *, layers=3, column="stable_rank", roles=ROLES, extra=("embed", "head")):
    """One row a layer and role, then those without a layer; values in that order, else 1, 2, 3 ..."""
    names = [(f"h.{n}.{role}.weight", n, role) for n in range(layers) for role in roles]
    names += [(f"{name}.weight", None, name) for name in extra]
    values = range(1, len(names) + 1) if values is None else values
    return [
        {"name": name, "shape": "4 x 4", "layer": layer, "role": role, column: value}
        for (name, layer, role), value in zip(names, values, strict=True)
    ]


def caption(figure):
    return figure["layout"]["meta"]["caption"]


def test_each_matrix_stands_in_the_cell_of_its_layer_and_role():
    found = rows()
    roles, layers, cells = map_cells(found)
    assert roles == ["q", "k", "up", "embed", "head"]
    assert layers == ["0", "1", "2", " ", "no layer"]
    seen = [cell for row in cells for cell in row if cell is not None]
    assert sorted(seen) == list(range(len(found)))
    heat = F.inspection_map(found, "stable_rank")["data"][0]
    for role, line, told in zip(roles, heat["z"], heat["text"], strict=True):
        for layer, value, text in zip(layers, line, told, strict=True):
            of_layer = [r for r in found if layer == ("no layer" if r["layer"] is None else str(r["layer"]))]
            here = [r for r in of_layer if r["role"] == role]
            assert value == (here[0]["stable_rank"] if here else None)
            assert text.startswith(here[0]["name"] if here else "no such matrix")


def test_experts_of_one_layer_and_role_get_rows_of_their_own():
    found = [{"name": f"h.{n}.up[{e}]", "layer": n, "role": "up", "noise": 1.0} for n in range(2) for e in range(3)]
    roles, _, cells = map_cells(found)
    assert roles == ["up", "up[1]", "up[2]"]
    assert sorted(cell for row in cells for cell in row if cell is not None) == list(range(6))
    twins = [
        {"name": f"{part}.0.up", "layer": 0, "role": "up", "noise": 1.0} for part in ("encoder", "decoder", "third")
    ]
    assert map_cells(twins)[0] == ["up", "up (2)", "up (3)"]


def test_colours_are_logarithmic_where_values_span_decades_and_zero_has_a_tick():
    values = [0.0, 1e-3, 1.0, *np.geomspace(0.01, 10, 8)]
    figure = F.inspection_map(rows(values, column="relative_change"), "relative_change")
    heat = figure["data"][0]
    assert heat["z"][0][0] == heat["zmin"] == pytest.approx(-3.5)
    assert heat["z"][1][0] == pytest.approx(-3)
    assert heat["zmax"] == pytest.approx(1)
    assert heat["colorbar"]["ticktext"][0] == "0"
    assert heat["colorbar"]["tickvals"][0] == heat["zmin"]
    plain = F.inspection_map(rows(), "stable_rank")["data"][0]
    assert (plain["zmin"], plain["zmax"]) == (1, 11)


def test_a_column_with_a_sign_is_centred_at_zero_even_over_decades():
    values = [-2.0, 1e-6, 0.5, *[0.1] * 8]
    heat = F.inspection_map(rows(values, column="energy_change"), "energy_change")["data"][0]
    assert (heat["zmin"], heat["zmid"], heat["zmax"]) == (-2, 0, 2)
    assert heat["colorscale"] == F.DIVERGING


def test_a_missing_value_leaves_a_crossed_blank_with_its_reason():
    values = [None, math.inf, math.nan, *range(1, 9)]
    found = rows(values, column="alpha")
    found[0]["alpha_refused"] = "only 4 singular values"
    figure = F.inspection_map(found, "alpha")
    heat, crosses = figure["data"]
    assert [line[0] for line in heat["z"][:3]] == [None] * 3
    assert "only 4 singular values" in heat["text"][0][0]
    assert "α inf" in heat["text"][1][0]
    assert list(zip(crosses["x"], crosses["y"], strict=True)) == [("0", "q"), ("0", "k"), ("0", "up")]
    assert caption(figure).endswith("of 8 matrices; 3 without a value.")
    nothing = F.inspection_map(rows([None] * 11, column="rotation_angle"), "rotation_angle")
    assert caption(nothing).startswith("None of the 11 matrices has a value: not measured: no base")


def test_the_map_can_show_some_matrices_only_and_counts_ties():
    figure = F.inspection_map(rows(), "stable_rank", names=["h.0.q.weight", "head.weight"])
    assert caption(figure) == "Largest 11 in head, smallest 1 in h.0.q, median 6 of 2 matrices."
    tied = F.inspection_map(rows([0.0, 0.0, *[5.0] * 9]), "stable_rank")
    assert caption(tied) == "Largest 5 in 9 matrices, smallest 0 in 2 matrices, median 5 of 11 matrices."


@pytest.mark.parametrize("column", PLOTTED)
def test_every_column_of_numbers_has_a_map_a_profile_and_a_comparison(column):
    found = rows(column=column)
    for figure in (
        F.inspection_map(found, column),
        F.inspection_depth(found, column),
        F.inspection_compare({"a": found, "b": found}, column),
    ):
        go.Figure(figure)
        assert figure["layout"]["title"]["text"].endswith("?")
        assert words(COLUMNS[column]) in figure["layout"]["title"]["text"]


def test_the_depth_profile_has_a_line_for_each_role_and_counts_what_has_no_layer():
    figure = F.inspection_depth(rows(), "stable_rank")
    assert [(line["name"], line["x"], line["y"]) for line in figure["data"]] == [
        ("q", [0, 1, 2], [1, 4, 7]),
        ("k", [0, 1, 2], [2, 5, 8]),
        ("up", [0, 1, 2], [3, 6, 9]),
    ]
    assert caption(figure) == "Median over the roles: 2 in layer 0, 8 in layer 2; 2 without a layer left out."


def test_models_become_a_median_and_a_band_each():
    deeper = rows([10.0 * v for v in range(1, 12)])
    figure = F.inspection_depth(None, "stable_rank", models={"a": rows(), "b": deeper})
    bands, lines = figure["data"][::2], figure["data"][1::2]
    assert [line["y"] for line in lines] == [[2, 5, 8], [20, 50, 80]]
    assert bands[0]["y"] == [3, 6, 9, 7, 4, 1]
    assert "Furthest apart in layer 2: a 8 and b 80" in caption(figure)


def test_a_band_on_a_log_axis_ends_above_zero():
    values = [0.0, 1e-4, 1.0] * 3 + [1.0, 1.0]
    found = rows(values, column="relative_change")
    figure = F.inspection_depth(None, "relative_change", models={"a": found})
    assert figure["layout"]["yaxis"]["type"] == "log"
    assert min(figure["data"][0]["y"]) == pytest.approx(1e-4)
    assert "3 at exactly 0 lie below the axis" in caption(figure)


def test_a_comparison_is_sorted_by_the_first_model_and_meets_by_name():
    first, second = rows([3.0, None, 1.0], layers=1, extra=()), rows([1.0, 2.0, 5.0], layers=1, extra=())[::-1]
    figure = F.inspection_compare({"a": first, "b": second}, "stable_rank")
    assert figure["layout"]["xaxis"]["ticktext"] == ["h.0.q", "h.0.up", "h.0.k"]
    assert [trace["y"] for trace in figure["data"]] == [[3, 1, None], [1, 5, 2]]
    assert caption(figure) == "Median: a 2, b 2. Furthest apart in h.0.up: a 1, b 5."
    same = F.inspection_compare({"a": first, "b": first}, "stable_rank")
    assert "Equal in all 2 matrices that they share" in caption(same)


def test_many_matrices_are_named_in_the_hover_only():
    found = rows(layers=20)
    figure = F.inspection_compare({"a": found}, "stable_rank")
    assert figure["layout"]["xaxis"]["showticklabels"] is False
    assert figure["data"][0]["text"][0].startswith("head.weight: 62")


def test_more_than_four_models_are_refused_in_words():
    five = dict.fromkeys("abcde", rows())
    for make in (
        lambda: F.inspection_compare(five, "stable_rank"),
        lambda: F.inspection_depth(None, "stable_rank", models=five),
    ):
        with pytest.raises(OptionError, match="at most four models can be read side by side; got 5"):
            make()


def test_names_are_shown_letter_by_letter():
    found = rows()
    found[0]["name"] = found[0]["role"] = '<b onclick="x">&'
    text = F.inspection_map(found, "stable_rank")["data"][0]["text"][0][0]
    assert text.startswith('&lt;b onclick="x"&gt;&amp;<br>')
    assert F.inspection_depth(found, "stable_rank")["data"][0]["name"].startswith("&lt;b")


@pytest.mark.parametrize("size", [1, 2, 95, 96, 97, 384, 5000])
def test_kept_indices_include_both_ends_and_rise(size):
    kept = spread_indices(size, 96)
    assert (kept[0], kept[-1]) == (0, size - 1)
    assert (np.diff(kept) > 0).all()
    assert len(kept) <= 96
    assert len(kept) == size if size <= 96 else len(kept) >= 60


def test_a_spectrum_is_divided_with_its_base_and_its_edge():
    values = np.array([8.0, 4.0, 2.0, 0.0])
    figure = F.inspection_spectra({"a": values}, base={"a": values / 2}, edges={"a": 3.0}, normalise="first")
    now, before, edge = figure["data"]
    assert now["y"] == [1, 0.5, 0.25, None]  # no zero on a log axis
    assert before["y"] == [0.5, 0.25, 0.125, None]
    assert edge["y"] == [0.375, 0.375]
    assert (before["line"]["dash"], edge["line"]["dash"]) == ("dot", "dash")
    assert now["line"]["color"] == before["line"]["color"] == edge["line"]["color"]
    by_norm = F.inspection_spectra({"a": values}, normalise="frobenius", log_y=False)["data"][0]["y"]
    assert sum(v**2 for v in by_norm) == pytest.approx(1)
    assert by_norm[-1] == 0


def test_shares_line_up_matrices_of_different_sizes():
    figure = F.inspection_spectra({"a": [2.0, 1.0], "b": [2.0, 1.5, 1.0, 0.5]}, quantile_axis=True, log_x=False)
    assert [trace["x"] for trace in figure["data"]] == [[0.25, 0.75], [0.125, 0.375, 0.625, 0.875]]


def test_a_long_spectrum_is_thinned_and_keeps_its_ends():
    values = np.geomspace(10, 1e-3, 5000)
    trace = F.inspection_spectra({"a": values})["data"][0]
    assert len(trace["x"]) <= 400
    assert (trace["y"][0], trace["y"][-1]) == (10, pytest.approx(1e-3))


@pytest.mark.parametrize("shape", [(200, 300), (300, 200), (200, 200)])
def test_the_law_has_mass_one_and_lies_on_the_histogram_of_noise(shape):
    sigma = torch.linalg.svdvals(torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    fit = bulk_fit(sigma, shape=shape)
    figure = F.density_with_law(sigma, shape=shape, noise=fit.noise, edge=fit.edge, above=fit.above)
    bars, law = figure["data"][:2]
    x, y = np.array(law["x"]), np.array(law["y"])
    # A chart keeps seven digits of x, and a step is a four-hundredth of it.
    assert np.sum(y) * (x[1] - x[0]) == pytest.approx(1, abs=1e-4)
    low, high = (fit.noise * abs(a) for a in (shape[0] ** 0.5 - shape[1] ** 0.5, shape[0] ** 0.5 + shape[1] ** 0.5))
    assert low <= x.min() and x.max() <= high
    assert np.dot(bars["y"], bars["width"]) == pytest.approx(1, abs=0.02)
    # 200 values in sixty bins: their running sums stay within the fluctuation of 1 / sqrt(200).
    steps = np.cumsum(np.array(bars["y"]) * np.array(bars["width"]))
    right = np.array(bars["x"]) + np.array(bars["width"]) / 2
    expected = np.interp(right, x, np.cumsum(y) * (x[1] - x[0]), left=0, right=1)
    assert np.abs(steps - expected).max() < 0.05


def test_values_above_the_edge_are_marked_and_a_giant_does_not_press_the_bulk():
    sigma = np.concatenate([[500.0, 3.0], np.linspace(1.9, 0.1, 98)])
    figure = F.density_with_law(sigma, shape=(100, 100), noise=0.1, edge=2.0, name="h.0.q")
    marks = figure["data"][-1]
    assert marks["x"] == [500, 3]
    assert figure["layout"]["xaxis"]["range"][1] < 5
    assert caption(figure).startswith("2 of 100 singular values lie above the noise edge 2; the largest is 500")
    bare = F.density_with_law(sigma, shape=(100, 100), noise=None, edge=None)
    assert [trace["type"] for trace in bare["data"]] == ["bar"]
    assert "No law was fitted" in caption(bare)


@pytest.mark.parametrize(
    ("error", "make"),
    [
        (UnknownNameError, lambda: F.inspection_map(rows(), "verdict")),
        (UnknownNameError, lambda: F.inspection_map(rows(), "stable rank")),
        (UnknownNameError, lambda: F.inspection_map(rows(), "noise", names=["h.9.q.weight"])),
        (ShapeError, lambda: F.inspection_map([], "noise")),
        (ShapeError, lambda: F.inspection_map(rows(), "noise", names=[])),
        (ShapeError, lambda: F.inspection_depth(rows(layers=0), "noise")),
        (OptionError, lambda: F.inspection_depth(None, "noise")),
        (OptionError, lambda: F.inspection_depth(rows(), "noise", models={"a": rows()})),
        (ShapeError, lambda: F.inspection_compare({}, "noise")),
        (ShapeError, lambda: F.inspection_spectra({})),
        (OptionError, lambda: F.inspection_spectra({str(i): [1.0] for i in range(9)})),
        (OptionError, lambda: F.inspection_spectra({"a": [1.0, 2.0]})),
        (UnknownNameError, lambda: F.inspection_spectra({"a": [1.0]}, normalise="second")),  # type: ignore[arg-type]
        (ShapeError, lambda: F.density_with_law([2.0, 1.0], shape=(3, 3), noise=1.0, edge=1.0)),
        (OptionError, lambda: F.density_with_law([2.0, 1.0], shape=(2, 3), noise=0.0, edge=1.0)),
        (OptionError, lambda: F.density_with_law([2.0, 1.0], shape=(2, 3), noise=1.0, edge=1.0, above=3)),
    ],
)
def test_bad_input_gets_one_of_our_errors(unchecked, error, make):
    with pytest.raises(error):
        make()


def test_a_matrix_of_zeros_has_a_spectrum_and_a_density():
    go.Figure(F.inspection_spectra({"a": [0.0, 0.0]}, normalise="first", edges={"a": None}))
    go.Figure(F.density_with_law([0.0, 0.0], shape=(2, 2), noise=None, edge=None))
