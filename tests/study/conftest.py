"""Finished studies: real scenes and real tickets, made-up training results."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from torch import Tensor

import lth_plugins as lth
from lth_plugins.commands import scenes
from lth_plugins.pruning.search.imp import imp, round_path
from lth_plugins.pruning.search.settings import SearchSettings
from lth_plugins.pruning.structure import Channels, L1Channels, structured
from lth_plugins.study.plan.kinds import FIND
from lth_plugins.study.plan.runs import Run, write_plan
from lth_plugins.study.report.study import write_study_report
from lth_plugins.ticket.perturb import swapped
from tests.ticket.networks import shuffled

ROOT = Path(__file__).resolve().parents[2]


def pretend_detection(run: Path, scenes: Path, strength: int) -> None:
    """Leave what detectron2 leaves: the truth, moved by some pixels and partly mistaken."""
    (run / "inference").mkdir()
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
    """Leave the label maps that mmseg leaves: the truth, partly mistaken."""
    (run / "predictions").mkdir()
    rng = np.random.default_rng(strength)
    for file in (scenes / "labels" / "test").iterdir():
        labels = np.asarray(Image.open(file)).copy()
        labels[(rng.random(labels.shape) < 0.1 * strength) & (labels > 0)] = 0
        Image.fromarray(labels).save(run / "predictions" / file.name)


METRICS = {"det": "bbox/AP", "seg": "mIoU"}


@dataclass
class PretendStudy:
    """A study's folder that is filled run by run, without any training."""

    folder: Path
    runs: list[Run] = field(default_factory=list)

    def ticket(self, source: str, k: int, arch: str = "resnet18") -> Path:
        return round_path(self.folder / "runs" / f"find-{source}-{arch}", k)

    def add(
        self,
        kind: str,
        k: int,
        values: Sequence[float | None],
        source: str = "moco",
        task: str = "det",
        arch: str = "resnet18",
        strength: float = 0.0,
        ticket: Path | None = None,
    ) -> None:
        """A condition of finished runs, a seed for each value; None leaves the metric out."""
        metric = METRICS.get(task, "bbox/AP")
        for seed, value in enumerate(values):
            name = f"{task}-{source}-{arch}-r{k:02d}-{kind}-{strength:g}-s{seed}"
            run = self.run(
                name,
                *(kind, source, k, task, seed, arch, metric, strength),
                ticket or self.ticket(source, k, arch),
            )
            self.mark(run, {"other": 1.0} if value is None else {metric: value})

    def run(
        self,
        name: str,
        kind: str,
        source: str,
        k: int,
        task: str,
        seed: int = 0,
        arch: str = "resnet18",
        metric: str = "",
        strength: float = 0.0,
        ticket: Path | None = None,
    ) -> Run:
        """A run with its folder and its log."""
        run = Run(
            name=name,
            kind=kind,
            source=source,
            weights=source,
            arch=arch,
            round=k,
            task=task,
            seed=seed,
            metric=metric,
            config=ROOT / "configs/study/digits.yaml",
            ticket=ticket,
            command=("tools/train_det.py", "OUTPUT_DIR", f"runs/<{name}>"),
            digest=hashlib.sha256(name.encode()).hexdigest(),
            folder=self.folder / "runs" / name,
            strength=strength,
        )
        run.folder.mkdir(parents=True)
        (self.folder / "logs").mkdir(exist_ok=True)
        (self.folder / "logs" / f"{name}.log").touch()
        self.runs.append(run)
        return run

    def mark(self, run: Run, metrics: dict[str, float], name: str | None = None) -> None:
        """Leave the marker of a finished run."""
        path = self.folder / "steps" / f"{name or run.name}.json"
        path.parent.mkdir(exist_ok=True)
        marker = {"digest": run.digest, "metrics": metrics, "seconds": 60.0, "cpu_seconds": 60.0}
        path.write_text(json.dumps(marker | {"attempts": 1}))

    def plan(
        self, left_out: dict[str, str] | None = None, settings: dict[str, object] | None = None
    ) -> Path:
        config = ROOT / "configs/study/digits.yaml"
        write_plan(self.folder, config, self.runs, left_out or {}, settings=settings)
        return self.folder


@pytest.fixture
def pretend_study(tmp_path: Path) -> PretendStudy:
    return PretendStudy(tmp_path / "study")


@pytest.fixture(scope="session")
def studied(
    tmp_path_factory: pytest.TempPathFactory, _resnet18_weights: dict[str, Tensor]
) -> PretendStudy:
    """A study of two sources with all that a report can tell of. Tests must not write to it."""
    study = PretendStudy(tmp_path_factory.mktemp("study"))
    dense = lth.Ticket.dense(_resnet18_weights, source="moco")
    # The second source has its channels in another order.
    for source, whole, fraction in (("moco", dense, 0.0), ("simclr", shuffled(dense)[0], 0.5)):
        for k in (0, 1, 8):
            masks = lth.prune(whole.weights, 1 - 0.8**k)
            ticket = swapped(whole.with_masks(masks, {}), fraction, seed=0) if k else whole
            study.ticket(source, k).parent.mkdir(parents=True, exist_ok=True)
            ticket.save(study.ticket(source, k))
        for task in METRICS:
            of = {"source": source, "task": task}
            study.add("dense", 0, (40.0, 40.1, 39.9), **of)
            study.add("ticket", 1, (40.1, 40.0, 40.2), **of)
            study.add("ticket", 8, (36.0, 36.2, 35.8) if task == "det" else (40.0,), **of)
    study.add("random", 8, (30.25, 30.5, 30.0))
    study.add("reversed", 8, (39.0, 38.5, 39.25))
    known = dense.with_masks(lth.Ticket.load(study.ticket("moco", 8)).masks, {})
    for kind, structure in (("channel", Channels()), ("channel_l1", L1Channels())):
        path = study.folder / f"{kind}.ticket"
        structured(known, structure).save(path)
        study.add(kind, 8, (35.0, 35.5), ticket=path)
    study.add("narrow", 8, (30.0, 31.0), ticket=study.folder / "channel.ticket")
    for strength in (0.25, 1.0):
        study.add("swap", 8, (36 - 6 * strength,) * 2, strength=strength)
    study.add("dense", 0, (45.0,) * 3, arch="resnet34")
    study.add("ticket", 1, (44.0,) * 3, arch="resnet34")
    study.plan(left_out={"cls": "lightning is not <installed>"})
    return study


@pytest.fixture(scope="session")
def study_report(studied: PretendStudy, tmp_path_factory: pytest.TempPathFactory) -> Path:
    # A space in the path must not break a link.
    return write_study_report(studied.folder, tmp_path_factory.mktemp("out") / "a b" / "r.html")


TASKS = {"det": {"tool": "detection"}, "seg": {"tool": "segmentation"}}


def shown_tasks(scenes: Path) -> dict[str, dict[str, Any]]:
    """The tasks of a study whose report shows the first test scene."""
    names = ["background", *map(str, range(10))]
    shown = {"images": f"{scenes}/images/test", "classes": names, "count": 1}
    truths = {"det": "annotations/instances_test.json", "seg": "labels/test"}
    return {
        name: {**task, "shown": {**shown, "truth": f"{scenes}/{truths[name]}"}}
        for name, task in TASKS.items()
    }


@pytest.fixture(scope="session")
def demo(
    tmp_path_factory: pytest.TempPathFactory, _resnet18_weights: dict[str, Tensor]
) -> PretendStudy:
    """A study as the demo is: searches, one seed, and a gallery. Tests must not write to it."""
    study = PretendStudy(tmp_path_factory.mktemp("demo"))
    folder = study.folder / "scenes"
    assert scenes.main(["--out", str(folder), "--train", "1", "--test", "3"]) == 0
    dense = lth.Ticket.dense(_resnet18_weights, source="test", recipe={})
    for source, measured in (("one", "val_top1"), ("other", "val_knn_top1")):
        search = study.run(f"find-{source}-resnet18", FIND, source, 2, FIND)
        study.mark(search, {})
        rounds = list(imp(dense, lambda ticket: ticket.weights, SearchSettings(2), search.folder))
        lines = [
            {"round": k, "density": t.density, measured: 0.97 - 0.01 * k, "seconds": 5.0 + k}
            for k, t in enumerate(rounds)
        ]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (search.folder / "metrics.jsonl").write_text(text)
    kinds = [("dense", 0), ("ticket", 1), ("ticket", 2), ("random", 2)]
    for source, task, shown in (("one", "det", 4), ("one", "seg", 4), ("other", "det", 2)):
        for strength, (kind, k) in enumerate(kinds[:shown]):
            study.add(kind, k, (41.25 - 7 * strength,), source, task)
            pretend = pretend_detection if task == "det" else pretend_segmentation
            pretend(study.runs[-1].folder, folder, strength)
    texts = {"title": "A <demo>", "about": "It shows all.", "caveats": ["One seed."]}
    study.plan(settings={"tasks": shown_tasks(folder), "report": texts})
    return study


@pytest.fixture(scope="session")
def demo_report(demo: PretendStudy, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_study_report(demo.folder, tmp_path_factory.mktemp("report") / "report.html")
