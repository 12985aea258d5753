"""Folders of images as people have them: what is odd is read, left out, or named by its path."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torch.utils.data import DataLoader

from lth_plugins.errors import ConfigError, RunError
from lth_plugins.pretrain.data import open_images
from lth_plugins.training.folders import Images, check_folders
from lth_plugins.training.images import UnreadableImage, read_image
from lth_plugins.training.settings import Data

GREY = (np.arange(40 * 40) % 256).astype(np.uint8).reshape(40, 40)
RGB = np.stack([GREY, GREY.T, 255 - GREY], 2)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            folder = tmp_path / split / name
            folder.mkdir(parents=True)
            for i in range(2):
                Image.fromarray(RGB).save(folder / f"{i}.jpg")
    return tmp_path


def refusal(root: Path) -> str:
    with pytest.raises(RunError) as error:
        open_images(Data(name="imagefolder", root=str(root), size=16))
    assert "\n" not in str(error.value)
    return str(error.value)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-200])


def text(path: Path) -> None:
    path.write_text("<html>404</html>")


def another_end(path: Path) -> None:
    Image.fromarray(RGB).save(path, format="PNG")
    path.write_bytes(path.read_bytes()[:-40])


def floats(path: Path) -> None:
    Image.fromarray(GREY.astype(np.float32)).save(path, format="TIFF")


def dangling(path: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere.jpg")


@pytest.mark.parametrize("spoil", [empty, truncated, text, another_end, floats, dangling])
@pytest.mark.parametrize("split", ["train", "val"])
def test_an_image_that_cannot_be_read_is_named_before_a_training(
    root: Path, spoil, split: str
) -> None:
    path = root / split / "dog" / "1.jpg"
    spoil(path)
    said = refusal(root)
    assert said.startswith(f"expected an image at {path}, found ") and "remove it" in said


def test_several_are_counted(root: Path) -> None:
    for name in ("cat", "dog"):
        empty(root / "train" / name / "0.jpg")
    said = refusal(root)
    assert said.startswith("2 images cannot be read: ") and f"{root}/train/dog/0.jpg" in said


def test_only_what_is_used_is_looked_at(root: Path) -> None:
    empty(root / "train/cat/1.jpg")
    open_images(Data(name="imagefolder", root=str(root), size=16, subset=2))


def test_every_kind_of_image_is_read_as_rgb(tmp_path: Path) -> None:
    grey = Image.fromarray(GREY)
    transparent = grey.convert("P")
    transparent.info["transparency"] = bytes(range(256))
    images = {
        "grey.png": grey,
        "cmyk.tif": grey.convert("CMYK"),
        "rgba.png": Image.merge("RGBA", [grey, grey, grey, Image.new("L", grey.size, 0)]),
        "palette.png": grey.convert("P"),
        "transparent.png": transparent,
        "deep.png": Image.fromarray(GREY.astype(np.uint16) * 257),
        "deep.tif": Image.fromarray(GREY.astype(np.uint16) * 257),
        "la.png": grey.convert("LA"),
    }
    for name, image in images.items():
        image.save(tmp_path / name)
        found = np.asarray(read_image(tmp_path / name))
        assert found.shape == (40, 40, 3) and np.abs(found[..., 0].astype(int) - GREY).max() <= 1


def test_hidden_files_and_folders_are_no_classes_and_no_images(
    root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for split in ("train", "val"):
        (root / split / ".ipynb_checkpoints").mkdir()
        Image.fromarray(RGB).save(root / split / ".ipynb_checkpoints" / "0.jpg")
    (root / "train/dog/._0.jpg").write_bytes(b"Mac OS X")
    (root / "train/cat/.ipynb_checkpoints").mkdir()
    Image.fromarray(RGB).save(root / "train/cat/.ipynb_checkpoints/0-checkpoint.jpg")
    with caplog.at_level(logging.INFO):
        images = open_images(Data(name="imagefolder", root=str(root), size=16))
    assert images.classes == ("cat", "dog")
    assert [len(split) for split in (images.train, images.val)] == [4, 4]
    assert f"left out 3 hidden files and folders in {root}/train" in caplog.text


def test_a_root_that_is_another_is_told_which(root: Path, tmp_path: Path) -> None:
    assert f"give data.root={root}" in refusal(root / "train")
    (root / "train").rename(root / "flat")
    assert "holds the classes themselves" in refusal(root / "flat")
    (root / "flat").rename(root / "training")
    assert "has training, val: set data.root to the folder that has" in refusal(root)


def test_an_image_damaged_within_is_named_by_the_worker_that_reads_it(root: Path) -> None:
    images = Images(root / "train", lambda image: 0)
    check_folders(images)
    path = root / "train/cat/0.jpg"
    text(path)
    with pytest.raises(UnreadableImage) as error:
        list(DataLoader(images, num_workers=1))
    assert str(error.value).startswith(f"expected an image at {path}")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("spoil", [empty, truncated, text])
def test_broken_images_are_left_out_and_counted_where_that_is_asked_for(
    root: Path, spoil, caplog: pytest.LogCaptureFixture
) -> None:
    path = root / "train/dog/1.jpg"
    spoil(path)
    data = Data(name="imagefolder", root=str(root), size=16, skip_broken=True)
    with caplog.at_level(logging.WARNING):
        found = [open_images(data) for _ in range(2)]
    assert f"left out 1 of 4 images in {root}/train" in caplog.text and str(path) in caplog.text
    for images in found:  # the same in every process
        assert [label for _, label in images.train] == [0, 0, 1]
        assert len(images.bank) == 3 and len(images.val) == 4
    (root / "train/dog/0.jpg").write_bytes(b"")
    with pytest.raises(RunError, match="none are in the classes dog"):
        open_images(data)


def test_skipping_is_for_folders_of_images() -> None:
    with pytest.raises(ConfigError, match=r"data\.skip_broken=true is for folders of images"):
        open_images(Data(name="digits", size=16, skip_broken=True))


def test_another_layout_of_cifar10_is_told_what_it_is(
    root: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("LTH_DATASETS", str(tmp_path / "all"))

    def said() -> str:
        with pytest.raises(RunError, match=r"docs/photos\.md") as error:
            open_images(Data(name="imagefolder", root="datasets/cifar10", size=16))
        return str(error.value)

    cifar = tmp_path / "all/cifar10"
    assert f"train/CLASS/*.jpg and val/CLASS/*.jpg in {cifar}, found nothing" in said()
    (cifar / "test").mkdir(parents=True)
    (root / "train").rename(cifar / "train")
    assert "rename test/ to val/" in said()
    (cifar / "cifar-10-batches-py").mkdir()
    assert "this is torchvision's CIFAR10; convert it" in said()
    (cifar / "test").rmdir()
    (root / "val").rename(cifar / "val")
    assert len(open_images(Data("imagefolder", "datasets/cifar10", 16)).train) == 4
