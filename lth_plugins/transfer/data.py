"""The datasets of downstream classification, with the input that the ticket wants.

They are torchvision's, and are read from where torchvision stores them; nothing is downloaded
unless the configuration says so.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch.utils.data import Dataset
from torchvision import transforms as T
from torchvision.datasets import CIFAR10, CIFAR100, SVHN, FashionMNIST

from lth_plugins.errors import RunError
from lth_plugins.registry import Registry
from lth_plugins.resilience.seeds import seed_of, seeded
from lth_plugins.ticket import InputSpec
from lth_plugins.training.loader import (
    Labelled,
    Splits,
    Transform,
    image_folders,
    input_transform,
    length,
    prepared,
    root_of,
    standard_transforms,
)
from lth_plugins.training.places import contents
from lth_plugins.transfer.config import Data

SOURCES: Registry[Callable[[Data, Transform, bool], Splits]] = Registry("data.name")
"""Datasets by name: ``source(data, to_input, augment)``."""


def open_images(data: Data, spec: InputSpec, augment: bool) -> Splits:
    """Open the dataset that a configuration names.

    Args:
        data: its configuration.
        spec: channel order and normalisation that the network wants.
        augment: the images to train on; False gives them as those to validate on.

    Returns:
        Images as float32 [3, size, size] and labels; ``val`` is the dataset's test split, or its
        validation split where the labels of the test split are not public.

    Raises:
        ConfigError: if the name is unknown.
        RunError: if the data is not where it should be.
    """
    return prepared(SOURCES[data.name](data, input_transform(spec), augment), data)


@SOURCES.register("digits")
def _digits(data: Data, to_input: Transform, augment: bool) -> Splits:
    """Digits in any colours on textured backgrounds; to train on, drawn anew in each epoch."""
    from lth_plugins.digits import CLASSES, DigitDataset

    train, val = (
        DigitDataset(split, data.size, augment=True, transform=to_input)
        for split in ("train", "test")
    )
    return Splits(train if augment else _Fixed(train), _Fixed(val), CLASSES)


class _Fixed(Dataset[tuple[Any, int]]):
    """The same draw of each image every time."""

    def __init__(self, drawn: Labelled) -> None:
        self.drawn = drawn

    def __len__(self) -> int:
        return length(self.drawn)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        with seeded(seed_of(index)):
            return self.drawn[index]


@dataclass(frozen=True)
class _Torchvision:
    """A dataset of small images that torchvision reads and can download.

    Attributes:
        title: for people.
        open: ``open(root, train, download=…, transform=…)``: a split of it.
        size: side of its images.
        flips: whether the paper's code augments: a crop after padding by an eighth, and flips.
        prepare: applied first.
    """

    title: str
    open: Callable[..., Any]
    size: int
    flips: bool
    prepare: tuple[Transform, ...] = ()

    def __call__(self, data: Data, to_input: Transform, augment: bool) -> Splits:
        resize = [T.Resize((data.size, data.size))] if data.size != self.size else []
        plain: list[Transform] = [*self.prepare, *resize]
        moves: list[Transform] = []
        if augment and self.flips:
            moves = [T.RandomCrop(data.size, data.size // 8), T.RandomHorizontalFlip()]
        train = self._split(data, True, T.Compose([*plain, *moves, to_input]))
        val = self._split(data, False, T.Compose([*plain, to_input]))
        classes = getattr(train, "classes", tuple("0123456789"))  # SVHN's have no names
        return Splits(train, val, tuple(classes))

    def _split(self, data: Data, train: bool, transform: Transform) -> Any:
        root = root_of(data)
        try:
            return self.open(str(root), train, download=data.download, transform=transform)
        except ModuleNotFoundError as error:
            raise RunError(f"{self.title} needs {error.name}: pip install {error.name}") from None
        except (RuntimeError, OSError, ValueError, AssertionError) as error:
            # What torchvision raises for a dataset that is missing, damaged or out of reach.
            if data.download:
                reason = f"and downloading it failed: {error}"
            else:
                reason = "all of it, undamaged; or give data.download=true"
            raise RunError(
                f"expected {self.title} in data.root={root}, as torchvision stores it, found "
                f"{contents(root)}: put it there, {reason}"
            ) from None


def _svhn(root: str, train: bool, **options: Any) -> SVHN:
    return SVHN(root, "train" if train else "test", **options)


@SOURCES.register("imagefolder")
def _imagefolder(data: Data, to_input: Transform, augment: bool) -> Splits:
    """``train/CLASS/*`` and ``val/CLASS/*``, with the transforms of torchvision's references."""
    augmented, plain = standard_transforms(data, to_input)
    return image_folders(data, augmented if augment else plain, plain)


@SOURCES.register("visda2017")
def _visda2017(data: Data, to_input: Transform, augment: bool) -> Splits:
    """``train/CLASS/*`` and ``validation/CLASS/*``, with the transforms of the paper's code."""
    crop = T.RandomResizedCrop(data.size, scale=(0.75, 1.33))
    augmented = T.Compose([crop, T.RandomHorizontalFlip(), to_input])
    plain = T.Compose([T.Resize((data.size, data.size)), to_input])
    return image_folders(data, augmented if augment else plain, plain, "validation")


SOURCES.register("cifar10", _Torchvision("CIFAR-10", CIFAR10, 32, flips=True))
SOURCES.register("cifar100", _Torchvision("CIFAR-100", CIFAR100, 32, flips=True))
SOURCES.register("svhn", _Torchvision("SVHN", _svhn, 32, flips=False))
_GREY = (T.Grayscale(3),)
SOURCES.register("fashionmnist", _Torchvision("Fashion-MNIST", FashionMNIST, 28, False, _GREY))
