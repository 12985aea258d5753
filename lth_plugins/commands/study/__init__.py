"""Is it matching? Train tickets of several sources and rounds on several tasks, and report.

    lth study run configs/study/digits.yaml     the same command resumes it
    lth study run configs/study/digits.yaml --dry-run     only print the commands
    lth study status runs/study/digits          counts, problems, and the time left
    lth study report runs/study/digits          writes runs/study/digits/report.html
    lth study seeds runs/study/digits           how many seeds each verdict takes

Paths are relative to the working directory, those inside a configuration, too; configurations that
are not there are looked for among those that come with lth_plugins.

Runs are local processes, one at a time or one per GPU, or jobs of Slurm with executor=slurm
partition=NAME. Every key of the configuration can be given as key=value (docs/study.md).
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

from lth_plugins import cli

FAILED = 1
"""The exit code where a run, or a command of ``prepare``, has failed."""


def main(argv: Sequence[str] | None = None, prog: str = "lth study") -> int:
    args = parse_args(argv, prog)
    return cli.run(lambda: obey(args, prog), prog, cli.RESUMES)


def obey(args: argparse.Namespace, prog: str) -> int:
    module, _, function = args.command.partition(".")
    with cli.needing("pip install 'lth_plugins[study]'"):
        command = getattr(importlib.import_module(f"{__name__}.{module}"), function)
        from lth_plugins.study.run.steps import StepError
    try:
        return int(command(args))
    except StepError as error:
        print(f"{prog}: error: {error}", file=sys.stderr)
        return FAILED


def make_parser(prog: str) -> argparse.ArgumentParser:
    parser = cli.command_parser(__doc__, "lth study", prog)
    commands = parser.add_subparsers(required=True)

    sub = commands.add_parser("run", help="run what is planned and not done yet")
    cli.add_config_arguments(sub, "configs/study")
    sub.add_argument("--dry-run", action="store_true", help="only print the commands")
    sub.set_defaults(command="run.run")

    sub = commands.add_parser("status", help="how many runs are done, running, failed and planned")
    sub.add_argument("study", type=folder, help="the study's folder")
    sub.set_defaults(command="look.show_status")

    sub = commands.add_parser("seeds", help="how many seeds each verdict takes for power 0.8")
    sub.add_argument("study", type=folder, help="the study's folder")
    sub.set_defaults(command="look.show_seeds")

    sub = commands.add_parser(
        "connect", help="evaluate between two seeds, as run does for connectivity"
    )
    sub.add_argument("study", type=folder, help="the study's folder")
    sub.add_argument("run", help="the name of a planned run that ends in line-DIGEST")
    sub.set_defaults(command="look.connect_seeds")

    sub = commands.add_parser("report", help="write the report")
    sub.add_argument("study", type=folder, help="the study's folder")
    sub.add_argument("--out", type=folder, help="where to (default STUDY/report.html)")
    sub.set_defaults(command="look.write_report")
    return parser


def parse_args(argv: Sequence[str] | None, prog: str) -> argparse.Namespace:
    parser = make_parser(prog)
    args, rest = parser.parse_known_args(argv)
    # argparse gives up on key=value after an option.
    if rest and (args.command != "run.run" or any(text.startswith("-") for text in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        args.overrides = [*args.overrides, *rest]
    return args


def folder(text: str) -> Path:
    return Path(text).expanduser()
