"""How checkpoint files are laid out: PyTorch, new and old, safetensors, NumPy's ``.npz``, pickles.

The content of a file says what it is, whatever its name.
"""

import re
import struct
import zipfile
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from types import MappingProxyType
from typing import Any

import safetensors.torch
import torch
from safetensors import safe_open
from torch import Tensor

from lth_plugins.errors import LthError, TicketError
from lth_plugins.ticket.foreign.described import Array, DType, Storage, shape_of
from lth_plugins.ticket.foreign.unpickle import load
from lth_plugins.ticket.on_disk import check_header

LONGEST_NAME = 255
WORDS = ("arch", "architecture", "model", "model_name", "backbone", "name")
"""Entries beside the tensors whose text names the model."""

_ZIP, _TAR = b"PK\x03\x04", b"ustar"  # the latter at byte 257
_OTHER_FILES: tuple[tuple[bytes, str], ...] = (
    (b"\x1f\x8b", "it is compressed (gzip): decompress it"),
    (b"BZh", "it is compressed (bzip2): decompress it"),
    (b"\xfd7zXZ", "it is compressed (xz): decompress it"),
    (b"\x28\xb5\x2f\xfd", "it is compressed (zstandard): decompress it"),
    (b"\x89HDF", "it is an HDF5 file, as Keras writes: convert its weights to PyTorch"),
    (b"\x93NUMPY", "it is one NumPy array without a name: save a dictionary of arrays"),
    (b"version https://git-lfs", "it is a pointer of Git LFS: fetch the file (git lfs pull)"),
    (b"<!", "it is a web page: the download went wrong"),
    (b"<h", "it is a web page: the download went wrong"),
    (b"<?xml", "it is an answer of a server, in XML: the download went wrong"),
    (b"{", "it is JSON, such as a config or the index of a checkpoint in shards"),
    (b"7z\xbc\xaf", "it is compressed (7z): decompress it"),
    (b"Rar!", "it is compressed (RAR): decompress it"),
)
"""What other files begin with, and what to do about them."""


class Entries(dict[str, Tensor]):
    """The tensors of a file by name.

    Attributes:
        words: texts beside them that name the model.
        left_out: entries whose objects were left out because that was asked for, and an object.
        unread: tensors and lists of tensors that are not among them by name, and what they are.
        slimmed: whether a state dict in the file says that it is that of a slimmed model.
    """

    words: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    slimmed: bool = False

    def __init__(self, tensors: Mapping[str, Tensor] = MappingProxyType({})) -> None:
        super().__init__(tensors)
        self.unread: dict[str, str] = {}


def read_content(path: Path) -> Any:
    size = path.stat().st_size
    with path.open("rb") as opened:
        start = opened.read(512)
    if start[:4] == _ZIP:
        return _read_zip(path)
    header = int.from_bytes(start[:8], "little")
    pickled = start[:1] == b"\x80"
    if (start[8:9] == b"{" and header < size) or (path.suffix == ".safetensors" and not pickled):
        return _read_safetensors(path)
    if start[257:262] == _TAR:
        raise TicketError("it is a tar file")
    for magic, what in _OTHER_FILES:
        if start.startswith(magic):
            raise TicketError(what)
    file = BytesIO(path.read_bytes())
    content = load(file, load_bytes=_read_inside)
    if type(content) is int and content == torch.serialization.MAGIC_NUMBER:
        return _read_old(file)
    return content


def _read_safetensors(path: Path) -> Any:
    check_header(path)
    with safe_open(path, framework="pt") as file:
        for entry in map(file.get_slice, file.keys()):
            shape_of(entry.get_shape())
        metadata = file.metadata() or {}
    tensors = Entries(safetensors.torch.load_file(path))
    tensors.words = tuple(metadata[key][:LONGEST_NAME] for key in WORDS if key in metadata)
    return tensors


def _read_zip(path: Path) -> Any:
    """What ``torch.save`` writes since PyTorch 1.6, or ``numpy.savez``."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = _names(archive, path.stat().st_size)
            if names and all(name.endswith(".npy") for name in names):
                return {name.removesuffix(".npy"): _array(archive.read(name)) for name in names}
            return _read_new(archive, _root(archive, names))
    except LthError:
        raise
    except _BROKEN_ZIP as error:
        raise TicketError(f"it is not a whole zip file ({error!s:.80})") from error


def _read_new(archive: zipfile.ZipFile, root: str) -> Any:
    """A PyTorch file: a pickle, and each storage by its key."""
    storages: dict[str, Storage] = {}

    def load_storage(key: str, dtype: torch.dtype, numel: int) -> Storage:
        if key not in storages:
            storages[key] = Storage(dtype, numel)
            storages[key].fill(archive.read(f"{root}data/{key}"))
        return storages[key]

    return load(BytesIO(archive.read(f"{root}data.pkl")), load_storage)


_NPY = re.compile(
    rb"\x93NUMPY(?:\x01\0..|\x02\0....)"
    rb"\{'descr': '(?P<order>[<>|])(?P<kind>\w+)', 'fortran_order': (?P<fortran>True|False), "
    rb"'shape': \((?P<shape>[\d, ]*)\), \} *\n",
    re.DOTALL,
)
"""The header of an array in NumPy's files, which is the text of a dictionary."""


def _array(data: bytes) -> Array:
    """An array in a file of NumPy's."""
    header = _NPY.match(data)
    if header is None:
        raise TicketError("an array in it does not begin as NumPy writes them")
    shape = tuple(int(n) for n in header["shape"].replace(b" ", b"").split(b",") if n)
    kind, array = DType(header["kind"].decode("latin1")), Array()
    kind.order(header["order"].decode())
    array.hold(shape, kind, header["fortran"] == b"True", data[header.end() :])
    return array


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


def _names(archive: zipfile.ZipFile, size: int) -> list[str]:
    """What is in an archive that is no larger when it is read.

    Raises:
        TicketError: if it is compressed, entries share their bytes, or it holds a program.
    """
    entries = archive.infolist()
    names = [entry.filename for entry in entries]
    if any(name.endswith("/constants.pkl") for name in names):
        raise TicketError("it is a TorchScript archive")
    packed = [e.filename for e in entries if e.compress_type or e.compress_size != e.file_size]
    if packed and all(name.endswith(".npy") for name in names):
        raise TicketError("its arrays are compressed: save them with numpy.savez")
    if packed or sum(entry.file_size for entry in entries) > size:
        what = f"{packed[0]:.80} is compressed" if packed else "its entries overlap"
        raise TicketError(f"{what}, which torch.save never does: save it again")
    return names


def _root(archive: zipfile.ZipFile, names: list[str]) -> str:
    """The folder that everything is in.

    Raises:
        TicketError: if it is something else than a file of tensors.
    """
    roots = [name.removesuffix("data.pkl") for name in names if name.endswith("/data.pkl")]
    if len(roots) != 1:
        raise TicketError(f"expected a data.pkl in the zip file, found {len(roots)}")
    (root,) = roots
    if f"{root}byteorder" in names and archive.read(f"{root}byteorder") != b"little":
        raise TicketError("it was written by a machine with another byte order")
    return root


def _read_old(file: BytesIO) -> Any:
    """What ``torch.save`` wrote before, after its first pickle: four more, and the storages."""
    storages: dict[str, Storage] = {}

    def load_storage(key: str, dtype: torch.dtype, numel: int) -> Storage:
        return storages.setdefault(key, Storage(dtype, numel))

    if load(file) != torch.serialization.PROTOCOL_VERSION:
        raise TicketError("it has another version than PyTorch's old format ever had")
    match load(file):
        case {"little_endian": False}:
            raise TicketError("it was written by a machine with another byte order")
    content = load(file, load_storage)
    match load(file):
        case [*keys] if all(type(key) is str and key in storages for key in keys):
            for key in keys:
                file.read(8)  # the number of elements once more
                storages[key].fill(file.read(storages[key].nbytes))
        case _:
            raise TicketError("it has no list of its storages: it is damaged")
    return content


def _read_inside(data: bytes) -> Any:
    """The storage of a tensor that Python's pickle has as a PyTorch file of its own."""
    file = BytesIO(data)
    if load(file) != torch.serialization.MAGIC_NUMBER:
        raise TicketError("a tensor's data is no PyTorch file: it is damaged")
    return _read_old(file)
