"""Tickets as checkpoints of other frameworks."""

import logging
import pickle
from collections.abc import Callable, Mapping
from io import BytesIO
from os import PathLike
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from lth_plugins.errors import ConfigError, unknown
from lth_plugins.ticket.dialects import from_torchvision
from lth_plugins.ticket.on_disk import write_file
from lth_plugins.ticket.ticket import Ticket

logger = logging.getLogger(__name__)


def _plain(dialect: str) -> Callable[[Ticket], bytes]:
    def encode(ticket: Ticket) -> bytes:
        state = from_torchvision(ticket.sparse_weights(), ticket.arch, dialect)
        return _torch_bytes({"state_dict": state})

    return encode


def _torch_prune(ticket: Ticket) -> bytes:
    state: dict[str, Tensor] = {}
    for name, value in ticket.weights.items():
        if name in ticket.masks:
            state[f"{name}_orig"] = value.clone()
            state[f"{name}_mask"] = ticket.masks[name].float()
        else:
            state[name] = value.clone()
    return _torch_bytes({"state_dict": state})


def _detectron2(ticket: Ticket) -> bytes:
    state = from_torchvision(ticket.sparse_weights(), ticket.arch, "detectron2")
    arrays = {k: v.numpy() for k, v in state.items() if not k.endswith("num_batches_tracked")}
    # The checkpointer of detectron2 then finds the trunk wherever the model nests it.
    content = {"model": arrays, "__author__": "lth_plugins", "matching_heuristics": True}
    return pickle.dumps(content, protocol=4)


def _torch_bytes(content: Any) -> bytes:
    buffer = BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


FORMATS: Mapping[str, Callable[[Ticket], bytes]] = MappingProxyType(
    {
        "torchvision": _plain("torchvision"),
        "timm": _plain("timm"),
        "mmseg": _plain("mmseg"),
        "detectron2": _detectron2,
        "torch-prune": _torch_prune,
    }
)
"""What a ticket can be written as: dense checkpoints with zeros, or ``torch.nn.utils.prune``'s."""


def to_checkpoint(ticket: Ticket, path: str | PathLike[str], format: str) -> None:
    """Write a ticket as another framework's checkpoint, atomically.

    Args:
        ticket: the ticket.
        path: the file; overwritten. That of "detectron2" ends in .pkl, and no other does.
        format: one of `FORMATS`.

    Raises:
        TicketError: if the format cannot express the architecture.
        ConfigError: if the format is unknown, or the file has the wrong ending.
        RunError: if the file cannot be written.
    """
    path = Path(path)
    if format not in FORMATS:
        raise unknown("format", format, FORMATS)
    if (path.suffix == ".pkl") != (format == "detectron2"):  # detectron2 knows its pickles by it
        wanted = "a name that ends in .pkl" if format == "detectron2" else "another end than .pkl"
        raise ConfigError(f"expected {wanted} for format {format!r}, found {path}")
    if ticket.outside:
        logger.warning("%s is the trunk alone, without the ticket's %r", path, ticket.outside.masks)
    write_file(path, FORMATS[format](ticket))
