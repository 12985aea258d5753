"""Pickles of foreign checkpoints, read without building anything that they name.

The names in a pickle are looked up in a table of functions of this module. Tensors and arrays
become descriptions (`described`) that check themselves against the file's bytes; any other
object becomes a placeholder, which has a name unless it is harmless: whether such objects may be
left out is the caller's decision. Copies that calls make are counted, because a pickle can pass one
object to many of them. So a file neither runs code nor gets more memory than it has bytes for. How
a file is laid out around its pickles is the part of `checkpoints`.

Decision: this replaces ``torch.load(weights_only=True)``, which bounds no memory (a file may call
``bytearray(n)``, and codecs that double their input), refuses NumPy's and Python 2's pickles, and
cannot leave out the objects beside the tensors. Cost: these 600 lines, fuzzed by `make soak`; and a
function or class of storage that a later PyTorch writes is refused until it has a row in a table
here.
"""

import pickle
import struct
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from io import BytesIO
from types import MappingProxyType
from typing import Any, ClassVar

import torch

from lth_plugins.errors import LthError, TicketError
from lth_plugins.ticket.foreign.described import (
    DTYPES,
    Array,
    Copies,
    DType,
    Placeholder,
    StateDict,
    Storage,
    Unread,
    View,
    lengths_of,
    shape_of,
    unread,
)

_MOST_NAMES = 1 << 12  # unknown ones, a kilobyte each
_PAIR = 4  # the fewest bytes of a pickle per item of a dictionary


def _view(
    storage: Any,
    offset: Any,
    size: Any,
    stride: Any,
    grad: Any = None,
    hooks: Any = None,
    *bits: Any,
) -> View | Unread:
    """``torch._utils._rebuild_tensor`` and ``_rebuild_tensor_v2``."""
    if any(bits):  # negated or conjugated when it is looked at
        return Unread()
    size, stride = shape_of(size), lengths_of(stride)
    (offset,) = lengths_of([offset])
    if type(storage) is not Storage or len(size) != len(stride):
        raise TicketError(f"a tensor claims to be of shape {size}: the file is damaged")
    return View(storage, offset, size, stride)


def _ordered(copies: Copies, pairs: Any = ()) -> StateDict:
    """``collections.OrderedDict``, which Python 2 calls with its content."""
    copies.add(_PAIR * len(pairs))
    return StateDict(_kept(pairs))


def _default(copies: Copies, _: Any = None, pairs: Any = ()) -> dict[str | int, Any]:
    """``collections.defaultdict``, whose items mostly follow."""
    return _ordered(copies, pairs)


def _from_buffer(copies: Copies, data: Any, kind: Any, shape: Any, order: Any) -> Array:
    """``numpy._core.numeric._frombuffer``, for arrays since protocol 5 of pickle."""
    array = Array()
    array.take((1, shape, kind, order == "F", data), copies)
    return array


def _kept(pairs: Iterable[Any]) -> dict[str | int, Any]:
    return {key: value for key, value in pairs if _is_key(key)}


def _is_key(key: Any) -> bool:
    """Whether a dictionary's key is kept: text, or a number that PyTorch writes.

    Tuples are not kept: hashing one that is nested deeply overflows the stack.
    """
    return type(key) is str or (type(key) is int and abs(key) < 1 << 63)


def _encoded(copies: Copies, text: str, encoding: str) -> bytes:
    """``_codecs.encode`` as Python 3 uses it to pickle bytes for Python 2."""
    if type(text) is not str or encoding != "latin1":  # other codecs make more of what they get
        raise TicketError("expected bytes written as latin1, found another codec: it is damaged")
    copies.add(len(text))
    return text.encode("latin1")


def _bytes(*arguments: Any) -> "bytes | Placeholder":
    """``bytes()``, as Python 3 pickles it for Python 2 where it is empty."""
    return Placeholder(*arguments) if arguments else b""


def _made_by(function: Callable[..., Any], _: Any, arguments: Any, *__: Any) -> Any:
    """``torch._tensor._rebuild_from_type_v2``: a tensor that has attributes, without those."""
    return function(*arguments)


def _first(value: Any, *_: Any) -> Any:
    """A parameter, which is a tensor and what autograd should do with it."""
    return value


_HARMLESS = (
    "argparse.Namespace",
    *(
        f"builtins.{name}"
        for name in (
            *("bool", "bytearray", "complex", "dict", "float", "int", "list"),
            *("object", "range", "set", "slice", "str", "tuple", "xrange"),
        )
    ),
    "collections.Counter",
    "collections.deque",
    "datetime.datetime",
    "datetime.timedelta",
    *(
        f"{module}.{kind}Path"
        for module in ("pathlib", "pathlib._local")
        for kind in ("", "Posix", "PurePosix", "Windows", "PureWindows")
    ),
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar",
    "numpy.ndarray",
    "torch.Size",
    "torch.Tensor",
    "torch.device",
    "torch.nn.parameter.Parameter",
    "torch.serialization._get_layout",
    *(
        f"torch.{scheme}"
        for scheme in (
            *("per_tensor_affine", "per_channel_affine", "per_tensor_symmetric"),
            *("per_channel_symmetric", "per_channel_affine_float_qparams"),
        )
    ),
    *(str(dtype) for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)),
)
"""What checkpoints have besides plain tensors and arrays, and tickets have no use for."""

_UNREAD: Mapping[str, str] = MappingProxyType(
    {
        "_rebuild_device_tensor_from_numpy": "a tensor of another device: save it from the CPU",
        "_rebuild_meta_tensor_no_storage": "a tensor without data (of the meta device): save the "
        "model after its weights are there",
        "_rebuild_nested_tensor": "a nested tensor",
        "_rebuild_qtensor": "a quantised tensor: give the floating-point model",
        "_rebuild_sparse_tensor": "a sparse tensor: save value.to_dense()",
        "_rebuild_tensor_v3": "a tensor of a type such as float8 or uint16: save value.float()",
    }
)
"""Functions of ``torch._utils`` that make tensors of which none is read here."""

_TABLE: Mapping[str, Callable[..., Any]] = MappingProxyType(
    {
        "collections.OrderedDict": _ordered,
        "collections.defaultdict": _default,
        "_codecs.encode": _encoded,
        "builtins.bytes": _bytes,
        "numpy.dtype": DType,
        **{f"numpy.{core}.multiarray._reconstruct": Array for core in ("core", "_core")},
        **{f"numpy.{core}.numeric._frombuffer": _from_buffer for core in ("core", "_core")},
        "torch._utils._rebuild_tensor": _view,
        "torch._utils._rebuild_tensor_v2": _view,
        "torch._utils._rebuild_parameter": _first,
        "torch._utils._rebuild_parameter_with_state": _first,
        "torch._tensor._rebuild_from_type_v2": _made_by,
        **{f"torch._utils.{name}": unread(kind) for name, kind in _UNREAD.items()},
        **dict.fromkeys(_HARMLESS, Placeholder),
    }
)
"""What stands for each name that a checkpoint may hold."""

_COPYING = (_ordered, _default, _encoded, _from_buffer)
"""Those of them that count what they copy."""

_BROKEN = (
    pickle.UnpicklingError,
    struct.error,
    ArithmeticError,
    AttributeError,
    EOFError,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
)
"""What a damaged pickle makes Python's unpickler stumble over."""


def load(
    file: BytesIO,
    load_storage: Callable[[str, torch.dtype, int], Storage] | None = None,
    load_bytes: Callable[[bytes], Any] | None = None,
) -> Any:
    """What a pickle holds: plain containers, with `View`, `Array` and `Placeholder` in them.

    Args:
        file: in memory, so that no length in it can make a read larger than it is; left where the
            pickle ends.
        load_storage: the storage of a key, a type and a number of elements.
        load_bytes: the storage in a file inside the pickle: so Python pickles tensors by itself.

    Raises:
        TicketError: if the pickle is damaged.
    """
    unpickler = _Unpickler(file, load_storage, load_bytes)
    try:
        return unpickler.load()
    except (LthError, *_BROKEN) as error:
        found = str(error) or type(error).__name__
        if unpickler.unknown:  # the file may be whole, and readable where these are installed
            found += f", after {next(iter(unpickler.unknown)):.80}, which is left out"
        if isinstance(error, LthError):
            raise TicketError(found) from error
        raise TicketError(f"it is not a whole pickle ({found:.200})") from error


class _Unpickler(pickle._Unpickler):
    """Python's unpickler in Python, with a table of names and a few stricter opcodes.

    The one in C makes room for as many objects as a file numbers.
    """

    # What the base class has, and its type stub lacks.
    stack: list[Any]
    append: Callable[[Any], None]
    read: Callable[[int], bytes]
    pop_mark: Callable[[], list[Any]]

    dispatch: ClassVar[dict[int, Any]] = dict(pickle._Unpickler.dispatch)
    for _code in (pickle.EXT1, pickle.EXT2, pickle.EXT4):
        del dispatch[_code[0]]  # names by number

    def __init__(
        self,
        file: BytesIO,
        load_storage: Callable[[str, torch.dtype, int], Storage] | None,
        load_bytes: Callable[[bytes], Any] | None,
    ) -> None:
        super().__init__(file, encoding="latin1")
        self.unknown: dict[str, type[Placeholder]] = {}
        self._load_storage = load_storage
        self._load_bytes = load_bytes
        self._copies = Copies(file.getbuffer().nbytes)

    def find_class(self, module: str, name: str) -> Any:
        if module in ("torch", "torch.cuda", "torch.storage") and name in DTYPES:
            return DTYPES[name]
        full = f"{'builtins' if module == '__builtin__' else module}.{name}"
        if full == "torch.storage._load_from_bytes" and self._load_bytes is not None:
            return partial(self._inside, self._load_bytes)
        known = _TABLE.get(full)
        if known in _COPYING:
            return partial(known, self._copies)
        if known is None and full not in self.unknown:
            if len(self.unknown) == _MOST_NAMES:
                raise TicketError(f"it names more than {_MOST_NAMES:,} classes and functions")
            self.unknown[full] = type("Unknown", (Placeholder,), {"what": f"{full:.80}"})
        return known or self.unknown[full]

    def _inside(self, load_bytes: Callable[[bytes], Any], data: Any) -> Any:
        if type(data) is not bytes:
            raise TicketError("a tensor has no bytes for its data: the file is damaged")
        self._copies.add(len(data))
        return load_bytes(data)

    def persistent_load(self, pid: Any) -> Any:
        match pid:
            case ("storage", torch.dtype() as dtype, str(key), _, int(numel), *rest):
                if self._load_storage is not None:
                    (numel,) = lengths_of([numel])
                    storage = self._load_storage(key, dtype, numel)
                    return _part(storage, rest[0]) if any(rest) else storage
            case ("module", *_):  # whole models from before PyTorch 1.6 bring their source along
                return Placeholder
        raise TicketError("a tensor does not say where its data is: the file is damaged")

    def load_build(self) -> None:
        state = self.stack.pop()
        if isinstance(self.stack[-1], DType | Array):
            self.stack[-1].take(state, self._copies)
        elif isinstance(self.stack[-1], StateDict):
            self.stack[-1].take(state)
        elif isinstance(self.stack[-1], Placeholder):
            self.stack[-1].append(state)

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._set([key, value])

    def load_setitems(self) -> None:
        self._set(self.pop_mark())

    def load_dict(self) -> None:
        items = self.pop_mark()
        self.append({})
        self._set(items)

    def _set(self, items: list[Any]) -> None:
        top = self.stack[-1]
        if isinstance(top, dict | Placeholder):
            pairs = _kept(zip(items[::2], items[1::2], strict=True))
            top.update(pairs) if isinstance(top, dict) else top.set(pairs)

    def load_bytearray8(self) -> None:
        # The base class allocates before it checks that the file has the bytes.
        size = int.from_bytes(self.read(8), "little")
        data = self.read(size)
        if len(data) != size:
            raise TicketError("it ends before its data")
        self.append(bytearray(data))

    def load_set(self) -> None:
        self.append(Placeholder())

    def load_frozenset(self) -> None:
        self.pop_mark()
        self.append(Placeholder())

    dispatch |= {
        pickle.BUILD[0]: load_build,
        pickle.BYTEARRAY8[0]: load_bytearray8,
        pickle.SETITEM[0]: load_setitem,
        pickle.SETITEMS[0]: load_setitems,
        pickle.DICT[0]: load_dict,
        pickle.EMPTY_SET[0]: load_set,
        pickle.FROZENSET[0]: load_frozenset,
    }


def _part(storage: Storage, view: Any) -> Storage:
    """The part of a storage that a file from before PyTorch 0.4 means."""
    _, start, numel = view
    start, numel = lengths_of([start, numel])
    return Storage(storage.dtype, numel, storage, start)
