"""Keys of state dicts as text: their segments, wrappers in them, and what several share."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import takewhile
from typing import Any

from torch import Tensor

from lth_plugins.errors import printable

State = Mapping[str, Tensor]

WRAPPERS = frozenset(
    (
        "module",  # DataParallel, DistributedDataParallel, AveragedModel, DeepSpeed, NNI
        "_orig_mod",  # torch.compile
        "_fsdp_wrapped_module",  # FullyShardedDataParallel
        "_fpw_module",  # its first versions, and fairscale's
        "_checkpoint_wrapped_module",  # activation checkpointing
        "_forward_module",  # Lightning Fabric, DeepSpeed in Lightning
        "_module",  # Opacus
    )
)
"""Names of modules that compute what the one module inside them computes: `locate` overlooks them
anywhere in a key."""


def unwrapped(key: str) -> str:
    """A key or prefix of a state dict without the names of wrappers."""
    return ".".join(segment for segment in key.split(".") if segment not in WRAPPERS)


def real_prefix(key: str, count: int) -> str:
    """The first segments of a key, this many besides wrappers, with the wrappers among them."""
    segments = key.split(".")
    end = 0
    while segments[end] in WRAPPERS or count:
        count -= segments[end] not in WRAPPERS
        end += 1
    return "".join(f"{segment}." for segment in segments[:end])


def segments_of(prefix: str) -> list[str]:
    return [segment for segment in prefix.split(".") if segment]


def shared_start(first: Sequence[str], second: Sequence[str]) -> int:
    """How many items two sequences begin with in common."""
    pairs = zip(first, second, strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def common_path(keys: Iterable[str]) -> str:
    """The path of the modules that contain all of these keys, with a dot at the end, or ""."""
    steps = zip(*(key.split(".")[:-1] for key in keys), strict=False)
    shared = takewhile(lambda step: len(set(step)) == 1, steps)
    return "".join(f"{step[0]}." for step in shared)


SLIMMED_MARK = "slimmed"
"""In the metadata of a slimmed model's state dict: the shapes that its layers had before."""


def is_slimmed(state: Any) -> bool:
    """Whether a state dict says that it is that of a slimmed model; False for anything else."""
    return any(SLIMMED_MARK in entry for entry in getattr(state, "_metadata", {}).values())


def some(keys: list[str]) -> str:
    """The first three of these keys, and how many more there are."""
    shown = printable(", ".join(keys[:3])) or "none"
    return shown if len(keys) <= 3 else f"{shown} and {len(keys) - 3} more"
