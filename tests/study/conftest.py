"""A finished demo: real scenes and real tickets, made-up training results."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torch import Tensor

import lth_plugins as lth
from lth_plugins.prune.imp import imp
from lth_plugins.study.report import Demo, Source, Variant
from lth_plugins.study.steps import Record, Step

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def finished(
    tmp_path_factory: pytest.TempPathFactory, _resnet18_weights: dict[str, Tensor]
) -> Demo:
    """A demo whose steps are all done. Tests must not write to its folders."""
    out = tmp_path_factory.mktemp("demo")
    scenes, find = out / "scenes", out / "find"
    command = [sys.executable, "tools/make_digit_scenes.py", "--out", scenes]
    subprocess.run([*command, "--train", "1", "--test", "3"], cwd=ROOT, check=True)
    sources = [
        Source("one", "one <way>", Path("one.yaml"), find / "one"),
        Source("other", "the other way", Path("other.yaml"), find / "other"),
    ]
    dense = lth.Ticket.dense(_resnet18_weights, source="test", recipe={})
    for source, judge in zip(sources, ("val_top1", "val_knn_top1"), strict=True):
        source.folder.mkdir(parents=True)
        rounds = list(imp(dense, lambda ticket, k: ticket.weights, 2, source.folder))
        metrics = [
            {"round": k, "density": t.density, judge: 0.97 - 0.01 * k, "seconds": 5.0 + k}
            for k, t in enumerate(rounds)
        ]
        (source.folder / "metrics.jsonl").write_text(
            "".join(json.dumps(line) + "\n" for line in metrics)
        )

    variants = [Variant(sources[0], k) for k in (0, 1, 2)]
    variants += [Variant(sources[0], 2, random=True)]
    variants += [Variant(sources[1], k) for k in (0, 2)]
    detect = {v.name: out / "detect" / v.name for v in variants}
    segment = {v.name: out / "segment" / v.name for v in variants if v.source == sources[0]}
    for strength, variant in enumerate(variants):
        pretend_detection(detect[variant.name], scenes, strength)
        if variant.name in segment:
            pretend_segmentation(segment[variant.name], scenes, strength)
    records = {
        name: Record(
            Step(name, f"Step {name}", ("tools/x.py", "--out", f"runs/<{name}>")),
            *(out / "logs" / f"{name}.log", 12.3, 20.1, 1, True),
        )
        for name in ("find_one", "detect_one_round_00", "segment_one_round_00")
    }
    return Demo("A demo", scenes, variants, detect, segment, {}, pictures=1, records=records)


def pretend_detection(run: Path, scenes: Path, strength: int) -> None:
    """What detectron2 leaves: the truth, moved by some pixels and partly mistaken."""
    (run / "inference").mkdir(parents=True)
    values = {"bbox/AP": 41.25 - 7 * strength, "bbox/AP50": 66.5 - 6 * strength, "iteration": 299}
    lines = [{"total_loss": 1.5, "iteration": 19}, values]
    (run / "metrics.json").write_text("".join(json.dumps(line) + "\n" for line in lines))
    truth = json.loads((scenes / "annotations" / "instances_test.json").read_text())
    rng = np.random.default_rng(strength)
    results = []
    for a in truth["annotations"]:
        x, y, width, height = a["bbox"]
        dx, dy = rng.normal(0, strength, 2)
        category = a["category_id"] if rng.random() > 0.2 * strength else 1
        box = {"image_id": a["image_id"], "category_id": category, "score": rng.uniform(0.4, 1)}
        results.append(box | {"bbox": [x + dx, y + dy, width, height]})
    (run / "inference" / "coco_instances_results.json").write_text(json.dumps(results))


def pretend_segmentation(run: Path, scenes: Path, strength: int) -> None:
    """What mmengine and mmseg leave: the truth, partly mistaken."""
    logs = run / "20260102_030405" / "vis_data"
    logs.mkdir(parents=True)
    lines = [{"loss": 1.5, "step": 20}, {"aAcc": 91.0, "mIoU": 31.5 - 5 * strength, "step": 200}]
    (logs / "scalars.json").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run / "predictions").mkdir()
    rng = np.random.default_rng(strength)
    for file in (scenes / "labels" / "test").iterdir():
        labels = np.asarray(Image.open(file)).copy()
        labels[(rng.random(labels.shape) < 0.1 * strength) & (labels > 0)] = 0
        Image.fromarray(labels).save(run / "predictions" / file.name)
