"""Foreign checkpoint files, read without running anything they bring along.

PyTorch files are read with ``weights_only=True``, detectron2's pickles by a reader that knows
arrays and nothing else. Files that also hold other objects (an optimizer's class, a config) are
refused, unless asked to leave those objects out; no file is ever unpickled freely. What the tensors
mean is `convert`'s business.
"""

import argparse
import codecs
import functools
import pickle
import re
import tarfile
import warnings
import zipfile
from collections.abc import Callable, Mapping
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from lth_plugins.ticket.errors import TicketError


def read_checkpoint(path: Path, skip_objects: bool = False) -> dict[str, Tensor]:
    """All tensors and arrays of a checkpoint file.

    Args:
        path: a PyTorch, safetensors or detectron2 pickle file.
        skip_objects: read a file that holds other objects than tensors and plain containers, and
            leave those out: placeholders are built in their place, and nothing the file names is
            imported or called. The reader is then Python's own instead of PyTorch's
            ``weights_only``, with a list of the few functions that rebuild tensors and arrays.

    Returns:
        The tensors by name; nested dictionaries are joined with dots, so that an entry of
        ``{"state_dict": {"conv1.weight": …}}`` is ``state_dict.conv1.weight``.

    Raises:
        TicketError: if there is no such file, it holds no state dict, or it holds other objects.
    """
    if not path.is_file():
        raise TicketError(f"expected a checkpoint, found nothing at {path}: check the path")
    try:
        content = _reader(path, skip_objects)(path)
    except Exception as error:  # whatever a foreign file makes its reader stumble over
        raise TicketError(
            f"{path} cannot be read safely: {_reason(error, skip_objects)}"
        ) from error
    state = _flatten(content)
    if not state:
        whole = isinstance(content, _Placeholder)
        found = "a whole object" if whole else f"{type(content).__name__} without any"
        raise TicketError(
            f"expected a state dict in {path}, found {found}: save model.state_dict() with "
            "torch.save and give that file"
        )
    return state


def _reason(error: Exception, skip_objects: bool) -> str:
    message = str(error)
    named = re.search(r"GLOBAL (\S+)", message)
    if not skip_objects and (named or "weights_only" in message):
        what = f"holds {named[1]}" if named else "may hold something"
        return (
            f"it {what}, which is neither a tensor nor a plain container, and building that would "
            "run code that the file chooses. To read its tensors and leave everything else out, "
            "say --skip-objects (skip_objects=True)"
        )
    lines = message.splitlines() or ["it ends too early"]
    return (
        f"{lines[0].rstrip('.')}. Expected a PyTorch file of tensors, a safetensors file or "
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
        for key, value in mapping.items():
            if _is_array(value):
                tensors[f"{prefix}{key}"] = torch.as_tensor(value)
        nested = [(f"{prefix}{key}.", value) for key, value in mapping.items()]
        pending += reversed(nested)
    return tensors


def _is_array(value: Any) -> bool:
    return isinstance(value, Tensor) or (
        isinstance(value, np.ndarray) and value.dtype.kind in "fiub"
    )


def _reader(path: Path, skip_objects: bool) -> Callable[[Path], Any]:
    if path.suffix == ".safetensors":
        return safetensors.torch.load_file
    if path.suffix == ".pkl":
        unpickler = _SkippingUnpickler if skip_objects else _DataUnpickler
        return lambda path: unpickler(BytesIO(path.read_bytes()), encoding="latin1").load()
    return functools.partial(_read_torch, skip_objects=skip_objects)


def _read_torch(path: Path, skip_objects: bool) -> Any:
    # PyTorch would run a TorchScript archive and unpack a tar file, whatever the unpickler.
    if tarfile.is_tarfile(path):
        raise ValueError("it is a tar file")
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if any(name.endswith("/constants.pkl") for name in archive.namelist()):
                raise ValueError("it is a TorchScript archive")
    with warnings.catch_warnings(), torch.serialization.safe_globals(_INERT):
        warnings.simplefilter("ignore")  # of old formats, which are read or refused all the same
        if not skip_objects:
            return torch.load(path, map_location="cpu", weights_only=True)
        reader = SimpleNamespace(__name__=__name__, Unpickler=_SkippingUnpickler, load=_skip_load)
        return torch.load(path, map_location="cpu", weights_only=False, pickle_module=reader)


_scalar = np.float64(0).__reduce__()[0]
_reconstruct = np.arange(0).__reduce__()[0]

# What ``weights_only`` does not know and what is nonetheless mere data.
_INERT: list[Any] = [
    argparse.Namespace,
    np.ndarray,
    np.dtype,
    *{type(np.dtype(code)) for code in "?bBhHiIlLqQefd"},
    # Under the names of NumPy 1 and 2, whichever is installed.
    *((_scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
    *((_reconstruct, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")),
    codecs.encode,
]


class _DataUnpickler(pickle.Unpickler):
    """Unpickles containers, NumPy arrays and tensors. Any other class or function is refused."""

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
            ("torch", "Size"),
            ("torch._utils", "_rebuild_tensor"),
            ("torch._utils", "_rebuild_tensor_v2"),
            ("torch._utils", "_rebuild_parameter"),
        }
    )

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in self._ALLOWED:
            return super().find_class(module, name)
        return self.other_class(module, name)

    def other_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"GLOBAL {module}.{name} is not data")


class _SkippingUnpickler(_DataUnpickler):
    """Unpickles what `_DataUnpickler` does, and a placeholder for everything else."""

    def other_class(self, module: str, name: str) -> Any:
        return _Placeholder


class _Placeholder:
    """Stands for an object that was not built. It takes whatever pickle does to objects."""

    dump_patches = False  # torch.load asks the modules in files from before PyTorch 1.6

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __setstate__(self, _: Any) -> None:
        pass

    def __setitem__(self, _: Any, __: Any) -> None:
        pass

    def append(self, _: Any) -> None:
        pass

    def extend(self, _: Any) -> None:
        pass

    def add(self, _: Any) -> None:
        pass


def _skip_load(file: Any, **options: Any) -> Any:
    return _SkippingUnpickler(file, **options).load()
