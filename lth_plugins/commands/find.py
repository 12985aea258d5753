"""Find tickets: pre-train a ResNet, then prune it by iterative magnitude pruning on the same task.

    lth find configs/pretrain/digits_supervised.yaml out=runs/digits rounds=8 seed=1

OUT gets round_00.ticket … round_NN.ticket, metrics.jsonl (one line per round), config.yaml,
pretrained.safetensors and TensorBoard curves in logs/. On Ctrl-C or SIGTERM it saves and exits; the
same command resumes. With method=rigl rounds=0 it trains sparse instead, and OUT gets final.ticket
(docs/methods.md). Every key of the configuration can be given as key=value (docs/find.md).
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence

from lth_plugins import cli
from lth_plugins.shipped import find_config


def make_parser(prog: str) -> argparse.ArgumentParser:
    parser = cli.command_parser(__doc__, "lth find", prog)
    cli.add_config_arguments(parser, "configs/pretrain")
    return parser


def main(argv: Sequence[str] | None = None, prog: str = "lth find") -> int:
    args = make_parser(prog).parse_args(argv)
    cli.log_progress()
    return cli.run(lambda: search(args), prog, cli.RESUMES)


def search(args: argparse.Namespace) -> None:
    path = find_config(args.config)
    from lth_plugins.pretrain import load_config

    config = load_config(path, args.overrides)
    replaced = f", replaced by {config.init}" if config.init else ""
    rounds = f"{replaced}, then {config.rounds} rounds of pruning"
    how = f" by {config.method}" if config.method else rounds
    logging.info(
        "%s pre-training of %s on %s%s; results go to %s",
        *(config.task, config.arch, config.data.name, how, config.out),
    )
    with cli.needing("pip install 'lth_plugins[pretrain]'"):
        from lth_plugins.pretrain.find import find
    cli.quiet_lightning()
    paths = find(config)
    print(f"{len(paths)} tickets, {paths[0]} to {paths[-1]}" if config.rounds else paths[0])
