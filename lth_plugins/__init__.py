"""Lottery tickets: sparse pre-trained backbones for detection and segmentation.

This module holds the public names. Each is imported when it is first used, as are the modules here:
what needs no PyTorch does not wait for it. No name imports a framework: import a plug-in
(`lth_plugins.detectron2`, `lth_plugins.mmseg`, `lth_plugins.transformers`, …) to use it.
"""

from typing import TYPE_CHECKING

from lth_plugins.lazy import attributes

if TYPE_CHECKING:  # for editors and type checkers
    from lth_plugins.deploy.compaction import compact as compact
    from lth_plugins.errors import ConfigError as ConfigError
    from lth_plugins.errors import LthError as LthError
    from lth_plugins.errors import RunError as RunError
    from lth_plugins.errors import TicketError as TicketError
    from lth_plugins.masking.attachment import Attachment as Attachment
    from lth_plugins.masking.attachment import attach as attach
    from lth_plugins.masking.attachment import attach_rest as attach_rest
    from lth_plugins.masking.attachment import attached as attached
    from lth_plugins.pruning import prune as prune
    from lth_plugins.pruning import prune_and_update as prune_and_update
    from lth_plugins.pruning.methods import SparseTraining as SparseTraining
    from lth_plugins.pruning.search.scripted import task_search as task_search
    from lth_plugins.shipped import config_path as config_path
    from lth_plugins.slimming.one_shot import slim as slim
    from lth_plugins.ticket import InputSpec as InputSpec
    from lth_plugins.ticket import Masks as Masks
    from lth_plugins.ticket import Ticket as Ticket
    from lth_plugins.ticket import TicketCatalog as TicketCatalog
    from lth_plugins.ticket import TicketMeta as TicketMeta

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = attributes(
    __name__,
    {
        "deploy.compaction": ("compact",),
        "errors": ("ConfigError", "LthError", "RunError", "TicketError"),
        "masking.attachment": ("Attachment", "attach", "attach_rest", "attached"),
        "pruning": ("prune", "prune_and_update"),
        "pruning.methods": ("SparseTraining",),
        "pruning.search.scripted": ("task_search",),
        "shipped": ("config_path",),
        "slimming.one_shot": ("slim",),
        "ticket": ("InputSpec", "Masks", "Ticket", "TicketCatalog", "TicketMeta"),
    },
)
