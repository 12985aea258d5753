"""Train a ticket to classify images: fine-tune it, or probe its frozen features linearly.

    lth cls configs/transfer/cifar10_r50.yaml --ticket round_07.ticket out=runs/cifar10

OUT gets config.yaml, metrics.jsonl (one line per epoch), and at the end result.json,
model.safetensors and final.ticket. On Ctrl-C or SIGTERM it saves and exits; the same command
resumes. ``rounds=18`` finds task-specific tickets instead. Every key of the configuration can be
given as key=value (docs/classify.md).
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Sequence

from lth_plugins import cli
from lth_plugins.shipped import find_config


def make_parser(prog: str) -> argparse.ArgumentParser:
    parser = cli.command_parser(__doc__, "lth cls", prog)
    cli.add_config_arguments(parser, "configs/transfer")
    parser.add_argument("--ticket", help="the same as ticket=…")
    parser.add_argument(
        "--eval-only",
        metavar="MODEL",
        help="only evaluate a run's model.safetensors; OUT gets evaluation.json",
    )
    return parser


def main(argv: Sequence[str] | None = None, prog: str = "lth cls") -> int:
    args = make_parser(prog).parse_intermixed_args(argv)
    cli.log_progress()
    return cli.run(lambda: train(args), prog, cli.RESUMES)


def train(args: argparse.Namespace) -> None:
    overrides = list(args.overrides)
    if args.ticket is not None:
        overrides.append(f"ticket={json.dumps(args.ticket)}")  # quoted: a path, not YAML
    if args.eval_only is not None:
        overrides += [f"start={json.dumps(args.eval_only)}", "rounds=0"]
    path = find_config(args.config)
    from lth_plugins.transfer import load_config

    config = load_config(path, overrides)
    logging.info(
        "%s of %s on %s with %s%s; results go to %s",
        *(config.mode, config.arch, config.data.name, config.ticket),
        f", {config.rounds} rounds of pruning" if config.rounds > 0 else "",
        config.out,
    )
    with cli.needing("pip install 'lth_plugins[transfer]'"):
        from lth_plugins.transfer.run import classify, evaluate, search
    cli.quiet_lightning()
    if args.eval_only is not None:
        result = evaluate(config)
        print(f"top1 {100 * result['top1']:.2f} %, {config.out}/evaluation.json")
    elif config.rounds > 0:
        paths = search(config)
        print(f"{len(paths)} tickets, {paths[0]} to {paths[-1]}")
    else:
        result = classify(config)
        print(f"top1 {100 * result['top1']:.2f} %, {config.out}/result.json")
