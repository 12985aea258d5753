"""What looks at a study: status, seeds, connect and report."""

import argparse
from functools import partial

from rich.console import Console

from lth_plugins.errors import RunError
from lth_plugins.progress import heard
from lth_plugins.study.judge import shown
from lth_plugins.study.judge.conditions import conditions
from lth_plugins.study.judge.looks import verdicts
from lth_plugins.study.run.state import read_study
from lth_plugins.study.run.status import say, status


def show_status(args: argparse.Namespace) -> int:
    console = Console()
    say(console, f"Reading the study in {args.study} …")
    study = read_study(args.study)
    console.print(status(study), soft_wrap=True)
    console.print(shown.words(verdicts(study, conditions(study))), soft_wrap=True)
    return 0


def show_seeds(args: argparse.Namespace) -> int:
    console = Console()
    say(console, f"Reading the study in {args.study} …")
    study = read_study(args.study)
    found = verdicts(study, conditions(study))
    if not found:
        raise RunError(f"expected tickets to judge in {args.study}, found none that is planned")
    wide = Console(width=max(console.width, shown.SEEDS_WIDTH))
    wide.print(shown.seeds(found), soft_wrap=True)
    return 0


def connect_seeds(args: argparse.Namespace) -> int:
    console = Console()
    say(console, f"Evaluating between two seeds, {args.run} in {args.study} …")
    from lth_plugins.study.analyse.connectivity import connect

    line = connect(args.study, args.run)
    values = ", ".join(f"{value:.2f}" for value in line.values)
    say(console, f"{values}; barrier {line.barrier:.2f}")
    return 0


def write_report(args: argparse.Namespace) -> int:
    console = Console()
    out = args.out or args.study / "report.html"
    say(console, f"Writing the report of the study in {args.study} to {out} …")
    with heard(partial(say, console), "Writing the report"):
        from lth_plugins.study.report.study import write_study_report

        path = write_study_report(args.study, out)
    say(console, f"{path}")
    return 0
