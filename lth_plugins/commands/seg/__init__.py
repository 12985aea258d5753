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

from lth_plugins import cli
from lth_plugins.commands.runner_options import INSTALL, add_runner_options
from lth_plugins.shipped import find_config
from lth_plugins.slimming.options import add_budget_options, check_budget_options


def make_parser(prog: str) -> argparse.ArgumentParser:
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
    return parser


def main(argv: Sequence[str] | None = None, prog: str = "lth seg") -> int:
    parser = make_parser(prog)
    args = parser.parse_args(argv)
    others = {"--imp-rounds": args.imp_rounds is not None}
    check_budget_options(parser, args, "segmentor", others)
    searches = args.imp_rounds is not None
    resumes = cli.RESUMES if searches or args.resume else cli.RESUMES_WITH_OPTION
    return cli.run(lambda: start(args), prog, resumes)


def start(args: argparse.Namespace) -> None:
    args.config = find_config(args.config)
    with cli.needing(INSTALL):
        from lth_plugins.commands.seg.run import train
    train(args)
