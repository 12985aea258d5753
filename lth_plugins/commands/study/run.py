"""`lth study run`: what is planned and not done yet."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

from rich.console import Console

from lth_plugins import cli
from lth_plugins.commands.study import FAILED
from lth_plugins.errors import RunError
from lth_plugins.shipped import CONFIGS, find_config, folder
from lth_plugins.study.judge import looks, shown
from lth_plugins.study.judge.conditions import conditions
from lth_plugins.study.judge.looks import verdicts
from lth_plugins.study.plan.config import load_config
from lth_plugins.study.plan.expand import Plan, check_inputs
from lth_plugins.study.plan.kinds import FIND
from lth_plugins.study.plan.paths import from_elsewhere, near
from lth_plugins.study.run.state import read_study
from lth_plugins.study.run.status import say, status
from lth_plugins.study.run.steps import command_line


def run(args: argparse.Namespace) -> int:
    console = Console()
    # Standard output is for the commands that a dry run prints.
    about = Console(stderr=True) if args.dry_run else console
    changes = f" with {shlex.join(args.overrides)}" if args.overrides else ""
    say(about, f"Planning the study of {args.config}{changes} …")
    path = near(find_config(args.config))
    with cli.needing("pip install 'lth_plugins[sweep]'"):
        from lth_plugins.study.run.sweep import pending, preparations, sweep
    config = load_config(path, args.overrides)
    planned = looks.planned(config)
    if borrowed := from_elsewhere([args.config, *config.named_configs]):
        say(about, f"Not in {Path.cwd()}, so taken from {folder(CONFIGS)}: {', '.join(borrowed)}.")
    for task, reason in planned.left_out.items():
        print(f"{task} is left out: {reason}.", file=sys.stderr)
    left = pending(config, planned)
    searches = sum(run.kind == FIND for run in left)
    verb = "A dry run: this would run" if args.dry_run else "To run:"
    say(
        about,
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
        say(console, "Verdicts are open: adding seeds where they are.")
        return looks.planned(config)

    sweep(config, path, planned, console, args.overrides, more)
    study = read_study(config.folder)
    console.print(status(study), soft_wrap=True)
    console.print(shown.words(verdicts(study, conditions(study))), soft_wrap=True)
    return FAILED if any(r.state != "done" for r in study.all) else 0
