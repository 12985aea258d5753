"""Datasets that a config names, and image files that cannot be read: said before a training."""

import json
import shutil
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances

from lth_plugins.commands.det import main, make_parser
from lth_plugins.detectron2.evaluation import evaluators_of
from lth_plugins.errors import ConfigError
from lth_plugins.training import images
from lth_plugins.training.images import UnreadableImage

Command = Callable[..., Namespace]


@pytest.fixture
def copied(scenes: Path, tmp_path: Path) -> Path:
    """A copy of the scenes, registered as copied_{train,test} while a test runs."""
    folder = tmp_path / "scenes"
    shutil.copytree(scenes, folder)
    for split in ("train", "test"):
        annotations = folder / f"annotations/instances_{split}.json"
        register_coco_instances(
            f"copied_{split}", {}, str(annotations), str(folder / "images" / split)
        )
    yield folder
    for split in ("train", "test"):
        DatasetCatalog.remove(f"copied_{split}")
        MetadataCatalog.remove(f"copied_{split}")


def spoil(folder: Path, split: str, how: str) -> Path:
    """Make the first annotated image of a split unreadable, and return its path."""
    entries = json.loads((folder / f"annotations/instances_{split}.json").read_text())
    annotated = {entry["image_id"] for entry in entries["annotations"]}
    name = next(i["file_name"] for i in entries["images"] if i["id"] in annotated)
    path = folder / "images" / split / name
    if how == "missing":
        path.unlink()
    else:
        content = {"empty": b"", "text": b"no image", "truncated": path.read_bytes()[:-200]}
        path.write_bytes(content[how])
    return path


@pytest.mark.parametrize(
    ("split", "how", "found"),
    [("train", "truncated", "cannot be read"), ("test", "missing", "found nothing")],
)
def test_an_unreadable_image_is_named_before_the_training(
    split: str,
    how: str,
    found: str,
    copied: Path,
    train_det: ModuleType,
    command: Command,
    tmp_path: Path,
) -> None:
    path = spoil(copied, split, how)
    options = {"DATASETS.TRAIN": "('copied_train',)", "DATASETS.TEST": "('copied_test',)"}
    with pytest.raises(UnreadableImage, match=found) as caught:
        train_det.main(command("fpn", options=options))
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    assert not list((tmp_path / "out").glob("*.pth"))


@pytest.mark.parametrize("workers", [0, 1])
def test_in_a_large_dataset_it_is_named_when_it_is_read(
    workers: int,
    copied: Path,
    train_det: ModuleType,
    command: Command,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(images, "FEW", 1)
    path = spoil(copied, "train", "truncated")
    options = {
        "DATASETS.TRAIN": "('copied_train',)",
        "DATASETS.TEST": (),
        "DATALOADER.NUM_WORKERS": workers,
        "SOLVER.MAX_ITER": 9,
    }
    with pytest.raises(UnreadableImage, match="cannot be read") as caught:
        train_det.main(command("fpn", options=options))
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("workers", [0, 1])
def test_in_an_evaluation_it_is_named_too(
    workers: int,
    copied: Path,
    trained: tuple[object, Path],
    train_det: ModuleType,
    command: Command,
) -> None:
    path = spoil(copied, "test", "empty")
    options = {
        "DATASETS.TEST": "('copied_test',)",
        "MODEL.WEIGHTS": trained[1] / "model_final.pth",
        "DATALOADER.NUM_WORKERS": workers,
    }
    with pytest.raises(UnreadableImage, match=f"{path}, found an empty file"):
        train_det.main(command("fpn", "--eval-only", options=options))


@pytest.mark.parametrize("key", ["DATASETS.TRAIN", "DATASETS.TEST"])
def test_a_dataset_that_is_not_registered_is_named_with_similar_ones(
    key: str, train_det: ModuleType, command: Command
) -> None:
    with pytest.raises(ConfigError) as caught:
        train_det.main(command("fpn", options={key: "('tiny_scene_train',)"}))
    message = str(caught.value)
    assert f"{key}, found 'tiny_scene_train'; did you mean tiny_scenes_train" in message
    assert "DATASETS.REGISTER.tiny_scene_train" in message and "--register" in message
    assert "tiny_scene_train" not in MetadataCatalog.list()


def test_a_dataset_without_an_evaluator_is_told_the_line_that_sets_it(
    train_det: ModuleType, command: Command
) -> None:
    DatasetCatalog.register("of_my_own", list)
    try:
        with pytest.raises(ConfigError) as caught:
            train_det.main(command("fpn", options={"DATASETS.TEST": "('of_my_own',)"}))
        line = 'MetadataCatalog.get("of_my_own").evaluator_type = "coco"'
        assert line in str(caught.value)
        exec(line, {"MetadataCatalog": MetadataCatalog})
        evaluators_of("of_my_own")
    finally:
        DatasetCatalog.remove("of_my_own")
        MetadataCatalog.remove("of_my_own")


def test_a_training_without_datasets_is_refused_and_an_evaluation_too(
    train_det: ModuleType, command: Command, trained: tuple[object, Path]
) -> None:
    with pytest.raises(ConfigError, match=r"found an empty DATASETS\.TRAIN"):
        train_det.main(command("fpn", options={"DATASETS.TRAIN": ()}))
    options = {"MODEL.WEIGHTS": trained[1] / "model_final.pth", "DATASETS.TEST": ()}
    for flags in ([], ["--onnx"], ["--compact", "--onnx"]):
        with pytest.raises(ConfigError, match=r"found an empty DATASETS\.TEST"):
            train_det.main(command("fpn", "--eval-only", *flags, options=options))


def test_no_arguments_is_a_usage_error(
    train_det: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments in ([], ["--eval-only"], ["MODEL.WEIGHTS", "a.pth"]):
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert ended.value.code == 2
        assert "required: --config-file FILE" in capsys.readouterr().err


CONFIGS = Path(__file__).parents[2] / "configs/detectron2"


def test_an_option_after_the_settings_is_told_its_place(
    train_det: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--config-file", "a.yaml", "OUTPUT_DIR", "out", "--resume"])
    assert ended.value.code == 2
    assert "--resume is after the settings (OUTPUT_DIR …)" in capsys.readouterr().err


def refused(train_det: ModuleType, capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line of an error, as every tool has it."""
    capsys.readouterr()
    code, line = main(list(map(str, arguments))), capsys.readouterr().err
    assert code == 2 and line.startswith("lth det: error: "), line
    assert line.count("\n") == 1
    return line


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["MODEL.TICKET.PTH", "a.ticket"], "Non-existent key: MODEL.TICKET.PTH"),
        (["MODEL.TICKET.PATH"], "odd length"),
        (["SOLVER.MAX_ITER", "many"], "SOLVER.MAX_ITER"),
    ],
)
def test_a_setting_that_is_none_is_one_line(
    options: list[str],
    message: str,
    train_det: ModuleType,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = CONFIGS / "digits/faster_rcnn_R_18_FPN_ticket.yaml"
    assert message in refused(train_det, capsys, "--config-file", config, *options)
    assert "missing.yaml" in refused(train_det, capsys, "--config-file", "missing.yaml")


def test_what_a_training_finds_missing_is_one_line(
    train_det: ModuleType, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    config = CONFIGS / "digits/faster_rcnn_R_18_FPN_ticket.yaml"
    options = ["MODEL.TICKET.PATH", "missing.ticket", "OUTPUT_DIR", tmp_path / "out"]
    assert "missing.ticket" in refused(train_det, capsys, "--config-file", config, *options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_the_command_is_told_what_to_add(
    train_det: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    config = CONFIGS / "PascalVOC-Detection/faster_rcnn_R_50_C4_ticket.yaml"
    message = refused(train_det, capsys, "--config-file", config, "--num-gpus", "8")
    assert "MODEL.DEVICE cpu MODEL.RESNETS.NORM BN" in message


def test_the_command_in_the_help_has_its_line_break(train_det: ModuleType) -> None:
    assert "_ticket.yaml \\\n        MODEL" in make_parser("lth det").format_help()
