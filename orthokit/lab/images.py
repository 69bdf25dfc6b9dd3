"""Two small sets of labelled grey pictures: clothes and handwritten digits."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from jaxtyping import Float, Int
from safetensors.torch import load
from torch import Tensor

from orthokit.errors import unknown_name
from orthokit.lab._assets import asset_bytes, provenance

__all__ = ["ImageSet", "images"]

# Largest grey value of each set: the value that is mapped to 1.
_WHITE = {"fashion": 255, "digits": 16}


@lru_cache(maxsize=len(_WHITE))
def _load(name: str) -> ImageSet:
    record = provenance(name)
    tensors = load(asset_bytes(name, "images.safetensors.xz"))

    def scaled(key: str) -> Tensor:
        return tensors[key].to(torch.float32).div_(_WHITE[name]).unsqueeze(1)

    return ImageSet(
        name=name,
        description=record["description"],
        licence=record["licence"],
        source=f"{record['package']['name']} {record['package']['version']} ({record['package']['kind']})",
        train_images=scaled("train_images"),
        train_labels=tensors["train_labels"].to(torch.int64),
        test_images=scaled("test_images"),
        test_labels=tensors["test_labels"].to(torch.int64),
        classes=tuple(record["counts"]["classes"]),
    )


def images(name: str) -> ImageSet:
    """A set of labelled pictures, split into a training and a test part.

    Args:
        name: ``"fashion"`` (10,000 + 2,000 pictures of 28 x 28) or ``"digits"`` (1,797 pictures of 8 x 8).

    Returns:
        The :class:`ImageSet`. It is read once and shared by all callers, so its tensors are not to be written to.

    Raises:
        UnknownNameError: There is no set of that name.
        AssetError: A data file is missing or does not have the recorded content.

    Example:
        >>> digits = images("digits")
        >>> digits.train_images.shape[1:], len(digits.classes)
        (torch.Size([1, 8, 8]), 10)
        >>> float(digits.train_images.min()), float(digits.train_images.max())
        (0.0, 1.0)

    Numerics:
        float32, grey values divided by the largest possible one. ``fashion`` takes its test pictures from the original
        test set and has the same number of every class in each part. ``digits`` puts every fifth picture of a class
        into the test part; the source does not name the writers, so one writer may be in both parts.

    References:
        Han Xiao, Kashif Rasul, Roland Vollgraf, Fashion-MNIST: a Novel Image Dataset for Benchmarking Machine Learning
        Algorithms, arXiv:1708.07747; here a subset. Ethem Alpaydin, Cenk Kaynak, Optical Recognition of Handwritten
        Digits, UCI Machine Learning Repository, 1998; here its test set, split anew.
    """
    if name not in _WHITE:
        raise unknown_name("image set", name, _WHITE)
    return _load(name)


@dataclass(frozen=True, eq=False, repr=False)
class ImageSet:
    """Pictures and labels in two parts.

    Args:
        name: ``"fashion"`` or ``"digits"``.
        description: One line.
        licence: SPDX expression of the data; the full text lies beside the data file.
        source: Package, version and registry kind it was built from.
        train_images: Grey values in [0, 1].
        train_labels: Index into ``classes``.
        test_images: Grey values in [0, 1].
        test_labels: Index into ``classes``.
        classes: Names of the classes.
    """

    name: str
    description: str
    licence: str
    source: str
    train_images: Float[Tensor, "train 1 height width"]
    train_labels: Int[Tensor, " train"]
    test_images: Float[Tensor, "test 1 height width"]
    test_labels: Int[Tensor, " test"]
    classes: tuple[str, ...]

    def __repr__(self) -> str:
        height, width = self.train_images.shape[-2:]
        return (
            f"ImageSet({self.name!r}, {len(self.train_labels):,} train + {len(self.test_labels):,} test images of "
            f"{height} x {width}, {len(self.classes)} classes)"
        )
