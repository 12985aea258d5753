"""Checkpoints with detectron2's own checkpointer: compacted ones, and the input that they note."""

from pathlib import Path
from typing import Any

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode

from lth_plugins.deploy.compaction import narrow_to
from lth_plugins.masking.loading import noted_input, reading


class CompactCheckpointer(DetectionCheckpointer):
    """detectron2's checkpointer, which gives the model the widths of a compacted checkpoint first.

    To evaluate: an optimizer that was made before the loading has the wide parameters. All else,
    checkpoints that are not compacted included, is as in ``DetectionCheckpointer``, which would
    leave out the convolutions that do not fit.
    """

    def _load_model(self, checkpoint: dict[str, Any]) -> Any:
        narrow_to(self.model, checkpoint["model"])
        return super()._load_model(checkpoint)


def apply_noted_input(cfg: CfgNode, path: str) -> None:
    """Feed the model what a checkpoint notes that it was trained on, by editing a config in place.

    For inference where the ticket is not there (`apply_ticket_input`). It does nothing where the
    checkpoint notes nothing, as others than those of a model with a ticket.

    Args:
        cfg: complete, and not frozen yet.
        path: a checkpoint; others than files of PyTorch note nothing.
    """
    if not path.endswith(".pth") or not Path(path).is_file():
        return
    with reading(path):
        content = torch.load(path, map_location="cpu", weights_only=True)
    noted = noted_input(content.get("model"))
    if noted is not None:
        cfg.INPUT.FORMAT = noted["format"]
        cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD = list(noted["mean"]), list(noted["std"])
