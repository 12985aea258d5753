"""Detection data of one's own: described in the config, or registered by a file of the user's."""

import json
import re
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

from lth_plugins.commands import det
from lth_plugins.detectron2 import register_datasets
from lth_plugins.detectron2.datasets import import_files
from lth_plugins.errors import ConfigError, LthError, RunError

Command = Callable[..., Namespace]
CLASSES = ["cell", "dot"]
BOX = "<xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax>"
OBJECT = f"<object><name>{{}}</name><bndbox>{BOX}</bndbox></object>"


@pytest.fixture(autouse=True)
def catalog() -> Iterator[None]:
    """Whatever a test registers is gone after it."""
    before = set(DatasetCatalog.list())
    yield
    for name in set(DatasetCatalog.list()) - before:
        DatasetCatalog.remove(name)
        if name in MetadataCatalog.list():
            MetadataCatalog.remove(name)


@pytest.fixture
def voc(tmp_path: Path) -> Path:
    """Six images of 60×40 in VOC's format, with two boxes each."""
    root = tmp_path / "cells"
    for folder in ("Annotations", "ImageSets/Main", "JPEGImages"):
        (root / folder).mkdir(parents=True)
    names = [f"c{i}" for i in range(6)]
    for number, name in enumerate(names):
        image = np.full((40, 60, 3), 40 * number, np.uint8)
        Image.fromarray(image).save(root / f"JPEGImages/{name}.jpg")
        write(root, name, ("cell", 1, 1, 30, 20), ("dot", 31, 21, 60, 40))
    (root / "ImageSets/Main/train.txt").write_text("\n".join(names) + "\n")
    return root


def write(root: Path, name: str, *boxes: tuple[Any, ...]) -> None:
    objects = "".join(OBJECT.format(*box) for box in boxes)
    size = "<size><width>60</width><height>40</height></size>"
    text = f"<annotation>{size}{objects}</annotation>"
    (root / f"Annotations/{name}.xml").write_text(text)


def described(root: Path, **changes: Any) -> dict[str, Any]:
    return {"TYPE": "voc", "ROOT": str(root), "SPLIT": "train", "CLASSES": CLASSES, **changes}


def refusal(root: Path, **changes: Any) -> str:
    register_datasets({"cells": described(root, **changes)})
    with pytest.raises(RunError) as caught:
        DatasetCatalog.get("cells")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_voc_boxes_are_edges_and_a_pixel_outside_is_clipped(voc: Path) -> None:
    write(voc, "c0", ("dot", 0, 0, 60, 41), ("cell", 5, 5, 5, 5))
    register_datasets({"cells": described(voc), "few": described(voc, SUBSET=2)})
    entries = DatasetCatalog.get("cells")
    assert [a["bbox"] for a in entries[0]["annotations"]] == [[0, 0, 60, 40], [4, 4, 5, 5]]
    assert [a["bbox"] for a in entries[1]["annotations"]] == [[0, 0, 30, 20], [30, 20, 60, 40]]
    assert [a["category_id"] for a in entries[0]["annotations"]] == [1, 0]
    assert [Path(e["file_name"]).stem for e in DatasetCatalog.get("few")] == ["c0", "c5"]


@pytest.mark.parametrize(
    ("box", "said"),
    [
        (
            ("cell", 1, 1, 62, 20),
            "inside the image of 60×40 in .*c1.xml, found cell at 1, 1, 62, 20",
        ),
        (("cell", -1, 1, 9, 20), "inside the image .*c1.xml, found cell at -1, 1, 9, 20"),
        (("cell", 9, 1, 3, 20), "xmin ≤ xmax .*c1.xml, found cell at 9, 1, 3, 20"),
        (("cell", "nan", 1, 3, 20), "c1.xml, found cell at nan"),
        (("cel", 1, 1, 3, 20), "class in .*c1.xml 'cel'; known are cell, dot; did you mean 'cell'"),
        (("cell", "x", 1, 3, 20), "four numbers as a box in .*c1.xml"),
    ],
)
def test_a_bad_box_is_named(box: tuple[Any, ...], said: str, voc: Path) -> None:
    write(voc, "c1", box)
    assert re.search(said, refusal(voc))


def test_files_that_are_missing_or_broken_are_named_and_counted(voc: Path) -> None:
    (voc / "Annotations/c0.xml").write_text("<annotation>")
    (voc / "Annotations/c1.xml").unlink()
    (voc / "JPEGImages/c2.jpg").unlink()
    Image.new("RGB", (50, 40)).save(voc / "JPEGImages/c3.jpg")
    said = refusal(voc)
    assert said.startswith("4 of the 6 images of DATASETS.REGISTER.cells cannot be used")
    assert "expected XML in" in said and "c1.xml, found no such file" in said
    assert "c2.jpg, found none; and 1 more" in said


def test_another_layout_is_told_what_it_is(voc: Path) -> None:
    assert f"its parts are in {voc}" in refusal(voc.parent)
    DatasetCatalog.remove("cells")
    assert "found train: give one of them as DATASETS.REGISTER.cells.SPLIT" in refusal(
        voc, SPLIT="val"
    )


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"TYPE": "yolo"}, "unknown DATASETS.REGISTER.mine.TYPE 'yolo'; known are coco, voc"),
        ({"TYPE": "voc", "ROT": "a"}, "'ROT'.*did you mean 'ROOT'"),
        ({"TYPE": "coco", "IMAGES": "a"}, "expected ANNOTATIONS in DATASETS.REGISTER.mine"),
        ({"TYPE": "voc", "ROOT": "a", "SPLIT": "b", "CLASSES": "cell"}, "names of classes"),
    ],
)
def test_a_description_is_checked(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        register_datasets({"mine": settings})
    assert "mine" not in DatasetCatalog.list()


def test_a_name_is_registered_once(voc: Path) -> None:
    register_datasets({"cells": described(voc)})
    register_datasets({"cells": described(voc)})
    for other in ({"cells": described(voc, SUBSET=1)}, {"coco_2017_val": described(voc)}):
        with pytest.raises(ConfigError, match="another dataset is registered"):
            register_datasets(other)


@pytest.mark.parametrize("how", ["category", "classes", "json", "missing"])
def test_categories_that_do_not_match_are_named(how: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    box = {"id": 1, "image_id": 1, "bbox": [1, 1, 5, 5], "category_id": 9, "iscrowd": 0}
    content = {
        "images": [{"id": 1, "file_name": "a.jpg", "width": 9, "height": 9}],
        "annotations": [{**box, "area": 25} | ({} if how == "category" else {"category_id": 1})],
        "categories": [{"id": 1, "name": "cell"}],
    }
    if how != "missing":
        path.write_text("[1" if how == "json" else json.dumps(content))
    settings = {"TYPE": "coco", "ANNOTATIONS": str(path), "IMAGES": str(tmp_path)}
    register_datasets({"mine": settings | ({"CLASSES": ["dot"]} if how == "classes" else {})})
    with pytest.raises(LthError) as caught:
        DatasetCatalog.get("mine")
    said = {"category": "category_id=9", "classes": "found ['dot']", "json": "cannot be read"}
    assert said.get(how, "found nothing") in str(caught.value) and str(path) in str(caught.value)


def test_a_config_trains_and_evaluates_on_what_it_describes(
    voc: Path, train_det: ModuleType, command: Command, tmp_path: Path
) -> None:
    names = {"DATASETS.TRAIN": "('cells',)", "DATASETS.TEST": "('cells',)"}
    options = {f"DATASETS.REGISTER.cells.{k}": str(v) for k, v in described(voc).items()} | names
    with pytest.raises(ConfigError, match=r"expected MODEL\.ROI_HEADS\.NUM_CLASSES 2"):
        train_det.main(command("fpn", options=options))
    options |= {"MODEL.ROI_HEADS.NUM_CLASSES": 2, "SOLVER.MAX_ITER": 1}
    train_det.main(command("fpn", options=options))
    options |= {"MODEL.WEIGHTS": tmp_path / "out/model_final.pth"}
    results = train_det.main(command("fpn", "--eval-only", options=options))
    assert {"AP", "AP50", "AP75"} <= set(results["bbox"])


class TestAFile:
    def test_it_is_run_once(self, tmp_path: Path) -> None:
        file = tmp_path / "mine.py"
        file.write_text(
            "from detectron2.data import DatasetCatalog\nDatasetCatalog.register('mine', list)\n"
        )
        import_files([str(file)])
        import_files([str(file)])
        assert "mine" in DatasetCatalog.list()

    def test_one_that_raises_is_named_with_its_traceback(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        file = tmp_path / "mine.py"
        file.write_text("def load():\n    return 1 / 0\n\nload()\n")
        config = Path(__file__).parents[2] / "configs/detectron2/bccd"
        config /= "faster_rcnn_R_18_FPN_ticket.yaml"
        for path, said in ((file, "ZeroDivisionError"), (tmp_path / "no.py", "found none at")):
            code = det.main(["--config-file", str(config), "--register", str(path)])
            error = capsys.readouterr().err
            assert code == 2 and str(path) in error and said in error
        assert "runpy" not in error
