"""The verdicts of a study, and the looks of ``seeds: auto``, which decide where seeds are added.

``looks.json`` in the study's folder holds, for each ticket, what its tests said at each look, so
that a study that is resumed has spent what it has spent. A look comes when all seeds that a ticket
has so far are done. Tickets whose verdict is open get more, as many as the next look has.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from lth_plugins.errors import ConfigError, RunError
from lth_plugins.resilience.atomic import write_atomically
from lth_plugins.study.judge.comparison import Sample
from lth_plugins.study.judge.conditions import Condition, conditions, rules
from lth_plugins.study.judge.verdict import (
    CRITERIA,
    Key,
    Look,
    Rule,
    Verdict,
    judge,
    look,
)
from lth_plugins.study.plan.config import StudyConfig
from lth_plugins.study.plan.kinds import JUDGED
from lth_plugins.study.run.state import Study, read_study

if TYPE_CHECKING:
    from lth_plugins.study.plan.expand import Plan, Point

LOOKS = "looks.json"


@dataclass(frozen=True)
class Taken:
    """The looks at a ticket.

    Attributes:
        point: architecture, source, task and round.
        rule: how it is judged, in words: a design is fixed before its first look.
        looks: all so far.
        seeds: that it gets; more than at the last look where its verdict was open.
    """

    point: "Point"
    rule: str
    looks: tuple[Look, ...]
    seeds: int


Stored = Mapping[str, Taken]
"""By the digest of the ticket's run of the first seed, which covers all settings."""


def planned(config: StudyConfig) -> "Plan":
    """All runs of a study, with the seeds that its looks have added.

    Raises:
        LthError: as `plan`; and if a look was taken by another rule than the configuration's.
    """
    from lth_plugins.study.plan.expand import plan

    base = plan(config)
    if not config.looks:
        return base
    tickets = {run.digest for run in base.runs if run.kind == "ticket"}
    own = {
        digest: taken for digest, taken in read_looks(config.folder).items() if digest in tickets
    }
    return plan(config, {taken.point: taken.seeds for taken in own.values()})


def take_looks(config: StudyConfig) -> bool:
    """Look at each ticket of a study whose seeds are all done, and store what was seen.

    Returns:
        Whether a ticket gets more seeds than the stored plan has.

    Raises:
        ConfigError: if a look was taken by another rule than the study's.
    """
    if not config.looks:
        return False
    study = read_study(config.folder)
    found, stored = conditions(study), dict(read_looks(study.folder))
    by_key = {c.key: c for c in found if c.run.kind in JUDGED}
    by_task = rules(study)
    before = dict(stored)
    for condition in by_key.values():
        dense = by_key.get((condition.source, condition.run.task, 0))
        if condition.run.kind == "ticket" and dense is not None:
            _take(stored, condition, dense, by_task[condition.run.task])
    for verdict in _judged(found, by_task, stored):
        digest = _first(by_key[verdict.key])
        taken = stored.get(digest)
        if taken is None or verdict.comparison is None:
            continue
        done, following = (
            taken.looks[-1].seeds,
            [n for n in config.looks if n > taken.looks[-1].seeds],
        )
        more = verdict.answer is None and not verdict.futile and following
        stored[digest] = replace(taken, seeds=following[0] if more else done)
    if stored != before:
        write_atomically(study.folder / LOOKS, json.dumps(_to_json(stored), indent=1).encode())
    return any(len(c.results) < stored[_first(c)].seeds for c in found if _first(c) in stored)


def verdicts(study: Study, found: Sequence[Condition]) -> list[Verdict]:
    """The verdicts of a study, each at the last look of a design that has several.

    Args:
        study: as it was read.
        found: its `conditions`.

    Raises:
        RunError: if the stored looks cannot be read.
    """
    by_task = rules(study)
    sequential = any(rule.looks for rule in by_task.values())
    return _judged(found, by_task, read_looks(study.folder) if sequential else {})


def _judged(
    found: Iterable[Condition], by_task: Mapping[str, Rule], stored: Stored
) -> list[Verdict]:
    values: dict[Key, Sample] = {}
    looks: dict[Key, Sequence[Look]] = {}
    for condition in found:
        if condition.run.kind in JUDGED:
            values[condition.key] = condition.values
        if condition.run.kind == "ticket" and _first(condition) in stored:
            looks[condition.key] = stored[_first(condition)].looks
            seeds = sorted(condition.values)[: looks[condition.key][-1].seeds]
            values[condition.key] = {seed: condition.values[seed] for seed in seeds}
    judged = judge({k: v for k, v in values.items() if _counts(k, by_task, looks)}, by_task, looks)
    waiting = [
        Verdict(*key, values[key], values.get((*key[:2], 0), {}), by_task[key[1]], _open())
        for key in values
        if not _counts(key, by_task, looks)
    ]
    waiting = [replace(v, reason=f"its first look is at {v.rule.looks[0]} seeds") for v in waiting]
    return sorted([*judged, *waiting], key=lambda v: v.key)


def _open() -> dict[str, bool | None]:
    return dict.fromkeys(CRITERIA)


def _counts(key: Key, by_task: Mapping[str, Rule], looks: Mapping[Key, object]) -> bool:
    """Whether it is judged: it is dense, has one look at all seeds, or had a look."""
    rule = by_task.get(key[1])
    return key[2] == 0 or rule is None or not rule.looks or key in looks


def _take(stored: dict[str, Taken], ticket: Condition, dense: Condition, rule: Rule) -> None:
    """Add a look where all seeds of a ticket are there, and were not looked at."""
    digest, run = _first(ticket), ticket.run
    seeds = {result.run.seed for result in ticket.results}
    point = (run.arch, run.source, run.task, run.round)
    taken = stored.get(digest, Taken(point, str(rule), (), len(seeds)))
    if taken.rule != str(rule):
        raise ConfigError(
            f"expected the rule of earlier looks at {ticket.title}, {taken.rule}, found {rule}: "
            "a sequential test keeps its margin, level and max_seeds. Give those, or another out"
        )
    samples = {c.key: {s: v for s, v in c.values.items() if s in seeds} for c in (ticket, dense)}
    if any(set(x) != seeds or not all(map(math.isfinite, x.values())) for x in samples.values()):
        return
    if taken.looks and taken.looks[-1].seeds >= len(seeds):
        return
    (verdict,) = judge(samples, rule)
    if verdict.comparison is not None:
        stored[digest] = replace(taken, looks=(*taken.looks, look(verdict)))


def _first(condition: Condition) -> str:
    return min(condition.results, key=lambda result: result.run.seed).run.digest


def read_looks(folder: Path) -> Stored:
    """The stored looks of a study; none where there is no file.

    Raises:
        RunError: if the file is damaged.
    """
    path = folder / LOOKS
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_bytes())
        return {
            digest: Taken(
                tuple(entry["point"]),
                entry["rule"],
                tuple(Look(**one) for one in entry["looks"]),
                entry["seeds"],
            )
            for digest, entry in content.items()
        }
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise RunError(
            f"{path} cannot be read ({error!r}). It says what looking at the study has spent: "
            "restore it, or start the study in another out"
        ) from None


def _to_json(stored: Stored) -> dict[str, object]:
    return {digest: asdict(taken) for digest, taken in stored.items()}
