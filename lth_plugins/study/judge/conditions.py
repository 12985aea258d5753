"""`Condition`: the runs of a study that differ in nothing but their seed."""

from collections import defaultdict
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from lth_plugins.study.judge.verdict import Key, Rule, mean_std
from lth_plugins.study.plan.config import looks_of
from lth_plugins.study.plan.kinds import KINDS, Kind, is_structured
from lth_plugins.study.plan.margin import Margin, read_margin
from lth_plugins.study.plan.runs import Run
from lth_plugins.study.plan.tools import TOOLS
from lth_plugins.study.run.state import Result, Study
from lth_plugins.ticket import ARCHITECTURES, ResNet


@dataclass(frozen=True)
class Condition:
    """The seeds of a source, task, kind, round and strength.

    Attributes:
        source: for people; with the architecture where the study has several.
        results: one for each seed.
    """

    source: str
    results: tuple[Result, ...]

    @property
    def run(self) -> Run:
        """Any of its runs, for what they have in common."""
        return self.results[0].run

    @property
    def arch(self) -> ResNet:
        return ARCHITECTURES[self.run.arch]

    @property
    def kind(self) -> Kind:
        return KINDS[self.run.kind]

    @property
    def masks(self) -> str:
        """Whose masks: "ticket", the round's, or the structure that was made of it."""
        return self.kind.made_as if is_structured(self.run.kind) else "ticket"

    @property
    def label(self) -> str:
        """The kind, for people."""
        label = self.kind.label.format(weights=self.run.weights)
        return label if self.run.round else self.kind.dense_label or label

    @property
    def dense(self) -> bool:
        """Whether nothing is pruned, so that the label needs no round."""
        return self.run.round == 0 and bool(self.kind.dense_label)

    @property
    def title(self) -> str:
        """All but the seed, for people."""
        strength = f" {self.run.strength:g}" if self.kind.strength else ""
        kind = self.label if self.dense else f"round {self.run.round}, {self.label}"
        return f"{self.run.task}, {self.source}, {kind}{strength}"

    @cached_property
    def values(self) -> dict[int, float]:
        """The metric of each seed that ended; NaN where it failed or left no value."""
        return {r.run.seed: r.value for r in self.results if r.state in ("done", "failed")}

    @property
    def key(self) -> Key:
        """As `verdict.judge` has it."""
        return self.source, self.run.task, self.run.round

    @cached_property
    def mean_std(self) -> tuple[float, float]:
        """Of the seeds that have a value; NaN where there are none, or one has no spread."""
        return mean_std(self.values)


def conditions(study: Study) -> list[Condition]:
    """All conditions of a study, by task, source, kind, strength and round."""
    several = len({r.run.arch for r in study.results}) > 1
    order = list(KINDS)
    found: dict[tuple[Any, ...], list[Result]] = defaultdict(list)
    for result in study.results:
        run = result.run
        source = f"{run.source} ({run.arch})" if several else run.source
        kind = order.index(run.kind)
        found[run.task, source, kind, run.weights, run.strength, run.round].append(result)
    return [Condition(key[1], tuple(found[key])) for key in sorted(found)]


def rules(study: Study) -> dict[str, Rule]:
    """How each task of a study is judged, by its settings and its tool."""
    settings = study.plan.settings
    found = {}
    for name, task in (settings.get("tasks") or {}).items():
        margin = read_margin(f"tasks.{name}.margin", str(task.get("margin") or Margin().amount))
        found[name] = Rule(margin, TOOLS[task["tool"]].paired, looks=looks_of(settings))
    return found
