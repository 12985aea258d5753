"""The data sets of downstream classification, fed as the ticket wants them.

They are torchvision's, and are read from where torchvision stores them; nothing is downloaded
unless the configuration says so.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from torch.utils.data import Dataset
from torchvision import transforms as T
from torchvision.datasets import CIFAR10, CIFAR100, SVHN, FashionMNIST

from lth_plugins.errors import unknown
from lth_plugins.resilience.seeds import seed_of, seeded
from lth_plugins.ticket import InputSpec, TicketError
from lth_plugins.training.folders import Images, check_folders, contents
from lth_plugins.training.loader import Transform, check_same_classes, input_transform, spread
from lth_plugins.transfer.config import Data


@dataclass(frozen=True)
class Pictures:
    """A data set: (picture, label) pairs to train and to validate on.

    Attributes:
        train: augmented, unless features are computed of them.
        val: never augmented, disjoint from ``train``.
        classes: their names, in the order of the labels.
    """

    train: Dataset[tuple[Any, int]]
    val: Dataset[tuple[Any, int]]
    classes: tuple[str, ...]

    def __str__(self) -> str:
        train, val = len(self.train), len(self.val)  # type: ignore[arg-type]
        return f"{train:,} images to train on, {val:,} to validate on, {len(self.classes)} classes"


def open_pictures(data: Data, spec: InputSpec, augment: bool) -> Pictures:
    """Open the data set that a configuration names.

    Args:
        data: its configuration.
        spec: channel order and normalisation that the network wants.
        augment: the pictures to train on; False gives them as those to validate on.

    Returns:
        Pictures as float32 [3, size, size] and labels; ``val`` is the data set's test split, or
        its validation split where the labels of the test split are not public.

    Raises:
        TicketError: if the name is unknown, or the data is not where it should be.
    """
    if data.name not in SOURCES:
        raise unknown("data.name", data.name, SOURCES)
    pictures = SOURCES[data.name](data, input_transform(spec), augment)
    if data.subset is not None:
        train, val = (spread(split, data.subset) for split in (pictures.train, pictures.val))
        pictures = Pictures(train, val, pictures.classes)
    check_folders(pictures.train, pictures.val)
    return pictures


def _digits(data: Data, to_input: Transform, augment: bool) -> Pictures:
    """Digits in any colours on textured grounds: to train on drawn anew in each epoch."""
    from lth_plugins.digits import CLASSES, DigitDataset

    train, val = (
        DigitDataset(split, data.size, augment=True, transform=to_input)
        for split in ("train", "test")
    )
    return Pictures(train if augment else _Fixed(train), _Fixed(val), CLASSES)


class _Fixed(Dataset[tuple[Any, int]]):
    """The same draw of each picture every time."""

    def __init__(self, drawn: Dataset[tuple[Any, int]]) -> None:
        self.drawn = drawn

    def __len__(self) -> int:
        return len(self.drawn)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> tuple[Any, int]:
        with seeded(seed_of(index)):
            return self.drawn[index]


@dataclass(frozen=True)
class _Torchvision:
    """A data set of small pictures that torchvision reads and can download.

    Attributes:
        title: for people.
        open: ``open(root, train, download=…, transform=…)``: a split of it.
        size: side of its pictures.
        flips: whether the paper's code augments: a crop after padding by an eighth, and flips.
        prepare: applied first.
    """

    title: str
    open: Callable[..., Any]
    size: int
    flips: bool
    prepare: tuple[Transform, ...] = ()

    def __call__(self, data: Data, to_input: Transform, augment: bool) -> Pictures:
        resize = [T.Resize((data.size, data.size))] if data.size != self.size else []
        plain: list[Transform] = [*self.prepare, *resize]
        moves: list[Transform] = []
        if augment and self.flips:
            moves = [T.RandomCrop(data.size, data.size // 8), T.RandomHorizontalFlip()]
        train = self._split(data, True, T.Compose([*plain, *moves, to_input]))
        val = self._split(data, False, T.Compose([*plain, to_input]))
        classes = getattr(train, "classes", tuple("0123456789"))  # SVHN's have no names
        return Pictures(train, val, tuple(classes))

    def _split(self, data: Data, train: bool, transform: Transform) -> Any:
        root = _root(data)
        try:
            return self.open(str(root), train, download=data.download, transform=transform)
        except ModuleNotFoundError as error:
            raise TicketError(
                f"{self.title} needs {error.name}: pip install {error.name}"
            ) from None
        except (RuntimeError, OSError, ValueError, AssertionError) as error:
            # What torchvision raises for a data set that is missing, damaged or out of reach.
            if data.download:
                reason = f"and downloading it failed: {error}"
            else:
                reason = "all of it, undamaged; or give data.download=true"
            raise TicketError(
                f"expected {self.title} in data.root={root}, as torchvision stores it, found "
                f"{contents(root)}: put it there, {reason}"
            ) from None


def _svhn(root: str, train: bool, **options: Any) -> SVHN:
    return SVHN(root, "train" if train else "test", **options)


def _imagefolder(data: Data, to_input: Transform, augment: bool) -> Pictures:
    """``train/CLASS/*`` and ``val/CLASS/*``, with the transforms of torchvision's references."""
    standard = T.Compose([T.RandomResizedCrop(data.size), T.RandomHorizontalFlip(), to_input])
    plain = T.Compose([T.Resize(data.size * 256 // 224), T.CenterCrop(data.size), to_input])
    return _folders(data, "val", standard if augment else plain, plain)


def _visda2017(data: Data, to_input: Transform, augment: bool) -> Pictures:
    """``train/CLASS/*`` and ``validation/CLASS/*``, with the transforms of the paper's code."""
    crop = T.RandomResizedCrop(data.size, scale=(0.75, 1.33))
    standard = T.Compose([crop, T.RandomHorizontalFlip(), to_input])
    plain = T.Compose([T.Resize((data.size, data.size)), to_input])
    return _folders(data, "validation", standard if augment else plain, plain)


def _folders(data: Data, val_name: str, train: Transform, val: Transform) -> Pictures:
    root = _root(data)
    one, other = Images(root / "train", train), Images(root / val_name, val)
    check_same_classes(one.classes, root / "train", other.classes, root / val_name)
    return Pictures(one, other, tuple(one.classes))


def _root(data: Data) -> Path:
    if data.root is None:
        raise TicketError(f"data.name={data.name} needs data.root: the folder that has the data")
    return Path(data.root).expanduser()


SOURCES: Mapping[str, Callable[[Data, Transform, bool], Pictures]] = MappingProxyType(
    {
        "digits": _digits,
        "cifar10": _Torchvision("CIFAR-10", CIFAR10, 32, flips=True),
        "cifar100": _Torchvision("CIFAR-100", CIFAR100, 32, flips=True),
        "svhn": _Torchvision("SVHN", _svhn, 32, flips=False),
        "fashionmnist": _Torchvision(
            "Fashion-MNIST", FashionMNIST, 28, flips=False, prepare=(T.Grayscale(3),)
        ),
        "imagefolder": _imagefolder,
        "visda2017": _visda2017,
    }
)
"""Data sets by name: ``source(data, to_input, augment)``."""
