"""Every chart: plain JSON, valid Plotly, a question as title, a caption computed from the data, checked input."""

import json

import numpy as np
import plotly.graph_objects as go
import pytest
import torch

from orthokit import figures as F
from orthokit.errors import DtypeError, NonFiniteError, OptionError, ShapeError, UnknownNameError

T = [1, 2, 5, 10, 100]
BETAS = [0.0, 0.5, 0.9, 0.99]
STEPS = np.arange(0, 50, 10)
PANELS = ("energy_by_matrix", "table_maps", "before_after", "accuracy_cost", "forgetting_matrices")
# Ticks that are names say it all.
BY_NAME = {"race_ranking": "yaxis", "drift_causes": "yaxis", "memory_modes": "xaxis"} | dict.fromkeys(
    (
        *("kept_and_broken", "step_costs", "correlation_forest", "layer_map", "phase_forest", "rank_after_finetuning"),
        *("merge_map", "merge_energies", "merge_scores", "inspection_map"),
    ),
    "yaxis",
)


def charts():
    """One call of each chart."""
    rng = np.random.default_rng(0)
    values = np.sort(rng.random((5, 8)), axis=1)[:, ::-1].copy()
    return {
        "loss_curves": F.loss_curves({"pre": (STEPS, rng.random((3, 5))), "none": (STEPS, rng.random(5))}),
        "scalar_history": F.scalar_history({"a": (STEPS, rng.random(5))}, ylabel="gap", log=True),
        "spectra": F.spectra({"G": values[0], "M": values[1]}, rank=3, edge=0.5, start=2),
        "spectrum_ratio": F.spectrum_ratio({"G": values[0] + 1, "M": values[1]}, "G"),
        "spectrum_bars": F.spectrum_bars(values[0], rank=2, edge=0.3, spikes=[1.0, np.nan], reference=[1.0, 0.5]),
        "spectrum_heatmap": F.spectrum_heatmap(STEPS, values, name="wq", zmin=-3, zmax=1),
        "coefficient_map": F.coefficient_map({"cubic": ([0.1, 1.0], [0.15, 1.0])}),
        "noise_suppression": F.noise_suppression(T, {"wq": np.sqrt(T)}),
        "subspace_error": F.subspace_error(T, {1: 1 / np.sqrt(T)}, {1: 1 / np.sqrt(T)}),
        "alignment_by_beta": F.alignment_by_beta(BETAS, {"pre": BETAS}, bands={"pre": (BETAS, BETAS)}),
        "alignment_by_checkpoint": F.alignment_by_checkpoint(STEPS, {"pre": rng.random(5)}, probe="trajectory"),
        "gap_by_beta": F.gap_by_beta(BETAS, BETAS, {"pre": BETAS}, current=0.9, published=([0.0, 0.9], [0.5, 1.6])),
        "gap_heatmap": F.gap_heatmap([0.5, 1], BETAS, rng.random((2, 4)), title="Where?", zero_centred=True),
        "projection_arrows": F.projection_arrows({"S": (1.0, 0.0), "G": (-0.5, 1.0)}),
        "sphere": F.sphere(torch.randn(6, 3, generator=torch.Generator().manual_seed(0)), before=np.eye(6, 3) + 1),
        "energy_by_dimension": F.energy_by_dimension([4, 8], {"random": [0.8, 0.75]}, expected=[0.85, 0.77]),
        "energy_change": F.energy_change([0.1, 1], {"rotation": [0, 1e-16], "noise": [1e-3, 1e-2]}),
        "energy_pairs": F.energy_pairs({"random": rng.uniform(-1, 1, 100)}, dimension=1024),
        "error_laws": F.error_laws(
            [0.1, 0.3], {"k = 2": [1e-6, 7e-4], "p = 2": [0, 1]}, measured={"p = 2": ([0.2], [0.1])}
        ),
        "error_parity": F.error_parity([1, 2, 3], {"0.3": [0.2, 7e-4, 1.6e-2]}, products=[1, 2, 2]),
        "singular_values_by_angle": F.singular_values_by_angle([0, 1, 2], {"a": [1, 0, 3]}, measured={"a": ([1], [0])}),
        "merge_drift": F.merge_drift([0, 9], {"a": rng.random((3, 2)), "b": [0, -1]}, predicted={"b": [0, -1]}),
        "inspection_map": F.inspection_map(
            [{"name": "h.0.q", "layer": 0, "role": "q", "noise": np.nan}, {"name": "embed", "noise": 2.0}], "noise"
        ),
        "inspection_depth": F.inspection_depth([{"name": "h.0.q", "layer": 0, "role": "q", "noise": 0.1}], "noise"),
        "inspection_compare": F.inspection_compare(
            {"A": [{"name": "q", "noise": 1.0}], "B": [{"name": "k", "noise": np.inf}]}, "noise"
        ),
        "inspection_spectra": F.inspection_spectra({"A": values[0], "B": values[1]}, edges={"A": 0.5, "B": None}),
        "density_with_law": F.density_with_law(values[0], shape=(8, 9), noise=0.1, edge=0.6),
        "merge_map": F.merge_map([{"name": "q.weight", "rotation_fraction": [0.4, 0.6]}]),
        "merge_energies": F.merge_energies([{"name": "q.weight", "energy_base": 0.7, "energy_merged": 0.8}]),
        "merge_scores": F.merge_scores({"average": {"TA": (80, 79, 81), "FDA": (82, np.nan, np.nan)}}, unit="points"),
        "merge_front": F.merge_front({"TA": [(80, 70), (82, 71)], "base": [(50, 90), (50, 91)]}, unit="points"),
        "merge_scales": F.merge_scales({"TA": ([0.1, 1], rng.random((2, 2)))}, unit="points", base=0.4),
        "map_adviser": F.map_adviser([0.1, 1], {"0.01": [2, np.nan]}, names={"0.01": ["two terms", "exact"]}),
        "table_maps": F.table_maps({"a": ([0.1, 1], [0.5, 1]), "b": ([0.1, 1], [-1, 1.2]), "c": ([0.1, 1], [1, 1])}),
        "before_after": F.before_after({"1/k": [1, 0.5]}, {"1/k": {"a": [1, 0.9], "b": [np.nan, np.nan]}}),
        "accuracy_cost": F.accuracy_cost({"1/k": {"a x5": (1, 0.1), "b": (2, 0.01), "c": (1, np.inf)}}, limit=1.3),
        "scaling_ranges": F.scaling_ranges({"1/k": {"a": (0.1, 1), "b": (0.2, 1)}}, {"1/k": {"a": 0.1, "b": 0.2}}),
        "race_curves": F.race_curves({"A": (STEPS, rng.random((3, 5)))}, xlabel="steps", ylabel="loss (nats)"),
        "race_ranking": F.race_ranking({"equal time": {"A": [-1.0, -1.1], "B": [np.nan, 1.0]}}),
        "rate_sensitivity": F.rate_sensitivity({"A": ([1.0, 2.0, 4.0], [2.0, 1.5, np.nan])}),
        "spectrum_drift": F.spectrum_drift({"k = 3": ([10, 100], rng.random((2, 2)))}, target=1e-5),
        "drift_causes": F.drift_causes({"3 terms": {"truncation": 1e-2, "rounding": 0.0}}),
        "memory_modes": F.memory_modes({"plain": {"weights": 2**20}, "low": {"weights": 2**19}}),
        "spectrum_kept": F.spectrum_kept([3.0, 2.0], {"AdamW": [4, 2], "Pion": torch.tensor([3.0, 2.0])}),
        "drift_budget": F.drift_budget(T, {"order 2": {"truncation": T, "rounding": rng.normal(size=5)}}),
        "stationarity_split": F.stationarity_split(T, {"in": rng.random((3, 5)), "radial": rng.random(5)}),
        "rate_range": F.rate_range([1e-3, 1e-2], {"A": [[2.0, np.nan], [2.1, 3.0]], "B": [2.2, 2.1]}),
        "kept_and_broken": F.kept_and_broken({"OFT": {"angles": [1e-7, 0.0]}, "LoRA": {"angles": [0.01, 0.02]}}),
        "tuned_rates": F.tuned_rates({"A": ([1, 2, 4], [2.0, 1.5, np.nan])}, {"A": (2, [1.5, 1.6])}, ylabel="nats"),
        "loss_by_budget": F.loss_by_budget({"A": ([10, 40], rng.random((3, 2)))}, ylabel="nats", start=2, full=0.1),
        "rates_by_block": F.rates_by_block(([8, 16], [4e-3, 2e-3]), ([8, 16], [2e-3, 2e-3])),
        "step_costs": F.step_costs({"a layer": {"OFT": 1.1, "BOFT": 1.6}, "a model": {"OFT": 1.0, "BOFT": 1.2}}),
        "requantised": F.requantised([0.1, 0.2], {"OFT": {"merged": [0.0, 1e-7], "requantised": [0.01, 0.01]}}),
        "error_at_angle": F.error_at_angle(
            [0.1, 1],
            {"k = 3": [1e-4, 1.0]},
            current="k = 3",
            at=0.3,
            measured={"here": 0.0},
            floor=1e-7,
            span=(1e-9, 10),
        ),
        "spectrum_before_after": F.spectrum_before_after([2.0, 0.0], {"turned": [2.0, 0.0], "added": [2.1, 0.1]}),
        "pair_angles": F.pair_angles([80.0, 95.0], {"turned": [80.0, 95.0], "added": [81.0, 90.0]}),
        "matrix_picture": F.matrix_picture(rng.standard_normal((5, 7)), name="R − I", cells=3),
        "energy_by_matrix": F.energy_by_matrix(["a", "b"], {"trained": [0.8, 0.7], "uniform": [0.7, 0.75]}),
        "forgetting_matrices": F.forgetting_matrices({"a": [[2, 50], [40, 4]]}),
        "penalty_weights": F.penalty_weights({"EWC": ([1, 10], [3, 2], 10)}),
        "stability_plasticity": F.stability_plasticity(
            {"A": [[2, 1.0], [2.2, 1.2]], "B": [[1, 2.0], [1.1, 2.1]]},
            xlabel="gained (nats)",
            ylabel="forgotten (nats)",
        ),
        "rates_and_scores": F.rates_and_scores({"A": ([1, 2, 4], [0.5, 1.0, np.nan], [0.1, 0.2, np.nan])}, most=1),
        "ways_back": F.ways_back(
            {"straight": ([0, 0.5, 1], [[0, 1.4, 2.0], [0, 1.6, 2.0]], [[0, 0.1, 1.0], [0, 0.1, 1.0]])},
            {"safe": [[1.5, 0.1], [1.6, 0.2]]},
            xlabel="gained (nats)",
            ylabel="forgotten (nats)",
        ),
        "correlation_forest": F.correlation_forest({"Spearman": {"CKA": (0.8, 0.5, 0.9)}}, runs=20, methods=5),
        "direction_profiles": F.direction_profiles(
            {"A": {"retention": [0.1, 0.0, 0.2], "adaptation": [0.6, 0.8, 0.0]}}, layer="blocks.0.attn.q"
        ),
        "distortion_scatter": F.distortion_scatter(
            {"A": ([1, 2, 3], [1, 2, np.nan]), "B": ([4], [4])}, xlabel="a", ylabel="b"
        ),
        "layer_map": F.layer_map(["q", "k"], {"A": [0.1, np.nan]}, name="residual"),
        "rank_phases": F.rank_phases({"A": ([0, 1, 2], [[17.0, 2.0, 8.0], [19.0, 4.0, 8.0]])}),
        "anchor_alignment": F.anchor_alignment(
            {"block 0": (STEPS, rng.random((2, 5))), "block 1": (STEPS, rng.random(5))}, bounds={"block 1": 0.99}
        ),
        "anchor_overlap": F.anchor_overlap({"end": rng.random((2, 3))}, layers=["0", "1", "2"], chance=0.2),
        "anchor_spectra": F.anchor_spectra({"step 0": [1.0, 0.1, 0.0], "step 9": [1.0, 0.5, 0.2]}),
        "loss_landscape": F.loss_landscape(
            [0, 1, 2],
            [-1, 1],
            rng.random((2, 3)),
            points={"base": (0.0, 0.0), "one": (2.0, 0.0)},
            paths={"TA": ([[0, 0], [1, 0.5]], [1.0, 0.8]), "FDA": ([[0, 0], [1.5, 0.5]], [1.0, 0.4])},
            off={"FDA": [0.0, 0.3]},
        ),
        "phase_forest": F.phase_forest({"rise": {"A": [[0.3, 0.1, 0.5]]}}),
        "rank_by_layer": F.rank_by_layer({"step 0": [[3, 9], [5, 9]], "end": [1, 2]}, layers=["norm", "embed"]),
        "rank_and_loss": F.rank_and_loss({"A": ([8, 4, 4.1], [17, 3, 20])}, points={"longer": (1.5, 25)}),
        "rank_after_finetuning": F.rank_after_finetuning({"new": {"OFT": [0.1, 0.2], "LoRA": [-0.1, 0.1]}}),
    }


@pytest.mark.parametrize(("name", "figure"), list(charts().items()), ids=lambda v: v if isinstance(v, str) else "")
def test_a_chart_is_plain_json_and_valid_plotly_with_question_and_caption(name, figure):
    again = json.loads(json.dumps(figure, allow_nan=False))
    assert again == figure
    go.Figure(figure)  # raises on any property Plotly does not know
    layout = figure["layout"]
    assert layout["title"]["text"].endswith("?")
    assert layout["meta"]["caption"].endswith(".")
    assert "nan" not in layout["meta"]["caption"]
    assert layout["meta"]["chart"] == name
    assert layout["uirevision"] == name
    for key, axis in layout.items():
        # Panels beside each other share the labels of the first; nothing else may lack one.
        if key.startswith(("xaxis", "yaxis")) and name not in PANELS and BY_NAME.get(name) != key:
            assert axis["title"]["text"]


def test_every_exported_chart_is_in_the_battery():
    made = {name for name in F.__all__ if callable(getattr(F, name)) and name in charts()}
    helpers = {"Shown", "browser_path", "figure_json", "mean_interval", "png", "set_renderer", "show", "t_quantile"}
    public = {name for name in F.__all__ if callable(getattr(F, name))}
    assert public - made == helpers | {"without_caption"}


def test_charts_do_not_share_the_template_with_what_a_caller_may_change():
    figure = F.spectra({"a": [2.0, 1.0]})
    figure["layout"]["template"]["layout"]["font"]["size"] = 99
    assert F.TEMPLATE["layout"]["font"]["size"] != 99


def test_tensors_lists_and_arrays_give_the_same_chart():
    values = [3.0, 2.0, 1.0]
    made = [F.spectra({"a": v}) for v in (values, np.array(values, np.float32), torch.tensor(values).bfloat16())]
    assert made[0] == made[1] == made[2]


def test_loss_band_is_the_t_interval_of_the_seeds():
    runs = np.array([[1.0, 2.0], [2.0, 4.0], [3.0, 9.0]])
    figure = F.loss_curves({"a": ([0, 1], runs)})
    band, line = figure["data"]
    mean, low, high = F.mean_interval(runs[:, 1])
    assert line["y"][1] == pytest.approx(mean)
    assert band["y"][1] == pytest.approx(high, rel=1e-6)
    assert band["y"][2] == pytest.approx(low, rel=1e-6)


def test_a_diverged_run_is_named_and_leaves_a_gap():
    figure = F.loss_curves({"good": ([0, 1], [2, 1]), "bad": ([0, 1], [2, float("nan")])})
    assert figure["data"][1]["y"] == [2, None]
    assert "diverged: bad" in figure["layout"]["meta"]["caption"]


def test_long_histories_are_thinned_and_keep_their_ends():
    figure = F.scalar_history({"a": (np.arange(100_000), np.arange(100_000.0))}, ylabel="x")
    xs = figure["data"][0]["x"]
    assert len(xs) <= 2000
    assert (xs[0], xs[-1]) == (0, 99_999)


def test_noise_slope_is_fitted_from_the_data():
    windows = np.array([1, 3, 10, 50])
    figure = F.noise_suppression(windows, {"w": (2 * windows - 1) ** 0.3})
    assert "^0.3." in figure["layout"]["meta"]["caption"]


def test_heatmap_keeps_exact_zeros_and_fixed_limits():
    figure = F.spectrum_heatmap([0, 1], [[1.0, 0.0], [10.0, 0.0]], name="w", zmin=-2, zmax=2)
    heat = figure["data"][0]
    assert (heat["zmin"], heat["zmax"]) == (-2, 2)
    assert heat["z"][0] == [0, 1]
    assert heat["z"][1] == [-7, -7]


def test_zero_centred_colours_are_symmetric():
    heat = F.gap_heatmap([1, 2], [0.0, 0.5], [[-1, 0], [2, 3]], title="?", zero_centred=True)["data"][0]
    assert (heat["zmin"], heat["zmid"], heat["zmax"]) == (-3, 0, 3)


def test_uniform_cosine_density_integrates_to_one_even_in_wide_layers():
    density = F.energy_pairs({"a": [0.0, 0.1]}, dimension=4096)["data"][-1]
    assert sum(density["y"]) * (density["x"][1] - density["x"][0]) == pytest.approx(1, rel=1e-4)


def test_sphere_ways_stay_on_the_sphere():
    figure = F.sphere(np.eye(3), before=[[0, 1, 0], [0, 0, 1], [-1, -1, 0]])
    way = next(t for t in figure["data"] if t.get("name") == "way")
    points = np.array([[np.nan if v is None else v for v in way[c]] for c in "xyz"])
    norms = np.linalg.norm(points, axis=0)
    assert np.allclose(norms[np.isfinite(norms)], 1, atol=1e-6)


def test_series_differ_in_more_than_colour():
    figure = F.scalar_history({str(i): ([0, 1], [i, i]) for i in range(6)}, ylabel="x")
    assert len({(t["line"]["dash"], t["marker"]["symbol"]) for t in figure["data"]}) == 6


@pytest.mark.parametrize(
    ("error", "make"),
    [
        (OptionError, lambda: F.spectra({"a": [1.0, 2.0]})),
        (OptionError, lambda: F.spectra({"a": [2.0, 1.0]}, rank=2)),
        (OptionError, lambda: F.spectra({"a": [2.0, 1.0]}, start=0)),
        (OptionError, lambda: F.spectra({"a": [2.0, -1.0]})),
        (NonFiniteError, lambda: F.spectra({"a": [float("nan"), 1.0]})),
        (ShapeError, lambda: F.spectra({})),
        (DtypeError, lambda: F.spectra({"a": ["x", "y"]})),
        (ShapeError, lambda: F.spectra({"a": [[1.0]]})),
        (ShapeError, lambda: F.spectra({"a": []})),
        (UnknownNameError, lambda: F.spectrum_ratio({"a": [1.0]}, "b")),
        (OptionError, lambda: F.spectrum_ratio({"a": [1.0, 0.0]}, "a")),
        (OptionError, lambda: F.spectrum_bars([2.0, 1.0], rank=2)),
        (OptionError, lambda: F.spectrum_heatmap([0], [[-1.0]], name="w")),
        (ShapeError, lambda: F.spectrum_heatmap([0, 1], [[1.0]], name="w")),
        (ShapeError, lambda: F.loss_curves({"a": ([0, 1], [1.0])})),
        (OptionError, lambda: F.loss_curves({"a": ([1, 0], [1.0, 2.0])})),
        (OptionError, lambda: F.alignment_by_beta([0.5, 1.0], {"a": [1, 1]})),
        (ShapeError, lambda: F.alignment_by_beta([0.5], {"a": [1]}, bands={"b": ([0], [1])})),
        (OptionError, lambda: F.gap_by_beta([0.5], [1], [1], current=1.0)),
        (OptionError, lambda: F.noise_suppression([1, 2], {"a": [0.0, 1.0]})),
        (OptionError, lambda: F.noise_suppression([0.5, 2], {"a": [1.0, 1.0]})),
        (ShapeError, lambda: F.subspace_error([1], {1: [1.0]}, {2: [1.0]})),
        (OptionError, lambda: F.sphere([[0, 0, 0]])),
        (ShapeError, lambda: F.sphere([[1, 0]])),
        (ShapeError, lambda: F.sphere([[1, 0, 0]], labels=["a", "b"])),
        (OptionError, lambda: F.energy_change([0, 1], {"a": [0, 0]})),
        (OptionError, lambda: F.energy_pairs({"a": [1.5]})),
        (ShapeError, lambda: F.energy_by_matrix([], {"a": []})),
        (ShapeError, lambda: F.projection_arrows({"a": (1, 2, 3)})),
    ],
)
def test_bad_input_gets_one_of_our_errors(unchecked, error, make):
    with pytest.raises(error):
        make()


def test_an_unknown_probe_is_refused(unchecked):
    with pytest.raises(OptionError, match="stationary"):
        F.alignment_by_beta([0.5], {"a": [1]}, probe="frozen")  # type: ignore[arg-type]
