"""Datasets of images, and batches of them in an order and with augmentations that repeat exactly.

Order and augmentation are functions of a seed, the epoch and the image alone: not of how many
processes load, how many devices share a batch, or whether the run was stopped and resumed.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, Subset
from torchvision import transforms as T

from lth_plugins.errors import ConfigError, RunError, TicketError
from lth_plugins.resilience.seeds import Seeded, seed_of
from lth_plugins.ticket import InputSpec
from lth_plugins.ticket.meta import COLOURS
from lth_plugins.training.folders import Images, check_folders
from lth_plugins.training.images import evenly_spaced
from lth_plugins.training.places import LAYOUTS, check_layout, dataset_path
from lth_plugins.training.settings import Data

Transform = Callable[[Any], Any]  # PIL image to tensor
Labelled = Dataset[tuple[Any, int]]


@dataclass(frozen=True)
class Splits:
    """A dataset: (image, label) pairs to train and to validate on.

    Attributes:
        train: augmented, unless features are computed of them.
        val: never augmented, disjoint from ``train``.
        classes: their names, in the order of the labels.
        bank: the images of ``train``, not augmented, whose neighbours in feature space are looked
            up; None where nothing does.
    """

    train: Labelled
    val: Labelled
    classes: tuple[str, ...]
    bank: Labelled | None = None

    def map(self, change: Callable[[Labelled], Labelled], val: bool = True) -> "Splits":
        """These splits, each changed by a function; ``val`` only if that is True."""
        bank = None if self.bank is None else change(self.bank)
        validated = change(self.val) if val else self.val
        return replace(self, train=change(self.train), val=validated, bank=bank)

    def __str__(self) -> str:
        train, val = length(self.train), length(self.val)
        return f"{train:,} images to train on, {val:,} to validate on, {len(self.classes)} classes"


def prepared(splits: Splits, data: Data) -> Splits:
    """The subset of a dataset that a configuration asks for, its images checked.

    Raises:
        LthError: if images cannot be read, or a class has fewer images than are asked for.
    """
    if data.skip_broken and not isinstance(splits.train, Images):
        raise ConfigError(
            f"data.skip_broken=true is for folders of images, and data.name={data.name} has none: "
            "leave it out"
        )
    if data.per_class is not None:
        chosen = per_class(splits, data.per_class, data.choice)
        splits = splits.map(lambda split: Subset(split, chosen), val=False)
    if data.subset is not None:
        count = data.subset
        splits = splits.map(lambda split: spread(split, count))
    if not data.skip_broken:
        check_folders(splits.train, splits.val)
    return splits


def length(split: Labelled) -> int:
    return len(split)  # type: ignore[arg-type]


def spread(split: Labelled, count: int) -> Labelled:
    """That many images, evenly spaced: folders of images are sorted by class."""
    return Subset(split, evenly_spaced(length(split), count))


def per_class(splits: Splits, count: int, seed: int) -> list[int]:
    """The indices of that many training images of each class, sorted.

    Those of a smaller count are among those of a larger one.

    Raises:
        RunError: if a class has fewer.
    """
    labels = torch.as_tensor(labels_of(splits.train))
    chosen: list[int] = []
    for label, name in enumerate(splits.classes):
        indices = (labels == label).nonzero()[:, 0]
        if len(indices) < count:
            raise RunError(
                f"expected {count} images or more to train on in each class, found {len(indices)} "
                f"in {name}: lower data.per_class"
            )
        generator = torch.Generator().manual_seed(seed_of(seed, label))
        order = torch.randperm(len(indices), generator=generator)
        chosen += indices[order[:count]].tolist()
    return sorted(chosen)


def labels_of(split: Labelled) -> Sequence[int]:
    """The labels of a dataset, without reading its images where it knows them."""
    for name in ("targets", "labels"):  # what torchvision's datasets call them
        if hasattr(split, name):
            return getattr(split, name)
    return [split[index][1] for index in range(length(split))]


def input_transform(spec: InputSpec) -> Transform:
    """From a PIL image, RGB, to the input of a network, float32 [3, H, W].

    Raises:
        TicketError: if the network reads bands instead of RGB or BGR.
    """
    if spec.format not in COLOURS:
        raise TicketError(
            f"expected a network that reads photographs, RGB or BGR, found one of {spec.label}: "
            "train it with lth_plugins.attach in a script whose images have these, or take another "
            "ticket"
        )
    spec = spec.of_unit_range
    order = [] if spec.format == "RGB" else [_reverse_channels]
    return T.Compose([T.ToTensor(), *order, T.Normalize(spec.mean, spec.std)])


def _reverse_channels(image: Tensor) -> Tensor:
    return image.flip(0)


def standard_transforms(data: Data, to_input: Transform) -> tuple[Transform, Transform]:
    """Augmentation and validation as torchvision's references have them for ImageNet."""
    augmented = T.Compose([T.RandomResizedCrop(data.size), T.RandomHorizontalFlip(), to_input])
    plain = T.Compose([T.Resize(data.size * 256 // 224), T.CenterCrop(data.size), to_input])
    return augmented, plain


def image_folders(data: Data, train: Transform, val: Transform, val_name: str = "val") -> Splits:
    """``train/CLASS/*`` and ``val/CLASS/*`` in ``data.root``.

    Raises:
        LthError: if there is no root, no such folder, or the splits have different classes.
    """
    root = root_of(data)
    if root.name in LAYOUTS:
        check_layout(root, LAYOUTS[root.name], "data.root")
    where, there = root / "train", root / val_name
    one = Images(where, train, data.skip_broken)
    other = Images(there, val, data.skip_broken)
    odd = sorted(set(one.classes) ^ set(other.classes))
    if odd:
        side = where if odd[0] in one.classes else there
        raise RunError(
            f"expected the same class folders in {where} and {there}, found {len(odd)} in one "
            f"only, such as {odd[0]} in {side.name}/"
        )
    return Splits(one, other, tuple(one.classes))


def root_of(data: Data) -> Path:
    """The folder of a dataset, see `dataset_path`.

    Raises:
        ConfigError: if the configuration names none.
    """
    if data.root is None:
        raise ConfigError(f"data.name={data.name} needs data.root: the folder that has the data")
    return dataset_path(data.root)


class TrainLoader(DataLoader):
    """Shuffled, augmented batches that resume where they were stopped.

    Lightning keeps `state_dict` in its checkpoints. One pass is one epoch, without the last
    incomplete batch. Of each global batch, a rank gets every ``world``-th image.

    Args:
        dataset: the images.
        batch_size: images in a global batch.
        seed: as `seed_of` makes them: of the run and of one training in it.
        rank: of this process, from 0.
        world: processes that share each batch.
        workers: processes that load images.

    Raises:
        ConfigError: if the images fill no batch, or the ranks cannot share one evenly.
    """

    def __init__(
        self,
        dataset: Labelled,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
        workers: int = 0,
    ) -> None:
        count = length(dataset)
        if count < batch_size:
            raise ConfigError(
                f"expected at least one batch of {batch_size} images to train on, found {count}: "
                "lower batch_size"
            )
        if batch_size % world:
            raise ConfigError(
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
        for images in super().__iter__():
            self.position += 1  # before it is used: a checkpoint made after its step has used it
            yield images

    position = 0
    """Batches handed out so far, in all epochs."""

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]


class Order(Sampler[tuple[int, int]]):
    """A rank's share of a shuffled epoch: (index, seed of its augmentation) pairs.

    Args:
        used: images of an epoch, over all ranks.
        count: images there are.
        seed: of the training.
        rank: of this process, from 0.
        world: processes that share an epoch.
    """

    def __init__(self, used: int, count: int, seed: int, rank: int, world: int) -> None:
        self.used, self.count, self.seed = used, count, seed
        self.rank, self.world = rank, world
        self.start(0, 0)

    def start(self, epoch: int, skip: int) -> None:
        """Make the next pass that of this epoch, without this rank's first ``skip`` images."""
        self.epoch, self.skip = epoch, skip

    def __len__(self) -> int:
        return self.used // self.world

    def __iter__(self) -> Iterator[tuple[int, int]]:
        generator = torch.Generator().manual_seed(seed_of(self.seed, self.epoch))
        order = torch.randperm(self.count, generator=generator)
        seeds = torch.randint(2**63 - 1, (self.count,), generator=generator)
        share = slice(self.rank + self.skip * self.world, self.used, self.world)
        yield from zip(order[share].tolist(), seeds[share].tolist(), strict=True)
