"""The image sets: shapes, ranges, balance and separation of the parts."""

import pytest
import torch

from orthokit.errors import UnknownNameError
from orthokit.lab.images import images


@pytest.mark.parametrize(("name", "train", "test", "side"), [("fashion", 10_000, 2_000, 28), ("digits", 1_442, 355, 8)])
def test_an_image_set_has_the_stated_form(name: str, train: int, test: int, side: int) -> None:
    found = images(name)
    for pictures, labels, count in (
        (found.train_images, found.train_labels, train),
        (found.test_images, found.test_labels, test),
    ):
        assert pictures.shape == (count, 1, side, side) and pictures.dtype == torch.float32
        assert labels.shape == (count,) and labels.dtype == torch.int64
        assert (float(pictures.min()), float(pictures.max())) == (0.0, 1.0)
        assert sorted(labels.unique().tolist()) == list(range(10))
    assert len(found.classes) == 10 and str(side) in repr(found)
    assert images(name) is found


def test_fashion_has_the_same_number_of_every_class_and_no_picture_twice_across_parts() -> None:
    fashion = images("fashion")
    assert fashion.train_labels.bincount().tolist() == [1000] * 10
    assert fashion.test_labels.bincount().tolist() == [200] * 10
    train = {picture.numpy().tobytes() for picture in fashion.train_images}
    test = {picture.numpy().tobytes() for picture in fashion.test_images}
    assert train.isdisjoint(test)
    assert fashion.train_labels[:50].unique().numel() > 5  # not sorted by class


def test_digits_keep_every_fifth_picture_of_a_class_for_the_test() -> None:
    digits = images("digits")
    whole = digits.train_labels.bincount() + digits.test_labels.bincount()
    assert int(whole.sum()) == 1797
    assert digits.test_labels.bincount().tolist() == (whole // 5).tolist()
    levels = digits.train_images * 16
    assert torch.equal(levels, levels.round())


def test_labels_belong_to_their_pictures() -> None:
    """The nearest mean of a class is right far more often than chance: labels were not shuffled against pictures."""
    for name, least in (("fashion", 0.6), ("digits", 0.8)):
        found = images(name)
        flat = found.train_images.flatten(1)
        means = torch.stack([flat[found.train_labels == label].mean(0) for label in range(10)])
        guess = torch.cdist(found.test_images.flatten(1), means).argmin(1)
        assert (guess == found.test_labels).float().mean() > least


def test_an_unknown_image_set_is_answered_with_the_closest() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'digits'"):
        images("digit")
