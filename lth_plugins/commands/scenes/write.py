"""Writing scenes of digits, all of them or none."""

from __future__ import annotations

import argparse
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask
from tqdm import tqdm

from lth_plugins.digits import (
    BUSY,
    CLASSES,
    SPLITS,
    Scene,
    check_scene_sides,
    render_scene,
)
from lth_plugins.errors import ConfigError, RunError
from lth_plugins.training.places import dataset_path

MANIFEST = "scenes.json"
FORMAT = 1  # raise it whenever the same settings no longer give the same bytes


def make(args: argparse.Namespace) -> None:
    names = ("train", "test", "seed", "min_size", "max_size")
    settings = {"format": FORMAT, **{name: getattr(args, name) for name in names}}
    if args.look != BUSY:  # as it was before there were others
        settings["look"] = args.look
    check_settings(settings)
    out = dataset_path(args.out).resolve()
    if is_complete(out, settings):
        print(f"{args.out} is complete already, made with these settings: nothing to do")
        return
    try:
        write_all(out, settings)
    except OSError as error:
        raise RunError(f"cannot write {args.out}: {error}") from error
    print(f"{args.out}: {args.train} train and {args.test} test scenes")


def check_settings(settings: dict[str, Any]) -> None:
    for split in SPLITS:
        if settings[split] < 1:
            raise ConfigError(f"--{split} is {settings[split]}: expected at least 1 scene")
    if settings["seed"] < 0:
        raise ConfigError(f"--seed is {settings['seed']}: expected 0 or more")
    check_scene_sides(settings["min_size"], settings["max_size"])


def is_complete(out: Path, settings: dict[str, Any]) -> bool:
    """Whether `out` holds exactly what these settings make; False if it is empty or missing.

    Raises:
        RunError: if it holds anything else, which is left unchanged.
    """
    if not out.exists():
        return False
    if not out.is_dir():
        raise RunError(f"{out} is not a folder: give --out another path")
    if not any(out.iterdir()):
        return False
    instead = "delete it, or give --out another path"
    try:
        found = json.loads((out / MANIFEST).read_text())
    except (OSError, ValueError):
        found = None
    if not isinstance(found, dict):
        raise RunError(
            f"{out} holds files, but no readable {MANIFEST}, so they are not scenes "
            f"this tool completed: {instead}"
        )
    if found != settings:
        differs = ", ".join(
            f"{key} {found.get(key)} there, {settings.get(key)} asked for"
            for key in {**settings, **found}
            if found.get(key) != settings.get(key)
        )
        raise RunError(f"{out} holds scenes made with other settings ({differs}): {instead}")
    missing = [path for path in expected_files(out, settings) if not path.is_file()]
    if missing:
        raise RunError(f"{out} has lost {len(missing)} files, such as {missing[0]}: {instead}")
    return True


def expected_files(out: Path, settings: dict[str, Any]) -> list[Path]:
    files = []
    for split in SPLITS:
        files.append(out / "annotations" / f"instances_{split}.json")
        for kind in ("images", "labels"):
            files += [out / kind / split / f"{i:06d}.png" for i in range(settings[split])]
    return files


def write_all(out: Path, settings: dict[str, Any]) -> None:
    """Write everything beside `out`, then move it there in one step."""
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        for split in SPLITS:
            write_split(partial, split, settings)
        write_json(partial / MANIFEST, settings)
        partial.rename(out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def write_split(out: Path, split: str, settings: dict[str, Any]) -> None:
    for kind in ("images", "labels"):
        (out / kind / split).mkdir(parents=True)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for i in tqdm(range(settings[split]), desc=f"{split} scenes", unit="scene"):
        scene = render_scene(
            np.random.default_rng([settings["seed"], SPLITS.index(split), i]),
            split,
            min_size=settings["min_size"],
            max_size=settings["max_size"],
            look=settings.get("look", BUSY),
        )
        name = f"{i:06d}.png"
        Image.fromarray(scene.image).save(out / "images" / split / name)
        Image.fromarray(scene.label_map).save(out / "labels" / split / name)
        height, width = scene.label_map.shape
        images.append({"id": i + 1, "file_name": name, "height": height, "width": width})
        annotations += coco_annotations(scene, image_id=i + 1, first_id=len(annotations) + 1)
    (out / "annotations").mkdir(exist_ok=True)
    write_json(
        out / "annotations" / f"instances_{split}.json",
        {
            "info": {"description": f"handwritten digits in scenes, {split}", **settings},
            "licenses": [],
            "images": images,
            "annotations": annotations,
            "categories": [
                {"id": digit + 1, "name": name, "supercategory": "digit"}
                for digit, name in enumerate(CLASSES)
            ],
        },
    )


def coco_annotations(scene: Scene, image_id: int, first_id: int) -> list[dict[str, Any]]:
    rles = coco_mask.encode(np.asfortranarray(scene.masks.transpose(1, 2, 0), np.uint8))
    return [
        {
            "id": first_id + n,
            "image_id": image_id,
            "category_id": int(label) + 1,
            "bbox": box.tolist(),
            "area": int(mask.sum()),
            "iscrowd": 0,
            "segmentation": {"size": list(mask.shape), "counts": rle["counts"].decode("ascii")},
        }
        for n, (label, box, mask, rle) in enumerate(
            zip(scene.labels, scene.boxes, scene.masks, rles, strict=True)
        )
    ]


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, separators=(",", ":")) + "\n")
