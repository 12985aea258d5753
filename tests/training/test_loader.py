"""Images to train on: they repeat exactly, and a folder that is no dataset is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from lth_plugins.errors import LthError
from lth_plugins.pretrain.data import open_images
from lth_plugins.resilience.seeds import seed_of
from lth_plugins.training.loader import Splits, TrainLoader
from lth_plugins.training.settings import Data

DIGITS = Data(name="digits", size=16, subset=48)


@pytest.fixture(scope="module")
def digits() -> Splits:
    return open_images(DIGITS)


def epochs(loader: TrainLoader, count: int) -> list[torch.Tensor]:
    """The images of all batches of some epochs."""
    return [images for _ in range(count) for images, _ in loader]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_a_seed_fixes_order_and_augmentation_however_images_are_loaded(digits: Splits) -> None:
    batches = epochs(TrainLoader(digits.train, 16, seed=3), 2)
    torch.manual_seed(99)
    assert same(batches, epochs(TrainLoader(digits.train, 16, seed=3), 2))
    assert same(batches, epochs(TrainLoader(digits.train, 16, seed=3, workers=2), 2))
    assert not same(batches, epochs(TrainLoader(digits.train, 16, seed=4), 2))


def test_each_epoch_is_drawn_anew(digits: Splits) -> None:
    batches = epochs(TrainLoader(digits.train, 48, seed=3), 2)
    assert not torch.equal(batches[0], batches[1])


def test_loading_leaves_the_global_random_numbers_alone(digits: Splits) -> None:
    batches = iter(TrainLoader(digits.train, 16, seed=3))
    next(batches)
    before = torch.get_rng_state()
    next(batches)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("stopped_after", [1, 3, 5])
@pytest.mark.parametrize("workers", [0, 1])
def test_a_loader_resumes_inside_an_epoch(stopped_after: int, workers: int, digits: Splits) -> None:
    whole = epochs(TrainLoader(digits.train, 16, seed=3), 3)
    first = TrainLoader(digits.train, 16, seed=3, workers=workers)
    taken = []
    while len(taken) < stopped_after:
        for images, _ in first:
            taken.append(images)
            if len(taken) == stopped_after:
                break
    second = TrainLoader(digits.train, 16, seed=3, workers=workers)
    second.load_state_dict(first.state_dict())
    while len(taken) < len(whole):
        taken += [images for images, _ in second]
    assert same(taken, whole)


def test_processes_share_each_global_batch(digits: Splits) -> None:
    whole = epochs(TrainLoader(digits.train, 16, seed=3), 1)
    ranks = [epochs(TrainLoader(digits.train, 16, 3, rank, world=2), 1) for rank in (0, 1)]
    for batch, first, second in zip(whole, *ranks, strict=True):
        assert torch.equal(torch.stack([first, second], dim=1).flatten(0, 1), batch)


def test_a_loader_that_cannot_fill_a_batch_is_refused(digits: Splits) -> None:
    with pytest.raises(LthError, match="one batch of 64 images to train on, found 48"):
        TrainLoader(digits.train, 64, seed=0)
    with pytest.raises(LthError, match="cannot be shared by 3 processes"):
        TrainLoader(digits.train, 16, seed=0, world=3)


def test_seeds_of_different_parts_differ() -> None:
    seeds = {seed_of(seed, stream) for seed in range(20) for stream in range(20)}
    assert len(seeds) == 400


def test_digits_to_train_and_to_validate_on_are_disjoint() -> None:
    images = open_images(Data(name="digits", size=32))
    assert (len(images.train), len(images.val)) == (1442, 355)
    assert images.classes == tuple("0123456789")


def image(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (20, 12), (200, 30, 30)).save(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            image(tmp_path / split / name / "0.png")
    return tmp_path


def test_a_folder_of_classes_is_a_dataset(folder: Path) -> None:
    images = open_images(Data(name="imagefolder", root=str(folder), size=16))
    assert images.classes == ("cat", "dog")
    for split in (images.train, images.val):
        found, label = split[1]
        assert (tuple(found.shape), label) == ((3, 16, 16), 1)


def test_a_subset_has_images_of_all_classes(folder: Path) -> None:
    for number in range(1, 4):
        for name in ("cat", "dog"):
            image(folder / "train" / name / f"{number}.png")
    images = open_images(Data(name="imagefolder", root=str(folder), size=16, subset=2))
    for split in (images.train, images.val, images.bank):
        assert [split[i][1] for i in range(len(split))] == [0, 1]


def test_a_folder_that_is_not_there_or_has_no_splits_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LthError, match=r"needs data\.root"):
        open_images(Data(name="imagefolder"))
    with pytest.raises(LthError, match="expected a folder of images at .*train, found none"):
        open_images(Data(name="imagefolder", root=str(tmp_path)))


def test_a_folder_without_images_is_refused(folder: Path) -> None:
    (folder / "train" / "dog" / "0.png").rename(folder / "train" / "dog" / "0.txt")
    with pytest.raises(LthError, match="expected images in .*dog, found none"):
        open_images(Data(name="imagefolder", root=str(folder)))


def test_other_classes_to_validate_than_to_train_on_are_refused(folder: Path) -> None:
    image(folder / "val" / "eel" / "0.png")
    with pytest.raises(LthError, match="same class folders .* found 1 .* eel in val/"):
        open_images(Data(name="imagefolder", root=str(folder)))


def test_an_unknown_dataset_is_refused() -> None:
    with pytest.raises(LthError, match="known are digits, calm_digits, imagefolder"):
        open_images(Data(name="cifar10"))
