"""What the subcommands of `lth study` do."""

from __future__ import annotations

import argparse
import shlex
import sys
from functools import partial
from pathlib import Path

from rich.console import Console

from lth_plugins import cli
from lth_plugins.commands.study import FAILED
from lth_plugins.errors import RunError
from lth_plugins.progress import heard
from lth_plugins.shipped import CONFIGS, find_config, folder
from lth_plugins.study.judge import looks, shown
from lth_plugins.study.judge.conditions import conditions
from lth_plugins.study.judge.looks import verdicts
from lth_plugins.study.plan.config import load_config
from lth_plugins.study.plan.expand import Plan, check_inputs
from lth_plugins.study.plan.kinds import FIND
from lth_plugins.study.plan.paths import from_elsewhere, near
from lth_plugins.study.run.state import read_study
from lth_plugins.study.run.status import status
from lth_plugins.study.run.steps import command_line


def run(args: argparse.Namespace) -> int:
    console = Console()
    # Standard output is for the commands that a dry run prints.
    say = Console(stderr=True) if args.dry_run else console
    changes = f" with {shlex.join(args.overrides)}" if args.overrides else ""
    _say(say, f"Planning the study of {args.config}{changes} …")
    path = near(find_config(args.config))
    with cli.needing("pip install 'lth_plugins[sweep]'"):
        from lth_plugins.study.run.sweep import pending, preparations, sweep
    config = load_config(path, args.overrides)
    planned = looks.planned(config)
    if borrowed := from_elsewhere([args.config, *config.named_configs]):
        _say(say, f"Not in {Path.cwd()}, so taken from {folder(CONFIGS)}: {', '.join(borrowed)}.")
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


def show_status(args: argparse.Namespace) -> int:
    console = Console()
    _say(console, f"Reading the study in {args.study} …")
    study = read_study(args.study)
    console.print(status(study), soft_wrap=True)
    console.print(shown.words(verdicts(study, conditions(study))), soft_wrap=True)
    return 0


def show_seeds(args: argparse.Namespace) -> int:
    console = Console()
    _say(console, f"Reading the study in {args.study} …")
    study = read_study(args.study)
    found = verdicts(study, conditions(study))
    if not found:
        raise RunError(f"expected tickets to judge in {args.study}, found none that is planned")
    wide = Console(width=max(console.width, shown.SEEDS_WIDTH))
    wide.print(shown.seeds(found), soft_wrap=True)
    return 0


def connect_seeds(args: argparse.Namespace) -> int:
    console = Console()
    _say(console, f"Evaluating between two seeds, {args.run} in {args.study} …")
    from lth_plugins.study.analyse.connectivity import connect

    line = connect(args.study, args.run)
    values = ", ".join(f"{value:.2f}" for value in line.values)
    _say(console, f"{values}; barrier {line.barrier:.2f}")
    return 0


def write_report(args: argparse.Namespace) -> int:
    console = Console()
    out = args.out or args.study / "report.html"
    _say(console, f"Writing the report of the study in {args.study} to {out} …")
    with heard(partial(_say, console), "Writing the report"):
        from lth_plugins.study.report.study import write_study_report

        path = write_study_report(args.study, out)
    _say(console, f"{path}")
    return 0


def _say(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)
