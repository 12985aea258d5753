"""Plug-in for Hugging Face transformers: tickets on detectors and segmentors with a ResNet trunk.

A script needs the import and one line, ``lt.attach_ticket(model, image_processor, ticket)``, and
one more for the Trainer, ``callbacks=[lt.TicketCallback()]``. Nothing of transformers is changed.
"""

from importlib.util import find_spec

if find_spec("transformers") is None:
    raise ImportError(
        "lth_plugins.transformers needs transformers: install the extra, lth_plugins[transformers]"
    )

from lth_plugins.masking.hosting import warn_if_untested
from lth_plugins.transformers.attach import attach_ticket
from lth_plugins.transformers.callbacks import StopCallback, TicketCallback, last_checkpoint
from lth_plugins.transformers.export import export_onnx
from lth_plugins.transformers.pruning import (
    GradualPruningCallback,
    SlimmingCallback,
    SparseTrainingCallback,
)
from lth_plugins.transformers.task import task_search

warn_if_untested("transformers", "5.23", "5.23")

__all__ = [
    "GradualPruningCallback",
    "SlimmingCallback",
    "SparseTrainingCallback",
    "StopCallback",
    "TicketCallback",
    "attach_ticket",
    "export_onnx",
    "last_checkpoint",
    "task_search",
]
