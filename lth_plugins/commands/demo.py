"""The main job from start to end on real images: find tickets, transfer them, report.

    lth demo                     results in runs/demo, report in runs/demo/report.html
    lth demo --config configs/study/demo_photos.yaml --out runs/demo_photos
                                      a ticket of zoo/ on photographs: docs/photos.md

This runs a study as lth study does, with as many runs at a time as there are cores, and writes
its report. In configs/study/demo.yaml, scenes of handwritten digits are made, a ResNet-18 is
pre-trained and pruned by IMP, and the dense network, a ticket and a random mask are each trained as
a detector (detectron2) and a segmentor (mmsegmentation). A line at least every ten seconds says how
far that is; the first result is the accuracy of the network after an epoch of its pre-training.
Ctrl-C and SIGTERM stop it, and the same command resumes; what is done is not done again.
"""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from lth_plugins import cli
from lth_plugins.commands import study


def make_parser(prog: str) -> argparse.ArgumentParser:
    parser = cli.command_parser(__doc__, "lth demo", prog)
    parser.add_argument("--config", default="configs/study/demo.yaml", help="of the study")
    parser.add_argument("--out", type=Path, default="runs/demo", help="folder for results")
    return parser


def main(argv: Sequence[str] | None = None, prog: str = "lth demo") -> int:
    args = make_parser(prog).parse_args(argv)
    os.environ.pop("DETECTRON2_DATASETS", None)  # scenes are where LTH_DATASETS says
    parallel = len(os.sched_getaffinity(0))
    code = study.main(["run", args.config, f"out={args.out}", f"parallel={parallel}"], prog)
    if code in (0, study.FAILED) and (args.out / "plan.json").is_file():
        code = study.main(["report", f"{args.out}"], prog) or code
    return code
