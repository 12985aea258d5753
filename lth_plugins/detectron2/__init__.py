"""Plug-in for detectron2: importing it registers what a config can name.

That is the ``build_ticket_…`` backbones and ``TicketRes5ROIHeads``. A training script needs the
import and one line, ``add_ticket_config(cfg)``; with a LazyConfig the import in the config is
enough. Nothing of detectron2 is changed, and no hook is needed to keep the masks.
"""

from importlib.util import find_spec

if find_spec("detectron2") is None:
    raise ImportError(
        "lth_plugins.detectron2 needs detectron2, which is on no package index: build it from "
        "https://github.com/facebookresearch/detectron2 (`make detectron2` does)"
    )

from lth_plugins.detectron2.checkpoint import CompactCheckpointer, apply_noted_input
from lth_plugins.detectron2.config import (
    add_ticket_config,
    apply_ticket_input,
    get_ticket,
    method_of,
)
from lth_plugins.detectron2.datasets import add_dataset_config, register_datasets
from lth_plugins.detectron2.export import export_onnx
from lth_plugins.detectron2.hooks import GradualPruningHook, SparseTrainingHook, TicketHook
from lth_plugins.detectron2.lazy import with_ticket
from lth_plugins.detectron2.modeling import (
    TicketRes5ROIHeads,
    build_ticket_resnet_backbone,
    build_ticket_resnet_fpn_backbone,
    build_ticket_retinanet_resnet_fpn_backbone,
)
from lth_plugins.detectron2.resume import (
    ResumableLoader,
    ResumeHook,
    resumable,
    resumable_train_loader,
)
from lth_plugins.detectron2.slimming import (
    SlimHook,
    add_slim_config,
    adopt_slimmed,
    example_of,
    slimming_of,
    slims,
)
from lth_plugins.detectron2.solver import add_solver_config, build_optimizer
from lth_plugins.detectron2.task import task_search
from lth_plugins.detectron2.teacher import DistillHook, add_distill_config, add_teacher

__all__ = [
    "CompactCheckpointer",
    "DistillHook",
    "GradualPruningHook",
    "ResumableLoader",
    "ResumeHook",
    "SlimHook",
    "SparseTrainingHook",
    "TicketHook",
    "TicketRes5ROIHeads",
    "add_dataset_config",
    "add_distill_config",
    "add_slim_config",
    "add_solver_config",
    "add_teacher",
    "add_ticket_config",
    "adopt_slimmed",
    "apply_noted_input",
    "apply_ticket_input",
    "build_optimizer",
    "build_ticket_resnet_backbone",
    "build_ticket_resnet_fpn_backbone",
    "build_ticket_retinanet_resnet_fpn_backbone",
    "example_of",
    "export_onnx",
    "get_ticket",
    "method_of",
    "register_datasets",
    "resumable",
    "resumable_train_loader",
    "slimming_of",
    "slims",
    "task_search",
    "with_ticket",
]
