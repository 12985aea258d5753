"""The ticket file: one safetensors file as small as the ticket is sparse.

Layout, version 1. The header's metadata has one entry, ``lth_plugins``: JSON with the format
version, the content digest and the ticket's description. For every prunable parameter NAME:

- ``NAME.mask``: the distances between kept weights, one byte each, zstandard-compressed (see
  `_encode_gaps`). Packed bits, nearly all zero in a sparse ticket, are what a byte-wise coder
  compresses badly: 1.4 to 1.6 times the entropy of a random mask at 3.5 to 1.8 % density, where
  the distances take 1.01 times.
- ``NAME``: the kept weights, float32, in memory order.

Everything else of the trunk (stem, normalisation) is stored whole under its own name. Shapes are
those of the architecture the description names, so no size is ever taken from an untrusted file.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zstandard
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_safetensors
from torch import Tensor

from lth_plugins.ticket.arch import ARCHITECTURES, ResNet
from lth_plugins.ticket.errors import TicketError
from lth_plugins.ticket.masks import Masks
from lth_plugins.ticket.ticket import Ticket, TicketMeta

FORMAT_VERSION = 1
_KEY = "lth_plugins"
_MASK = ".mask"
_ESCAPE = 255
_COMPRESSION_LEVEL = 3  # what is left after the gaps is noise: higher levels gain under 1 %
_MOST_METADATA = 1 << 20


def write(ticket: Ticket, path: Path) -> Path:
    """Write ``ticket`` to ``path``; a file that was there is replaced whole or not at all.

    Raises:
        TicketError: if the folder does not exist or cannot be written to.
    """
    tensors: dict[str, Tensor] = {}
    for name, value in ticket.weights.items():
        if name in ticket.masks:
            mask = ticket.masks[name].numpy().ravel()
            gaps = _encode_gaps(mask)
            packed = zstandard.ZstdCompressor(level=_COMPRESSION_LEVEL).compress(gaps.tobytes())
            tensors[name + _MASK] = torch.frombuffer(bytearray(packed), dtype=torch.uint8)
            value = torch.from_numpy(value.numpy().ravel()[mask])
        tensors[name] = value
    header = {"version": FORMAT_VERSION, "digest": ticket.digest, "meta": ticket.meta.to_dict()}
    # A single entry, because safetensors writes several in random order.
    data = to_safetensors(tensors, metadata={_KEY: json.dumps(header, sort_keys=True)})
    try:
        replace_file(path, data)
    except OSError as error:
        raise TicketError(
            f"cannot write the ticket {path}: {error.strerror or error}. "
            "Give a path in an existing folder with free space; nothing was changed"
        ) from error
    return path


def replace_file(path: Path, data: bytes) -> None:
    """Write beside the target, flush, rename: a crash leaves the old file or the new one."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def read(path: Path) -> Ticket:
    """Read a ticket and check it against its digest. Pruned weights of θ are zero in the result.

    Raises:
        TicketError: if there is no such file, it is not a ticket, is of a newer format, is
            truncated, or its content does not match its digest.
    """
    if not path.is_file():
        raise TicketError(f"expected a ticket file, found nothing at {path}: check the path")
    try:
        with safe_open(path, framework="pt") as file:
            meta, stored = _read_header(file.metadata() or {})
            return _read_content(file, meta, stored)
    except (TicketError, SafetensorError, zstandard.ZstdError, OSError) as error:
        raise TicketError(f"{path} cannot be read as a ticket: {_reason(error, path)}") from error


def read_digest(path: Path) -> str:
    """The digest that a ticket file states. The rest of the file is neither read nor checked.

    Raises:
        TicketError: if there is no such file, or it has no ticket's header.
    """
    if not path.is_file():
        raise TicketError(f"expected a ticket file, found nothing at {path}: check the path")
    try:
        with safe_open(path, framework="pt") as file:
            return _read_header(file.metadata() or {})[1]
    except (TicketError, SafetensorError, OSError) as error:
        raise TicketError(f"{path} cannot be read as a ticket: {_reason(error, path)}") from error


def _reason(error: Exception, path: Path) -> str:
    if isinstance(error, TicketError):
        return str(error)
    if path.stat().st_size == 0:
        return "the file is empty; copy it again or make the ticket again"
    return (
        f"it is not a whole safetensors file ({error}). If it is a checkpoint, make a ticket of "
        "it first; if it was a ticket, it is truncated or damaged: copy it again"
    )


def _read_header(metadata: Mapping[str, str]) -> tuple[TicketMeta, str]:
    text = metadata.get(_KEY)
    if text is None or len(text) > _MOST_METADATA:
        raise TicketError(
            "it is a safetensors file, but not a ticket (it has no 'lth_plugins' header). "
            "If it is a checkpoint, make a ticket of it first"
        )
    try:
        header = json.loads(text)
        version, stored, meta = header["version"], header["digest"], header["meta"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise TicketError(f"its header is damaged: {error!r}") from None
    if version != FORMAT_VERSION:
        raise TicketError(
            f"it has format version {version!r:.20}, "
            f"this release reads version {FORMAT_VERSION}: upgrade lth_plugins"
        )
    return TicketMeta.from_dict(meta), stored


def _read_content(file: Any, meta: TicketMeta, stored: str) -> Ticket:
    arch = ARCHITECTURES[meta.arch]
    expected = set(arch.shapes) | {name + _MASK for name in arch.prunable}
    found = set(file.keys())
    if found != expected:
        odd = sorted(found ^ expected)[0]
        raise TicketError(
            f"expected the {len(expected)} entries of a {arch.name} ticket, found {len(found)}; "
            f"{odd} is {'missing' if odd in expected else 'not one of them'}"
        )
    masks: dict[str, Tensor] = {}
    weights: dict[str, Tensor] = {}
    content = _Digest(meta, arch)
    for name, shape in arch.shapes.items():
        dtype = "I64" if name.endswith("num_batches_tracked") else "F32"
        if name not in arch.prunable:
            weights[name] = _entry(file, name, dtype, shape)
            content.add(weights[name].numpy())
            continue
        packed = _entry(file, name + _MASK, "U8", None)
        numel = int(np.prod(shape))
        kept = _decode_gaps(_decompress(packed.numpy().tobytes(), numel, name), numel, name)
        survivors = _entry(file, name, dtype, (len(kept),))
        mask = np.zeros(numel, dtype=bool)
        mask[kept] = True
        content.add(np.packbits(mask))
        content.add(survivors.numpy())
        weight = np.zeros(numel, dtype=np.float32)
        weight[kept] = survivors.numpy()
        masks[name] = torch.from_numpy(mask).view(shape)
        weights[name] = torch.from_numpy(weight).view(shape)
    if content.hexdigest() != stored:
        raise TicketError(
            "its content does not match its digest: it was edited or damaged. "
            "Copy it again, or make the ticket again"
        )
    known = Masks(masks)
    ticket = Ticket(known, weights, meta, known)
    ticket.__dict__["digest"] = stored  # just checked: spare the second computation
    return ticket


def _entry(file: Any, name: str, dtype: str, shape: tuple[int, ...] | None) -> Tensor:
    """One tensor, its declared type and shape checked before anything is allocated."""
    entry = file.get_slice(name)
    found = tuple(entry.get_shape())
    if entry.get_dtype() != dtype or (found != shape if shape is not None else len(found) != 1):
        raise TicketError(
            f"{name} is {entry.get_dtype()} {found}, expected {dtype} {shape or '(bytes,)'}"
        )
    return file.get_tensor(name)


def _encode_gaps(mask: np.ndarray) -> np.ndarray:
    """Kept positions of a flat mask as bytes: how many pruned weights lie before each kept one.

    A distance of 255 or more is written as as many 255s as fit and the rest. The distances of a
    random mask are geometrically distributed, which a byte-wise entropy coder nearly saturates.
    """
    distance = np.diff(np.flatnonzero(mask), prepend=-1) - 1
    escapes = distance // _ESCAPE
    gaps = np.full(len(distance) + int(escapes.sum()), _ESCAPE, dtype=np.uint8)
    gaps[np.arange(len(distance)) + np.cumsum(escapes)] = distance % _ESCAPE
    return gaps


def _decode_gaps(gaps: np.ndarray, numel: int, name: str) -> np.ndarray:
    """The kept positions, ascending; the inverse of `_encode_gaps`."""
    is_kept = gaps != _ESCAPE
    position = np.cumsum(gaps.astype(np.int32) + is_kept, dtype=np.int64) - 1
    if len(position) and position[-1] >= numel:
        raise TicketError(f"the mask of {name} reaches beyond its {numel} weights")
    return position[is_kept]


def _decompress(packed: bytes, numel: int, name: str) -> np.ndarray:
    """Unpack a mask, bounded by the number of weights it can describe."""
    bound = numel + numel // _ESCAPE
    size = zstandard.frame_content_size(packed)
    if not 0 <= size <= bound:
        raise TicketError(
            f"the mask of {name} claims {size} bytes, expected at most {bound} for {numel} weights"
        )
    unpacked = zstandard.ZstdDecompressor().decompress(packed, max_output_size=bound)
    return np.frombuffer(unpacked, dtype=np.uint8)


class _Digest:
    """SHA-256 over the description, then every entry of the trunk in network order."""

    def __init__(self, meta: TicketMeta, arch: ResNet) -> None:
        self._hash = hashlib.sha256(json.dumps(meta.to_dict(), sort_keys=True).encode())

    def add(self, values: np.ndarray) -> None:
        self._hash.update(np.ascontiguousarray(values).data if values.ndim else values.tobytes())

    def hexdigest(self) -> str:
        return self._hash.hexdigest()


def digest(ticket: Ticket) -> str:
    """The content digest of a ticket; the same before and after it was written and read."""
    content = _Digest(ticket.meta, ticket.arch)
    for name, value in ticket.weights.items():
        if name in ticket.masks:
            mask = ticket.masks[name].numpy().ravel()
            content.add(np.packbits(mask))
            content.add(value.numpy().ravel()[mask])
        else:
            content.add(value.numpy())
    return content.hexdigest()
