"""Recipes written for mergekit: understood as mergekit understands them, and merged to the same numbers."""

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from orthokit.checkpoints import open_checkpoint
from orthokit.errors import OptionError, OrthokitError, UnknownNameError
from orthokit.merging import dare
from orthokit.merging.mergekit import read_mergekit

DATA = Path(__file__).parent / "data"
RECIPES: dict[str, dict[str, Any]] = yaml.safe_load((DATA / "mergekit.yml").read_text())
DRAWN = [name for name, recipe in RECIPES.items() if recipe["merge_method"].startswith("dare")]
FIXED = [name for name in RECIPES if name not in DRAWN]
# Both compute in float32, in another order: a few roundings of numbers up to about 4.
ROUNDING = 1e-6

Models = dict[str, dict[str, Tensor]]


def made() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_mergekit", DATA / "make_mergekit.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def recorded() -> Models:
    found: Models = {}
    with open_checkpoint(DATA / "mergekit.safetensors") as file:
        for key in file:
            group, name = key.split("/")
            found.setdefault(group, {})[name] = file.tensor(key)
    return found


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the models that the recipes name."""
    from safetensors.torch import save_file

    for name in ("base", "a", "b", "c"):
        (tmp_path / name).mkdir()
        save_file(recorded()[name], tmp_path / name / "model.safetensors", metadata={"format": "pt"})
    monkeypatch.chdir(tmp_path)
    return tmp_path


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.allclose(found[name], tensor, rtol=0, atol=ROUNDING), name


def ours(case: str, place: Path) -> dict[str, Tensor]:
    recipe = read_mergekit(yaml.safe_dump(RECIPES[case]))
    recipe.merge(place / f"ours-{case}")
    with open_checkpoint(place / f"ours-{case}") as model:
        return {name: model.tensor(name) for name in model}


def ours_drawn(case: str, models: Models) -> dict[str, Tensor]:
    """Tensor by tensor with the masks that mergekit was given: its generator is not ours."""
    mask = made().mask
    recipe = read_mergekit(yaml.safe_dump(RECIPES[case]))
    found = {}
    for name, base in models["base"].items():
        options = recipe.options_for(name)
        experts = [models[path.name][name] for path in recipe.experts]
        masks = [mask(expert - base, 1 - options["p"]) for expert in experts]
        found[name] = dare(base, experts, masks=masks, **options)
    return found


@pytest.mark.parametrize("case", FIXED)
def test_a_recipe_gives_what_mergekit_was_recorded_to_give(case: str, place: Path) -> None:
    assert_same(ours(case, place), recorded()[case])


@pytest.mark.parametrize("case", DRAWN)
def test_dare_gives_what_mergekit_was_recorded_to_give_with_the_same_masks(case: str) -> None:
    models = recorded()
    assert_same(ours_drawn(case, models), models[case])


@pytest.mark.parametrize("case", FIXED)
def test_what_was_recorded_differs_from_the_base_and_the_experts(case: str) -> None:
    """Else the parity above would show little."""
    models = recorded()
    name = "model.layers.1.mlp.up_proj.weight"
    assert all(not torch.allclose(models[case][name], models[other][name], atol=1e-3) for other in ("base", "a", "b"))


@pytest.mark.peers
@pytest.mark.skipif(importlib.util.find_spec("mergekit") is None, reason="mergekit is not installed")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", list(RECIPES))
def test_mergekit_itself_gives_the_same(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    maker = made()
    maker.write_models(tmp_path)
    theirs = maker.merged_by_mergekit(RECIPES[case], tmp_path, "theirs")
    found = ours_drawn(case, maker.tiny_models()) if case in DRAWN else ours(case, tmp_path)
    assert_same(found, theirs)


def test_a_drawn_recipe_can_be_carried_out_and_its_seed_counts(place: Path) -> None:
    found = {}
    for seed, out in ((1, "one"), (1, "two"), (2, "three")):
        read_mergekit(yaml.safe_dump(RECIPES["dare_ties"])).merge(place / out, seed=seed)
        with open_checkpoint(place / out) as model:
            found[out] = model.tensor("lm_head.weight")
    assert torch.equal(found["one"], found["two"]) and not torch.equal(found["one"], found["three"])


def recipe(**changes: Any) -> str:
    values: dict[str, Any] = {
        "merge_method": "ties",
        "base_model": "base",
        "models": [{"model": "a", "parameters": {"weight": 1, "density": 0.5}}, {"model": "b"}],
        "parameters": {"weight": 0.5, "density": 0.25},
    }
    return yaml.safe_dump({key: value for key, value in {**values, **changes}.items() if value is not None})


def test_parameters_of_a_model_win_over_those_of_all() -> None:
    options = read_mergekit(recipe()).options_for("W")
    assert options == {"weights": [1.0, 0.5], "scale": 1.0, "density": [0.5, 0.25], "normalize": True}


def test_numbers_that_yaml_takes_for_text_are_numbers() -> None:
    told = read_mergekit("merge_method: linear\nmodels: [{model: a, parameters: {weight: 1e-3}}]")
    assert told.options_for("W")["weights"] == [1e-3]


@given(st.lists(st.floats(-3, 3), min_size=1, max_size=6), st.floats(0, 1))
def test_values_along_the_layers_are_joined_by_lines(values: list[float], position: float) -> None:
    text = recipe(parameters={"weight": values, "density": 1}, models=[{"model": "a"}])
    found = read_mergekit(text).options_for("W", position=position)["weights"][0]
    place = position * (len(values) - 1)
    nearest = torch.tensor(values, dtype=torch.float64)
    expected = sum(value * max(0.0, 1 - abs(place - i)) for i, value in enumerate(nearest.tolist()))
    assert found == pytest.approx(expected, abs=1e-12)


def test_layers_are_found_in_names_and_all_else_stands_at_the_beginning() -> None:
    text = recipe(parameters={"weight": [0, 1], "density": 1}, models=[{"model": "a"}])
    names = [f"model.layers.{i}.mlp.experts.{j}.w.weight" for i in range(5) for j in range(2)]
    recipes = read_mergekit(text).recipes(["embed.weight", *names, "lm_head.weight"])
    weights = {name: (one.weights or [])[0] for name, one in recipes.items()}
    assert weights["embed.weight"] == weights["lm_head.weight"] == 0.0
    assert [weights[name] for name in names[::2]] == [0.0, 0.25, 0.5, 0.75, 1.0] == [weights[n] for n in names[1::2]]
    lone = read_mergekit(text).recipes(["h.0.attn.weight"])
    assert lone["h.0.attn.weight"].weights == [1.0]


def test_the_type_of_the_result_is_the_one_asked_for() -> None:
    assert read_mergekit(recipe()).dtype is None
    assert read_mergekit(recipe(dtype="bfloat16")).dtype == "bfloat16"
    told = read_mergekit(recipe(dtype="float32", out_dtype="bfloat16"))
    assert told.dtype == "bfloat16" and "computation" in told.notes[0]


def test_what_makes_no_difference_is_told() -> None:
    told = read_mergekit(recipe(parameters={"weight": 1, "density": 1, "int8_mask": True}))
    assert told.notes == ("int8_mask saves memory in mergekit and makes no difference here",)


@pytest.mark.parametrize(
    ("text", "error", "words"),
    [
        ("- a\n- b\n", OptionError, "must be a mapping"),
        ("{a: [\n", OptionError, "cannot be read"),
        (recipe(merge_method="karcher"), UnknownNameError, "karcher"),
        (recipe(merge_method=None), UnknownNameError, "None"),
        (recipe(tokenizer_source="union"), OptionError, "tokenizer_source must be 'base'"),
        (recipe(tokenizer={"source": "a"}), OptionError, "a tokenizer of its own"),
        (recipe(chat_template="auto"), OptionError, "chat template"),
        (recipe(modules={}), OptionError, "several modules"),
        (recipe(merge_methods="x"), UnknownNameError, "did you mean 'merge_method'"),
        (recipe(base_model=None), OptionError, "needs a base_model"),
        (recipe(models=None), OptionError, "either models or slices"),
        (recipe(models=["a"]), OptionError, "a list of mappings"),
        (recipe(models=[{"model": {"path": "a"}}]), OptionError, "must be a path"),
        (recipe(models=[{"model": "a+lora"}]), OptionError, "an adapter on a model"),
        (recipe(models=[{"model": "base"}]), OptionError, "no models besides its base"),
        (recipe(parameters={"densty": 1}), UnknownNameError, "did you mean 'density'"),
        (recipe(parameters=[1]), OptionError, "must be a mapping"),
        (
            recipe(merge_method="slerp", parameters={"t": 0.5}, models=[{"model": "a"}, {"model": "b"}]),
            OptionError,
            "2",
        ),
    ],
)
def test_what_cannot_be_done_is_refused_in_words(text: str, error: type[OrthokitError], words: str) -> None:
    with pytest.raises(error) as raised:
        read_mergekit(text)
    assert words in str(raised.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"parameters": {"density": 1}}, "ties needs weight"),
        ({"parameters": {"weight": 1, "rescale": True}}, "rescale: true of ties"),
        ({"parameters": {"weight": "much"}}, "finite number"),
        ({"parameters": {"weight": [{"filter": "x"}]}}, "must have a value"),
        ({"parameters": {"weight": [1, {"value": 2}]}}, "must have a value"),
        ({"merge_method": "dare_ties"}, "one density for all"),
    ],
)
def test_what_cannot_be_done_with_a_tensor_is_refused_in_words(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(OptionError) as raised:
        read_mergekit(recipe(**changes)).options_for("W")
    assert words in str(raised.value)


@pytest.mark.parametrize(
    ("sources", "words"),
    [
        ([{"model": "a", "layer_range": [0, 2]}, {"model": "b", "layer_range": [0, 3]}], "only whole models"),
        ([{"model": "a", "layer_range": [1, 3]}], "only whole models"),
        ([{"model": "a"}], "only whole models"),
    ],
)
def test_slices_that_are_not_whole_models_are_refused(sources: list[dict[str, Any]], words: str) -> None:
    with pytest.raises(OptionError, match=words):
        read_mergekit(recipe(models=None, slices=[{"sources": sources}]))
    with pytest.raises(OptionError, match="stacks 2 slices"):
        read_mergekit(recipe(models=None, slices=[{"sources": sources}] * 2))


def test_a_slice_of_fewer_layers_than_the_model_has_is_refused(place: Path) -> None:
    sources = [{"model": name, "layer_range": [0, 2]} for name in ("a", "b")]
    told = read_mergekit(recipe(models=None, slices=[{"sources": sources}]))
    with pytest.raises(OptionError, match="takes 2 layers and the model has 3"):
        told.merge(place / "out")
    assert not (place / "out").exists()


def test_a_recipe_is_read_from_a_file_too(tmp_path: Path) -> None:
    (tmp_path / "recipe.yml").write_text(recipe())
    assert read_mergekit(tmp_path / "recipe.yml") == read_mergekit(str(tmp_path / "recipe.yml"))
    with pytest.raises(OptionError, match="cannot be read"):
        read_mergekit(tmp_path / "missing.yml")
