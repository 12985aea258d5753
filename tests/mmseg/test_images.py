"""An image file that cannot be read is named: before a run where that is cheap, else when read."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mmengine.runner import Runner
from PIL import Image

from lth_plugins.errors import RunError
from lth_plugins.mmseg import ImagesHook, make_resumable
from lth_plugins.training import images
from lth_plugins.training.images import UnreadableImage

SPOILT = {"empty": b"", "text": b"no image", "truncated": None}
FOUND = {"empty": "an empty file", "text": "no image format", "truncated": "cannot be read"}


@pytest.fixture
def copied(scenes: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(scenes, tmp_path / "scenes"))


def spoil(folder: Path, split: str, how: str, kind: str = "images") -> str:
    """Make an image, or label map, of a split unreadable, and return its path."""
    path = sorted((folder / kind / split).iterdir())[-1]
    content = SPOILT[how]
    path.write_bytes(path.read_bytes()[:-100] if content is None else content)
    return str(path)


def runner_of(tiny_config: Callable[..., Any], folder: Path, **overrides: Any) -> Runner:
    """As tools/train_seg.py makes it."""
    roots = {
        f"{split}_dataloader.dataset.data_root": str(folder) for split in ("train", "val", "test")
    }
    cfg = tiny_config({**roots, "train_cfg.max_iters": 9, **overrides})
    make_resumable(cfg)
    runner = Runner.from_cfg(cfg)
    runner.register_hook(ImagesHook())
    return runner


@pytest.mark.parametrize(
    ("split", "kind", "how"), [("train", "images", "truncated"), ("test", "labels", "empty")]
)
def test_it_is_named_before_the_training(
    how: str, split: str, kind: str, copied: Path, tiny_config: Callable[..., Any]
) -> None:
    path = spoil(copied, split, how, kind)
    runner = runner_of(tiny_config, copied)
    with pytest.raises(UnreadableImage, match=FOUND[how]) as caught:
        runner.train()
    assert path in str(caught.value) and "\n" not in str(caught.value)
    assert not list(Path(runner.work_dir).glob("*.pth"))


@pytest.mark.parametrize("workers", [0, 1])
def test_in_a_large_dataset_it_is_named_when_it_is_read(
    workers: int, copied: Path, tiny_config: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(images, "FEW", 1)
    path = spoil(copied, "train", "text")
    options = {"num_workers": workers, "persistent_workers": bool(workers)}
    overrides = {f"train_dataloader.{key}": value for key, value in options.items()}
    with pytest.raises(UnreadableImage, match="no image format") as caught:
        runner_of(tiny_config, copied, **overrides).train()
    assert path in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(("split", "value"), [("train", 12), ("train", 255), ("test", 200)])
def test_a_label_outside_the_classes_is_named_with_its_file(
    split: str, value: int, copied: Path, tiny_config: Callable[..., Any]
) -> None:
    path = sorted((copied / "labels" / split).iterdir())[0]
    labels = np.array(Image.open(path))
    labels[3, 5] = value
    Image.fromarray(labels).save(path)
    runner = runner_of(tiny_config, copied, **{"train_cfg.max_iters": 1})
    if value == 255:  # what mmseg ignores
        runner.train()
        return
    with pytest.raises(RunError, match=f"labels from 0 to 10 in {path}, .* found {value}"):
        runner.call_hook("before_train")


def test_a_missing_dataset_is_told_where_it_is_from(
    tool: Callable[[str], Any],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    dense18_file: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("LTH_DATASETS", str(tmp_path))
    config = str(Path(__file__).parents[2] / "configs/mmseg/camvid/deeplabv3plus_r18_ticket.py")
    command = [config, "--ticket", str(dense18_file), "--work-dir", str(tmp_path / "out")]
    for there, said in (
        ("", f"in {tmp_path}/camvid, found nothing"),
        ("camvid/LabeledApproved_full", "Cambridge's archive of 32 classes"),
    ):
        (tmp_path / there).mkdir(parents=True, exist_ok=True)
        assert tool("seg").main(command) == 2
        assert said in (error := capfd.readouterr().err) and "docs/photos.md" in error
    for part in ("train", "trainannot", "val", "valannot"):
        (tmp_path / "camvid/CamVid" / part).mkdir(parents=True)
    assert tool("seg").main(command) == 2
    assert f"its parts are in {tmp_path}/camvid/CamVid" in capfd.readouterr().err


def test_in_a_test_it_is_named_too(
    copied: Path, tiny_config: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = spoil(copied, "test", "text")
    for few in (images.FEW, 1):
        monkeypatch.setattr(images, "FEW", few)
        with pytest.raises(UnreadableImage, match=path):
            runner_of(tiny_config, copied).test()


def test_a_checkpoint_that_lacks_the_head_is_not_tested(
    tool: Callable[[str], Any],
    tiny_options: dict[str, Any],
    tiny_config: Callable[..., Any],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Its head would be random, in what is tested and in what is compacted."""
    model = Runner.from_cfg(tiny_config()).model
    state = {k: v for k, v in model.state_dict().items() if k.startswith("backbone.")}
    torch.save({"state_dict": state, "meta": {}}, tmp_path / "trunk.pth")
    config = str(Path(__file__).parents[2] / "configs/mmseg/digits/fcn_r18_ticket.py")
    options = ["--cfg-options", *(f"{k}={v}".replace(" ", "") for k, v in tiny_options.items())]
    for extra in ([], ["--compact", str(tmp_path / "compact.pth")]):
        command = [config, str(tmp_path / "trunk.pth"), "--work-dir", str(tmp_path), *extra]
        assert tool("test_seg").main([*command, *options]) == 2
        assert "none such as decode_head" in capfd.readouterr().err
    assert not (tmp_path / "compact.pth").exists()


@pytest.mark.parametrize(
    ("name", "found"),
    [("broken.pth", "a file that cannot be read"), ("missing.pth", "no such file")],
)
def test_a_checkpoint_that_cannot_be_read_is_named(
    name: str,
    found: str,
    tool: Callable[[str], Any],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "broken.pth").write_bytes(b"junk" * 10)
    config = str(Path(__file__).parents[2] / "configs/mmseg/digits/fcn_r18_ticket.py")
    command = [config, str(tmp_path / name), "--work-dir", str(tmp_path)]
    assert tool("test_seg").main(command) == 2
    error = capfd.readouterr().err
    assert f"{name}, found {found}" in error and "Traceback" not in error
