"""Criteria: what a weight is worth. Each is one small file and a row here.

Another package adds one without a row: with ``CRITERIA.register(name, criterion)``, as a decorator
of a function too, or with an entry point of the group ``lth_plugins.criteria``.
"""

from lth_plugins.errors import ConfigError, LthError
from lth_plugins.pruning.criteria.cap import CAP, WoodFisher
from lth_plugins.pruning.criteria.criterion import Criterion, Loss, Losses, Surgeon
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
CRITERIA.register("woodfisher", WoodFisher())
CRITERIA.register("cap", CAP())


def data_free(name: str) -> Criterion:
    """The criterion of this name, for callers that have no data to rank weights by.

    Raises:
        ConfigError: if there is no such criterion, or it needs a model and a loss.
    """
    criterion = CRITERIA[name]
    if needs_loss(name):
        free = [other for other in CRITERIA if not needs_loss(other)]
        raise ConfigError(
            f"criterion {name!r} ranks weights by the gradients of a loss on data, and here is "
            f"none: choose {' or '.join(free)}, or in Python give lth.prune a model and a loss"
        )
    return criterion


def needs_loss(name: str) -> bool:
    """Whether the criterion of this name ranks weights by the gradients of a loss."""
    try:
        CRITERIA[name]({}, None, None)
    except (LthError, AttributeError, TypeError):  # another package's may just use what is None
        return True
    return False


__all__ = ["CRITERIA", "Criterion", "Loss", "Losses", "Surgeon", "data_free", "needs_loss"]
