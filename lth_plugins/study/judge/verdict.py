"""Is a sub-network matching? The test, the literature's criterion, and what follows from both.

Pure functions over numbers: nothing here knows where they come from. Larger metrics are better. A
verdict is "matching" or "not matching" where a test says so with power, else "open" with a reason.
"""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from lth_plugins.study.judge.comparison import (
    PAIRED,
    WELCH,
    Comparison,
    Sample,
    correlation,
    paired,
    welch,
)
from lth_plugins.study.judge.sequential import design, sequential_p
from lth_plugins.study.plan.config import LEAST_SEEDS
from lth_plugins.study.plan.margin import Margin

WITHIN_STD = "within_std"
TESTED = "verdict"
CRITERIA = {WITHIN_STD: "within one std", TESTED: "by the test"}
"""The criteria, with their titles for people. `judge` says what they are."""

Key = tuple[str, str, int]
"""Source, task and round; round 0 is dense."""

Answer = bool | None
WORDS: Mapping[Answer, str] = {True: "matching", False: "not matching", None: "open"}


@dataclass(frozen=True)
class Rule:
    """How a task is judged, fixed before any value is seen.

    Attributes:
        margin: the loss that still counts as matching.
        paired: which test decides. The paired one where runs of one seed share the order of the
            data and the initialisation of the heads; else Welch's.
        alpha: the chance to call a sub-network matching that loses the margin, of any round of a
            source and task; likewise, to call one not matching that loses less.
        power: what a test needs for "matching" or "not matching" to be said.
        looks: of a group-sequential design, the seeds at each of its looks; empty where there is
            one look, at all seeds.
    """

    margin: Margin = field(default_factory=Margin)
    paired: bool = False
    alpha: float = 0.05
    power: float = 0.8
    looks: tuple[int, ...] = ()

    def __str__(self) -> str:
        """For people, all of it but the power, which no test depends on."""
        test = "paired by seed" if self.paired else "Welch's"
        looks = f", looks at {', '.join(map(str, self.looks))} seeds" if self.looks else ""
        return f"{test} t test, margin {self.margin}, level {self.alpha:g}{looks}"

    @property
    def fractions(self) -> tuple[float, ...]:
        """The information at each look, of that at the last one."""
        return tuple(seeds / self.looks[-1] for seeds in self.looks) or (1.0,)


@dataclass(frozen=True)
class Look:
    """What the tests said at a number of seeds.

    Attributes:
        seeds: from the first on.
        p: of the test of "it loses the margin or more".
        p_not: of the test of "it loses the margin or less".
    """

    seeds: int
    p: float
    p_not: float


@dataclass(frozen=True)
class Verdict:
    """What the seeds of a source, task and round say, beside those of the dense network.

    Attributes:
        source: the pre-training.
        task: the downstream task.
        round: of IMP, from 1.
        values: the metric of each seed.
        dense: that of each seed of the dense network.
        rule: how it is judged.
        matching: by criterion, the names of `CRITERIA`; None where that is open.
        tests: both comparisons, by their names; empty where seeds are missing.
        correlation: of the metrics of both over the seeds in common.
        margin: in units of the metric.
        p: of the test that decides, of "it loses the margin or more": small says matching. Over all
            looks, and before Holm's correction. NaN where seeds are missing.
        p_holm: after it.
        p_not, p_not_holm: likewise of "it loses the margin or less": small says not matching.
        power: the chance that the test says matching, were there no difference at all to the dense
            network; as well, that it says not matching were the loss twice the margin. Of a
            sequential design, at its last look. Without Holm's correction, so at most this.
        power_holm: likewise at Holm's strictest level, so at least this.
        power_found: at that level, were the true difference the one found.
        futile: whether more seeds, up to those of the last look, are unlikely to decide it.
        reason: why it is open; "" where it is not.
    """

    source: str
    task: str
    round: int
    values: Sample
    dense: Sample
    rule: Rule
    matching: Mapping[str, Answer]
    tests: Mapping[str, Comparison] = field(default_factory=dict)
    correlation: float = math.nan
    margin: float = math.nan
    p: float = math.nan
    p_holm: float = math.nan
    p_not: float = math.nan
    p_not_holm: float = math.nan
    power: float = math.nan
    power_holm: float = math.nan
    power_found: float = math.nan
    futile: bool = False
    reason: str = ""

    @property
    def key(self) -> Key:
        return self.source, self.task, self.round

    @property
    def answer(self) -> Answer:
        """Whether it is matching, by the test."""
        return self.matching[TESTED]

    @property
    def word(self) -> str:
        """For people: matching, not matching or open."""
        return WORDS[self.answer]

    @property
    def comparison(self) -> Comparison | None:
        """The one that decides; None where seeds are missing."""
        return self.tests.get(PAIRED if self.rule.paired else WELCH)


@dataclass(frozen=True)
class Winner:
    """The winning ticket of a source: the sparsest round such that it and all denser match.

    Attributes:
        source: the pre-training.
        task: the downstream task; `UNIVERSAL` where all tasks are meant.
        criterion: a name in `CRITERIA`.
        round: its round; None if even the densest is not known to match.
        stopped_by: the next round, which is not known to match; None if all match.
        undecided: whether ``stopped_by`` is not decided, so that a sparser ticket may win.
    """

    source: str
    task: str
    criterion: str
    round: int | None
    stopped_by: int | None
    undecided: bool


UNIVERSAL = "all tasks"

FUTILE = 0.05
"""A sequential test stops where its chance to reject by the last look is smaller, from half of the
seeds on: with fewer the trend says little. Stopping so never adds to its errors."""


def finite(sample: Sample) -> list[float]:
    """The metric of the seeds that have one."""
    return [value for value in sample.values() if math.isfinite(value)]


def mean_std(sample: Sample) -> tuple[float, float]:
    """Mean and sample standard deviation (of n - 1) of the seeds that have a value.

    NaN where there are none, or one, which has no spread.
    """
    found = finite(sample)
    mean = float(np.mean(found)) if found else math.nan
    return mean, float(np.std(found, ddof=1)) if len(found) > 1 else math.nan


def judge(
    values: Mapping[Key, Sample],
    rules: Rule | Mapping[str, Rule] | None = None,
    looks: Mapping[Key, Sequence[Look]] | None = None,
) -> list[Verdict]:
    """Decide for every source, task and round from 1 whether the sub-network is matching.

    ``verdict``: two one-sided t tests at the margin, paired by seed or Welch's (`Rule`). Where the
    first rejects, at level alpha, that the loss is the margin or more, the word is matching. Where
    the second rejects that it is the margin or less, the word is not matching. Both are corrected
    by Holm over the rounds of a source and task. Neither is said without power: that for a true
    difference of zero (matching) or a loss of twice the margin (not matching), or else that for the
    difference found, which only makes the level stricter. All else is open: not to see a loss is no
    evidence of none, and not to show that there is none is no evidence of a loss.

    ``within_std``, the literature's criterion: the mean is at least the dense mean less one dense
    standard deviation. The noisier the dense network is, the more losses it lets pass.

    Args:
        values: the metric of each seed; NaN for a seed that has none. Round 0 is dense.
        rules: of each task, or one for all. Tasks without one have the default.
        looks: of sequential designs, all looks so far of each source, task and round; the last one
            was at the seeds in ``values``.

    Returns:
        Verdicts by source, task and round, in this order.
    """
    verdicts: list[Verdict] = []
    for source, task in sorted({(source, task) for source, task, _ in values}):
        rule = rules if isinstance(rules, Rule) else (rules or {}).get(task, Rule())
        dense = values.get((source, task, 0), {})
        rounds = sorted(k for s, t, k in values if (s, t) == (source, task) and k > 0)
        keys: list[Key] = [(source, task, k) for k in rounds]
        compared = [_compare(key, values[key], dense, rule, (looks or {}).get(key)) for key in keys]
        verdicts += _decide(compared)
    return verdicts


def _compare(
    key: Key, values: Sample, dense: Sample, rule: Rule, looks: Sequence[Look] | None
) -> Verdict:
    verdict = Verdict(*key, values, dense, rule, dict.fromkeys(CRITERIA))
    reason = _missing(values, dense, rule)
    if reason:
        return replace(verdict, reason=reason)
    mean, (dense_mean, dense_std) = mean_std(values)[0], mean_std(dense)
    margin = rule.margin.points(dense_mean)
    tests = {WELCH: welch(values, dense)}
    if len(values.keys() & dense.keys()) > 1:
        tests[PAIRED] = paired(values, dense)
    verdict = replace(
        verdict,
        matching={**verdict.matching, WITHIN_STD: mean >= dense_mean - dense_std},
        tests=tests,
        correlation=correlation(values, dense),
        margin=margin,
    )
    if looks is None:
        looks = [look(verdict)]
    return replace(
        verdict,
        p=sequential_p([one.p for one in looks], rule.fractions),
        p_not=sequential_p([one.p_not for one in looks], rule.fractions),
    )


def look(verdict: Verdict) -> Look:
    """What the tests say at the seeds that a verdict has, whatever they said before."""
    test, margin = verdict.comparison, verdict.margin
    assert test is not None
    return Look(test.seeds, test.p_matching(margin), test.p_not_matching(margin))


def _missing(values: Sample, dense: Sample, rule: Rule) -> str:
    """Why the seeds do not allow a test; "" where they do."""
    for what, sample in (("dense", dense), ("sparse", values)):
        count = len(finite(sample))
        if count < len(sample):
            return f"{len(sample) - count} of {len(sample)} {what} seeds have no value"
        if count < LEAST_SEEDS:
            plural = "" if count == 1 else "s"
            return f"{count} {what} seed{plural}: it takes {LEAST_SEEDS} to decide"
    pairs = len(values.keys() & dense.keys())
    if rule.paired and pairs < LEAST_SEEDS:
        return f"{pairs} seeds that dense and sparse have both: it takes {LEAST_SEEDS} to decide"
    dense_mean = np.mean(finite(dense))
    if rule.margin.relative and dense_mean <= 0:
        return f"a margin relative to a dense mean of {dense_mean:g} means nothing"
    return ""


def _decide(verdicts: Sequence[Verdict]) -> list[Verdict]:
    """Holm's correction over those that are tested, their power, and the words."""
    tested = [v for v in verdicts if not v.reason]
    corrected = zip(holm([v.p for v in tested]), holm([v.p_not for v in tested]), strict=True)
    decided = {v.round: _word(v, *p, len(tested)) for v, p in zip(tested, corrected, strict=True)}
    return [decided.get(v.round, v) for v in verdicts]


def _word(verdict: Verdict, p_holm: float, p_not_holm: float, rounds: int) -> Verdict:
    test, rule, margin = verdict.comparison, verdict.rule, verdict.margin
    assert test is not None
    last = max((test.seeds, *rule.looks))
    end = test if last == test.seeds else test.at(last)
    level, strict = (design(rule.alpha / n, rule.fractions)[-1] for n in (1, rounds))
    verdict = replace(
        verdict,
        p_holm=p_holm,
        p_not_holm=p_not_holm,
        power=end.power(margin, level),
        power_holm=end.power(margin, strict),
        power_found=test.power(abs(test.difference + margin), rule.alpha / rounds),
    )
    enough = max(verdict.power_holm, verdict.power_found) >= rule.power
    rejected = p_holm <= rule.alpha, p_not_holm <= rule.alpha
    if enough and any(rejected):
        return replace(verdict, matching={**verdict.matching, TESTED: rejected[0]})
    chance = test.chance(margin, strict, last)
    futile = test.seeds < last <= 2 * test.seeds and chance < FUTILE
    found = f"power {100 * verdict.power_holm:.0f} %" + (f" at {last} seeds" * (last > test.seeds))
    if any(rejected):
        reason = f"a test rejects, but with {found}"
    elif verdict.power_holm < rule.power:
        reason = found
    elif test.seeds < last:
        reason = f"no test rejects yet, at {test.seeds} of {last} seeds"
    else:
        reason = "it is too close to the margin for these seeds"
    if futile:
        reason += f"; {100 * chance:.0f} % chance that {last} seeds decide it, so no more are added"
    return replace(verdict, futile=futile, reason=reason)


def holm(p: Sequence[float]) -> list[float]:
    """p values corrected for being several (Holm, Scandinavian Journal of Statistics 6, 1979)."""
    order = np.argsort(p)
    stepped = np.asarray(p, float)[order] * np.arange(len(p), 0, -1)
    corrected = np.empty(len(p))
    corrected[order] = np.minimum(np.maximum.accumulate(stepped), 1.0)
    return corrected.tolist()


def winners(verdicts: Sequence[Verdict], unmeasured: Collection[str] = ()) -> list[Winner]:
    """The winning ticket of each source, on each task and on all of them, by each criterion.

    Args:
        verdicts: of `judge`.
        unmeasured: tasks of the study that no verdict is about, see `universal`.
    """
    found = []
    for source in sorted({v.source for v in verdicts}):
        own = [v for v in verdicts if v.source == source]
        for criterion in CRITERIA:
            for task in sorted({v.task for v in own}):
                rounds = {v.round: v.matching[criterion] for v in own if v.task == task}
                found.append(_winner(source, task, criterion, rounds))
            on_all = universal(verdicts, criterion, unmeasured)
            rounds = {k: a for (s, k), a in on_all.items() if s == source}
            found.append(_winner(source, UNIVERSAL, criterion, rounds))
    return found


def _winner(source: str, task: str, criterion: str, rounds: Mapping[int, Answer]) -> Winner:
    best = None
    for k in sorted(rounds):
        if not rounds[k]:
            return Winner(source, task, criterion, best, k, rounds[k] is None)
        best = k
    return Winner(source, task, criterion, best, None, False)


def universal(
    verdicts: Sequence[Verdict], criterion: str, unmeasured: Collection[str] = ()
) -> dict[tuple[str, int], Answer]:
    """For each source and round, whether it is matching on every task of the study.

    None where it is matching on some and not decided, or not measured, on the others, such as tasks
    that are ``unmeasured`` altogether.
    """
    tasks = {v.task for v in verdicts}.union(unmeasured)
    answers = {(v.source, v.round, v.task): v.matching[criterion] for v in verdicts}
    points = sorted({(v.source, v.round) for v in verdicts})
    return {(s, k): _all(answers.get((s, k, task)) for task in tasks) for s, k in points}


def _all(answers: Iterable[Answer]) -> Answer:
    found = set(answers)
    return False if False in found else None if None in found else True
