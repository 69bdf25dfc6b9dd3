"""The charts of the arena say in words what their marks show, and refuse what they cannot draw."""

import json

import numpy as np
import plotly.graph_objects as go
import pytest

from orthokit.errors import OptionError, ShapeError
from orthokit.figures import arena, front, mean_interval

POINTS = {"A": [[2.0, 1.0], [2.2, 1.2]], "B": [[1.0, 2.0], [1.0, 2.1]], "C": [[0.5, -0.1], [0.6, -0.2]]}
AXES = {"xlabel": "gained (nats)", "ylabel": "forgotten (nats)"}
WAY = ([0.0, 0.5, 1.0], [[0, 1.4, 2.0], [0, 1.6, 2.0]], [[0, 0.1, 1.0], [0, 0.1, 1.0]])


def caption(figure):
    return figure["layout"]["meta"]["caption"]


def charts():
    """One call of each chart."""
    profile = {"retention": [0.1, 0.0, 0.2], "adaptation": [0.6, 0.8, 0.0]}
    found = {"Spearman": {"CKA": (0.8, 0.5, 0.9), "size": (0.1, -0.5, 0.6)}}
    return {
        "stability_plasticity": front.stability_plasticity(POINTS, **AXES, notes={"A": "rank 8"}),
        "rates_and_scores": front.rates_and_scores({"A": ([1, 2, 4], [0.5, 1.0, np.nan], [0.1, 0.2, np.nan])}, most=1),
        "ways_back": front.ways_back({"straight": WAY}, {"safe": [[1.5, 0.1], [1.6, 0.2]]}, **AXES),
        "correlation_forest": arena.correlation_forest(found, runs=20, methods=5, published={"CKA": 0.7, "x": 1}),
        "direction_profiles": arena.direction_profiles({"A": profile, "B": profile}, layer="blocks.0.attn.q"),
        "distortion_scatter": arena.distortion_scatter({"A": ([1, 2, 3], [1, 2, np.nan]), "B": ([4], [4])}, **AXES),
        "layer_map": arena.layer_map(["q", "k"], {"A": [0.1, np.nan], "B": [np.nan, np.nan]}, name="residual"),
    }


@pytest.mark.parametrize(("name", "figure"), list(charts().items()), ids=lambda v: v if isinstance(v, str) else "")
def test_a_chart_is_plain_json_and_valid_plotly(name, figure):
    assert json.loads(json.dumps(figure, allow_nan=False)) == figure
    go.Figure(figure)
    assert figure["layout"]["title"]["text"].endswith("?") and caption(figure).endswith(".")
    assert "nan" not in caption(figure) and figure["layout"]["meta"]["chart"] == name


def test_the_front_is_told_with_who_beats_whom():
    figure = front.stability_plasticity(POINTS, **AXES)
    assert caption(figure) == (
        "On the front, where no other gains as much and forgets less: C and A. Beaten on both axes: B by A. "
        "Bars: 95% intervals of means over 2 seeds."
    )
    edge = figure["data"][0]
    # Level to C, then at its gain down to the forgetting of A, and level to A.
    assert edge["line"]["shape"] == "vh" and edge["x"] == pytest.approx([0, 0.55, 2.1])
    assert edge["y"] == pytest.approx([-0.15, -0.15, 1.1])


def test_equal_points_do_not_beat_each_other():
    figure = front.stability_plasticity({"A": [[1, 1]], "B": [[1, 1]], "C": [[1, 2]]}, **AXES)
    assert "forgets less: A and B. Beaten on both axes: C by A and B." in caption(figure)
    assert "Bars" not in caption(figure), "one run has no interval"


def test_bars_are_students_intervals_on_both_axes():
    mark = next(t for t in front.stability_plasticity(POINTS, **AXES)["data"] if t.get("text") == ["A"])
    for axis, values in (("x", [2.0, 2.2]), ("y", [1.0, 1.2])):
        mean, _, high = mean_interval(values)
        assert mark[axis] == [pytest.approx(mean)]
        assert mark[f"error_{axis}"]["array"] == [pytest.approx(high - mean, rel=1e-6)]


def test_pointing_at_a_method_tells_its_settings():
    figure = front.stability_plasticity(POINTS, **AXES, notes={"A": "rank 8; rate 0.001"})
    mark = next(t for t in figure["data"] if t.get("text") == ["A"])
    assert "rank 8; rate 0.001" in mark["hovertemplate"] and "gained 2.1 ± " in mark["hovertemplate"]


def test_a_method_that_diverged_is_named_and_not_drawn():
    figure = front.stability_plasticity({**POINTS, "D": [[np.nan, 1.0], [1.0, 1.0]]}, **AXES)
    assert "Diverged: D." in caption(figure) and all(t["name"] != "D" for t in figure["data"])


def test_labels_of_neighbours_stand_apart():
    spots = front._apart(
        [(0.0, 0.0), (1.0, 1.0), (1.005, 1.0), (0.995, 1.0)],
        ["before", "LoRA", "DoRA", "PiSSA"],
        low=(0, 0),
        high=(1, 1),
    )
    assert len(set(spots[1:])) == 3


def test_twelve_methods_are_twelve_styles():
    many = {f"m{i}": [[1.0 + i, i * i]] for i in range(12)}
    marks = [t["marker"] for t in front.stability_plasticity(many, **AXES)["data"] if t["name"].startswith("m")]
    assert len({(mark["color"], mark["symbol"]) for mark in marks}) == 12


def test_the_front_holds_whoever_is_not_beaten_on_both_axes():
    trade = {"A": [[3, 2]], "B": [[2, 1]], "C": [[1.9, 1.5]], "D": [[np.nan, 0]]}
    assert "forgets less: B and A. Beaten on both axes: C by B." in caption(front.stability_plasticity(trade, **AXES))


def test_one_that_forgets_far_more_stands_at_the_edge_and_leaves_the_others_room():
    points = {**POINTS, "D": [[1.4, 0.3], [1.5, 0.2]], "E": [[1.8, 9.0], [1.9, 11.0]]}
    figure = front.stability_plasticity(points, **AXES)
    assert "Below the chart: E, which forgets 10." in caption(figure)
    low, high = figure["layout"]["yaxis"]["range"]
    (arrow,) = (trace for trace in figure["data"] if trace.get("text") == ["E: 10"])
    assert arrow["x"] == [pytest.approx(1.85)] and high < arrow["y"][0] < low < 6
    # The bars of the others are inside.
    half = mean_interval([1.0, 1.2])[2] - 1.1
    assert high < -0.2 and low > max(2.1, 1.1 + half)
    whole = front.stability_plasticity(points, **AXES, clip=False)
    assert "range" not in whole["layout"]["yaxis"] and "Below" not in caption(whole)
    assert whole["layout"]["yaxis"]["autorange"] == "reversed"


@pytest.mark.parametrize("forgettings", [[0.1, 0.2, 0.3, 0.7], [9.0, 8.0, 0.1, 0.2], [-0.1, -0.2, -0.3, -0.01], [9.0]])
def test_no_axis_ends_before_many_or_before_what_is_not_far(forgettings):
    figure = front.stability_plasticity({f"m{i}": [[1.0, f]] for i, f in enumerate(forgettings)}, **AXES)
    assert "range" not in figure["layout"]["yaxis"]


def test_where_there_is_no_start_no_star_is_drawn():
    with_, without = (front.stability_plasticity(POINTS, **AXES, start=start) for start in ((0, 0), None))
    names = [{trace["name"] for trace in figure["data"]} for figure in (with_, without)]
    assert names[0] - names[1] == {"before"}
    assert without["data"][0]["x"][0] == 0.5, "the front begins at the least that was gained"


def test_rates_tell_what_is_traded_at_the_best_one_and_beyond():
    figure = front.rates_and_scores({"A": ([1, 2, 4], [0.5, 1.0, 0.8], [0.1, 0.2, 0.9]), "B": ([1, 3], [2, 1], [0, 1])})
    assert caption(figure) == (
        "At its best rate: A gains 1 and forgets 0.2 at 2; at twice that rate it forgets 0.9. "
        "B gains 2 and forgets 0 at 1."
    )
    left, right = figure["data"][:2]
    assert (left["y"], right["y"], right["xaxis"]) == ([0.5, 1, 0.8], [0.1, 0.2, 0.9], "x2")
    assert right["legendgroup"] == left["legendgroup"] and not right["showlegend"]


def test_values_beyond_the_end_of_the_axes_are_cut():
    layout = front.rates_and_scores({"A": ([1, 2], [1, -50], [0.1, 99])}, most=2)["layout"]
    assert layout["yaxis"]["range"] == pytest.approx([-1.08, 1.08])
    assert layout["yaxis2"]["range"] == pytest.approx([-0.16, 2])


def test_ways_back_tell_shares_halfway():
    figure = front.ways_back({"A": WAY, "B": ([0.0, 1.0], [0, 1], [0, -1])}, **AXES)
    assert caption(figure) == "At α = 0.5: A keeps 75% of its gain and 10% of its forgetting."
    means = [t for t in figure["data"] if t["mode"] == "lines+markers+text"]
    assert means[0]["text"] == ["", "α = 0.5", "α = 1"] and means[0]["x"] == [0, 1.5, 2]
    assert sum(t["mode"] == "lines" for t in figure["data"]) == 2, "a faint line for each of the two seeds"
    nothing = front.ways_back({"B": ([0.0, 1.0], [0, 1], [0, -1])}, **AXES)
    assert caption(nothing) == "No path has a middle, a gain and a forgetting."


def test_correlations_are_sorted_by_strength_and_open_where_undecided():
    found = {"P": {"a": (0.1, -0.2, 0.3), "b": (-0.9, -1.0, -0.5)}, "S": {"a": (0.3, 0.1, 0.5), "b": (0, -1, 1)}}
    figure = arena.correlation_forest(found, runs=9, methods=3, published={"a": 0.5})
    assert caption(figure) == (
        "P, 9 runs of 3 methods: strongest with b (−0.9, from −1 to −0.5); not told from zero: a."
    )
    assert figure["layout"]["yaxis"]["ticktext"] == ["b", "a"]
    assert figure["data"][0]["marker"]["symbol"] == ["circle", "circle-open"]
    assert figure["data"][-1]["name"] == "published" and figure["data"][-1]["y"] == [1]


def test_rank_correlations_are_those_of_scipy():
    from scipy import stats

    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 5, 30).astype(float), rng.random(30)
    assert arena._ranked(x, y) == pytest.approx(stats.spearmanr(x, y).statistic)
    assert arena._ranked(np.ones(4), y[:4]) == 0


def test_profiles_tell_where_the_change_lies():
    profile = {"retention": [0.1, 0.3, 0.2, 0.0], "adaptation": [0.6, 0.8, 0.0, 0.0]}
    assert caption(arena.direction_profiles({"A": profile}, layer="q")) == (
        "Largest retention drift: A 0.3 at direction 2. "
        "Share of the change in the first quarter of the directions: A 36%."
    )


def test_layers_that_were_not_judged_are_left_blank():
    figure = charts()["layer_map"]
    assert figure["data"][0]["y"] == ["A"] and figure["data"][0]["z"] == [[0.1, None]]
    assert caption(figure) == "Largest: A 0.1 in q. Mean over layers: A 0.1."


@pytest.mark.parametrize(
    ("error", "make"),
    [
        (ShapeError, lambda: front.stability_plasticity({"A": [[1.0, 2.0, 3.0]]}, **AXES)),
        (ShapeError, lambda: front.stability_plasticity({"A": [[np.nan, 2.0]]}, **AXES)),
        (OptionError, lambda: front.rates_and_scores({"A": ([0.0, 1.0], [1, 2], [1, 2])})),
        (ShapeError, lambda: front.rates_and_scores({"A": ([1.0, 2.0], [np.nan] * 2, [1, 2])})),
        (ShapeError, lambda: front.rates_and_scores({"A": ([1.0, 2.0], [1, 2], [1, 2, 3])})),
        (ShapeError, lambda: front.ways_back({"A": ([0.0, 1.0], [1, 2])}, **AXES)),
        (ShapeError, lambda: front.ways_back({"A": ([0.0, 1.0], [1, 2], [[1, 2], [1, 2]])}, **AXES)),
        (ShapeError, lambda: arena.correlation_forest({"P": {"a": (1.0, 2.0)}}, runs=3, methods=3)),
        (
            ShapeError,
            lambda: arena.correlation_forest({"P": {"a": (0, 0, 0)}, "S": {"b": (0, 0, 0)}}, runs=3, methods=3),
        ),
        (ShapeError, lambda: arena.direction_profiles({"A": {"retention": [1.0]}}, layer="q")),
        (ShapeError, lambda: arena.direction_profiles({"A": {"retention": [1.0], "adaptation": [1, 2]}}, layer="q")),
        (ShapeError, lambda: arena.distortion_scatter({"A": ([1.0, 2.0], [1.0])}, **AXES)),
        (ShapeError, lambda: arena.distortion_scatter({"A": ([1.0, 2.0], [1.0, 2.0])}, **AXES)),
        (ShapeError, lambda: arena.layer_map(["q"], {"A": [1.0, 2.0]}, name="residual")),
        (ShapeError, lambda: arena.layer_map(["q"], {"A": [np.nan]}, name="residual")),
        (OptionError, lambda: arena.layer_map(["q"], {"A": [-1.0]}, name="residual")),
    ],
)
def test_bad_input_gets_one_of_our_errors(unchecked, error, make):
    with pytest.raises(error):
        make()


def test_a_scatter_says_what_its_markers_are():
    groups = {"A": ([1.0, 2.0, 3.0], [1.0, 2.0, 3.0])}
    caption = arena.distortion_scatter(groups, counted=("matrices", "parts"), **AXES)["layout"]["meta"]["caption"]
    assert caption.startswith("Rank correlation over 3 matrices: 1; inside parts with three matrices or more")
