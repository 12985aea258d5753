"""``seeds: auto``: what is looked at, when seeds are added and for whom, and what is kept."""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import lth_plugins as lth
from lth_plugins.pruning.search.imp import round_path
from lth_plugins.study.judge import shown
from lth_plugins.study.judge.conditions import conditions
from lth_plugins.study.judge.looks import LOOKS, planned, take_looks, verdicts
from lth_plugins.study.judge.verdict import Verdict
from lth_plugins.study.plan.config import StudyConfig, load_config
from lth_plugins.study.plan.expand import Plan
from lth_plugins.study.plan.runs import Run, write_plan
from lth_plugins.study.run import steps
from lth_plugins.study.run.state import read_study

STUDY = """
out: study
archs: [resnet18]
seeds: auto
rounds: [4, 5, 6]
baselines: {reinit: [4]}
sources: {mine: {tickets: .}}
tasks:
  cls: {tool: classification, config: cls.yaml}
"""
ROOT = Path(__file__).resolve().parents[3]

Value = Callable[[Run], float]


def value(run: Run) -> float:
    """Round 4 loses nothing, round 5 is on the margin and noisy, round 6 loses four points."""
    shared = 80 + 0.7 * (run.seed % 5)
    wave = 1 if run.seed % 2 else -1
    return shared + {0: 0.0, 4: 0.05 * wave, 5: -0.5 + 0.8 * wave, 6: -4 + 0.05 * wave}[run.round]


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ticket18: lth.Ticket) -> StudyConfig:
    monkeypatch.chdir(tmp_path)
    Path("study.yaml").write_text(STUDY)
    Path("cls.yaml").write_text((ROOT / "configs/transfer/digits_r18.yaml").read_text())
    for k in (0, 4, 5, 6):
        ticket18.shuffled(k).save(round_path(tmp_path, k))
    return load_config("study.yaml")


def write(config: StudyConfig) -> Plan:
    """Store the plan, as a sweep does."""
    found = planned(config)
    write_plan(config.folder, Path("study.yaml"), found.runs, {}, (), asdict(config))
    return found


def finish(config: StudyConfig, runs: tuple[Run, ...], of: Value = value) -> None:
    for run in runs:
        run.folder.mkdir(parents=True, exist_ok=True)
        marker = {"digest": run.digest, "attempts": 1, "seconds": 1.0, "metrics": {"top1": of(run)}}
        steps.write_marker(config.folder, run.name, marker)


def judged(config: StudyConfig) -> dict[int, Verdict]:
    study = read_study(config.folder)
    return {v.round: v for v in verdicts(study, conditions(study))}


def entries(config: StudyConfig) -> list[dict[str, Any]]:
    """The stored looks, of each ticket."""
    return list(json.loads((config.folder / LOOKS).read_text()).values())


def seeds_of(found: Plan, k: int) -> list[int]:
    return sorted(run.seed for run in found.runs if run.round == k and run.kind != "reinit")


def test_open_verdicts_get_seeds_look_by_look_and_the_dense_network_with_them(
    config: StudyConfig,
) -> None:
    assert config.looks == (3, 6, 9, 12)
    first = write(config)
    assert {k: len(seeds_of(first, k)) for k in (0, 4, 5, 6)} == dict.fromkeys((0, 4, 5, 6), 3)
    finish(config, first.runs)
    assert "its first look is at 3 seeds" in judged(config)[4].reason
    assert take_looks(config)
    second = write(config)
    assert {v.word for v in judged(config).values()} >= {"open"}
    assert seeds_of(second, 0) == seeds_of(second, 5) == list(range(6))
    assert sum(run.kind == "reinit" for run in second.runs) == 3  # baselines get no more
    finish(config, second.runs)
    more = take_looks(config)
    found = judged(config)
    assert {k: v.word for k, v in found.items()} == {4: "matching", 5: "open", 6: "not matching"}
    assert found[5].futile and "no more are added" in found[5].reason
    assert not more and seeds_of(write(config), 0) == list(range(6))
    # All rounds of the table are counted at the looks, whatever else is there.
    assert {v.comparison.seeds for v in found.values() if v.comparison} <= {3, 6}


def test_a_study_that_is_resumed_keeps_its_spending_and_does_not_look_twice(
    config: StudyConfig,
) -> None:
    finish(config, write(config).runs)
    assert take_looks(config)
    stored = (config.folder / LOOKS).read_text()
    planned_before = write(config)
    assert not take_looks(config), "the plan has what was added, and nothing of it is done yet"
    assert (config.folder / LOOKS).read_text() == stored
    assert planned(load_config("study.yaml")).runs == planned_before.runs
    added = [run for run in planned_before.runs if run.seed >= 3]
    finish(config, tuple(added[:-1]))
    take_looks(config)
    looks = [
        len(entry["looks"]) for entry in json.loads((config.folder / LOOKS).read_text()).values()
    ]
    finish(config, tuple(added))
    take_looks(config)
    after = [
        len(entry["looks"]) for entry in json.loads((config.folder / LOOKS).read_text()).values()
    ]
    assert sum(looks) < sum(after) and max(after) == 2


def test_a_seed_without_a_value_is_not_looked_at(config: StudyConfig) -> None:
    runs = write(config).runs
    finish(
        config, runs, lambda run: float("nan") if (run.round, run.seed) == (4, 1) else value(run)
    )
    take_looks(config)
    points = [
        entry["point"][-1] for entry in json.loads((config.folder / LOOKS).read_text()).values()
    ]
    assert sorted(points) == [5, 6]


def test_a_rule_that_changes_after_a_look_is_refused(config: StudyConfig) -> None:
    finish(config, write(config).runs)
    take_looks(config)
    other = load_config("study.yaml", ["tasks.cls.margin=1%"])
    write(other)
    with pytest.raises(lth.ConfigError, match=r"margin 0.5 points.*found.*1 % of the dense mean"):
        take_looks(other)
    (config.folder / LOOKS).write_text("{")
    with pytest.raises(lth.RunError, match=r"looks\.json cannot be read.*restore it"):
        planned(config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("min_seeds=1", "min_seeds of 3 or more .* found 1: .* variance, and one has none"),
        ("min_seeds=2", "min_seeds of 3 or more"),
        ("max_seeds=3", "max_seeds of more than min_seeds=3 .* nothing to add"),
        ("seeds=often", "list of numbers of 0 or more, or auto, found often"),
        ("seeds=[-1]", "list of numbers of 0 or more"),
        ("tasks.cls.margin=0", "tasks.cls.margin to be points .* found 0"),
        ("tasks.cls.margin=a%", "such as 1%"),
    ],
)
def test_what_allows_no_verdict_is_refused(config: StudyConfig, change: str, message: str) -> None:
    with pytest.raises(lth.ConfigError, match=message):
        load_config("study.yaml", [change])


def test_the_seeds_that_each_verdict_takes_are_shown_with_their_uncertainty(
    config: StudyConfig,
) -> None:
    plain = load_config("study.yaml", ["seeds=[0,1,2]"])
    finish(plain, write(plain).runs)
    found = judged(plain)
    console = Console(width=250, record=True, file=None)
    with console.capture() as capture:
        console.print(shown.seeds(list(found.values())))
        console.print(shown.words(list(found.values())))
    text = capture.get()
    needed = found[5].comparison.needed(0.5, 0.05 / 3)  # type: ignore[union-attr]
    assert needed > 12 and f"{needed:.0f} (" in text and "0.50 (0.5 points)" in text
    assert "paired" in text and "to a factor of eight" in text
    assert "round 6 not matching" in text and "round 5 open (power" in text
