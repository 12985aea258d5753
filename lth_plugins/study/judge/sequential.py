"""Looking repeatedly, paid for: group-sequential tests with alpha spending.

A test that is repeated as seeds come in rejects by chance more often than its level says. Here the
level is spent over the looks, by the function of Lan and DeMets that resembles O'Brien and
Fleming's boundaries (Biometrika 70, 1983, 659-663): little early, nearly all at the end, whenever
the looks come. Levels are of the normal process with independent increments, and p values of t
tests are compared with them, the significance-level approach (Jennison and Turnbull, Group
Sequential Methods, 2000, 4.4). With a first look at three seeds that would err by up to 7 % of the
level too often, as simulated: designs spend `T_TESTS` of it.
"""

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from scipy import special

_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(96)
_FAR = 8.0  # standard deviations, beyond which there is nothing
_ALPHAS = np.concatenate([np.geomspace(1e-9, 1e-3, 20), np.geomspace(1.25e-3, 0.995, 44)])

T_TESTS = 0.93
"""The part of a level that a design of several t tests spends, for so few seeds (see above)."""


def spent(alpha: float, fraction: float) -> float:
    """The part of a one-sided level that is spent once a fraction of all seeds is there."""
    return float(2 * special.ndtr(special.ndtri(alpha / 2) / math.sqrt(fraction)))


@lru_cache(maxsize=4096)
def levels(alpha: float, fractions: tuple[float, ...]) -> tuple[float, ...]:
    """The level of the one-sided test at each look, such that together they have level ``alpha``.

    By recursive integration over the paths that have crossed no boundary so far (Armitage,
    McPherson and Rowe, Journal of the Royal Statistical Society A 132, 1969).

    Args:
        alpha: of all looks together.
        fractions: of the information, which is the number of seeds, at each look; rising, at most
            1. Later looks do not change earlier levels.
    """
    found: list[float] = []
    places, density = np.zeros(1), np.ones(1)  # of the process S = Z √t, and weights of a sum
    for before, fraction in zip((0.0, *fractions), fractions, strict=False):
        step, end = math.sqrt(fraction - before), _FAR * math.sqrt(fraction)
        budget = spent(alpha, fraction) - (spent(alpha, before) if before else 0.0)
        bound = _bound(places, density, step, budget, end)
        found.append(float(special.ndtr(-bound / math.sqrt(fraction))))
        half = (bound + end) / 2
        following = -end + half * (1 + _NODES)
        away = (following[:, None] - places) / step
        kernel = np.exp(-(away**2) / 2) / (math.sqrt(2 * math.pi) * step)
        places, density = following, (kernel @ density) * half * _WEIGHTS
    return tuple(found)


def _bound(
    places: np.ndarray, density: np.ndarray, step: float, budget: float, end: float
) -> float:
    """What the process, which was at ``places``, exceeds after a step with this probability."""

    def excess(bound: float) -> float:
        return float(density @ special.ndtr((places - bound) / step)) - budget

    from scipy import optimize  # a tenth of a second, and only for verdicts at several looks

    return float(optimize.brentq(excess, -end, end)) if excess(end) < 0 else end


def design(alpha: float, fractions: tuple[float, ...]) -> tuple[float, ...]:
    """The level of the t test at each look of a design; of one look it is ``alpha``."""
    return (alpha,) if fractions == (1.0,) else levels(T_TESTS * alpha, fractions)


def sequential_p(p: Sequence[float], fractions: tuple[float, ...]) -> float:
    """The smallest level of a `design` at which a look so far rejects; of one look, its p.

    It is a p value: where the hypothesis holds, the chance that it ever falls to a level is at most
    that level (Liu and Anderson, Journal of the American Statistical Association 103, 2008).

    Args:
        p: one-sided, of each look so far.
        fractions: as those of `levels`, of all looks.
    """
    if fractions == (1.0,):
        return p[0]
    found = []
    for one, column in zip(p, _table(fractions).T, strict=False):
        at = np.log(max(one, 1e-300))
        found.append(float(np.exp(np.interp(at, column, np.log(_ALPHAS), right=0.0))))
    return min(1.0, min(found) / T_TESTS)


@lru_cache(maxsize=64)
def _table(fractions: tuple[float, ...]) -> np.ndarray:
    """The logarithm of `levels` for each of `_ALPHAS`, rising in each column."""
    rows = [levels(float(alpha), fractions) for alpha in _ALPHAS]
    return np.maximum.accumulate(np.log(np.maximum(rows, 1e-300)), axis=0)
