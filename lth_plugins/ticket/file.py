"""The ticket file: one safetensors file as small as the ticket is sparse.

The header's metadata has one entry, ``lth_plugins``: JSON with the format version, the content
digest and the ticket's description. For every prunable parameter NAME there are:

- ``NAME.mask``: the distances between kept weights, one byte each, zstandard-compressed (see
  `_encode_gaps`). A byte-wise coder compresses packed bits badly where nearly all are zero: to 1.4
  to 1.6 times the entropy of a random mask at 3.5 to 1.8 % density. The distances take 1.01 times.
- ``NAME``: the kept weights, float32, in memory order.

Everything else of the trunk (stem, normalisation) is stored whole under its own name. Shapes are
those of the architecture that the description names: no size comes from an untrusted file.

Versions, of which a ticket is written in the lowest that holds it (`_READERS` has all of them):

1. A trunk.
2. A ticket that also prunes outside the trunk. The header lists those parameters with their shapes
   under ``rest``, bounded in sum before anything is allocated; their two entries are called
   ``rest.NAME.mask`` and ``rest.NAME``.
3. A ticket for other images than RGB or BGR of 8 bits. The description's input says how many
   channels they have, and so the shape of the stem's first convolution. ``rest`` may be there.

What a file makes its reader allocate is bounded by those shapes and by the bytes it has: before a
mask is unpacked its size must be one that the stored weights and the shape allow.
"""

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, TypeVar

import numpy as np
import zstandard
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as to_safetensors

from lth_plugins.errors import LthError, TicketError, enough_memory
from lth_plugins.ticket.arch import Shape
from lth_plugins.ticket.counts import Counts
from lth_plugins.ticket.meta import TicketMeta
from lth_plugins.ticket.on_disk import check_header, check_there, write_file
from lth_plugins.ticket.shapes import check_outside_shapes

Array = NDArray[Any]

_T = TypeVar("_T")

_KEY = "lth_plugins"
_MASK = ".mask"
_OUTSIDE = "rest."
_ESCAPE = 255
_COMPRESSION_LEVEL = 3  # what is left after the gaps is noise: higher levels gain under 1 %
_MOST_METADATA = 1 << 20
_LARGEST_WINDOW = 8 << 20  # what every decoder should support (RFC 8878, section 3.1.1.1.2)


@dataclass(frozen=True)
class Content:
    """What a file stores: a ticket by its parts, as NumPy arrays.

    Attributes:
        meta: its description.
        masks: of the trunk, boolean.
        weights: of the trunk; those that are pruned are not stored, and 0 once they are read.
        outside_masks: of what is pruned outside the trunk.
        outside_weights: likewise.
    """

    meta: TicketMeta
    masks: Mapping[str, Array]
    weights: Mapping[str, Array]
    outside_masks: Mapping[str, Array]
    outside_weights: Mapping[str, Array]

    @cached_property
    def counts(self) -> Counts:
        """How many weights of the trunk are kept, by parameter."""
        return _counts(self.masks)

    @cached_property
    def outside_counts(self) -> Counts:
        """How many weights outside the trunk are kept, by parameter."""
        return _counts(self.outside_masks)

    @cached_property
    def digest(self) -> str:
        """The content digest; the same before and after the content was written and read."""
        shapes = {name: mask.shape for name, mask in self.outside_masks.items()}
        result = _Digest(self.meta, shapes)
        masks = {**self.masks, **self.outside_masks}
        for name, value in (*self.weights.items(), *self.outside_weights.items()):
            if name in masks:
                mask = masks[name].ravel()
                result.add_masked(mask, value.ravel()[mask])
            else:
                result.add(value)
        return result.hexdigest()


def _counts(masks: Mapping[str, Array]) -> Counts:
    return Counts({n: (int(np.count_nonzero(mask)), mask.size) for n, mask in masks.items()})


@dataclass(frozen=True)
class Facts:
    """What a file says of its ticket; the weights are not read for it."""

    meta: TicketMeta
    digest: str
    counts: Counts
    outside_counts: Counts


def write(content: Content, path: Path) -> None:
    """Write a ticket and its digest to a file, atomically.

    Raises:
        RunError: if the folder does not exist or cannot be written to.
    """
    tensors: dict[str, Array] = {}
    for name, value in content.weights.items():
        if name in content.masks:
            tensors |= _masked_entries(name, content.masks[name], value)
        else:
            tensors[name] = np.asarray(value, order="C")
    header = {"version": 1, "digest": content.digest, "meta": content.meta.to_dict()}
    if content.outside_masks:
        shapes = [(name, mask.shape) for name, mask in content.outside_masks.items()]
        header |= {"version": 2, "rest": shapes}
    if not content.meta.input.is_photograph:
        header["version"] = 3
    for name, value in content.outside_weights.items():
        tensors |= _masked_entries(_OUTSIDE + name, content.outside_masks[name], value)
    # A single entry, because safetensors writes several in random order.
    data = to_safetensors(tensors, metadata={_KEY: json.dumps(header, sort_keys=True)})
    write_file(path, data)


def _masked_entries(name: str, mask: Array, value: Array) -> dict[str, Array]:
    kept = mask.ravel()
    gaps = _encode_gaps(kept)
    packed = zstandard.ZstdCompressor(level=_COMPRESSION_LEVEL).compress(gaps.tobytes())
    return {
        name + _MASK: np.frombuffer(packed, np.uint8),
        name: value.ravel()[kept],
    }


class _Header(NamedTuple):
    """What a file says before its content: all of it checked."""

    meta: TicketMeta
    outside: Mapping[str, Shape]
    digest: str


def read(path: Path) -> Content:
    """Read a ticket and check it against its digest.

    Raises:
        TicketError: if there is no such file, it is not a ticket, is of a newer format, is
            truncated, or its content does not match its digest.
    """
    return _read_with(_read_content, path)


def read_digest(path: Path) -> str:
    """The digest that a ticket file states. Its content is neither read nor checked.

    Raises:
        TicketError: if there is no such file, or it has no ticket's header.
    """
    return _read_with(lambda _, header: header.digest, path)


def read_facts(path: Path) -> Facts:
    """What a ticket file says of its ticket. Its content is neither read nor checked.

    Raises:
        TicketError: if there is no such file, or it has no ticket's header and entries.
    """
    return _read_with(_read_facts, path)


def _read_facts(file: Any, header: _Header) -> Facts:
    meta, outside, digest = header
    _check_entries(file, header)

    def counts(shapes: Mapping[str, Shape], prefix: str) -> Counts:
        kept = {name: math.prod(file.get_slice(prefix + name).get_shape()) for name in shapes}
        return Counts({name: (kept[name], math.prod(shape)) for name, shape in shapes.items()})

    return Facts(meta, digest, counts(meta.network.prunable, ""), counts(outside, _OUTSIDE))


def holds_ticket(path: Path) -> bool:
    """Whether a file has a ticket's header, whatever its name."""
    try:
        read_digest(path)
    except LthError:
        return False
    return True


def _read_with(read: Callable[[Any, _Header], _T], path: Path) -> _T:
    """What is read of a ticket's open file and its header."""
    check_there(path, "a ticket file")
    try:
        check_header(path)
        with enough_memory(), safe_open(path, framework="np") as file:
            return read(file, _read_header(file.metadata() or {}))
    # RecursionError: of a recipe that is nested too deeply.
    except (LthError, SafetensorError, zstandard.ZstdError, OSError, RecursionError) as error:
        raise TicketError(f"{path} cannot be read as a ticket: {_reason(error, path)}") from error


def _reason(error: Exception, path: Path) -> str:
    if isinstance(error, LthError):
        return str(error)
    if path.stat().st_size == 0:
        return "the file is empty; copy it again or make the ticket again"
    return (
        f"it is not a whole safetensors file ({error}). If it is a checkpoint, make a ticket of "
        "it first; if it was a ticket, it is truncated or damaged: copy it again"
    )


def _read_header(metadata: Mapping[str, str]) -> _Header:
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
    if type(version) is int and version > max(_READERS):
        raise TicketError(
            f"it has format version {version!r:.20}, this release reads versions up to "
            f"{max(_READERS)}: upgrade lth_plugins"
        )
    if type(version) is not int or version not in _READERS:
        raise TicketError(f"its header is damaged: {version!r:.40} is not a format version")
    if not isinstance(stored, str):
        raise TicketError(f"its header is damaged: {stored!r:.40} is no digest")
    return _Header(TicketMeta.from_dict(meta), _READERS[version](header), stored)


def _outside_shapes(header: Mapping[str, Any]) -> dict[str, Shape]:
    """What the header says of the parameters outside the trunk, checked."""
    declared = header.get("rest")
    shapes: dict[str, Shape] = {}
    for entry in declared if isinstance(declared, list) else [declared]:
        match entry:
            case [str(name), [*lengths]] if all(type(n) is int for n in lengths):
                shapes[name] = tuple(lengths)
            case _:
                raise TicketError(f"its header is damaged: {entry!r:.80} under rest")
    check_outside_shapes(shapes)
    return shapes


_READERS: Mapping[int, Callable[[Mapping[str, Any]], Mapping[str, Shape]]] = MappingProxyType(
    {
        1: lambda header: {},
        2: _outside_shapes,
        3: lambda header: _outside_shapes(header) if "rest" in header else {},
    }
)
"""For every version that this release reads: which parameters outside the trunk a header lists.
tests/ticket/samples has a file of each, and a version once written stays readable."""


def _check_entries(file: Any, header: _Header) -> None:
    """Check that a file has the entries that its header promises, and no others."""
    arch, outside = header.meta.network, header.outside
    masked = {*arch.prunable, *(_OUTSIDE + name for name in outside)}
    expected = {*arch.shapes, *masked, *(name + _MASK for name in masked)}
    found = set(file.keys())
    if found != expected:
        odd = sorted(found ^ expected)[0]
        raise TicketError(
            f"expected the {len(expected)} entries of a {arch.name} ticket, found {len(found)}; "
            f"{odd} is {'missing' if odd in expected else 'not one of them'}"
        )


def _read_content(file: Any, header: _Header) -> Content:
    meta, outside, stored = header
    _check_entries(file, header)
    arch = meta.network
    masks: dict[str, Array] = {}
    weights: dict[str, Array] = {}
    content = _Digest(meta, outside)
    for name, shape in arch.shapes.items():
        if name in arch.prunable:
            masks[name], weights[name] = _read_masked(file, name, shape, content)
            continue
        dtype = "I64" if name.endswith("num_batches_tracked") else "F32"
        weights[name] = _entry(file, name, dtype, shape)
        content.add(weights[name])
    others = {n: _read_masked(file, _OUTSIDE + n, shape, content) for n, shape in outside.items()}
    if content.hexdigest() != stored:
        raise TicketError(
            "its content does not match its digest: it was edited or damaged. "
            "Copy it again, or make the ticket again"
        )
    result = Content(
        *(meta, masks, weights),
        {name: mask for name, (mask, _) in others.items()},
        {name: value for name, (_, value) in others.items()},
    )
    result.__dict__["digest"] = stored  # just checked: spares computing it again
    return result


def _read_masked(file: Any, name: str, shape: Shape, content: "_Digest") -> tuple[Array, Array]:
    """A mask and its surviving weights, of the parameter's shape, zero where pruned."""
    numel = int(np.prod(shape))
    survivors = _entry(file, name, "F32", None)
    packed = _entry(file, name + _MASK, "U8", None)
    most = min(len(survivors), numel) + numel // _ESCAPE
    kept = _decode_gaps(_decompress(packed.tobytes(), most, name), numel, name)
    if len(kept) != len(survivors):
        raise TicketError(
            f"the mask of {name} keeps {len(kept)} weights, but {len(survivors)} are stored"
        )
    mask, weight = np.zeros(numel, bool), np.zeros(numel, np.float32)
    mask[kept], weight[kept] = True, survivors
    content.add_masked(mask, survivors)
    return mask.reshape(shape), weight.reshape(shape)


def _entry(file: Any, name: str, dtype: str, shape: Shape | None) -> Array:
    """One array, its declared type and shape checked before anything is allocated."""
    entry = file.get_slice(name)
    found = tuple(entry.get_shape())
    if entry.get_dtype() != dtype or (found != shape if shape is not None else len(found) != 1):
        raise TicketError(
            f"{name} is {entry.get_dtype()} {found}, expected {dtype} {shape or '(any,)'}"
        )
    return file.get_tensor(name)


def _encode_gaps(mask: Array) -> Array:
    """Kept positions of a flat mask as bytes: how many pruned weights lie before each kept one.

    A distance of 255 or more is written as as many 255s as fit and the remainder. The distances of
    a random mask are geometrically distributed, which a byte-wise entropy coder nearly saturates.
    """
    distance = np.diff(np.flatnonzero(mask), prepend=-1) - 1
    escapes = distance // _ESCAPE
    gaps = np.full(len(distance) + int(escapes.sum()), _ESCAPE, dtype=np.uint8)
    gaps[np.arange(len(distance)) + np.cumsum(escapes)] = distance % _ESCAPE
    return gaps


def _decode_gaps(gaps: Array, numel: int, name: str) -> Array:
    """The kept positions, ascending; the inverse of `_encode_gaps`."""
    is_kept = gaps != _ESCAPE
    position = np.add(gaps, is_kept, dtype=np.int64)
    position[:1] -= 1
    np.cumsum(position, out=position)
    if len(position) and position[-1] >= numel:
        raise TicketError(f"the mask of {name} reaches beyond its {numel} weights")
    return position if is_kept.all() else position[is_kept]


def _decompress(packed: bytes, most: int, name: str) -> Array:
    """Unpack a mask of at most this many bytes."""
    size = zstandard.frame_content_size(packed)
    if not 0 <= size <= most:
        raise TicketError(f"the mask of {name} claims {size} bytes, expected at most {most}")
    decompressor = zstandard.ZstdDecompressor(max_window_size=_LARGEST_WINDOW)
    return np.frombuffer(decompressor.decompress(packed, max_output_size=most), dtype=np.uint8)


class _Digest:
    """SHA-256 over the description, every entry of the trunk in network order, and the outside."""

    def __init__(self, meta: TicketMeta, outside: Mapping[str, Shape]) -> None:
        self._hash = hashlib.sha256(json.dumps(meta.to_dict(), sort_keys=True).encode())
        if outside:
            self._hash.update(json.dumps(list(outside.items())).encode())

    def add_masked(self, mask: Array, survivors: Array) -> None:
        self.add(np.packbits(mask))
        self.add(survivors)

    def add(self, values: Array) -> None:
        self._hash.update(np.ascontiguousarray(values).data if values.ndim else values.tobytes())

    def hexdigest(self) -> str:
        return self._hash.hexdigest()
