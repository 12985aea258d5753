"""Tensors and other objects of a pickle, described instead of built.

A description checks itself against the bytes that the file has, before anything is allocated.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from lth_plugins.errors import TicketError
from lth_plugins.ticket.trunk import PLAIN

DTYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {
        "FloatStorage": torch.float32,
        "DoubleStorage": torch.float64,
        "HalfStorage": torch.float16,
        "BFloat16Storage": torch.bfloat16,
        "LongStorage": torch.int64,
        "IntStorage": torch.int32,
        "ShortStorage": torch.int16,
        "CharStorage": torch.int8,
        "ByteStorage": torch.uint8,
        "BoolStorage": torch.bool,
        "ComplexFloatStorage": torch.complex64,
        "ComplexDoubleStorage": torch.complex128,
        "QInt8Storage": torch.qint8,
        "QUInt8Storage": torch.quint8,
        "QInt32Storage": torch.qint32,
        "UntypedStorage": torch.uint8,
    }
)
"""The type of the elements of each of PyTorch's classes of storages."""

_LONGEST, _MOST_DIMENSIONS, _MOST_ELEMENTS = 1 << 40, 16, 1 << 48


class Copies:
    """Count what the calls of one pickle copy, bounded by its length.

    Twice that is what a pickle without shared arguments can reach: a text becomes bytes, and these
    an array.
    """

    def __init__(self, pickled: int) -> None:
        self._left = 2 * pickled

    def add(self, length: int) -> None:
        """Count a copy, before it is made.

        Raises:
            TicketError: if that is more than there are bytes for.
        """
        self._left -= length
        if self._left < 0:
            raise TicketError(
                "expected each text, list and array to be used once, found more copies than the "
                "pickle has bytes for: it was made to exhaust memory"
            )


class Placeholder:
    """Stands for an object that was not built. It accepts whatever pickle does to objects.

    Attributes:
        what: the name of the class or function, where it is not known to be harmless.
        items: what was set on it by key, as on a dictionary.
        inner: the other objects it was given.
    """

    what: ClassVar[str | None] = None
    items: Mapping[str | int, Any] = MappingProxyType({})
    inner: Sequence[Any] = ()

    def __init__(self, *args: Any, **_: Any) -> None:
        self.inner = args

    def append(self, value: Any) -> None:
        if not isinstance(self.inner, list):
            self.inner = list(self.inner)
        self.inner.append(value)

    def extend(self, values: Any) -> None:
        for value in values:
            self.append(value)

    add = append

    def set(self, pairs: Mapping[str | int, Any]) -> None:
        if not isinstance(self.items, dict):
            self.items = {}
        self.items.update(pairs)


class StateDict(dict[str | int, Any]):
    """An ordered dictionary, with what a module's state dict notes beside its tensors."""

    _metadata: Mapping[Any, Mapping[str, Any]] = MappingProxyType({})

    def take(self, attributes: Any) -> None:
        """Keep the notes among the attributes that pickle sets."""
        noted = attributes.get("_metadata") if isinstance(attributes, dict) else None
        if isinstance(noted, dict):
            self._metadata = {k: entry for k, entry in noted.items() if isinstance(entry, dict)}


class Unread(Placeholder):
    """Stands for a tensor that is not rebuilt.

    Attributes:
        kind: what it is, and what to do about it.
    """

    kind: ClassVar[str] = "a tensor that is conjugated or negated when it is read: resolve it first"


def unread(kind: str) -> type[Unread]:
    """A class of placeholders for tensors of this kind."""
    return type("Unread", (Unread,), {"kind": kind})


@dataclass(eq=False)
class Storage:
    """The flat memory that views of tensors look at.

    Attributes:
        dtype: of its elements.
        numel: how many elements there are said to be; `fill` checks it.
        root: the storage this is a part of, in files from before PyTorch 0.4.
        start: its first element in ``root``.
    """

    dtype: torch.dtype
    numel: int
    root: "Storage | None" = None
    start: int = 0
    _data: bytearray | None = None

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize

    def fill(self, data: bytes) -> None:
        """Give it its content.

        Raises:
            TicketError: if it is not as long as was said.
        """
        if len(data) != self.nbytes:
            raise TicketError(
                f"a storage is said to have {self.nbytes:,} bytes, found {len(data):,}: the file "
                "is truncated or damaged"
            )
        self._data = bytearray(data)

    @cached_property
    def elements(self) -> Tensor:
        """Its content, one-dimensional; all that share it see the same memory."""
        if self.root is not None:
            whole = self.root.elements
            if not 0 <= self.start <= self.start + self.numel <= len(whole):
                raise TicketError("a storage reaches beyond the one it is a part of")
            return whole[self.start : self.start + self.numel]
        if self._data is None:
            raise TicketError("a tensor has no data in the file: it is truncated or damaged")
        if not self._data:  # which frombuffer refuses
            return torch.empty(0, dtype=self.dtype)
        if self.dtype == torch.bool:
            return torch.frombuffer(self._data, dtype=torch.uint8) != 0  # a byte may be any number
        return torch.frombuffer(self._data, dtype=self.dtype)


@dataclass(frozen=True)
class View:
    """A tensor as PyTorch pickles it: a strided view of a storage."""

    storage: Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    def tensor(self) -> Tensor | None:
        """The tensor; None if its numbers are complex or quantised, which no weights are.

        Raises:
            TicketError: if it reaches beyond its storage.
        """
        if self.storage.dtype not in PLAIN:
            return None
        elements = self.storage.elements
        if 0 in self.size:
            return elements.new_empty(self.size)
        steps = zip(self.size, self.stride, strict=True)
        if self.offset + sum((n - 1) * step for n, step in steps) >= len(elements):
            raise TicketError(
                f"a tensor of shape {self.size} reaches beyond the {len(elements):,} elements of "
                "its storage: the file is damaged"
            )
        return elements.as_strided(self.size, self.stride, self.offset)


class DType:
    """The type of an array's elements as NumPy pickles it: a code, which its byte order follows."""

    _PLAIN = ("b1", "i1", "i2", "i4", "i8", "u1", "f2", "f4", "f8")

    def __init__(self, code: Any, *_: Any) -> None:
        plain = type(code) is str and code in self._PLAIN
        self.dtype = np.dtype(code) if plain else None  # others hold no plain numbers

    def take(self, state: Any, _: Copies) -> None:
        self.order(state[1])

    def order(self, code: Any) -> None:
        """Set the byte order, as NumPy writes it."""
        if self.dtype is not None and code == ">":
            self.dtype = self.dtype.newbyteorder(">")


class Array:
    """An array as NumPy pickles it: empty at first; shape and bytes follow."""

    _tensor: Tensor | None = None

    def __init__(self, *_: Any) -> None:
        pass

    def take(self, state: Any, copies: Copies) -> None:
        _, shape, kind, fortran, data = state
        copies.add(len(data))
        self.hold(shape, kind, fortran, data)

    def hold(self, shape: Any, kind: DType, fortran: Any, data: Any) -> None:
        """Set the content to these bytes, in this order.

        Raises:
            TicketError: if there are more or fewer than the shape says.
        """
        dtype = kind.dtype
        if dtype is None:
            return
        size = shape_of(shape)
        data = data.encode("latin1") if type(data) is str else data  # bytes, from Python 2
        data = bytes(data) if type(data) is bytearray else data  # from protocol 5
        if type(data) is not bytes or len(data) != math.prod(size) * dtype.itemsize:
            raise TicketError(f"an array of shape {size} has not the bytes for it: it is damaged")
        values = np.frombuffer(data, dtype).reshape(size, order="F" if fortran else "C")
        if dtype.kind == "b":
            values = values.view("u1") != 0  # a byte may be any number
        # A copy in the native byte order, because PyTorch knows no other.
        self._tensor = torch.from_numpy(values.astype(values.dtype.newbyteorder("="), order="C"))

    def tensor(self) -> Tensor | None:
        """The array; None if it holds anything but plain numbers."""
        return self._tensor


def shape_of(value: Any) -> tuple[int, ...]:
    """Check a shape: few whole numbers, and no more elements than a machine has bytes.

    Raises:
        TicketError: if the shape is invalid. Beside a length of zero the other lengths are bounded
            too: PyTorch multiplies them for the strides.
    """
    shape = lengths_of(value)
    if math.prod(max(n, 1) for n in shape) > _MOST_ELEMENTS:
        raise TicketError(f"a tensor claims to be of shape {shape}: the file is damaged")
    return shape


def lengths_of(value: Any) -> tuple[int, ...]:
    """A shape or strides: few whole numbers, none of them negative."""
    few = type(value) in (tuple, list) and len(value) <= _MOST_DIMENSIONS
    if not few or not all(type(n) is int and 0 <= n < _LONGEST for n in value):
        raise TicketError("a tensor has an invalid shape or strides: the file is damaged")
    return tuple(value)
