"""`Comparison`: what the seeds of two conditions say about their difference, and two tests of it.

Pure functions over numbers. Both tests are t tests, of an estimate with a standard error and
degrees of freedom: p values, power and the seeds that a power takes follow from these alike. The
distributions are scipy's.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from scipy import special

PAIRED, WELCH = "paired", "Welch"

Sample = Mapping[int, float]
"""The metric of each seed, by the seed; NaN for one that has none."""

MOST_SEEDS = 100_000
"""A test that takes more is reported as taking infinitely many."""


@dataclass(frozen=True)
class Comparison:
    """The difference of two conditions over seeds, sparse less dense.

    Attributes:
        test: `PAIRED` or `WELCH`.
        seeds: of the condition that has fewer; of the paired test, the pairs.
        difference: the mean.
        spread: the standard deviation of the difference of one seed each; 0 without any noise.
        error: the standard error of the mean difference.
        freedom: degrees of freedom of ``error``.
    """

    test: str
    seeds: int
    difference: float
    spread: float
    error: float
    freedom: float

    def p_matching(self, margin: float) -> float:
        """p of the one-sided test of "it loses the margin or more".

        Args:
            margin: in units of the metric; taken as fixed.
        """
        return self._p(self.difference + margin)

    def p_not_matching(self, margin: float) -> float:
        """p of the one-sided test of "it loses the margin or less"."""
        return self._p(-self.difference - margin)

    def _p(self, distance: float) -> float:
        if self.error == 0:  # nothing to test
            return 0.0 if distance > 0 else 1.0
        return float(special.stdtr(self.freedom, -distance / self.error))

    def interval(self, alpha: float) -> tuple[float, float]:
        """The difference's confidence interval of 1 - 2 ``alpha``, which the tests agree with."""
        reach = _quantile(alpha, self.freedom) * self.error if self.error else 0.0
        return self.difference - reach, self.difference + reach

    def power(self, distance: float, alpha: float) -> float:
        """The chance of p at most ``alpha`` where the true difference is so far from the margin.

        From the noncentral t distribution. The true spread is taken to be that of these seeds,
        which is uncertain itself: see `uncertainty`.

        Args:
            distance: the margin itself for a true difference of zero, and, as the tests are mirror
                images, for a loss of twice the margin.
            alpha: the level.
        """
        if self.error == 0:
            return float(distance > 0)
        away = distance / self.error
        missed = float(special.nctdtr(self.freedom, away, _quantile(alpha, self.freedom)))
        return 1.0 if math.isnan(missed) else 1.0 - missed  # no number, where it is far too small

    def at(self, seeds: int) -> "Comparison":
        """What so many seeds of both conditions would say, were difference and spread the same."""
        ratio = 1.0
        if self.error:
            ratio = self.freedom / max(1, self.seeds - 1)
            ratio = min(max(ratio, 1.0), 2.0)  # Welch's at equal numbers; a pair is one
        return replace(
            self,
            seeds=seeds,
            error=self.spread / math.sqrt(seeds),
            freedom=(1.0 if self.test == PAIRED else ratio) * (seeds - 1),
        )

    def needed(self, margin: float, alpha: float, power: float = 0.8, least: int = 3) -> float:
        """The seeds of each condition that `power` takes; infinite above `MOST_SEEDS`."""
        if self.at(least).power(margin, alpha) >= power:
            return least
        few, many = least, 2 * least
        while self.at(many).power(margin, alpha) < power:
            few, many = many, 2 * many
            if many > MOST_SEEDS:
                return math.inf
        while many - few > 1:
            middle = (few + many) // 2
            enough = self.at(middle).power(margin, alpha) >= power
            few, many = (few, middle) if enough else (middle, many)
        return many

    def uncertainty(self, level: float = 0.9) -> tuple["Comparison", "Comparison"]:
        """The same with the spread at both ends of its confidence interval (chi squared).

        It assumes normal noise, and of Welch's test that its degrees of freedom describe it.
        """
        if self.error == 0:
            return self, self
        tail = (1 - level) / 2
        ends = (special.chdtri(self.freedom, p) for p in (tail, 1 - tail))
        factors = [math.sqrt(self.freedom / end) for end in ends]
        low, high = (replace(self, spread=self.spread * f, error=self.error * f) for f in factors)
        return low, high

    def chance(self, margin: float, alpha: float, seeds: int) -> float:
        """The chance that either test rejects once there are so many seeds, if the trend holds.

        Conditional power under the current trend (Lan and Wittes, Biometrics 44, 1988), with the
        spread taken as known.
        """
        end, here = self.at(seeds), self.difference + margin
        if self.error == 0 or seeds <= self.seeds:
            return float(min(self.p_matching(margin), self.p_not_matching(margin)) <= alpha)
        critical = _quantile(alpha, end.freedom) * end.error
        noise = self.spread * math.sqrt(seeds - self.seeds) / seeds
        return float(sum(special.ndtr((way - critical) / noise) for way in (here, -here)))


def paired(values: Sample, dense: Sample) -> Comparison:
    """Compare the seeds that both have, each with itself.

    Assumes that the differences are independent and normal; not that the two are independent.

    Args:
        values: two seeds or more in common with ``dense``, finite.
        dense: likewise.
    """
    seeds = sorted(values.keys() & dense.keys())
    gaps = np.array([values[seed] - dense[seed] for seed in seeds])
    constant = all(_noiseless([one[seed] for seed in seeds]) for one in (values, dense))
    spread = 0.0 if constant else float(np.std(gaps, ddof=1))
    count = len(seeds)
    return Comparison(
        *(PAIRED, count, float(np.mean(gaps)), spread, spread / math.sqrt(count), count - 1)
    )


def welch(values: Sample, dense: Sample) -> Comparison:
    """Compare two independent samples of seeds with a variance each (Welch, Biometrika 34, 1947).

    Args:
        values: two or more, finite.
        dense: likewise.
    """
    samples = [np.array(list(sample.values())) for sample in (values, dense)]
    variances = [0.0 if _noiseless(x) else float(np.var(x, ddof=1)) for x in samples]
    errors = [v / len(x) for v, x in zip(variances, samples, strict=True)]
    total = sum(errors)
    parts = (e**2 / (len(x) - 1) for e, x in zip(errors, samples, strict=True))
    freedom = total**2 / sum(parts) if total else math.inf
    return Comparison(
        WELCH,
        min(map(len, samples)),
        float(np.mean(samples[0]) - np.mean(samples[1])),
        math.sqrt(sum(variances)),
        math.sqrt(total),
        freedom,
    )


def correlation(values: Sample, dense: Sample) -> float:
    """Pearson's correlation over the seeds in common; NaN without noise, or with two seeds."""
    seeds = sorted(values.keys() & dense.keys())
    one, other = ([sample[seed] for seed in seeds] for sample in (values, dense))
    if len(seeds) < 3 or _noiseless(one) or _noiseless(other):
        return math.nan
    return float(np.corrcoef(one, other)[0, 1])


def _noiseless(values: "np.ndarray | list[float]") -> bool:
    return bool(np.ptp(values) == 0)  # rounding gives equal values a variance


def _quantile(alpha: float, freedom: float) -> float:
    """What Student's t exceeds with probability alpha. (scipy.stats takes a second to import.)"""
    return float(-special.stdtrit(freedom, alpha))
