"""The coefficient lab at its smallest size."""

import math

import pytest
import torch

from orthokit import studies
from orthokit.errors import OptionError, ParameterError, ShapeError, UnknownNameError
from orthokit.lab import TinyGPT, language_modelling
from orthokit.linalg import COEFFICIENTS, polar, singular_values
from orthokit.optim import Muon, for_model
from orthokit.studies import SPECTRA, Recipe, with_spectrum

SHAPE = (12, 20)


def test_recipes_are_named_by_what_they_do_and_do_it():
    X = with_spectrum("gaussian", SHAPE)
    recipe = Recipe("polar_express", 5, 2, "schatten")
    assert recipe.name == "polar_express x5 + 2, schatten"
    assert Recipe("jordan").name == "jordan x5" and Recipe("you_six").count == 6 and Recipe("svd").name == "svd"
    torch.testing.assert_close(Recipe("svd")(X), polar(X))
    assert (singular_values(recipe(X)) - 1).abs().max() < 1e-3
    names = [r.name for r in studies.lab_recipes()]
    assert len(set(names)) == len(names)
    assert [r.table for r in studies.published_recipes()] == list(COEFFICIENTS)


@pytest.mark.parametrize(
    "recipe", [Recipe("jordan"), Recipe("you"), Recipe("polar_express", 6, 1, "aol"), Recipe("svd")]
)
def test_a_recipe_is_what_muon_does_with_its_options(recipe):
    X = with_spectrum("gaussian", SHAPE, seed=1)
    p = torch.nn.Parameter(torch.zeros(SHAPE))
    p.grad = X.clone()
    # Without momentum and with "original" scaling, a wide matrix moves by minus the orthogonalised gradient.
    Muon([p], lr=1.0, weight_decay=0.0, order="none", ns_dtype=torch.float32, **recipe.muon).step()
    torch.testing.assert_close(-p.detach(), recipe(X), rtol=0, atol=1e-5)


def test_spectra_are_what_their_names_say():
    s = singular_values(with_spectrum("log-uniform", (9, 30), smallest=1e-4))
    torch.testing.assert_close(s, 1e-4 ** (torch.arange(9) / 8), rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(
        singular_values(with_spectrum("1/k", (30, 9))), 1 / torch.arange(1.0, 10), rtol=1e-4, atol=0
    )
    G = with_spectrum("gaussian", (100, 200))
    assert abs(float(G.std()) - 1) < 0.02
    assert not torch.equal(G, with_spectrum("gaussian", (100, 200), seed=1))


def test_values_belong_to_directions_so_a_turned_one_is_negative():
    # Its first row is negative at 1: the only direction of a matrix of rank one is turned round.
    X = torch.outer(torch.ones(6), torch.ones(8))
    found = studies.values_after(X, [Recipe("turbo_muon"), Recipe("polar_express")])
    assert found["turbo_muon x4"][0] < -0.5 and found["polar_express x6"][0] > 0.9


@pytest.mark.parametrize("spectrum", SPECTRA)
def test_scalar_maps_say_what_happens_to_every_singular_value(spectrum):
    X = with_spectrum(spectrum, SHAPE, dtype=torch.float64)
    s = singular_values(X) / torch.linalg.matrix_norm(X)
    recipes = [Recipe("jordan"), Recipe("you", 5, 1), Recipe("cans")]
    maps = studies.scalar_maps(recipes, s)
    for name, values in studies.values_after(X, recipes).items():
        torch.testing.assert_close(values.double(), maps[name][1], rtol=0, atol=1e-4)


def test_comparison_holds_quality_and_cost_of_every_recipe_on_every_spectrum():
    recipes = [Recipe("jordan"), Recipe("polar_express", 7), Recipe("svd")]
    table = studies.compare_recipes(recipes, shape=SHAPE, dtype=torch.float32, rounds=2)
    assert len(table) == 9 and list(table["spectrum"].unique()) == list(SPECTRA)
    assert (table["seconds"] > 0).all()
    assert (table.loc[table["recipe"] == "jordan x5", "cost"] == 1).all()
    exact = table[table["recipe"] == "svd"]
    assert (exact["mean_error"] < 1e-5).all() and (exact["from_polar"] < 1e-5).all()
    worst = table.pivot(index="recipe", columns="spectrum", values="mean_error").max(axis=1)
    assert worst["svd"] < worst["polar_express x7"] < worst["jordan x5"]
    with pytest.raises(OptionError, match="rounds"):
        studies.compare_recipes(recipes, rounds=0)


def test_what_diverges_has_infinite_errors():
    bad = torch.full((2, 3), torch.nan)
    found = studies.orthogonality(bad, polar(torch.ones(2, 3)))
    assert found["mean_error"] == found["from_polar"] == math.inf


def test_ranges_start_below_one_and_aol_is_no_looser_than_frobenius():
    found = studies.start_ranges(with_spectrum("gaussian", (24, 48)))
    assert all(0 < low < high <= 1 + 1e-9 for low, high in found.values())
    assert found["frobenius"][0] < found["schatten"][0] < found["spectral"][0]
    assert found["frobenius"][0] < found["aol"][0]


def test_jordan_steps_are_shorter_than_exact_ones():
    momenta = [with_spectrum("gaussian", (24, 48), seed=seed) for seed in range(3)]
    assert studies.step_length(Recipe("svd"), momenta) == pytest.approx(1, abs=1e-5)
    assert studies.step_length(Recipe("polar_express", 7), momenta) == pytest.approx(1, abs=1e-3)
    assert 0.7 < studies.step_length(Recipe("jordan"), momenta) < 0.99


def test_training_differs_by_the_recipe_only():
    recipes = {"jordan": (Recipe("jordan"), 1.0), "same": (Recipe("jordan"), 1.0), "exact": (Recipe("svd"), 1.1)}
    sizes = {"batch": 2, "context": 16, "windows": 4, "evaluations": 2, "progress": False}
    table = studies.train_recipes(recipes, seeds=[0, 1], steps=4, lr=1e-2, **sizes)
    assert table.groupby("recipe")["seed"].nunique().to_dict() == {"jordan": 2, "same": 2, "exact": 2}
    values = table.pivot(index=["seed", "step"], columns="recipe", values="value")
    assert (values["jordan"] == values["same"]).all()
    last = values.xs(4, level="step")
    assert (last["jordan"] != last["exact"]).all()
    apart = studies.relative_to(table, "jordan")
    assert set(apart["recipe"]) == {"same", "exact"} and (apart.loc[apart["recipe"] == "same", "value"] == 0).all()
    found = apart[(apart["recipe"] == "exact") & (apart["step"] == 4)].set_index("seed")["value"]
    assert (found - (last["exact"] - last["jordan"])).abs().max() == 0
    with pytest.raises(OptionError, match="not in the table"):
        studies.relative_to(table, "you")


def test_reported_step_moves_the_model_and_tells_of_every_matrix():
    model = TinyGPT("0.2M", seed=0)
    optimizer = for_model(model, "muon", lr=1e-2)
    task = language_modelling("addresses", context=16, batch=2, seed=0)
    before = model.blocks[0].attn.q.weight.detach().clone()
    report = studies.reported_step(model, task, optimizer, step=0)
    assert len(report) == (optimizer.routing["optimizer"] == "Muon").sum()
    assert not torch.equal(before, model.blocks[0].attn.q.weight)
    assert all(p.grad is None for p in model.parameters())
    with pytest.raises(ParameterError, match="needs a Muon"):
        studies.reported_step(model, task, torch.optim.SGD(model.parameters()), step=0)


def test_scale_rules_hold_for_an_orthogonal_update():
    table = studies.scale_rules([(8, 32), (32, 8)])
    assert set(table["rule"]) == {"original", "match_rms_adamw", "spectral"}
    for row in table.itertuples():
        shape = tuple(int(side) for side in row.shape.split(" x "))
        U = row.factor * polar(with_spectrum("gaussian", shape))
        assert float(U.square().mean().sqrt()) == pytest.approx(row.rms, rel=1e-4)


def test_heads_apart_gain_more_with_a_larger_spectral_norm():
    G = with_spectrum("1/k", (16, 12), seed=3)
    whole, apart = studies.head_split(G, heads=4).itertuples()
    assert whole.gain == pytest.approx(float(singular_values(G).sum()), rel=1e-4)
    assert apart.gain > whole.gain
    # Four heads of four rows: 16 singular values of 1 against the 12 that the whole has room for.
    assert (whole.norm, apart.norm) == pytest.approx((12**0.5, 4.0), rel=1e-4)
    assert whole.spectral == pytest.approx(1, abs=1e-4) and apart.spectral > 1
    with pytest.raises(ShapeError, match="3 heads"):
        studies.head_split(G, heads=3)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda: Recipe("jordaan"), UnknownNameError),
        (lambda: with_spectrum("gausian"), UnknownNameError),
        (lambda: with_spectrum("1/k", (1, 5)), ShapeError),
        (lambda: with_spectrum("log-uniform", SHAPE, smallest=2.0), OptionError),
    ],
)
def test_unknown_names_and_impossible_sizes_are_refused(call, error):
    with pytest.raises(error):
        call()
