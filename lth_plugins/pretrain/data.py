"""The datasets of pre-trainings, with the views that each pre-training wants."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.utils.data import Dataset
from torchvision import transforms as T

from lth_plugins.registry import Registry
from lth_plugins.ticket import IMAGENET, InputSpec
from lth_plugins.training.folders import Images
from lth_plugins.training.loader import (
    Labelled,
    Splits,
    Transform,
    image_folders,
    input_transform,
    length,
    prepared,
    standard_transforms,
)
from lth_plugins.training.settings import Data

Views = Sequence[Transform] | None
SOURCES: Registry[Callable[[Data, Views, Transform], Splits]] = Registry("data.name")
"""Datasets by name: ``source(data, views, to_input)``."""


def open_images(data: Data, views: Views = None, spec: InputSpec = IMAGENET) -> Splits:
    """Open the dataset that a configuration names.

    Args:
        data: its configuration.
        views: instead of one image by the dataset's own augmentation, train on a list of images of
            the same thing, one by each of these.
        spec: channel order and normalisation that the network wants.

    Raises:
        ConfigError: if the name is unknown.
        RunError: if the folder is not such a dataset.
    """
    return prepared(SOURCES[data.name](data, views, input_transform(spec)), data)


@SOURCES.register("digits")
def _digits(data: Data, views: Views, to_input: Transform) -> Splits:
    return _digits_of("busy", data, views, to_input)


@SOURCES.register("calm_digits")
def _calm_digits(data: Data, views: Views, to_input: Transform) -> Splits:
    return _digits_of("calm", data, views, to_input)


def _digits_of(look: str, data: Data, views: Views, to_input: Transform) -> Splits:
    """Handwritten digits, those that are drawn in a look of `lth_plugins.digits.LOOKS`."""
    from lth_plugins.digits import CLASSES, DigitDataset

    def digits(split: str, transform: Transform, drawn: bool = False) -> DigitDataset:
        return DigitDataset(split, data.size, augment=drawn, transform=transform, look=look)

    def either(transform: Transform) -> Labelled:
        plain = digits("train", T.Compose([moved, transform]))
        return _EitherOf(plain, digits("train", transform, drawn=True))

    moved = T.RandomAffine(10, translate=(0.1, 0.1), scale=(0.85, 1.1))
    train = either(to_input) if views is None else _EachOf([either(view) for view in views])
    return Splits(train, digits("test", to_input), CLASSES, bank=digits("train", to_input))


class _EitherOf(Dataset[tuple[Any, int]]):
    """One of two versions of each image, tossed anew each time.

    Digits as they are validated on, and digits as they occur in scenes: a network trained on the
    former alone has seen neither colours nor backgrounds when it is transferred.
    """

    def __init__(self, one: Labelled, other: Labelled) -> None:
        self.one, self.other = one, other

    def __len__(self) -> int:
        return length(self.one)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return (self.one if torch.rand(()) < 0.5 else self.other)[index]


class _EachOf(Dataset[tuple[list[Any], int]]):
    """Each of several versions of each image: the views of a digit are drawings of one scan.

    Two crops of one drawing would share its colours and its background, and those alone would tell
    that they belong together: no shape needs to be learned.
    """

    def __init__(self, versions: Sequence[Labelled]) -> None:
        self.versions = versions

    def __len__(self) -> int:
        return length(self.versions[0])

    def __getitem__(self, index: int) -> tuple[list[Any], int]:
        images, labels = zip(*(version[index] for version in self.versions), strict=True)
        return list(images), labels[0]


@SOURCES.register("imagefolder")
def _imagefolder(data: Data, views: Views, to_input: Transform) -> Splits:
    augmented, plain = standard_transforms(data, to_input)
    splits = image_folders(data, augmented if views is None else _Each(views), plain)
    assert isinstance(splits.train, Images)
    bank = copy.copy(splits.train)
    bank.transform = plain
    return replace(splits, bank=bank)


class _Each:
    """Each of several transforms of one image, which is decoded once for all views."""

    def __init__(self, views: Sequence[Transform]) -> None:
        self.views = views

    def __call__(self, image: Any) -> list[Any]:
        return [view(image) for view in self.views]
