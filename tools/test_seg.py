#!/usr/bin/env python3
"""Evaluate a segmentor that tools/train_seg.py trained, with mmengine's own Runner.

    tools/test_seg.py configs/mmseg/digits/fcn_r18_ticket.py work_dirs/fcn_r18_ticket/iter_80.pth

The ticket itself is not needed: the checkpoint is an ordinary one. The data preprocessor is set to
the input that the checkpoint was trained on.
"""

import argparse
import sys
from collections.abc import Sequence

from mmengine.config import Config
from mmengine.registry import RUNNERS
from mmengine.runner import CheckpointLoader, Runner

import lth_plugins as lth
from lth_plugins.mmseg.config import add_runner_options, apply_input, load_config
from lth_plugins.mmseg.hooks import trained_on


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_runner_options(parser)
    parser.add_argument("checkpoint", help="checkpoint file")
    parser.add_argument("--out", help="folder for the predicted label maps")
    parser.add_argument("--show-dir", help="folder for images with their predictions painted on")
    parser.add_argument("--tta", action="store_true", help="test-time augmentation")
    return parser.parse_args(argv)


def set_outputs(cfg: Config, args: argparse.Namespace) -> None:
    """What --out, --show-dir and --tta mean in the config."""
    if args.out:
        cfg.test_evaluator.update(output_dir=args.out, keep_results=True)
    if args.show_dir:
        cfg.default_hooks.visualization = {"type": "SegVisualizationHook", "draw": True}
        cfg.visualizer.save_dir = args.show_dir
    if args.tta:
        cfg.test_dataloader.dataset.pipeline = cfg.tta_pipeline
        cfg.model = {**cfg.tta_model, "module": cfg.model}


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    cfg = load_config(args)
    cfg.load_from = args.checkpoint
    try:
        spec = trained_on(CheckpointLoader.load_checkpoint(args.checkpoint, map_location="cpu"))
        if spec is not None:
            apply_input(cfg, spec)
        set_outputs(cfg, args)
        runner = RUNNERS.build(cfg) if "runner_type" in cfg else Runner.from_cfg(cfg)
        runner.test()
    except lth.TicketError as error:
        print(f"test_seg.py: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
