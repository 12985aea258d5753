"""Datasets are read as torchvision stores them, with the input that the ticket wants."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from lth_plugins import InputSpec
from lth_plugins.digits import DigitDataset
from lth_plugins.errors import LthError
from lth_plugins.ticket import UNIT_RANGE
from lth_plugins.transfer.config import Data
from lth_plugins.transfer.data import SOURCES, open_images


def digit(index: int, size: int) -> tuple[Tensor, int]:
    """An image of the tiny datasets: float [3, size, size] in [0, 1], and its label."""
    image, label = DigitDataset("train", size)[index]
    return torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255, label


@pytest.mark.parametrize(
    ("name", "size", "classes"),
    [("cifar10", 32, 10), ("cifar100", 32, 100), ("svhn", 32, 10), ("fashionmnist", 28, 10)],
)
def test_torchvision_datasets_keep_images_and_labels(
    name: str, size: int, classes: int, request: pytest.FixtureRequest
) -> None:
    root = request.getfixturevalue(name)

    found = open_images(Data(name, str(root), size), UNIT_RANGE, augment=False)

    assert len(found.classes) == classes
    for split in (found.train, found.val):
        for index in range(8):
            image, label = split[index]
            expected, expected_label = digit(index, size)
            assert torch.equal(image, expected)
            assert label == expected_label


def test_images_of_another_size_are_resized(fashionmnist: Path) -> None:
    found = open_images(Data("fashionmnist", str(fashionmnist), 40), UNIT_RANGE, augment=True)

    assert found.train[0][0].shape == found.val[0][0].shape == (3, 40, 40)


@pytest.mark.parametrize("name", ["cifar10", "digits"])
def test_only_images_to_train_on_are_augmented(name: str, cifar10: Path) -> None:
    found = open_images(Data(name, str(cifar10), 32), UNIT_RANGE, augment=True)

    assert len({found.train[0][0].numpy().tobytes() for _ in range(10)}) > 1
    assert len({found.val[0][0].numpy().tobytes() for _ in range(10)}) == 1


def test_channels_and_normalisation_are_the_tickets() -> None:
    spec = InputSpec("BGR", mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))
    data = Data("digits", size=16)

    fed = open_images(data, spec, augment=False).val[0][0]

    plain = open_images(data, UNIT_RANGE, augment=False).val[0][0]
    mean, std = torch.tensor(spec.mean)[:, None, None], torch.tensor(spec.std)[:, None, None]
    assert torch.allclose(fed, (plain.flip(0) - mean) / std, atol=1e-6)


@pytest.mark.parametrize("name", ["imagefolder", "visda2017"])
def test_folders_of_images(name: str, folders: Path) -> None:
    found = open_images(Data(name, str(folders), 16), UNIT_RANGE, augment=True)

    assert found.classes == ("3", "7")
    assert found.train[0][0].shape == found.val[0][0].shape == (3, 16, 16)
    assert [found.val[i][1] for i in (0, -1)] == [0, 1]


@pytest.mark.parametrize("name", ["cifar10", "digits", "imagefolder"])
def test_few_images_of_each_class_are_the_same_in_every_run(
    name: str, request: pytest.FixtureRequest
) -> None:
    fixture = {"cifar10": "cifar10", "imagefolder": "folders"}.get(name)
    root = str(request.getfixturevalue(fixture)) if fixture else None

    def labels_and_images(count: int, choice: int = 0) -> list[tuple[int, bytes]]:
        data = Data(name, root, 16, per_class=count, choice=choice)
        found = open_images(data, UNIT_RANGE, augment=False)
        assert len(found.val) == whole  # these are for training only
        return [(label, image.numpy().tobytes()) for image, label in found.train]

    whole = len(open_images(Data(name, root, 16), UNIT_RANGE, augment=False).val)
    one, two = labels_and_images(1), labels_and_images(2)
    classes = {label for label, _ in two}
    assert sorted(label for label, _ in two) == sorted([*classes, *classes])
    assert two == labels_and_images(2) and set(one) < set(two)
    assert any(one != labels_and_images(1, choice) for choice in range(1, 6))


class TestBadInput:
    def test_a_class_with_too_few_images(self, folders: Path) -> None:
        data = Data("imagefolder", str(folders), 16, per_class=1000)
        with pytest.raises(LthError, match=r"expected 1000 images .* found \d+ in 3: lower data"):
            open_images(data, UNIT_RANGE, True)

    @pytest.mark.parametrize("name", ["cifar10", "cifar100", "svhn", "fashionmnist"])
    def test_a_missing_dataset_names_the_folder(self, name: str, tmp_path: Path) -> None:
        root = tmp_path / "nothing" / "here"

        with pytest.raises(LthError, match=rf"{root}.*no such folder.*data\.download=true"):
            open_images(Data(name, str(root)), UNIT_RANGE, True)

        assert not root.exists()

    def test_a_damaged_dataset(self, cifar10: Path) -> None:
        (cifar10 / "cifar-10-batches-py" / "data_batch_3").write_bytes(b"")

        with pytest.raises(LthError, match=r"expected CIFAR-10 in .*found cifar-10-batches-py"):
            open_images(Data("cifar10", str(cifar10)), UNIT_RANGE, True)

    def test_an_unknown_dataset(self) -> None:
        with pytest.raises(LthError, match=r"unknown data.name 'cifar'; known are digits"):
            open_images(Data("cifar"), UNIT_RANGE, True)

    @pytest.mark.parametrize("name", sorted(SOURCES.keys() - {"digits"}))
    def test_no_root(self, name: str) -> None:
        with pytest.raises(LthError, match=f"data.name={name} needs data.root"):
            open_images(Data(name), UNIT_RANGE, True)

    def test_a_split_without_classes(self, folders: Path) -> None:
        shutil.rmtree(folders / "train")
        (folders / "train").mkdir()

        with pytest.raises(LthError, match=r"one folder per class in .*train.*class folder"):
            open_images(Data("imagefolder", str(folders)), UNIT_RANGE, True)
