"""Pictures to pre-train on, in an order and with augmentations that repeat exactly.

Order and augmentation are functions of a seed, the epoch and the picture alone: not of how many
processes load, how many devices share a batch, or whether the run was stopped and resumed.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, Subset
from torchvision import transforms as T

from lth_plugins.errors import unknown
from lth_plugins.pretrain.config import Data
from lth_plugins.resilience.seeds import Seeded, seed_of
from lth_plugins.ticket import IMAGENET, InputSpec, TicketError
from lth_plugins.training.folders import Images, check_folders

Transform = Callable[[Any], Any]  # PIL image to tensor


@dataclass(frozen=True)
class Pictures:
    """A data set: (picture, label) pairs to train and to validate on.

    Attributes:
        train: augmented.
        val: never augmented, disjoint from ``train``.
        bank: those of ``train``, not augmented: whose neighbours in feature space are looked up.
        classes: their names, in the order of the labels.
    """

    train: Dataset[tuple[Any, int]]
    val: Dataset[tuple[Any, int]]
    bank: Dataset[tuple[Any, int]]
    classes: tuple[str, ...]

    def __str__(self) -> str:
        train, val = len(self.train), len(self.val)  # type: ignore[arg-type]
        return f"{train:,} images to train on, {val:,} to validate on, {len(self.classes)} classes"


def open_pictures(
    data: Data, views: Sequence[Transform] | None = None, spec: InputSpec = IMAGENET
) -> Pictures:
    """Open the data set that a configuration names.

    Args:
        data: its configuration.
        views: instead of one picture by the data set's own augmentation, train on a list of
            pictures of the same thing, one by each of these.
        spec: channel order and normalisation that the network wants.

    Raises:
        TicketError: if the name is unknown, or the folder is not such a data set.
    """
    if data.name not in SOURCES:
        raise unknown("data.name", data.name, SOURCES)
    pictures = SOURCES[data.name](data, views, input_transform(spec))
    if data.subset is not None:
        train, val, bank = (
            spread(split, data.subset) for split in (pictures.train, pictures.val, pictures.bank)
        )
        pictures = Pictures(train, val, bank, pictures.classes)
    check_folders(pictures.train, pictures.val)
    return pictures


def spread(split: Dataset[tuple[Any, int]], count: int) -> Dataset[tuple[Any, int]]:
    """That many pictures, evenly spaced: folders of images are sorted by class."""
    size = len(split)  # type: ignore[arg-type]
    return Subset(split, torch.linspace(0, size - 1, min(count, size)).long().tolist())


def input_transform(spec: InputSpec) -> Transform:
    """From a PIL image, RGB, to what a network wants to be fed, float32 [3, H, W]."""
    order = [] if spec.format == "RGB" else [_reverse_channels]
    return T.Compose([T.ToTensor(), *order, T.Normalize(spec.mean, spec.std)])


def _reverse_channels(picture: Tensor) -> Tensor:
    return picture.flip(0)


def _digits(data: Data, views: Sequence[Transform] | None, to_input: Transform) -> Pictures:
    from lth_plugins.digits import CLASSES, DigitDataset

    def digits(split: str, transform: Transform, drawn: bool = False) -> DigitDataset:
        return DigitDataset(split, data.size, augment=drawn, transform=transform)

    def either(transform: Transform) -> Dataset[tuple[Any, int]]:
        plain = digits("train", T.Compose([moved, transform]))
        return _EitherOf(plain, digits("train", transform, drawn=True))

    moved = T.RandomAffine(10, translate=(0.1, 0.1), scale=(0.85, 1.1))
    train = either(to_input) if views is None else _EachOf([either(view) for view in views])
    return Pictures(train, digits("test", to_input), digits("train", to_input), CLASSES)


class _EitherOf(Dataset[tuple[Any, int]]):
    """One of two versions of each picture, tossed anew each time.

    Digits as they are validated on, and digits as they occur in scenes: trained on the former
    alone, a network has seen neither colours nor backgrounds when it is transferred.
    """

    def __init__(self, one: Dataset[tuple[Any, int]], other: Dataset[tuple[Any, int]]) -> None:
        self.one, self.other = one, other

    def __len__(self) -> int:
        return len(self.one)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return (self.one if torch.rand(()) < 0.5 else self.other)[index]


class _EachOf(Dataset[tuple[list[Any], int]]):
    """Each of several versions of each picture: the views of a digit are drawings of one scan.

    Two crops of one drawing would share its colours and its ground, and tell by those alone that
    they belong together: no shape needs to be learned.
    """

    def __init__(self, versions: Sequence[Dataset[tuple[Any, int]]]) -> None:
        self.versions = versions

    def __len__(self) -> int:
        return len(self.versions[0])  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> tuple[list[Any], int]:
        pictures, labels = zip(*(version[index] for version in self.versions), strict=True)
        return list(pictures), labels[0]


def _imagefolder(data: Data, views: Sequence[Transform] | None, to_input: Transform) -> Pictures:
    if data.root is None:
        raise TicketError("data.name=imagefolder needs data.root: the folder with train/ and val/")
    root = Path(data.root).expanduser()
    # The augmentation that torchvision's first ImageNet weights were trained with.
    drawn: Transform = T.Compose(
        [T.RandomResizedCrop(data.size), T.RandomHorizontalFlip(), to_input]
    )
    plain = T.Compose([T.Resize(data.size * 256 // 224), T.CenterCrop(data.size), to_input])
    if views is not None:
        drawn = _Each(views)
    train, val = Images(root / "train", drawn), Images(root / "val", plain)
    check_same_classes(train.classes, root / "train", val.classes, root / "val")
    bank = copy.copy(train)
    bank.transform = plain
    return Pictures(train, val, bank, tuple(train.classes))


class _Each:
    """Each of several transforms of one picture: decodes it once for all views."""

    def __init__(self, views: Sequence[Transform]) -> None:
        self.views = views

    def __call__(self, picture: Any) -> list[Any]:
        return [view(picture) for view in self.views]


def check_same_classes(one: Sequence[str], where: Path, other: Sequence[str], there: Path) -> None:
    """Raise ``TicketError`` unless two splits, in these folders, have the same class folders."""
    odd = sorted(set(one) ^ set(other))
    if odd:
        side = where if odd[0] in one else there
        raise TicketError(
            f"expected the same class folders in {where} and {there}, found {len(odd)} in one "
            f"only, such as {odd[0]} in {side.name}/"
        )


SOURCES: dict[str, Callable[[Data, Sequence[Transform] | None, Transform], Pictures]] = {
    "digits": _digits,
    "imagefolder": _imagefolder,
}


class TrainLoader(DataLoader):
    """Shuffled, augmented batches that go on where they were stopped.

    Lightning keeps `state_dict` in its checkpoints. One pass is one epoch; the last incomplete
    batch is left out. Of each global batch, a rank gets every ``world``-th picture.

    Args:
        dataset: the pictures.
        batch_size: pictures in a global batch.
        seed: as `seed_of` makes them: of the run and of one training in it.
        rank: of this process, from 0.
        world: processes that share each batch.
        workers: processes that load pictures.

    Raises:
        TicketError: if the pictures fill no batch, or the ranks cannot share one evenly.
    """

    def __init__(
        self,
        dataset: Dataset[tuple[Any, int]],
        batch_size: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
        workers: int = 0,
    ) -> None:
        count = len(dataset)  # type: ignore[arg-type]
        if count < batch_size:
            raise TicketError(
                f"expected at least one batch of {batch_size} pictures to train on, found {count}: "
                "lower batch_size"
            )
        if batch_size % world:
            raise TicketError(
                f"batch_size={batch_size} cannot be shared by {world} processes: give a multiple"
            )
        self.order = Order(count // batch_size * batch_size, count, seed, rank, world)
        super().__init__(
            Seeded(dataset),
            batch_size // world,
            sampler=self.order,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=torch.cuda.is_available(),
        )

    def __iter__(self) -> Iterator[Any]:
        epoch, batch = divmod(self.position, len(self))
        self.order.start(epoch, batch * (self.batch_size or 1))
        for pictures in super().__iter__():
            self.position += 1  # before it is used: a checkpoint made after its step has used it
            yield pictures

    position = 0
    """Batches handed out so far, in all epochs."""

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]


class Order(Sampler[tuple[int, int]]):
    """A rank's share of a shuffled epoch: (index, seed of its augmentation) pairs.

    Args:
        used: pictures of an epoch, over all ranks.
        count: pictures there are.
        seed: of the training.
        rank: of this process, from 0.
        world: processes that share an epoch.
    """

    def __init__(self, used: int, count: int, seed: int, rank: int, world: int) -> None:
        self.used, self.count, self.seed = used, count, seed
        self.rank, self.world = rank, world
        self.start(0, 0)

    def start(self, epoch: int, skip: int) -> None:
        """Make the next pass that of this epoch, without this rank's first ``skip`` pictures."""
        self.epoch, self.skip = epoch, skip

    def __len__(self) -> int:
        return self.used // self.world

    def __iter__(self) -> Iterator[tuple[int, int]]:
        generator = torch.Generator().manual_seed(seed_of(self.seed, self.epoch))
        order = torch.randperm(self.count, generator=generator)
        seeds = torch.randint(2**63 - 1, (self.count,), generator=generator)
        share = slice(self.rank + self.skip * self.world, self.used, self.world)
        yield from zip(order[share].tolist(), seeds[share].tolist(), strict=True)
