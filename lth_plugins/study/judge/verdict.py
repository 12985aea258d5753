"""Is a sub-network matching? Two criteria over the metrics of several seeds, and what follows.

Pure functions over numbers: nothing here knows where they come from. Larger metrics are better.
With fewer than `LEAST_SEEDS` seeds, or a seed without a value, nothing is decided, and the reason
is given: a verdict is True, False or None (unknown).
"""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy import stats

LEAST_SEEDS = 3
WITHIN_STD = "within_std"
NON_INFERIOR = "non_inferior"
CRITERIA = {WITHIN_STD: "within one std", NON_INFERIOR: "non-inferior"}
"""The criteria, with their titles for people. `judge` says what they are."""

Key = tuple[str, str, int]
"""Source, task and round; round 0 is dense."""

Answer = bool | None


@dataclass(frozen=True)
class Verdict:
    """What the seeds of a source, task and round say, beside those of the dense network.

    Attributes:
        source: the pre-training.
        task: the downstream task.
        round: of IMP, from 1.
        values: the metric of each seed.
        dense: that of each seed of the dense network.
        matching: by criterion, the names of `CRITERIA`; None where that is not known.
        p: of the non-inferiority test, before Holm's correction; NaN where nothing is decided.
        p_holm: after it.
        power: of that test at this number of seeds, were there no difference at all to the dense
            network, see `power`; without Holm's correction, so at most this.
        power_holm: likewise at Holm's strictest level, so at least this.
        reason: why nothing is decided; "" where something is.
    """

    source: str
    task: str
    round: int
    values: tuple[float, ...]
    dense: tuple[float, ...]
    matching: Mapping[str, Answer]
    p: float = math.nan
    p_holm: float = math.nan
    power: float = math.nan
    power_holm: float = math.nan
    reason: str = ""


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


def finite(values: Sequence[float]) -> list[float]:
    """The metric of the seeds that have one."""
    return [value for value in values if math.isfinite(value)]


def mean_std(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation (of n - 1) of the seeds that have a value.

    NaN where there are none, or one, which has no spread.
    """
    found = finite(values)
    mean = float(np.mean(found)) if found else math.nan
    return mean, float(np.std(found, ddof=1)) if len(found) > 1 else math.nan


def judge(
    values: Mapping[Key, Sequence[float]], margin: float = 0.01, alpha: float = 0.05
) -> list[Verdict]:
    """Decide for every source, task and round from 1 whether the sub-network is matching.

    ``within_std``, the literature's criterion: the mean is at least the dense mean less one dense
    standard deviation. It calls a loss of less than that matching, and the noisier the dense
    network is, the more losses it lets pass.

    ``non_inferior``: a one-sided Welch test rejects, at level ``alpha``, that the mean is below the
    dense one by the margin or more; corrected by Holm over the rounds of a source and task. Failing
    to see a loss is no evidence of none, so without enough seeds this answers False: see its power.

    Args:
        values: the metric of each seed; NaN for a seed that has none. Round 0 is dense.
        margin: the loss that still counts as matching, a fraction of the dense mean.
        alpha: the chance to call a sub-network matching that loses the margin, of any round of a
            source and task.

    Returns:
        Verdicts by source, task and round, in this order.
    """
    verdicts: list[Verdict] = []
    for source, task in sorted({(source, task) for source, task, _ in values}):
        dense = values.get((source, task, 0), ())
        rounds = sorted(k for s, t, k in values if (s, t) == (source, task) and k > 0)
        compared = [
            _compare((source, task, k), values[source, task, k], dense, margin, alpha)
            for k in rounds
        ]
        verdicts += _correct(compared, margin, alpha)
    return verdicts


def _compare(
    point: Key, values: Sequence[float], dense: Sequence[float], margin: float, alpha: float
) -> Verdict:
    verdict = Verdict(*point, tuple(values), tuple(dense), dict.fromkeys(CRITERIA))
    reason = _undecided(values, dense)
    if reason:
        return replace(verdict, reason=reason)
    mean, _ = mean_std(values)
    dense_mean, dense_std = mean_std(dense)
    return replace(
        verdict,
        matching={WITHIN_STD: mean >= dense_mean - dense_std},
        p=non_inferiority(values, dense, margin * dense_mean),
        power=power(values, dense, margin * dense_mean, alpha),
    )


def _undecided(values: Sequence[float], dense: Sequence[float]) -> str:
    for what, seeds in (("dense", dense), ("sparse", values)):
        count = len(finite(seeds))
        if count < len(seeds):
            return f"{len(seeds) - count} of {len(seeds)} {what} seeds have no value"
        if count < LEAST_SEEDS:
            plural = "" if count == 1 else "s"
            return f"{count} {what} seed{plural}: it takes {LEAST_SEEDS} to decide"
    if np.mean(dense) <= 0:
        return f"a margin relative to a dense mean of {np.mean(dense):g} means nothing"
    return ""


def _correct(verdicts: Sequence[Verdict], margin: float, alpha: float) -> list[Verdict]:
    """Holm's correction over those that are decided."""
    tests = [v for v in verdicts if not v.reason]
    corrected = dict(zip((v.round for v in tests), holm([v.p for v in tests]), strict=True))
    return [
        v
        if v.reason
        else replace(
            v,
            matching={**v.matching, NON_INFERIOR: corrected[v.round] <= alpha},
            p_holm=corrected[v.round],
            power_holm=power(v.values, v.dense, margin * mean_std(v.dense)[0], alpha / len(tests)),
        )
        for v in verdicts
    ]


def non_inferiority(values: Sequence[float], dense: Sequence[float], margin: float) -> float:
    """p of the one-sided Welch test of "the mean is below the dense one by the margin or more".

    Args:
        values: at least two, finite.
        dense: likewise.
        margin: in units of the metric; taken as fixed, though it may stem from ``dense``.
    """
    if np.ptp(values) == 0 == np.ptp(dense):  # no noise, nothing to test
        return 0.0 if np.mean(values) > np.mean(dense) - margin else 1.0
    mean, std = mean_std(values)
    dense_mean, dense_std = mean_std(dense)
    test = stats.ttest_ind_from_stats(
        *(mean, std, len(values), dense_mean - margin, dense_std, len(dense)),
        equal_var=False,
        alternative="greater",
    )
    return float(test.pvalue)


def power(values: Sequence[float], dense: Sequence[float], margin: float, alpha: float) -> float:
    """The chance that `non_inferiority` gives at most ``alpha``, if the true difference is zero.

    From the noncentral t distribution with Welch's degrees of freedom; the true standard deviations
    are taken to be those of the samples, which are uncertain themselves with a few seeds.
    """
    if np.ptp(values) == 0 == np.ptp(dense):  # rounding gives equal values a variance
        return float(margin > 0)
    errors = [np.var(seeds, ddof=1) / len(seeds) for seeds in (values, dense)]
    freedom = sum(errors) ** 2 / sum(
        error**2 / (len(seeds) - 1) for error, seeds in zip(errors, (values, dense), strict=True)
    )
    shift = margin / math.sqrt(sum(errors))
    return float(stats.nct.sf(stats.t.isf(alpha, freedom), freedom, shift))


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
