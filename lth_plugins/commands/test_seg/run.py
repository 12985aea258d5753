"""Evaluating a segmentor as a command line says."""

import argparse
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.dist import is_main_process
from mmengine.runner import Runner

import lth_plugins as lth
from lth_plugins.mmseg import ImagesHook
from lth_plugins.mmseg.checkpoint import check_whole, read_checkpoint
from lth_plugins.mmseg.config import apply_input, check_data, load_config
from lth_plugins.mmseg.hooks import holder, trained_on
from lth_plugins.mmseg.slimming import build_runner
from lth_plugins.resilience.atomic import open_atomically
from lth_plugins.slimming.widths import adopt_widths


def set_outputs(cfg: Config, args: argparse.Namespace) -> None:
    """Write --val, --out, --show-dir and --tta into the config."""
    if args.val:
        cfg.test_dataloader, cfg.test_evaluator = cfg.val_dataloader, cfg.val_evaluator
    if args.out:
        cfg.test_evaluator.update(output_dir=args.out, keep_results=True)
    if args.show_dir:
        cfg.default_hooks.visualization = {"type": "SegVisualizationHook", "draw": True}
        cfg.visualizer.save_dir = args.show_dir
    if args.tta:
        cfg.test_dataloader.dataset.pipeline = cfg.tta_pipeline
        cfg.model = {**cfg.tta_model, "module": cfg.model}


def compact(runner: Runner, checkpoint: dict[str, Any], path: str) -> None:
    """Replace the runner's model by the compacted one, and write it."""
    runner.call_hook("before_run")  # EMAHook builds here the model it loads averages into
    runner.load_or_resume()  # testing does not load again
    owner, name = holder(runner)
    model = lth.compact(getattr(owner, name))
    setattr(owner, name, model)
    if is_main_process():
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with open_atomically(Path(path)) as file:
            meta = checkpoint.get("meta", {})
            torch.save({"meta": meta, "state_dict": model.state_dict()}, file)


def evaluate(args: argparse.Namespace) -> None:
    cfg = load_config(args)
    cfg.load_from = args.checkpoint
    checkpoint = read_checkpoint(args.checkpoint)
    spec = trained_on(checkpoint)
    if spec is not None:
        apply_input(cfg, spec)
    set_outputs(cfg, args)
    check_data(cfg, "test")
    runner = build_runner(cfg)
    runner.register_hook(ImagesHook())
    model, state = getattr(*holder(runner)), checkpoint.get("state_dict", checkpoint)
    check_whole(model, state, args.checkpoint)
    adopt_widths(model, state)
    if args.compact:
        compact(runner, checkpoint, args.compact)
    runner.test()
