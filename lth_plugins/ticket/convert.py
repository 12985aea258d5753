"""Checkpoints of other frameworks to tickets and back.

Foreign files are never unpickled freely: PyTorch files are read with ``weights_only=True``,
detectron2's pickles by a reader that knows arrays and nothing else.
"""

import pickle
from collections.abc import Callable, Mapping
from io import BytesIO
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from lth_plugins.ticket.dialects import from_torchvision, to_torchvision
from lth_plugins.ticket.errors import TicketError
from lth_plugins.ticket.file import replace_file
from lth_plugins.ticket.masks import Masks
from lth_plugins.ticket.ticket import IMAGENET, InputSpec, Ticket

_ORIG, _MASK = "_orig", "_mask"  # the suffixes of torch.nn.utils.prune
_WRAPPERS = ("state_dict", "model", "model_state")  # where trainers put the state dict


def from_checkpoint(path: Path, source: str = "unknown", input: InputSpec = IMAGENET) -> Ticket:
    """A ticket of a checkpoint in any known dialect.

    A checkpoint pruned with ``torch.nn.utils.prune`` (``*_orig`` and ``*_mask``) keeps its masks;
    any other becomes a dense ticket.

    Args:
        path: a PyTorch, safetensors or detectron2 pickle file.
        source: the pre-training it comes from.
        input: how its network was fed.

    Raises:
        TicketError: if the file cannot be read safely, or no known layout fits.
    """
    state = read_checkpoint(path)
    masks = {k.removesuffix(_MASK): v for k, v in state.items() if k.endswith(_MASK)}
    weights = {k.removesuffix(_ORIG): v for k, v in state.items() if not k.endswith(_MASK)}
    try:
        dense = Ticket.dense(weights, source, input, {"imported": True})
        if not masks:
            return dense
        everywhere = {key: torch.ones_like(value) for key, value in weights.items()}
        _, spelled = to_torchvision(everywhere | masks)
        return Ticket(
            Masks({name: spelled[name] for name in dense.arch.prunable}), dense.weights, dense.meta
        )
    except TicketError as error:
        raise TicketError(f"{path} cannot be made a ticket: {error}") from error


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """The state dict in a checkpoint file, without running anything the file brings along.

    Raises:
        TicketError: if there is no such file, it holds no state dict, or reading it would need
            full unpickling.
    """
    if not path.is_file():
        raise TicketError(f"expected a checkpoint, found nothing at {path}: check the path")
    try:
        content = _reader(path)(path)
    except Exception as error:  # whatever a foreign file makes its reader stumble over
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise TicketError(
            f"{path} cannot be read safely: {reason}. Expected a PyTorch file of tensors "
            "(weights_only), a safetensors file or detectron2's pickle of arrays. If you trust it, "
            "save its state dict anew with torch.save and give that file"
        ) from error
    for key in _WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
            break
    if isinstance(content, Mapping):
        state = {k: torch.as_tensor(v) for k, v in content.items() if _is_array(v)}
        if state:
            return {str(key): value for key, value in state.items()}
    raise TicketError(
        f"expected a state dict in {path}, found {type(content).__name__} without any"
    )


def _is_array(value: Any) -> bool:
    return isinstance(value, Tensor) or (
        isinstance(value, np.ndarray) and value.dtype.kind in "fiub"
    )


def _reader(path: Path) -> Callable[[Path], Any]:
    if path.suffix == ".safetensors":
        return safetensors.torch.load_file
    if path.suffix == ".pkl":
        return lambda path: _ArrayUnpickler(BytesIO(path.read_bytes()), encoding="latin1").load()
    return lambda path: torch.load(path, map_location="cpu", weights_only=True)


class _ArrayUnpickler(pickle.Unpickler):
    """Unpickles containers and NumPy arrays. Every other class or function is refused."""

    _ALLOWED = frozenset(
        {
            ("collections", "OrderedDict"),
            ("_codecs", "encode"),
            ("numpy", "ndarray"),
            ("numpy", "dtype"),
            *(
                (f"{core}.multiarray", function)
                for core in ("numpy.core", "numpy._core")
                for function in ("_reconstruct", "scalar")
            ),
        }
    )

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._ALLOWED:
            raise pickle.UnpicklingError(f"it wants to load {module}.{name}")
        return super().find_class(module, name)


def _plain(dialect: str) -> Callable[[Ticket], bytes]:
    def encode(ticket: Ticket) -> bytes:
        state = from_torchvision(ticket.sparse_weights(), ticket.arch, dialect)
        return _torch_bytes({"state_dict": state})

    return encode


def _torch_prune(ticket: Ticket) -> bytes:
    state: dict[str, Tensor] = {}
    for name, value in ticket.weights.items():
        if name in ticket.masks:
            state[name + _ORIG] = value.clone()
            state[name + _MASK] = ticket.masks[name].float()
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


def to_checkpoint(ticket: Ticket, path: Path, format: str) -> None:
    """Write a ticket as another framework's checkpoint, all or nothing.

    Args:
        ticket: the ticket.
        path: the file; overwritten.
        format: one of `FORMATS`.

    Raises:
        TicketError: if the format is unknown or cannot express the architecture, or the file
            cannot be written.
    """
    if format not in FORMATS:
        raise TicketError(f"unknown format {format!r}; known are {', '.join(FORMATS)}")
    data = FORMATS[format](ticket)
    try:
        replace_file(path, data)
    except OSError as error:
        raise TicketError(
            f"cannot write {path}: {error.strerror or error}. Give a path in an existing folder "
            "with free space; nothing was changed"
        ) from error
