"""Handwritten digits: nothing leaks, everything repeats, and the annotations say what is drawn."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import v2

from lth_plugins.commands import scenes
from lth_plugins.digits import (
    CLASSES,
    SPLITS,
    DigitDataset,
    Scene,
    load_scans,
    render_scene,
)
from lth_plugins.errors import ConfigError

coco_api = pytest.importorskip("pycocotools.coco")

ROOT = Path(__file__).resolve().parents[1]
TOOL = ROOT / "tools" / "make_digit_scenes.py"
SMALL = ["--train", "12", "--test", "8", "--seed", "3", "--min-size", "96", "--max-size", "120"]


Make = Callable[..., int]


@pytest.fixture(scope="module")
def make() -> Make:
    """Run tools/make_digit_scenes.py in this process: with an output folder, and more options."""
    main = scenes.main
    return lambda out, *options: main(["--out", str(out), *options])


@pytest.fixture(scope="module")
def written(make: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("digits") / "scenes"
    assert make(out, *SMALL) == 0
    return out


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def scene(seed: int | list[int], split: str = "train", **limits: object) -> Scene:
    return render_scene(np.random.default_rng(seed), split, **limits)  # type: ignore[arg-type]


# Scans


def test_the_splits_share_no_scan_and_leave_none_out_of_any_class() -> None:
    train, test = ({image.tobytes() for image in load_scans(split)[0]} for split in SPLITS)
    assert not train & test and len(train | test) == 1797
    train, test = (np.bincount(load_scans(split)[1], minlength=10) for split in SPLITS)
    assert np.array_equal(test, (train + test) // 5)


def test_scans_cannot_be_changed_by_accident() -> None:
    for array in load_scans("train"):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0


def test_an_unknown_split_is_named_with_the_known_ones() -> None:
    for use in (load_scans, DigitDataset, lambda split: scene(0, split)):
        with pytest.raises(ConfigError, match="'val'.*train, test"):
            use("val")


# The pre-training dataset


def test_a_plain_image_is_the_scan_up_sampled() -> None:
    dataset = DigitDataset("test", size=32)
    image, label = dataset[7]
    assert (image.mode, image.size) == ("RGB", (32, 32))
    assert label == dataset.targets[7] == load_scans("test")[1][7]
    shrunk = np.asarray(image.convert("L").resize((8, 8), Image.Resampling.BOX), int)
    assert np.abs(shrunk - load_scans("test")[0][7]).mean() < 25
    assert image.tobytes() == dataset[7][0].tobytes()


def test_augmented_images_vary_and_follow_the_seed_of_torch() -> None:
    dataset = DigitDataset("train", size=40, augment=True)
    torch.manual_seed(5)
    first, second = dataset[3][0], dataset[3][0]
    torch.manual_seed(5)
    assert first.size == (40, 40)
    assert first.tobytes() == dataset[3][0].tobytes() != second.tobytes()


def test_torchvision_transforms_and_data_loaders_accept_it() -> None:
    to_tensor = v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])
    dataset = DigitDataset("test", size=24, augment=True, transform=to_tensor)
    loader = torch.utils.data.DataLoader(dataset, batch_size=16, num_workers=2)
    images, labels = next(iter(loader))
    assert images.shape == (16, 3, 24, 24)
    assert labels.tolist() == dataset.targets[:16]
    assert len({image.numpy().tobytes() for image in images}) == 16


@settings(max_examples=20, deadline=None)
@given(size=st.integers(8, 80), index=st.integers(0, 354), seed=st.integers(0, 2**32))
def test_an_augmented_image_of_any_size_has_that_size(size: int, index: int, seed: int) -> None:
    torch.manual_seed(seed)
    image, _ = DigitDataset("test", size=size, augment=True)[index]
    assert image.size == (size, size)
    assert np.ptp(np.asarray(image.convert("L"), int)) > 50


def test_images_smaller_than_a_scan_are_refused() -> None:
    with pytest.raises(ConfigError, match="size is 7"):
        DigitDataset("train", size=7)


# Scenes


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**63),
    split=st.sampled_from(SPLITS),
    low=st.integers(64, 160),
    more=st.integers(0, 64),
)
def test_every_scene_agrees_with_its_annotations(
    seed: int, split: str, low: int, more: int
) -> None:
    s = scene(seed, split, min_size=low, max_size=low + more)
    height, width = s.label_map.shape
    count = len(s.labels)
    assert low <= min(height, width) and max(height, width) <= low + more
    assert s.image.shape == (height, width, 3) and s.image.dtype == np.uint8
    assert s.masks.shape == (count, height, width) and s.boxes.shape == (count, 4)
    assert 1 <= count <= 6
    assert np.array_equal(s.labels, load_scans(split)[1][s.scans])

    assert s.masks.sum(axis=0).max() == 1, "visible masks are disjoint"
    by_class = (s.masks * (s.labels + 1)[:, None, None]).sum(axis=0)
    assert np.array_equal(s.label_map, by_class)
    for (x, y, w, h), mask in zip(s.boxes, s.masks, strict=True):
        inside = mask[y : y + h, x : x + w]
        assert inside.sum() == mask.sum() > 0
        assert inside[0].any() and inside[-1].any() and inside[:, 0].any() and inside[:, -1].any()


def test_calm_scenes_have_few_large_digits_side_by_side_on_light_or_dark_ground() -> None:
    for s in (scene(seed, look="calm", min_size=96, max_size=96) for seed in range(40)):
        assert 1 <= len(s.labels) <= 3
        assert s.boxes[:, 3].min() > 20 and s.boxes[:, 2:].max() < 80
        (x, y), (right, below) = s.boxes[:, :2].T, (s.boxes[:, :2] + s.boxes[:, 2:]).T
        apart = (x[:, None] >= right) | (right[:, None] <= x)
        apart |= (y[:, None] >= below) | (below[:, None] <= y)
        assert (apart | np.eye(len(s.labels), dtype=bool)).all()
        grey = s.image @ np.array([0.299, 0.587, 0.114])
        ground = np.median(grey[s.label_map == 0])
        assert abs(ground - 128) > 40
        assert all(abs(np.median(grey[mask]) - ground) > 90 for mask in s.masks)


def test_busy_is_what_scenes_and_digits_look_like_by_default() -> None:
    assert scene(8, look="busy").image.tobytes() == scene(8).image.tobytes()
    drawn = []
    for look in ({}, {"look": "busy"}, {"look": "calm"}):
        torch.manual_seed(5)
        drawn.append(DigitDataset("train", size=40, augment=True, **look)[3][0].tobytes())
    assert drawn[0] == drawn[1] != drawn[2]


def test_an_unknown_look_is_named_with_the_known_ones() -> None:
    for use in (lambda look: scene(0, look=look), lambda look: DigitDataset("train", look=look)):
        with pytest.raises(ConfigError, match="'calmer'.*busy, calm"):
            use("calmer")


def test_scenes_vary_in_shape_size_polarity_and_overlap() -> None:
    scenes = [scene(seed) for seed in range(60)]
    assert len({s.label_map.shape for s in scenes}) > 50
    heights = np.concatenate([s.boxes[:, 3] for s in scenes])
    assert heights.min() < 24 and heights.max() > 50
    ink_is_lighter = [
        s.image[s.label_map > 0].mean() > s.image[s.label_map == 0].mean() for s in scenes
    ]
    assert 0.2 < np.mean(ink_is_lighter) < 0.8

    def boxes_overlap(s: Scene) -> bool:
        cover = np.zeros(s.label_map.shape, int)
        for x, y, w, h in s.boxes:
            cover[y : y + h, x : x + w] += 1
        return bool(cover.max() > 1)

    assert np.mean([boxes_overlap(s) for s in scenes]) > 0.2


def test_ink_stands_out_from_the_ground_around_it() -> None:
    luminance = np.array([0.299, 0.587, 0.114])
    contrasts = []
    for s in map(scene, range(40)):
        grey = s.image @ luminance
        for (x, y, w, h), mask in zip(s.boxes, s.masks, strict=True):
            around = grey[y : y + h, x : x + w][s.label_map[y : y + h, x : x + w] == 0]
            contrasts.append(abs(np.median(grey[mask]) - np.median(around)) if around.size else 255)
    assert np.quantile(contrasts, 0.05) > 50


def test_digits_hide_parts_of_others_but_never_most_of_one() -> None:
    """Ink per box of a digit shows how much is hidden, beside digits that overlap no other."""
    apart, crowded = [], []
    for s in map(scene, range(60)):
        fills = s.masks.sum(axis=(1, 2)) / s.boxes[:, 2:].prod(axis=1)
        (x, y), (right, below) = s.boxes[:, :2].T, (s.boxes[:, :2] + s.boxes[:, 2:]).T
        meet = (x[:, None] < right) & (x < right[:, None])
        meet &= (y[:, None] < below) & (y < below[:, None])
        for fill, others in zip(fills, meet.sum(axis=1) - 1, strict=True):
            (crowded if others else apart).append(fill)
    assert len(crowded) > 20
    assert 0.5 * min(apart) < min(crowded)


@pytest.mark.parametrize(
    "limits", [{"min_size": 63}, {"min_size": 100, "max_size": 99}, {"max_size": 4096}]
)
def test_limits_out_of_range_are_refused(limits: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="expected|cannot"):
        scene(0, **limits)


# Scenes on disk


@pytest.mark.parametrize("split", SPLITS)
def test_pycocotools_reads_the_masks_boxes_and_classes_that_were_drawn(
    written: Path, split: str
) -> None:
    coco = coco_api.COCO(str(written / "annotations" / f"instances_{split}.json"))
    names = {c["id"]: c["name"] for c in coco.loadCats(coco.getCatIds())}
    assert names == {i + 1: name for i, name in enumerate(CLASSES)}
    for i, image_id in enumerate(coco.getImgIds()):
        info = coco.loadImgs(image_id)[0]
        rng = np.random.default_rng([3, SPLITS.index(split), i])
        drawn = render_scene(rng, split, min_size=96, max_size=120)
        image = Image.open(written / "images" / split / info["file_name"])
        label_map = Image.open(written / "labels" / split / info["file_name"])
        assert (image.mode, label_map.mode) == ("RGB", "L")
        assert np.array_equal(np.asarray(image), drawn.image)
        assert np.array_equal(np.asarray(label_map), drawn.label_map)
        assert (info["height"], info["width"]) == drawn.label_map.shape
        found = coco.loadAnns(coco.getAnnIds(imgIds=image_id, iscrowd=False))
        assert len(found) == len(drawn.labels)
        for n, annotation in enumerate(found):
            mask = coco.annToMask(annotation)
            assert np.array_equal(mask, drawn.masks[n])
            assert annotation["area"] == mask.sum()
            assert annotation["bbox"] == drawn.boxes[n].tolist()
            assert names[annotation["category_id"]] == CLASSES[drawn.labels[n]]


def test_a_few_dozen_scenes_show_every_class() -> None:
    for split in SPLITS:
        seen = np.concatenate([scene(seed, split).labels for seed in range(40)])
        assert set(seen) == set(range(10))


def test_the_same_seed_draws_the_same_scenes_however_many_are_asked_for(
    make: Make, written: Path, tmp_path: Path
) -> None:
    assert make(tmp_path / "again", *SMALL) == make(tmp_path / "more", *SMALL, "--train=14") == 0
    before, more = contents(written), contents(tmp_path / "more")
    assert contents(tmp_path / "again") == before
    images = {name for name in before if name.endswith(".png")}
    assert len(images) == 2 * (12 + 8)
    assert all(more[name] == before[name] for name in images)


def test_a_second_run_changes_nothing(
    make: Make, written: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    times = {path: path.stat().st_mtime_ns for path in written.rglob("*")}
    assert make(written, *SMALL) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert make(written, *SMALL, "--seed=4") == 2, "other settings never overwrite"
    message = capsys.readouterr().err
    assert "seed 3 there, 4 asked for" in message and "delete it" in message
    assert {path: path.stat().st_mtime_ns for path in written.rglob("*")} == times
    assert [path.name for path in written.parent.iterdir()] == ["scenes"]


@pytest.mark.parametrize("manifest", [None, "", "[]", '{"format": 1'])
def test_an_incomplete_folder_is_not_accepted_as_scenes(
    make: Make, tmp_path: Path, manifest: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "images").mkdir()
    if manifest is not None:
        (tmp_path / "scenes.json").write_text(manifest)
    before = contents(tmp_path)
    assert make(tmp_path, *SMALL) == 2
    assert "no readable scenes.json" in capsys.readouterr().err
    assert contents(tmp_path) == before


def test_only_a_look_that_was_chosen_is_noted(
    make: Make, written: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Scenes that were made before there were looks are still found complete."""
    assert "look" not in json.loads((written / "scenes.json").read_text())
    few = ("--train", "1", "--test", "1")
    assert make(tmp_path, *few, "--look", "calm") == 0
    assert json.loads((tmp_path / "scenes.json").read_text())["look"] == "calm"
    image = Image.open(tmp_path / "images/test/000000.png")
    drawn = scene([0, 1, 0], "test", look="calm")
    assert np.array_equal(np.asarray(image), drawn.image)
    assert make(tmp_path, *few) == 2
    assert "look calm there" in capsys.readouterr().err


def test_a_folder_that_lost_a_file_is_noticed(
    make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = ("--train", "1", "--test", "1")
    assert make(tmp_path, *few) == 0, "an empty folder is filled"
    (tmp_path / "labels" / "test" / "000000.png").unlink()
    assert make(tmp_path, *few) == 2
    assert "lost 1 files" in capsys.readouterr().err


STOPPED = """
import runpy, sys
from tests.reliability.starter import arm
arm("PIL.Image.Image.save", "", int(sys.argv[1]))
sys.argv[:2] = []
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_a_run_that_is_stopped_leaves_no_output(signum: int, code: int, tmp_path: Path) -> None:
    out = tmp_path / "made/scenes"
    command = [sys.executable, "-c", STOPPED, str(int(signum)), TOOL, "--out", out, *SMALL]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    assert not out.exists()
    left = list(out.parent.iterdir())
    assert len(left) == (signum == signal.SIGKILL), "what can tidy up does"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--train", "-1"], "--train is -1"),
        (["--test", "0"], "--test is 0"),
        (["--seed", "-2"], "--seed is -2"),
        (["--min-size", "20"], "scene sides from 20 to 160"),
        (["--min-size", "130", "--max-size", "120"], "scene sides from 130 to 120"),
    ],
)
def test_bad_settings_end_with_one_line_and_code_2(
    make: Make,
    tmp_path: Path,
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert make(tmp_path / "scenes", *arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("below", ["", "inside"])
def test_a_file_in_the_way_is_left_alone(
    make: Make, tmp_path: Path, below: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "file"
    file.write_text("precious")
    assert make(file / below, *SMALL) == 2
    error = capsys.readouterr().err
    assert "file" in error and error.count("\n") == 1
    assert file.read_text() == "precious"


def test_the_settings_are_beside_the_scenes(written: Path) -> None:
    settings = {"train": 12, "test": 8, "seed": 3, "min_size": 96, "max_size": 120}
    assert json.loads((written / "scenes.json").read_text()) == {"format": 1, **settings}
