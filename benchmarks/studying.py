"""A study with thousands of runs: planning it, its status, its report.

Nothing is trained. The plan is the paper's own, its runs are marked as done with made-up metrics,
and its tickets are those of made-up weights.
"""

import io
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from rich.console import Console

import lth_plugins as lth
from benchmarks.measure import seconds_of
from benchmarks.report import Row, at_most
from benchmarks.setting import Setting, distinct_weights, make_ticket
from lth_plugins.study.plan.config import load_config
from lth_plugins.study.plan.expand import plan
from lth_plugins.study.plan.runs import Run, write_plan
from lth_plugins.study.report.study import write_study_report
from lth_plugins.study.run import steps
from lth_plugins.study.run.state import read_study
from lth_plugins.study.run.status import status

CONFIGS = Path(__file__).parents[1] / "configs" / "study"


def study(setting: Setting) -> Iterator[Row]:
    """Each once: what they take hardly varies beside what they may."""
    file = CONFIGS / f"{setting.study}.yaml"
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made) / "study"
        config = load_config(file, [f"out={folder}"])
        runs: list[Run] = []
        yield _row("plan", setting, lambda: runs.extend(plan(config).runs), runs, 5)
        write_plan(folder, file, runs, {})
        _pretend(folder, runs)
        page = Console(file=io.StringIO())
        yield _row("status of", setting, lambda: page.print(status(read_study(folder))), runs, 5)
        report = folder / "report.html"
        yield _row("report of", setting, lambda: write_study_report(folder, report), runs, 60)


def _row(
    what: str, setting: Setting, act: Callable[[], object], runs: Sequence[Run], most: float
) -> Row:
    seconds = seconds_of(act)
    return Row(
        f"{what} a study of {len(runs):,} runs ({setting.study}.yaml)",
        f"{seconds:.3g} s",
        "–",
        seconds,
        at_most(most),
        f"{1e3 * seconds / len(runs):.2g} ms a run",
        unit="s",
    )


def _pretend(folder: Path, runs: Sequence[Run]) -> None:
    rng = np.random.default_rng(0)
    for run in runs:
        run.folder.mkdir(parents=True)
        metrics = {run.metric: 80 - run.round**2 / 20 + rng.normal(0, 0.2)} if run.trains else {}
        marker = {"digest": run.digest, "metrics": metrics, "seconds": 1.0, "attempts": 1}
        steps.write_marker(folder, run.name, marker)
    plain = [run for run in runs if run.kind in ("dense", "ticket")]
    for seed, source in enumerate(sorted({run.source for run in plain})):
        paths = {r.round: r.ticket for r in plain if r.source == source if r.ticket is not None}
        arch = next(run.arch for run in plain if run.source == source)
        state = distinct_weights(arch, seed)
        for k, path in paths.items():
            make_ticket(state, lth.prune(state, 1 - 0.8**k), arch).save(path)
