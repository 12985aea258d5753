"""Criteria: what a weight is worth. Each is one small file; a new one is a file and a row here."""

from collections.abc import Mapping
from types import MappingProxyType

from lth_plugins.errors import unknown
from lth_plugins.pruning.criteria.criterion import Criterion, Loss
from lth_plugins.pruning.criteria.grasp import GraSP
from lth_plugins.pruning.criteria.magnitude import Magnitude
from lth_plugins.pruning.criteria.random import Random
from lth_plugins.pruning.criteria.snip import Snip
from lth_plugins.pruning.criteria.synflow import SynFlow

CRITERIA: Mapping[str, Criterion] = MappingProxyType(
    {
        "magnitude": Magnitude(),
        "random": Random(),
        "snip": Snip(),
        "grasp": GraSP(),
        "synflow": SynFlow(),
    }
)


def get_criterion(name: str) -> Criterion:
    """The criterion of this name.

    Raises:
        TicketError: if there is none.
    """
    if name not in CRITERIA:
        raise unknown("criterion", name, CRITERIA)
    return CRITERIA[name]


__all__ = [
    "CRITERIA",
    "Criterion",
    "GraSP",
    "Loss",
    "Magnitude",
    "Random",
    "Snip",
    "SynFlow",
    "get_criterion",
]
