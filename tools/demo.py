#!/usr/bin/env python3
"""The main job from start to end on real images: find tickets, transfer them, report.

    tools/demo.py                     results in runs/demo, report in runs/demo/report.html

Scenes of handwritten digits are made, a ResNet-18 is pre-trained in three ways and pruned by IMP,
and dense networks, tickets and a random mask are each trained as a detector (detectron2) and a
segmentor (mmsegmentation). Every step is one of the tools in this folder. Ctrl-C and SIGTERM stop
it, and the same command resumes; what is done is not done again.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

if __name__ == "__main__":
    from _start import stop_in_one_line

    stop_in_one_line()

from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from lth_plugins import cli
from lth_plugins.pruning.search.imp import round_path
from lth_plugins.study import steps
from lth_plugins.study.report import Demo, Source, Variant, write_report
from lth_plugins.study.steps import Step, StepError
from lth_plugins.study.tasks import TOOLS

ROOT = Path(__file__).resolve().parents[1]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", type=Path, default=ROOT / "configs/demo/digits.yaml")
    parser.add_argument("--out", type=Path, default=ROOT / "runs/demo", help="folder for results")
    args = parser.parse_args(argv)
    return cli.run(lambda: demonstrate(args), __file__, cli.RESUMES)


def demonstrate(args: argparse.Namespace) -> int:
    config, out = OmegaConf.load(args.config), args.out.resolve()
    # Commands hold paths relative to the root, and are run there.
    os.chdir(ROOT)
    os.environ.pop("DETECTRON2_DATASETS", None)  # the scenes lie in ./datasets
    if out.is_relative_to(ROOT):
        out = out.relative_to(ROOT)
    console = Console()
    console.print("Ctrl-C stops it, and the same command resumes.")
    try:
        path = run_demo(config, out, console)
    except StepError as error:
        console.print(f"demo.py: error: {error}", markup=False, highlight=False, soft_wrap=True)
        return 1
    console.print(f"{path}", soft_wrap=True)
    return 0


def run_demo(config: DictConfig, out: Path, console: Console) -> Path:
    """Run all steps that are not done yet, and write the report. Returns its path."""
    left_out = {task: f"{why}." for task in config.tasks if (why := TOOLS[task].missing)}
    demo = describe(config, out, left_out)
    for task, reason in demo.left_out.items():
        console.print(f"{task.capitalize()} is left out: {reason}", highlight=False)
    records = steps.run(plan(config, demo), out, console)
    report = out / "report.html"
    write_report(replace(demo, records=records), report)
    return report


def describe(config: DictConfig, out: Path, left_out: Mapping[str, str]) -> Demo:
    """What lies where, once all steps are done."""
    sources = [
        Source(name, s.label, Path(s.config), out / "find" / name)
        for name, s in config.sources.items()
    ]
    by_name = {source.name: source for source in sources}
    variants = [
        Variant(by_name[v.source], v.round, v.get("random", False)) for v in config.variants
    ]

    def runs(task: str) -> dict[str, Path]:
        chosen = [v for v in variants if v.source.name in config.tasks[task].sources]
        return {} if task in left_out else {v.name: out / task / v.name for v in chosen}

    return Demo(
        "Lottery tickets on handwritten digits",
        Path(config.scenes),
        variants,
        detect=runs("detection"),
        segment=runs("segmentation"),
        left_out=left_out,
        pictures=config.pictures,
    )


def plan(config: DictConfig, demo: Demo) -> list[Step]:
    """All steps; where several could run, those that come first do."""
    found = [find_tickets(config, source) for source in demo.sources]
    trainings = [train_det(config, v, demo) for v in demo.among(demo.detect)]
    trainings += [train_seg(config, v, demo) for v in demo.among(demo.segment)]
    return [make_scenes(config), *found, *trainings]


def make_scenes(config: DictConfig) -> Step:
    return Step(
        "scenes",
        "Make the scenes",
        ("tools/make_digit_scenes.py", "--out", config.scenes),
        outputs=(manifest(config),),
    )


def find_tickets(config: DictConfig, source: Source) -> Step:
    rounds, folder = config.sources[source.name].rounds, source.folder
    return Step(
        f"find_{source.name}",
        f"Pre-training and {rounds} rounds of IMP, {source.label}",
        ("tools/find_ticket.py", f"{source.config}", f"out={folder}", f"rounds={rounds}"),
        inputs=(source.config,),
        outputs=(*(round_path(folder, k) for k in range(rounds + 1)), folder / "metrics.jsonl"),
        folder=folder,
        resumes=True,
    )


def train_seg(config: DictConfig, variant: Variant, demo: Demo) -> Step:
    folder, predictions = demo.segment[variant.name], demo.predictions[variant.name]
    recipe = config.tasks.segmentation.config
    command = ["tools/train_seg.py", recipe, "--ticket", f"{variant.ticket}"]
    # The evaluation after training also leaves the predicted label maps.
    command += [f"--work-dir={folder}", "--cfg-options", f"val_evaluator.output_dir={predictions}"]
    if variant.random:
        init = "model.backbone.init_cfg"
        command += [f"{init}.random=True", f"{init}.weights={variant.weights}"]
    return Step(
        f"segment_{variant.name}",
        f"Segmentation, {variant.label}",
        tuple(command),
        inputs=(Path(recipe), *data(config, variant)),
        outputs=(predictions,),
        folder=folder,
    )


def train_det(config: DictConfig, variant: Variant, demo: Demo) -> Step:
    folder = demo.detect[variant.name]
    recipe = config.tasks.detection.config
    command = ["tools/train_det.py", "--config-file", recipe]
    command += ["MODEL.TICKET.PATH", f"{variant.ticket}"]
    if variant.random:
        command += ["MODEL.TICKET.RANDOM", "True", "MODEL.TICKET.WEIGHTS", f"{variant.weights}"]
    return Step(
        f"detect_{variant.name}",
        f"Detection, {variant.label}",
        (*command, "OUTPUT_DIR", f"{folder}"),
        inputs=(Path(recipe), *data(config, variant)),
        outputs=(folder / "inference/coco_instances_results.json",),
        folder=folder,
    )


def data(config: DictConfig, variant: Variant) -> tuple[Path, ...]:
    """Files that decide what a variant's training results in, apart from the training's config."""
    tickets = (variant.ticket, variant.weights) if variant.weights else (variant.ticket,)
    return (manifest(config), *tickets)


def manifest(config: DictConfig) -> Path:
    return Path(config.scenes) / "scenes.json"


if __name__ == "__main__":
    sys.exit(main())
