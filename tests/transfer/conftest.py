"""A configuration small enough to train in seconds, and tiny datasets in the real formats."""

from __future__ import annotations

import hashlib
import pickle
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import scipy.io
from PIL import Image
from torchvision.datasets import CIFAR10, CIFAR100, SVHN

from lth_plugins.digits import DigitDataset
from lth_plugins.transfer import TransferConfig, load_config

TINY = """
arch: resnet18
batch_size: 16
data: {name: digits, size: 16, subset: 32}
optimizer: {weight_decay: 2.0e-4}
training: {epochs: 2, lr: 0.02, warmup_epochs: 1}
trainer: {accelerator: cpu, devices: 1}
"""

Configure = Callable[..., TransferConfig]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("config") / "tiny.yaml"
    path.write_text(TINY)
    return path


@pytest.fixture
def configure(tiny: Path, tmp_path: Path, ticket18_file: Path) -> Configure:
    """``configure("key=value", …)``: two epochs of two steps on digits, unless told otherwise."""

    def make(*overrides: str) -> TransferConfig:
        return load_config(tiny, [f"ticket={ticket18_file}", f"out={tmp_path}/run", *overrides])

    return make


def digits(split: str, size: int, count: int) -> tuple[np.ndarray, list[int]]:
    """Real digits, uint8 [N, size, size, 3], and their labels."""
    dataset = DigitDataset(split, size)
    images, labels = zip(*(dataset[i] for i in range(count)), strict=True)
    return np.stack([np.asarray(image) for image in images]), list(labels)


def _pickle(path: Path, content: object) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(content))
    return _md5(path)


def _md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


def _rows(images: np.ndarray) -> np.ndarray:
    """[N, 3072]: a row has all of red, then green, then blue."""
    return images.transpose(0, 3, 1, 2).reshape(len(images), -1)


# torchvision checks the MD5 sums of the published files. These have the published layout but other
# content, so the fixtures put their sums in place of those; all else of torchvision is untouched.


@pytest.fixture
def cifar10(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = tmp_path / "cifar10"
    folder = root / CIFAR10.base_folder
    images, labels = digits("train", 32, 40)
    for attribute, names in (
        ("train_list", [f"data_batch_{k}" for k in range(1, 6)]),
        ("test_list", ["test_batch"]),
    ):
        parts = np.array_split(np.arange(len(images)), len(names))
        sums = [
            [
                name,
                _pickle(
                    folder / name, {"data": _rows(images[p]), "labels": [labels[i] for i in p]}
                ),
            ]
            for name, p in zip(names, parts, strict=True)
        ]
        monkeypatch.setattr(CIFAR10, attribute, sums)
    names = {"label_names": list("abcdefghij")}
    md5 = _pickle(folder / "batches.meta", names)
    monkeypatch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": md5})
    return root


@pytest.fixture
def cifar100(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = tmp_path / "cifar100"
    folder = root / CIFAR100.base_folder
    images, labels = digits("train", 32, 8)
    for attribute, name in (("train_list", "train"), ("test_list", "test")):
        md5 = _pickle(folder / name, {"data": _rows(images), "fine_labels": labels})
        monkeypatch.setattr(CIFAR100, attribute, [[name, md5]])
    md5 = _pickle(folder / "meta", {"fine_label_names": [f"class {i}" for i in range(100)]})
    monkeypatch.setattr(CIFAR100, "meta", {**CIFAR100.meta, "md5": md5})
    return root


@pytest.fixture
def svhn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = tmp_path / "svhn"
    root.mkdir()
    images, labels = digits("train", 32, 8)
    classes = np.array([10 if label == 0 else label for label in labels], np.uint8)[:, None]
    sums = {}
    for split in ("train", "test"):
        path = root / f"{split}_32x32.mat"
        scipy.io.savemat(path, {"X": images.transpose(1, 2, 3, 0), "y": classes})
        sums[split] = [SVHN.split_list[split][0], path.name, _md5(path)]
    monkeypatch.setattr(SVHN, "split_list", sums)
    return root


@pytest.fixture
def fashionmnist(tmp_path: Path) -> Path:
    root = tmp_path / "fashionmnist"
    folder = root / "FashionMNIST" / "raw"
    folder.mkdir(parents=True)
    images, labels = digits("train", 28, 8)
    for split in ("train", "t10k"):
        header = struct.pack(">iiii", 0x803, len(images), 28, 28)
        (folder / f"{split}-images-idx3-ubyte").write_bytes(header + images[..., 0].tobytes())
        header = struct.pack(">ii", 0x801, len(labels))
        (folder / f"{split}-labels-idx1-ubyte").write_bytes(header + bytes(labels))
    return root


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """A folder of images, two classes, to train and (under both names in use) to validate on."""
    root = tmp_path / "folders"
    images, labels = digits("train", 24, 30)
    for split in ("train", "val", "validation"):
        for digit in (3, 7):
            (root / split / str(digit)).mkdir(parents=True)
            for i in np.flatnonzero(np.array(labels) == digit):
                Image.fromarray(images[i]).save(root / split / str(digit) / f"{i}.png")
    return root
