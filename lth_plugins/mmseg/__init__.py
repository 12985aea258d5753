"""Plug-in for mmsegmentation: importing it registers the names that a config can use.

``custom_imports=dict(imports=['lth_plugins.mmseg'])`` in a config is enough. The names go into
mmengine's root registries, where mmsegmentation, mmdetection and mmpretrain all look them up: the
initialiser ``Ticket`` and the hook ``TicketHook`` serve the three of them. The backbones are
mmsegmentation's own, and exist where it is installed.
"""

from importlib.util import find_spec

if find_spec("mmengine") is None:
    raise ImportError(
        "lth_plugins.mmseg needs mmengine and mmsegmentation: install the extra, lth_plugins[mmseg]"
    )

from lth_plugins.mmseg.config import apply_input, apply_ticket
from lth_plugins.mmseg.hooks import GradualPruningHook, SparseTrainingHook, TicketHook
from lth_plugins.mmseg.images import ImagesHook
from lth_plugins.mmseg.init import TicketInit
from lth_plugins.mmseg.resume import ResumeHook, make_resumable
from lth_plugins.mmseg.slimming import SlimHook
from lth_plugins.mmseg.task import task_search
from lth_plugins.mmseg.teacher import DistillHook, apply_teacher

__all__ = [
    "DistillHook",
    "GradualPruningHook",
    "ImagesHook",
    "ResumeHook",
    "SlimHook",
    "SparseTrainingHook",
    "TicketHook",
    "TicketInit",
    "apply_input",
    "apply_teacher",
    "apply_ticket",
    "make_resumable",
    "task_search",
]

if find_spec("mmseg") is not None:
    from lth_plugins.mmseg.backbones import TicketResNet, TicketResNetV1c, TicketResNetV1d

    __all__ += ["TicketResNet", "TicketResNetV1c", "TicketResNetV1d"]
