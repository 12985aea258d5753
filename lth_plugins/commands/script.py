"""Run a training script of your own on a ticket, as a study does.

    lth script --ticket round_07.ticket --seed 1 --out runs/mine train.py --epochs=3

The script is started with ``--ticket FILE --seed N --out FOLDER`` and the arguments that follow it.
It writes its metrics to FOLDER/metrics.json (docs/study.md). With --weights, --random, --reverse or
--reinit, FILE is a ticket that is made for this run, and removed at its end.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from lth_plugins import cli


def make_parser(prog: str) -> argparse.ArgumentParser:
    parser = cli.command_parser(__doc__, "lth script", prog)
    parser.add_argument("--ticket", required=True, help="file, name or hf://owner/repo")
    parser.add_argument("--weights", help="a ticket whose θ to use instead, such as the dense one")
    masks = parser.add_mutually_exclusive_group()
    masks.add_argument(
        "--random", action="store_true", help="a random mask of its layer-wise densities"
    )
    masks.add_argument("--reverse", action="store_true", help="keep what it prunes")
    parser.add_argument(
        "--reinit", action="store_true", help="the trunk's weights as torchvision initialises them"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the training and what is random")
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("script", type=Path, help="Python script that trains")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="of the script")
    return parser


def main(argv: Sequence[str] | None = None, prog: str = "lth script") -> int:
    args = make_parser(prog).parse_args(argv)
    cli.log_progress()
    return cli.run(lambda: train(args), prog, "the same command starts the script again")


def train(args: argparse.Namespace) -> None:
    from lth_plugins.study.run.script import run_script
    from lth_plugins.ticket import Choice

    choice = Choice(
        args.ticket,
        args.weights,
        reverse=args.reverse,
        random=args.random,
        seed=args.seed,
        load_weights=not args.reinit,
    )
    run_script(args.script, choice, args.seed, args.out, args.arguments)
