"""Foreign checkpoint files, read without running anything they bring along.

PyTorch files, new and old, and detectron2's pickles go through `unpickle`, which knows tensors,
arrays and plain containers. Files that also hold other objects (an optimizer's class, a config) are
refused, unless asked to leave those objects out; no file is ever unpickled freely. Here is how the
files are laid out, and what they may hold at most. What the tensors mean is `convert`'s business.
"""

import os
import struct
import zipfile
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lth_plugins.ticket.errors import NotFound, TicketError, enough_memory
from lth_plugins.ticket.unpickle import (
    PLAIN,
    Array,
    Placeholder,
    Storage,
    UnknownName,
    View,
    load,
    shape_of,
)

MOST_HEADER = 8 << 20
"""Bytes of a safetensors header; those of the largest tickets and checkpoints have a tenth."""

_MOST_ENTRIES, _LONGEST_NAME = 1 << 16, 255
_ZIP, _TAR = b"PK\x03\x04", b"ustar"  # the latter at byte 257


def read_checkpoint(path: Path, skip_objects: bool = False) -> dict[str, Tensor]:
    """All tensors and arrays of plain numbers in a checkpoint file.

    Args:
        path: a PyTorch, safetensors or detectron2 pickle file.
        skip_objects: read a file that holds other objects than tensors and plain containers, and
            leave those out: placeholders are built in their place, and nothing the file names is
            imported or called.

    Returns:
        The tensors by name; nested dictionaries are joined with dots, so that an entry of
        ``{"state_dict": {"conv1.weight": …}}`` is ``state_dict.conv1.weight``.

    Raises:
        TicketError: if there is no such file, it holds no state dict, or it holds other objects.
    """
    check_there(path, "a checkpoint")
    try:
        with enough_memory():
            content = _read(path, skip_objects)
            state = _flatten(content)
    except (TicketError, SafetensorError, OSError) as error:
        raise TicketError(f"{path} cannot be read safely: {_reason(error)}") from error
    if not state:
        whole = isinstance(content, Placeholder)
        found = "a whole object" if whole else f"{type(content).__name__} without any"
        raise TicketError(
            f"expected a state dict in {path}, found {found}: save model.state_dict() with "
            "torch.save and give that file"
        )
    return state


def _reason(error: Exception) -> str:
    if isinstance(error, UnknownName):
        return (
            f"it holds {error}, which is neither a tensor nor a plain container, and building that "
            "would run code that the file chooses. To read its tensors and leave everything else "
            "out, say --skip-objects (skip_objects=True)"
        )
    return (
        f"{str(error).rstrip('.')}. Expected a PyTorch file of tensors, a safetensors file or "
        "detectron2's pickle of arrays, whole and not compressed"
    )


def _flatten(content: Any) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    pending = [("", content)]
    seen: set[int] = set()  # a pickle may hold a dictionary that holds itself
    while pending:
        prefix, mapping = pending.pop()
        if not isinstance(mapping, Mapping) or id(mapping) in seen:
            continue
        seen.add(id(mapping))
        nested = []
        for key, value in mapping.items():
            name = f"{prefix}{key}"
            tensor = value.tensor() if isinstance(value, View | Array) else value
            if isinstance(tensor, Tensor) and tensor.dtype in PLAIN:
                tensors[name] = tensor
                if len(name) > _LONGEST_NAME or len(tensors) > _MOST_ENTRIES:
                    raise TicketError(
                        f"expected at most {_MOST_ENTRIES:,} tensors with names of at most "
                        f"{_LONGEST_NAME} characters, found more"
                    )
            elif isinstance(value, Mapping) and len(name) < _LONGEST_NAME:
                nested.append((f"{name}.", value))
        pending += reversed(nested)
    return tensors


def _read(path: Path, skip_objects: bool) -> Any:
    if path.suffix == ".safetensors":
        check_header(path)
        with safe_open(path, framework="pt") as file:
            for entry in map(file.get_slice, file.keys()):
                shape_of(entry.get_shape())
        return safetensors.torch.load_file(path)
    with path.open("rb") as file:
        start = file.read(512)
    if path.suffix == ".pkl":
        return load(BytesIO(path.read_bytes()), skip_objects=skip_objects)
    if start[257:262] == _TAR:
        raise TicketError("it is a tar file")
    return (_read_zip if start[:4] == _ZIP else _read_old)(path, skip_objects)


def check_there(path: Path, what: str) -> None:
    """Raise `NotFound` where there is no file, as far as anybody here can tell."""
    if not os.path.isfile(path):  # for path.is_file() a name may be too long
        raise NotFound(
            f"expected {what}, found nothing at {path}: check the path, and who may read it"
        )


def check_header(path: Path) -> None:
    """Refuse a safetensors file whose header is longer than is worth parsing.

    Raises:
        SafetensorError: if it says so. Whether the rest is sound is for safetensors to say.
    """
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
    if size > MOST_HEADER:
        raise SafetensorError(f"a header of {size:,} bytes, expected at most {MOST_HEADER:,}")


def _read_zip(path: Path, skip_objects: bool) -> Any:
    """What ``torch.save`` writes since PyTorch 1.6: a pickle, and each storage by its key."""
    storages: dict[str, Storage] = {}
    try:
        with zipfile.ZipFile(path) as archive:
            root = _root(archive, path.stat().st_size)

            def load_storage(key: str, dtype: torch.dtype, numel: int) -> Storage:
                if key not in storages:
                    storages[key] = Storage(dtype, numel)
                    storages[key].fill(archive.read(f"{root}data/{key}"))
                return storages[key]

            return load(BytesIO(archive.read(f"{root}data.pkl")), load_storage, skip_objects)
    except TicketError:
        raise
    except _BROKEN_ZIP as error:
        raise TicketError(f"it is not a whole zip file ({error!s:.80})") from error


_BROKEN_ZIP = (
    zipfile.BadZipFile,
    EOFError,
    KeyError,  # no such entry
    NotImplementedError,  # a feature of other zip files
    RuntimeError,  # encrypted
    ValueError,
    struct.error,
)
"""What a damaged zip file makes Python's reader stumble over."""


def _root(archive: zipfile.ZipFile, size: int) -> str:
    """The folder that everything is in, of an archive that is no larger when it is read.

    Raises:
        TicketError: if it is compressed, entries share their bytes, or it is something else than a
            file of tensors.
    """
    entries = archive.infolist()
    names = [entry.filename for entry in entries]
    if any(name.endswith("/constants.pkl") for name in names):
        raise TicketError("it is a TorchScript archive")
    packed = [e.filename for e in entries if e.compress_type or e.compress_size != e.file_size]
    if packed or sum(entry.file_size for entry in entries) > size:
        what = f"{packed[0]:.80} is compressed" if packed else "its entries overlap"
        raise TicketError(f"{what}, which torch.save never does: save it again")
    roots = [name.removesuffix("data.pkl") for name in names if name.endswith("/data.pkl")]
    if len(roots) != 1:
        raise TicketError(f"expected a data.pkl in the zip file, found {len(roots)}")
    (root,) = roots
    if f"{root}byteorder" in names and archive.read(f"{root}byteorder") != b"little":
        raise TicketError("it was written by a machine with another byte order")
    return root


def _read_old(path: Path, skip_objects: bool) -> Any:
    """What ``torch.save`` wrote before: five pickles, and the storages one after the other."""
    storages: dict[str, Storage] = {}
    file = BytesIO(path.read_bytes())

    def load_storage(key: str, dtype: torch.dtype, numel: int) -> Storage:
        return storages.setdefault(key, Storage(dtype, numel))

    if load(file) != torch.serialization.MAGIC_NUMBER:
        raise TicketError("it does not begin as a PyTorch file")
    if load(file) != torch.serialization.PROTOCOL_VERSION:
        raise TicketError("it has another version than PyTorch's old format ever had")
    match load(file):
        case {"little_endian": False}:
            raise TicketError("it was written by a machine with another byte order")
    content = load(file, load_storage, skip_objects)
    match load(file):
        case [*keys] if all(type(key) is str and key in storages for key in keys):
            for key in keys:
                file.read(8)  # the number of elements once more
                storages[key].fill(file.read(storages[key].nbytes))
        case _:
            raise TicketError("it has no list of its storages: it is damaged")
    return content
