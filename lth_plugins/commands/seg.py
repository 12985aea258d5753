r"""Train a segmentor on a ticket, with mmengine's own Runner.

    lth seg configs/mmseg/digits/fcn_r18_ticket.py --ticket round_08.ticket

CONFIG is one of configs/mmseg, or any mmseg config: --ticket then replaces its pre-trained
weights. The data preprocessor is set to the ticket's input. Baselines are options of
the ticket, see `lth_plugins.mmseg.TicketInit`:

    --cfg-options model.backbone.init_cfg.random=True \
                  model.backbone.init_cfg.weights=round_00.ticket

--imp-rounds 8 finds task-specific tickets instead: the ticket is dense then (round 0), each round
is such a training, and the work dir gets round_00.ticket, … and the run of each in train_00, ….
The same command resumes. imp=dict(…) in the config has more settings, which are options as well:
--cfg-options imp.rewind=init.

--teacher CHECKPOINT distils: the segmentor also learns the logits of that one, which the same
config trained densely.

On SIGTERM or Ctrl-C it saves and exits with code 143 or 130; --resume continues from there.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from mmengine.config import Config
from mmengine.device import is_cuda_available, is_musa_available, is_npu_available
from mmengine.dist import is_main_process

from lth_plugins import cli
from lth_plugins.mmseg import ImagesHook, SlimHook, make_resumable, task_search
from lth_plugins.mmseg.config import (
    add_runner_options,
    apply_ticket,
    check_data,
    join_processes,
    load_config,
)
from lth_plugins.mmseg.slimming import apply_slimmed, build_runner
from lth_plugins.mmseg.teacher import apply_teacher, check_teacher
from lth_plugins.resilience.lock import output_folder
from lth_plugins.slimming.options import add_budget_options, check_budget_options, has_budget


def parse_args(argv: Sequence[str] | None, prog: str) -> argparse.Namespace:
    parser = cli.command_parser(__doc__, "lth seg", prog)
    add_runner_options(parser)
    parser.add_argument("--ticket", help="a path, a catalog name or hf://owner/repo[/file]")
    parser.add_argument(
        "--resume", action="store_true", help="resume from the latest checkpoint in the work dir"
    )
    parser.add_argument(
        "--imp-rounds", type=int, metavar="N", help="find task-specific tickets, pruning N times"
    )
    add_budget_options(parser, "segmentor", "SlimHook in custom_hooks has more settings")
    parser.add_argument(
        "--teacher",
        metavar="CHECKPOINT",
        help="also learn the logits of this segmentor, of the dense training of the config",
    )
    parser.add_argument("--amp", action="store_true", help="automatic mixed precision")
    args = parser.parse_args(argv)
    others = {"--imp-rounds": args.imp_rounds is not None}
    check_budget_options(parser, args, "segmentor", others)
    if args.amp and not (is_cuda_available() or is_npu_available() or is_musa_available()):
        parser.error("--amp needs an accelerator: mmengine has no mixed precision on the CPU")
    return args


def main(argv: Sequence[str] | None = None, prog: str = "lth seg") -> int:
    args = parse_args(argv, prog)
    searches = args.imp_rounds is not None
    resumes = cli.RESUMES if searches or args.resume else cli.RESUMES_WITH_OPTION
    return cli.run(lambda: train(args), prog, resumes)


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
        runner.train()
