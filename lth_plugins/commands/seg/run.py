"""Training a segmentor as a command line says."""

import argparse
from pathlib import Path

from mmengine.config import Config
from mmengine.device import is_cuda_available, is_musa_available, is_npu_available
from mmengine.dist import is_main_process

from lth_plugins.errors import ConfigError
from lth_plugins.mmseg import ImagesHook, SlimHook, make_resumable, task_search
from lth_plugins.mmseg.config import apply_ticket, check_data, join_processes, load_config
from lth_plugins.mmseg.hooks import ProgressHook
from lth_plugins.mmseg.slimming import apply_slimmed, build_runner
from lth_plugins.mmseg.teacher import apply_teacher, check_teacher
from lth_plugins.resilience.lock import output_folder
from lth_plugins.slimming.options import has_budget


def set_budget(cfg: Config, flops: float | None, latency: float | None) -> None:
    """Have the ``SlimHook`` of a config, or one that it gets, end with this budget."""
    hooks = list(cfg.get("custom_hooks") or [])
    own = [hook for hook in hooks if hook["type"] in ("SlimHook", SlimHook)]
    settings = {key: value for hook in own for key, value in hook.items() if key != "type"}
    settings |= {"flops": flops, "latency": latency}
    SlimHook(**settings)  # refuses invalid settings
    others = [hook for hook in hooks if hook not in own]
    cfg.custom_hooks = [*others, {"type": "SlimHook", **settings}]


def train(args: argparse.Namespace) -> None:
    if args.amp and not (is_cuda_available() or is_npu_available() or is_musa_available()):
        raise ConfigError("--amp needs an accelerator: mmengine has no mixed precision on the CPU")
    cfg = load_config(args)
    cfg.resume = args.resume
    if args.amp:
        cfg.optim_wrapper.type = "AmpOptimWrapper"
        cfg.optim_wrapper.setdefault("loss_scale", "dynamic")
    apply_ticket(cfg, args.ticket)
    if args.teacher:
        apply_teacher(cfg, args.teacher)
    if args.imp_rounds is not None:
        cfg.merge_from_dict({"imp.rounds": args.imp_rounds})
    if has_budget(args):
        set_budget(cfg, args.prune_flops, args.prune_latency)
    check_data(cfg, "train", "val")
    make_resumable(cfg)
    check_teacher(cfg)
    apply_slimmed(cfg)
    searches = cfg.get("imp", {}).get("rounds", 0) != 0  # 0 is an ordinary training
    search = task_search(cfg) if searches else None  # refuses before anything is written
    join_processes(cfg)
    with output_folder(Path(cfg.work_dir), main=is_main_process()):
        if search is not None:
            search.run()
            return
        runner = build_runner(cfg)
        runner.register_hook(ImagesHook())
        runner.register_hook(ProgressHook())
        runner.train()
