"""Foreign checkpoint files, read without running anything they bring along.

Files that hold other objects beside tensors (an optimizer's class, a pruner) are refused, unless
those are the host's bookkeeping or the caller leaves them out; no file is ever unpickled freely.
`containers` knows how files are laid out, and `convert` what the tensors mean.
"""

import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from lth_plugins.errors import LthError, TicketError, enough_memory, printable
from lth_plugins.ticket.foreign.containers import LONGEST_NAME, WORDS, Entries, read_content
from lth_plugins.ticket.foreign.described import Array, Placeholder, Unread, View
from lth_plugins.ticket.keys import is_slimmed
from lth_plugins.ticket.on_disk import check_there
from lth_plugins.ticket.trunk import PLAIN

logger = logging.getLogger(__name__)

_MOST_ENTRIES = 1 << 16
_BOOKKEEPING = (
    *("message_hub", "param_schedulers", "meta"),  # mmengine
    *("hyper_parameters", "hparams", "callbacks", "loops", "lr_schedulers"),  # Lightning
    *("datamodule_hyper_parameters", "args", "cfg", "config", "scheduler", "lr_scheduler"),
)
"""Entries of hosts' checkpoints which hold no weights: objects in them are left out."""


def read_checkpoint(path: Path, skip_objects: bool = False) -> Entries:
    """All tensors and arrays of plain numbers in a checkpoint file.

    Args:
        path: a PyTorch, safetensors or NumPy file, or a pickle, under any name.
        skip_objects: read a file that holds other objects than tensors and plain containers, and
            leave those out: placeholders are built in their place, and nothing the file names is
            imported or called. What is left out is said. A dictionary of another class than dict
            gives its items.

    Returns:
        The tensors by name; nested dictionaries are joined with dots, so that an entry of
        ``{"state_dict": {"conv1.weight": …}}`` is ``state_dict.conv1.weight``.

    Raises:
        TicketError: if there is no such file, it holds no state dict, or it holds other objects.
    """
    path = Path(path)
    if os.path.isdir(path):  # for path.is_dir() a name may be too long
        raise TicketError(_a_folder(path))
    check_there(path, "a checkpoint")
    if re.search(r"-\d{5}-of-(?!00001)\d{5}\b|\.index(\.json)?$", path.name):
        raise TicketError(
            f"expected a checkpoint in one file, found {path}, a part or the index of one in "
            "shards: join them first. For Hugging Face's, load the model and save "
            "model.state_dict() with torch.save; convert TensorFlow's to PyTorch"
        )
    if path.stat().st_size == 0:
        raise TicketError(f"expected a checkpoint, found an empty file at {path}: fetch it again")
    if path.suffix == ".distcp":
        raise TicketError(_sharded_folder(path.parent))
    try:
        with enough_memory():
            content = read_content(path)
            entries = _flatten(content)
            _check_objects(content, entries, skip_objects)
    except (LthError, SafetensorError, OSError) as error:
        said = str(error)
        if not isinstance(error, _Objects):
            said = (
                f"{said.rstrip('.')}. Expected a PyTorch file of tensors, a safetensors file or a "
                "pickle of tensors or arrays, whole and not compressed"
            )
        raise TicketError(f"{path} cannot be read safely: {said}") from error
    if not entries:
        unread = next(iter(entries.unread.items()), None)
        found = _instead(content) if unread is None else f"{unread[0]}, {unread[1]}"
        raise TicketError(f"expected a state dict in {path}, found {found}")
    return entries


class _Objects(TicketError):
    """A file holds other objects than tensors and plain containers."""


def _check_objects(content: Any, entries: Entries, skip: bool) -> None:
    """Say what is left out of a file, or refuse it.

    Raises:
        _Objects: naming an object, unless objects are to be left out, or this one is bookkeeping;
            or if it holds parts of tensors.
    """
    for entry, names in _objects(content).items():
        parts = [name for name in names if name.startswith("torch.distributed.")]
        if parts and _holds_weights(entry):
            raise _Objects(
                f"it holds {parts[0]}: tensors that are spread over processes, of which each file "
                f"has a part. {_GATHER}"
            )
        if entry in _BOOKKEEPING:
            why = "it is the host's bookkeeping, and no weights"
        elif skip:
            why = "its objects are not built"
            entries.left_out += (f"{entry or 'the file'} ({names[0]})",)
        else:
            raise _Objects(_refusal(names[0], entries))
        if not entries:
            continue  # which is an error, and says more
        what = names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
        logger.warning(
            "Left out what %s holds besides tensors (%s): %s",
            *(printable(entry or "the file"), printable(what), why),
        )


_GATHER = (
    "Gather them before saving: torch.distributed.checkpoint.state_dict.get_model_state_dict("
    "model, options=StateDictOptions(full_state_dict=True, cpu_offload=True)), and torch.save "
    "that on rank 0"
)


def _refusal(name: str, entries: Entries) -> str:
    found = (
        f"it holds {name}, which is neither a tensor nor a plain container, and building that "
        "would run code that the file chooses. "
    )
    if any(_holds_weights(key) and value.ndim > 1 for key, value in entries.items()):
        return (
            f"{found}To read its tensors and leave everything else out, say --skip-objects "
            "(skip_objects=True)"
        )
    return (
        f"{found}Without it no weights would be left: save model.state_dict() with torch.save, and "
        "give that file"
    )


def _holds_weights(key: str) -> bool:
    """Whether this entry of a checkpoint may hold weights, and is not an optimizer's state."""
    entry = key.split(".")[0]
    return not entry.startswith("optim") and entry not in _BOOKKEEPING


def _objects(content: Any) -> dict[str, list[str]]:
    """The names of the objects that were not built, by the entry of the file they are in."""
    found: dict[str, list[str]] = {}
    pending: list[tuple[str | None, Any]] = [(None, content)]
    seen: set[int] = set()
    while pending:
        entry, value = pending.pop()
        name = getattr(value, "what", None) if _is_placeholder(value) else None
        if name is not None and name not in found.setdefault(entry or "", []):
            found[entry or ""].append(name)
        if id(value) in seen or not isinstance(value, Mapping | list | tuple | Placeholder):
            continue
        seen.add(id(value))
        if isinstance(value, Placeholder):
            pending += [(entry or "", inner) for inner in reversed(value.inner)]
            value = value.items
        if isinstance(value, Mapping):
            pending += [
                (str(key) if entry is None else entry, inner) for key, inner in value.items()
            ]
        else:
            pending += [(entry or "", inner) for inner in value]
    return found


def _is_placeholder(value: Any) -> bool:
    known = isinstance(value, type) and issubclass(value, Placeholder)
    return known or isinstance(value, Placeholder)


def _instead(content: Any) -> str:
    """What a file holds instead of a state dict, and what to do."""
    save = "save model.state_dict() with torch.save and give that file"
    if isinstance(content, Placeholder):
        return f"a whole object{f' ({content.what})' if content.what else ''}: {save}"
    if isinstance(content, View | Array):
        return f"one tensor without a name: {save}"
    unnamed = _unnamed(content)
    if unnamed is not None:
        return unnamed
    return f"{type(content).__name__} without any: {save}"


def _unnamed(values: Any) -> str | None:
    """What a list of tensors is, and what to do about it; None for any other value."""
    if not isinstance(values, list | tuple) or not values:
        return None
    if not all(isinstance(value, View | Array) for value in values):
        return None
    return (
        f"a list of {len(values)} tensors or arrays, which does not say whose they are: name them "
        "in the order they were made in, such as masks = dict(zip((name for name, _ in "
        "model.named_parameters() if 'weight' in name), masks)), and save that with torch.save"
    )


def _named(values: Any) -> Any:
    """A list of names and tensors in pairs as a dictionary; anything else as it is."""
    if isinstance(values, list | tuple) and values:
        pairs = [value for value in values if isinstance(value, list | tuple) and len(value) == 2]
        if len(pairs) == len(values) and all(type(name) is str for name, _ in pairs):
            return {name: value for name, value in pairs}  # noqa: C416 (lists are pairs, too)
    return values


def _why_unread(value: Any) -> str | None:
    """Why this tensor, or list of tensors, is not read; None if it is neither."""
    if isinstance(value, Unread):
        return value.kind
    if isinstance(value, View):
        return f"a tensor of {value.storage.dtype}, which holds no plain numbers"
    if isinstance(value, Tensor):
        return f"a tensor of {value.dtype}: save value.float()"
    return _unnamed(value)


def _a_folder(path: Path) -> str:
    if (path / ".metadata").is_file():
        return _sharded_folder(path)
    return f"expected a checkpoint, found a folder at {path}: give one of the files in it"


def _sharded_folder(path: Path) -> str:
    return (
        f"expected a checkpoint in one file, found {path}, a folder that "
        "torch.distributed.checkpoint wrote, whose files have parts of the tensors: gather them "
        f"into one with `python -m torch.distributed.checkpoint.format_utils dcp_to_torch {path} "
        "OUT.pth`, and give OUT.pth"
    )


def _flatten(content: Any) -> Entries:
    tensors = Entries()
    words = list(content.words) if isinstance(content, Entries) else []
    pending = [("", content)]
    seen: set[int] = set()  # a pickle may hold a dictionary that holds itself
    while pending:
        prefix, mapping = pending.pop()
        mapping = mapping.items if isinstance(mapping, Placeholder) else _named(mapping)
        if not isinstance(mapping, Mapping) or id(mapping) in seen:
            continue
        seen.add(id(mapping))
        tensors.slimmed |= is_slimmed(mapping)
        nested = []
        for key, value in mapping.items():
            name = f"{prefix}{key}"
            tensor = value.tensor() if isinstance(value, View | Array) else value
            if isinstance(tensor, Tensor) and tensor.dtype in PLAIN:
                tensors[name] = tensor
                _check_names(name, tensors)
            elif (why := _why_unread(value)) is not None:
                tensors.unread[name] = why
                _check_names(name, tensors.unread)
            elif isinstance(_named(value), Mapping | Placeholder) and len(name) < LONGEST_NAME:
                nested.append((f"{name}.", value))
            elif not prefix and key in WORDS and type(value) is str:
                words.append(value[:LONGEST_NAME])
        pending += reversed(nested)
    tensors.words = tuple(words)
    return tensors


def _check_names(name: str, so_far: Mapping[str, Any]) -> None:
    if len(name) > LONGEST_NAME or len(so_far) > _MOST_ENTRIES:
        raise TicketError(
            f"expected at most {_MOST_ENTRIES:,} tensors with names of at most {LONGEST_NAME} "
            "characters, found more"
        )
