"""Evaluate a segmentor that lth seg trained, with mmengine's own Runner.

    lth test-seg configs/mmseg/digits/fcn_r18_ticket.py work_dirs/fcn_r18_ticket/iter_80.pth

It needs no ticket: the checkpoint is an ordinary one, or a compacted one, whose widths the model
adopts. The data preprocessor is set to the input that the checkpoint was trained on.

--compact OUT.pth first removes the dead channels of a structured ticket, writes the narrower model
to OUT.pth and evaluates that.
"""

import argparse
from collections.abc import Sequence

from lth_plugins import cli
from lth_plugins.commands.runner_options import INSTALL, add_runner_options
from lth_plugins.shipped import find_config


def make_parser(prog: str) -> argparse.ArgumentParser:
    parser = cli.command_parser(__doc__, "lth test-seg", prog)
    add_runner_options(parser)
    parser.add_argument("checkpoint", help="checkpoint file")
    parser.add_argument("--out", help="folder for the predicted label maps")
    parser.add_argument("--show-dir", help="folder for images with their predictions drawn on them")
    parser.add_argument(
        "--compact",
        metavar="OUT.pth",
        help="first remove dead channels, write and test that",
    )
    parser.add_argument("--val", action="store_true", help="test on what a training validates on")
    parser.add_argument("--tta", action="store_true", help="test-time augmentation")
    return parser


def main(argv: Sequence[str] | None = None, prog: str = "lth test-seg") -> int:
    args = make_parser(prog).parse_args(argv)
    return cli.run(lambda: start(args), prog, "nothing was evaluated to the end")


def start(args: argparse.Namespace) -> None:
    args.config = find_config(args.config)
    with cli.needing(INSTALL):
        from lth_plugins.commands.test_seg.run import evaluate
    evaluate(args)
