"""Checkpoints of detectron2's own checkpointer: loads compacted ones, reads the input they note."""

import zipfile
from pathlib import Path
from typing import Any

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode

from lth_plugins.errors import TicketError
from lth_plugins.masking.loading import noted_input, reading
from lth_plugins.slimming.widths import adopt_widths


class CompactCheckpointer(DetectionCheckpointer):
    """detectron2's checkpointer, which gives the model the widths of a compacted or slimmed
    checkpoint first.

    It is for evaluation: an optimizer that was made before has the wide parameters. Everything else
    is as in ``DetectionCheckpointer``, which would skip the convolutions that do not fit.
    """

    def _load_model(self, checkpoint: dict[str, Any]) -> Any:
        adopt_widths(self.model, checkpoint["model"])
        return super()._load_model(checkpoint)


class WholeCheckpointer(CompactCheckpointer):
    """A checkpointer that refuses a checkpoint that lacks parameters, which would be random.

    Raises:
        TicketError: if the checkpoint lacks a parameter, has another shape, or cannot be read.
    """

    def _load_file(self, filename: str) -> Any:
        with reading(filename):
            return super()._load_file(filename)

    def _load_model(self, checkpoint: dict[str, Any]) -> Any:
        found = super()._load_model(checkpoint)
        absent = [key for key in found.missing_keys if not key.endswith("num_batches_tracked")]
        absent += [key for key, *_ in found.incorrect_shapes]
        if absent:
            raise TicketError(
                f"expected all parameters of a trained {type(self.model).__name__} in the "
                f"checkpoint, found none that fit {len(absent)} of them, such as {absent[0]}, "
                "which would be random: give the checkpoint that was trained with this config"
            )
        return found


def read_checkpoint(path: str) -> Any:
    """What a file of PyTorch holds; only the tensors that are used are read from the disk.

    Raises:
        TicketError: if there is none, or it cannot be read.
    """
    with reading(path):
        # Files of old versions of PyTorch are no archives, and are read whole.
        lazily = zipfile.is_zipfile(path)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=lazily)


def state_in(path: str) -> Any:
    """The model's state dict in a checkpoint; None where the path is no file of PyTorch.

    Raises:
        TicketError: if it cannot be read.
    """
    if not path.endswith(".pth") or not Path(path).is_file():
        return None
    return read_checkpoint(path).get("model")


def apply_noted_input(cfg: CfgNode, path: str) -> None:
    """Feed the model the input that a checkpoint notes, by editing a config in place.

    For inference without the ticket that `apply_ticket_input` needs. A checkpoint of a model that
    never had a ticket notes none, and changes nothing.

    Args:
        cfg: complete, and not frozen yet.
        path: a checkpoint; only files of PyTorch note their input.
    """
    noted = noted_input(state_in(path))
    if noted is not None:
        cfg.INPUT.FORMAT = noted.format
        cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD = list(noted.mean), list(noted.std)
