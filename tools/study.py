#!/usr/bin/env python3
"""Is it matching? Train tickets of several sources and rounds on several tasks, and report.

    tools/study.py run configs/study/digits.yaml     stopped and started again, it goes on
    tools/study.py run configs/study/digits.yaml --dry-run     only print the commands
    tools/study.py status runs/study/digits          what is done, running and failed, and the rest
    tools/study.py report runs/study/digits          writes runs/study/digits/report.html

Runs are local processes, one at a time or one a GPU, or jobs of Slurm with executor=slurm
partition=NAME. Every key of the configuration can be given as key=value (docs/study.md).
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
    # For Ctrl-C during the imports below, of which Python would print a traceback.
    signal.signal(signal.SIGINT, lambda *_: os.write(2, b"stopped\n") and os._exit(130))

from rich.console import Console

from lth_plugins import TicketError, cli
from lth_plugins.study.config import load_config
from lth_plugins.study.plan import plan
from lth_plugins.study.runs import read_result, read_study
from lth_plugins.study.status import status
from lth_plugins.study.steps import StepError, command_line

ROOT = Path(__file__).resolve().parents[1]


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    return cli.run(lambda: obey(args), __file__, cli.RESUMES)


def obey(args: argparse.Namespace) -> int:
    os.chdir(ROOT)  # commands hold paths relative to the root
    console = Console()
    try:
        return args.command(args, console)
    except (StepError, TicketError) as error:
        console.print(f"study.py: error: {error}", markup=False, highlight=False, soft_wrap=True)
        return 2


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True)

    sub = commands.add_parser("run", help="run what is planned and not done yet")
    sub.add_argument("config", type=from_root, help="YAML file, such as those in configs/study")
    sub.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="changes to it")
    sub.add_argument("--dry-run", action="store_true", help="only print the commands")
    sub.set_defaults(command=run)

    sub = commands.add_parser("status", help="what is done, running, failed, and the rest")
    sub.add_argument("study", type=from_root, help="the study's folder")
    sub.set_defaults(command=show_status)

    sub = commands.add_parser("report", help="write the report")
    sub.add_argument("study", type=from_root, help="the study's folder")
    sub.add_argument("--out", type=from_root, help="where to (default STUDY/report.html)")
    sub.set_defaults(command=write_report)
    args, rest = parser.parse_known_args(argv)
    # argparse gives up on key=value after an option.
    if rest and (args.command is not run or any(text.startswith("-") for text in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        args.overrides = [*args.overrides, *rest]
    return args


def from_root(text: str) -> Path:
    """A path given relative to the working directory, relative to the root if it lies there."""
    path = Path(text).expanduser().resolve()
    return path.relative_to(ROOT) if path.is_relative_to(ROOT) else path


def run(args: argparse.Namespace, console: Console) -> int:
    try:
        from lth_plugins.study.sweep import preparations, sweep
    except ImportError as error:
        raise TicketError(f"{error}: pip install 'lth_plugins[sweep]'") from None
    config = load_config(args.config, args.overrides)
    planned = plan(config)
    for task, reason in planned.left_out.items():
        print(f"{task} is left out: {reason}.", file=sys.stderr)
    if args.dry_run:
        commands = [step.command for step in preparations(config)]
        results = [read_result(config.folder, run) for run in planned.runs]
        commands += [result.run.command for result in results if result.state != "done"]
        print(*map(command_line, commands), sep="\n")
        return 0
    sweep(config, args.config, planned, console)
    study = read_study(config.folder)
    console.print(status(study))
    return 1 if any(r.state != "done" for r in (*study.makers, *study.results)) else 0


def show_status(args: argparse.Namespace, console: Console) -> int:
    console.print(status(read_study(args.study)))
    return 0


def write_report(args: argparse.Namespace, console: Console) -> int:
    from lth_plugins.study.study_report import write_study_report

    path = write_study_report(args.study, args.out or args.study / "report.html")
    console.print(f"{path}", soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
