"""Is it matching? Train tickets of several sources and rounds on several tasks, and report.

    lth study run configs/study/digits.yaml     the same command resumes it
    lth study run configs/study/digits.yaml --dry-run     only print the commands
    lth study status runs/study/digits          counts, problems, and the time left
    lth study report runs/study/digits          writes runs/study/digits/report.html
    lth study seeds runs/study/digits           how many seeds each verdict takes

Paths are relative to the working directory, those inside a configuration, too; configurations and
scripts that are not there are looked for in the checkout of this tool.

Runs are local processes, one at a time or one per GPU, or jobs of Slurm with executor=slurm
partition=NAME. Every key of the configuration can be given as key=value (docs/study.md).
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from rich.console import Console

from lth_plugins import cli
from lth_plugins.errors import RunError
from lth_plugins.progress import heard
from lth_plugins.study.judge import looks, shown
from lth_plugins.study.judge.conditions import conditions
from lth_plugins.study.judge.looks import verdicts
from lth_plugins.study.plan.config import load_config
from lth_plugins.study.plan.expand import Plan, check_inputs
from lth_plugins.study.plan.kinds import FIND
from lth_plugins.study.plan.paths import CHECKOUT, from_checkout, near, shipped
from lth_plugins.study.plan.runs import PLAN
from lth_plugins.study.run.state import read_study
from lth_plugins.study.run.status import status
from lth_plugins.study.run.steps import StepError, command_line

__all__ = ["FAILED", "PLAN", "main"]

FAILED = 1
"""The exit code where a run, or a command of ``prepare``, has failed."""


def main(argv: Sequence[str] | None = None, prog: str = "lth study") -> int:
    args = parse_args(argv, prog)
    return cli.run(lambda: obey(args, prog), prog, cli.RESUMES)


def obey(args: argparse.Namespace, prog: str) -> int:
    try:
        return args.command(args, Console())
    except StepError as error:
        print(f"{prog}: error: {error}", file=sys.stderr)
        return FAILED


def parse_args(argv: Sequence[str] | None, prog: str) -> argparse.Namespace:
    parser = cli.command_parser(__doc__, "lth study", prog)
    commands = parser.add_subparsers(required=True)

    sub = commands.add_parser("run", help="run what is planned and not done yet")
    sub.add_argument("config", help="YAML file, such as those in configs/study")
    sub.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="changes to it")
    sub.add_argument("--dry-run", action="store_true", help="only print the commands")
    sub.set_defaults(command=run)

    sub = commands.add_parser("status", help="how many runs are done, running, failed and planned")
    sub.add_argument("study", type=folder, help="the study's folder")
    sub.set_defaults(command=show_status)

    sub = commands.add_parser("seeds", help="how many seeds each verdict takes for power 0.8")
    sub.add_argument("study", type=folder, help="the study's folder")
    sub.set_defaults(command=show_seeds)

    sub = commands.add_parser(
        "connect", help="evaluate between two seeds, as run does for connectivity"
    )
    sub.add_argument("study", type=folder, help="the study's folder")
    sub.add_argument("run", help="the name of a planned run that ends in line-DIGEST")
    sub.set_defaults(command=connect_seeds)

    sub = commands.add_parser("report", help="write the report")
    sub.add_argument("study", type=folder, help="the study's folder")
    sub.add_argument("--out", type=folder, help="where to (default STUDY/report.html)")
    sub.set_defaults(command=write_report)
    args, rest = parser.parse_known_args(argv)
    # argparse gives up on key=value after an option.
    if rest and (args.command is not run or any(text.startswith("-") for text in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        args.overrides = [*args.overrides, *rest]
    return args


def folder(text: str) -> Path:
    return Path(text).expanduser()


def run(args: argparse.Namespace, console: Console) -> int:
    # Standard output is for the commands that a dry run prints.
    say = Console(stderr=True) if args.dry_run else console
    changes = f" with {shlex.join(args.overrides)}" if args.overrides else ""
    _say(say, f"Planning the study of {args.config}{changes} …")
    try:
        from lth_plugins.study.run.sweep import pending, preparations, sweep
    except ImportError as error:
        raise RunError(f"{error}: pip install 'lth_plugins[sweep]'") from None
    path = near(shipped(args.config))
    config = load_config(path, args.overrides)
    planned = looks.planned(config)
    borrowed = from_checkout([args.config, *config.named_files])
    if borrowed:
        _say(say, f"Not in {Path.cwd()}, so taken from {CHECKOUT}: {', '.join(borrowed)}.")
    for task, reason in planned.left_out.items():
        print(f"{task} is left out: {reason}.", file=sys.stderr)
    left = pending(config, planned)
    searches = sum(run.kind == FIND for run in left)
    verb = "A dry run: this would run" if args.dry_run else "To run:"
    _say(
        say,
        f"{verb} {len(left)} of {len(planned.runs)} runs ({searches} searches, "
        f"{sum(run.trains for run in left)} trainings); results go to {config.folder}.",
    )
    if args.dry_run:
        try:
            check_inputs(planned, left)
        except RunError as error:
            if not config.prepare:
                raise
            print(f"Unless {'; '.join(config.prepare)} makes it: {error}", file=sys.stderr)
        commands = [*(step.command for step in preparations(config)), *(r.command for r in left)]
        print(*map(command_line, commands), sep="\n")
        return 0

    def more() -> Plan | None:
        if not looks.take_looks(config):
            return None
        _say(console, "Verdicts are open: adding seeds where they are.")
        return looks.planned(config)

    sweep(config, path, planned, console, args.overrides, more)
    study = read_study(config.folder)
    console.print(status(study), soft_wrap=True)
    console.print(shown.words(verdicts(study, conditions(study))), soft_wrap=True)
    return FAILED if any(r.state != "done" for r in study.all) else 0


def show_status(args: argparse.Namespace, console: Console) -> int:
    _say(console, f"Reading the study in {args.study} …")
    study = read_study(args.study)
    console.print(status(study), soft_wrap=True)
    console.print(shown.words(verdicts(study, conditions(study))), soft_wrap=True)
    return 0


def show_seeds(args: argparse.Namespace, console: Console) -> int:
    _say(console, f"Reading the study in {args.study} …")
    study = read_study(args.study)
    found = verdicts(study, conditions(study))
    if not found:
        raise RunError(f"expected tickets to judge in {args.study}, found none that is planned")
    wide = Console(width=max(console.width, shown.SEEDS_WIDTH))
    wide.print(shown.seeds(found), soft_wrap=True)
    return 0


def connect_seeds(args: argparse.Namespace, console: Console) -> int:
    _say(console, f"Evaluating between two seeds, {args.run} in {args.study} …")
    from lth_plugins.study.analyse.connectivity import connect

    line = connect(args.study, args.run)
    values = ", ".join(f"{value:.2f}" for value in line.values)
    _say(console, f"{values}; barrier {line.barrier:.2f}")
    return 0


def write_report(args: argparse.Namespace, console: Console) -> int:
    out = args.out or args.study / "report.html"
    _say(console, f"Writing the report of the study in {args.study} to {out} …")
    with heard(partial(_say, console), "Writing the report"):
        from lth_plugins.study.report.study import write_study_report

        path = write_study_report(args.study, out)
    _say(console, f"{path}")
    return 0


def _say(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)
