"""Lottery tickets: sparse pre-trained backbones for detection and segmentation.

This module holds the public names. Importing it imports PyTorch and no framework: import a plug-in
(`lth_plugins.detectron2`, `lth_plugins.mmseg`, `lth_plugins.timm`) to use it.
"""

from lth_plugins.deploy.compaction import compact
from lth_plugins.errors import ConfigError, LthError, RunError, TicketError
from lth_plugins.masking.attachment import Attachment, attach, attach_rest, attached
from lth_plugins.pruning import prune
from lth_plugins.pruning.search.scripted import task_search
from lth_plugins.slimming.one_shot import slim
from lth_plugins.ticket import InputSpec, Masks, Ticket, TicketCatalog, TicketMeta

__version__ = "0.1.0"

__all__ = [
    "Attachment",
    "ConfigError",
    "InputSpec",
    "LthError",
    "Masks",
    "RunError",
    "Ticket",
    "TicketCatalog",
    "TicketError",
    "TicketMeta",
    "attach",
    "attach_rest",
    "attached",
    "compact",
    "prune",
    "slim",
    "task_search",
]
