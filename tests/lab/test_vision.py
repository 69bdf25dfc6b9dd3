"""The small vision transformer, its weights, and tasks of some classes."""

import json

import pytest
import torch

from orthokit.errors import OptionError, ShapeError, UnknownNameError
from orthokit.lab import images
from orthokit.lab._assets import ASSETS, asset_json, provenance
from orthokit.lab.image_tasks import some_classes
from orthokit.lab.vision import SmallViT, load_small_vit


def test_the_weights_are_those_of_their_record():
    record, task = asset_json("vit_garments", "record.json"), some_classes("fashion", range(5))
    found = task.evaluate(load_small_vit())
    assert found["test_error"] == pytest.approx(record["test_error"], abs=2e-3)
    assert found["test_loss"] == pytest.approx(record["test_loss"], abs=1e-3)
    assert record["run"]["classes"] == [0, 1, 2, 3, 4]
    assert sum(p.numel() for p in load_small_vit().parameters()) == record["model"]["parameters"]


def test_the_asset_says_where_it_is_from():
    described = provenance("vit_garments")
    assert described["licence"] == "Apache-2.0" and described["built_by"] == "tools/pretrain_vision.py"
    folder = ASSETS / "vit_garments"
    assert set(described["files"]) == {"model.safetensors", "record.json"}
    assert (folder / "LICENCE.txt").stat().st_size > 10_000
    assert json.loads((folder / "record.json").read_text())["name"] == "vit-garments"


def test_a_model_is_a_function_of_its_seed_and_leaves_the_global_generator_alone():
    state = torch.random.get_rng_state()
    x = torch.rand(3, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    first, again, other = (SmallViT(seed=seed)(x) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.allclose(first, other)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_patch_is_a_square_of_the_picture():
    model, x = SmallViT(patch=14, layers=1), torch.zeros(1, 1, 28, 28)
    x[0, 0, :14, 14:] = 1.0
    seen = []
    model.patches.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    model(x)
    assert seen[0].sum(-1).tolist() == [[0.0, 196.0, 0.0, 0.0]]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"classes": 1}, "classes >= 2"),
        ({"patch": 5}, "divide 28"),
        ({"heads": 5}, "heads must divide"),
        ({"layers": 0}, ">= 1"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(options, text):
    with pytest.raises(OptionError, match=text):
        SmallViT(**options)


def test_pictures_of_another_size_are_refused():
    with pytest.raises(ShapeError, match="28 x 28; got"):
        SmallViT()(torch.zeros(1, 1, 8, 8))


def test_some_classes_are_the_pictures_of_these_classes_numbered_anew():
    task, whole = some_classes("fashion", [7, 2], batch=64, seed=3), images("fashion")
    assert task.classes == (whole.classes[7], whole.classes[2])
    assert len(task.test_labels) == int(((whole.test_labels == 7) | (whole.test_labels == 2)).sum())
    assert torch.equal(task.test_images[task.test_labels == 0], whole.test_images[whole.test_labels == 7])
    pictures, labels = task.batch(5)
    again = some_classes("fashion", [7, 2], batch=64, seed=3).batch(5)
    assert torch.equal(pictures, again[0]) and set(labels.tolist()) == {0, 1}


def test_digits_are_resized_and_all_classes_are_the_default():
    task = some_classes("digits", test=50)
    assert task.test_images.shape == (50, 1, 28, 28) and task.classes == images("digits").classes
    assert float(task.test_images.min()) >= 0 and float(task.test_images.max()) <= 1
    assert task.describe()["task"] == "some_classes" and task.describe()["test"] == 50


@pytest.mark.parametrize(
    ("name", "classes", "options", "error"),
    [
        ("cats", None, {}, UnknownNameError),
        ("fashion", [1], {}, OptionError),
        ("fashion", [1, 1], {}, OptionError),
        ("fashion", [1, 10], {}, OptionError),
        ("fashion", [1, -1], {}, OptionError),
        ("fashion", None, {"side": 0}, OptionError),
        ("fashion", None, {"test": 0}, OptionError),
        ("fashion", None, {"batch": 0}, OptionError),
    ],
)
def test_classes_that_are_not_there_are_refused(name, classes, options, error):
    with pytest.raises(error):
        some_classes(name, classes, **options)
