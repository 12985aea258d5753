"""`Margin`: the loss that still counts as matching."""

import math
import re
from dataclasses import dataclass

from lth_plugins.errors import ConfigError


@dataclass(frozen=True)
class Margin:
    """A loss, in points of the metric or relative to the dense network.

    Attributes:
        amount: of points (percent of a metric in percent); where relative, a fraction.
        relative: whether the dense mean is the unit. That mean is an estimate, and tests take the
            margin as fixed: a margin in points is.
    """

    amount: float = 0.5
    relative: bool = False

    def points(self, dense: float) -> float:
        """The margin in units of the metric.

        Args:
            dense: the mean of the dense network.
        """
        return self.amount * dense if self.relative else self.amount

    def __str__(self) -> str:
        if self.relative:
            return f"{100 * self.amount:g} % of the dense mean"
        return f"{self.amount:g} point{'' if self.amount == 1 else 's'}"


def read_margin(key: str, text: str) -> Margin:
    """A margin as a configuration has it: ``0.5``, points of the metric, or ``1%``.

    Args:
        key: of the configuration, for messages.
        text: the value.

    Raises:
        ConfigError: if it is no positive number.
    """
    found = re.fullmatch(r"\s*([0-9.eE+-]+)\s*(%?)\s*", text)
    try:
        amount = float(found[1]) if found else math.nan
    except ValueError:
        amount = math.nan
    if not 0 < amount < math.inf or found is None:
        raise ConfigError(
            f"expected {key} to be points of the metric, such as 0.5, or a part of the dense mean, "
            f"such as 1%, above 0; found {text}"
        )
    return Margin(amount / 100, True) if found[2] else Margin(amount)
