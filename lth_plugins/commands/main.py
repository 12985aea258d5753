"""`lth`: all commands behind one name. Each is imported once it is known to be the one."""

import argparse
import importlib
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import cast

import lth_plugins
from lth_plugins.errors import unknown

HELP = {
    "find": "find tickets: pre-train, then prune and rewind in rounds",
    "det": "train or evaluate a detector on a ticket (detectron2)",
    "seg": "train a segmentor on a ticket (mmsegmentation)",
    "test-seg": "evaluate a segmentor",
    "cls": "train a ticket to classify images",
    "script": "run a training script of your own on a ticket",
    "ticket": "look at tickets, make, convert and disturb them",
    "study": "is it matching? sweeps over sources, rounds, tasks and seeds",
    "demo": "the main job from start to end on real images",
    "scenes": "write scenes of handwritten digits",
    "config": "the configurations that come with lth_plugins: list, path, copy",
}

SHELLS = ("bash", "zsh", "tcsh")


def main(argv: Sequence[str] | None = None) -> int:
    given = list(sys.argv[1:] if argv is None else argv)
    parser = _parser()
    if given and not given[0].startswith("-"):
        name, *rest = given
        if name not in HELP:
            parser.error(f"{unknown('command', name, HELP)}")
        return cast(int, _module(name).main(rest, f"lth {name}"))
    args = parser.parse_args(given)
    if args.print_completion:
        print(_completion(args.print_completion))
        return 0
    parser.print_help()
    return 0


def _module(name: str) -> ModuleType:
    return importlib.import_module(f"lth_plugins.commands.{name.replace('-', '_')}")


def _parser() -> argparse.ArgumentParser:
    widest = max(map(len, HELP))
    listed = "\n".join(f"  {name:<{widest}}  {help}" for name, help in HELP.items())
    parser = argparse.ArgumentParser(
        prog="lth",
        usage="lth [-h] [--version] [--print-completion SHELL] COMMAND …",
        description="Lottery tickets as backbones for stock frameworks.\n\n"
        f"commands:\n{listed}\n\n`lth COMMAND --help` says more.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    version = f"lth_plugins {lth_plugins.__version__}"
    parser.add_argument("--version", action="version", version=version)
    parser.add_argument(
        "--print-completion",
        choices=SHELLS,
        metavar="SHELL",
        help=f"print what makes a shell ({', '.join(SHELLS)}) complete commands and options",
    )
    return parser


def _completion(shell: str) -> str:
    import shtab

    parser = _parser()
    commands = parser.add_subparsers()
    for name, help in HELP.items():
        own = _module(name).make_parser(f"lth {name}")
        commands.add_parser(name, help=help, parents=[own], add_help=False)
    return shtab.complete(parser, shell)
