"""Importances: what a channel is worth. Each is one small file and a row here.

Another package adds one without a row: with ``IMPORTANCES.register(name, factory)``, or with an
entry point of the group ``lth_plugins.importances``. A factory makes an `Importance` for one model.
"""

from collections.abc import Callable
from functools import partial

from lth_plugins.registry import Registry
from lth_plugins.slimming.importance.fisher import Fisher
from lth_plugins.slimming.importance.importance import Importance
from lth_plugins.slimming.importance.magnitude import Magnitude
from lth_plugins.slimming.importance.taylor import Taylor
from lth_plugins.slimming.importance.ticket import TicketDensity

IMPORTANCES: Registry[Callable[[], Importance]] = Registry("importance", "lth_plugins.importances")
IMPORTANCES.register("l1", partial(Magnitude, 1))
IMPORTANCES.register("l2", partial(Magnitude, 2))
IMPORTANCES.register("ticket", TicketDensity)
IMPORTANCES.register("taylor", Taylor)
IMPORTANCES.register("fisher", Fisher)

__all__ = ["IMPORTANCES", "Importance"]
