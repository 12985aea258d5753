"""Criteria: what a weight is worth. Each is one small file and a row here.

Another package adds one without a row: with ``CRITERIA.register(name, criterion)``, as a decorator
of a function too, or with an entry point of the group ``lth_plugins.criteria``.
"""

from lth_plugins.pruning.criteria.criterion import Criterion, Loss
from lth_plugins.pruning.criteria.grasp import GraSP
from lth_plugins.pruning.criteria.magnitude import Magnitude
from lth_plugins.pruning.criteria.random import Random
from lth_plugins.pruning.criteria.snip import Snip
from lth_plugins.pruning.criteria.synflow import SynFlow
from lth_plugins.registry import Registry

CRITERIA: Registry[Criterion] = Registry("criterion", "lth_plugins.criteria")
CRITERIA.register("magnitude", Magnitude())
CRITERIA.register("random", Random())
CRITERIA.register("snip", Snip())
CRITERIA.register("grasp", GraSP())
CRITERIA.register("synflow", SynFlow())

__all__ = ["CRITERIA", "Criterion", "GraSP", "Loss", "Magnitude", "Random", "Snip", "SynFlow"]
