"""What is inside a trunk besides its parameters, by the keys of a state dict or model."""

import re
from collections.abc import Iterator

from lth_plugins.ticket.arch import part_of
from lth_plugins.ticket.keys import State, common_path
from lth_plugins.ticket.layout import Layout
from lth_plugins.ticket.signs import signs_of_others

_HARMLESS: tuple[tuple[str, str], ...] = (
    (r"\.num_batches_tracked$", "a counter"),
    (r"\.sparseWeight$", "what STR computes from a weight and its threshold"),
    (r"\.total_(ops|params)$", "what thop counted"),
    (
        r"\.(weight_fake_quant|activation_post_process)\.",
        "observed for a later quantisation; the weights are those before it",
    ),
)
"""Patterns of what a trunk may hold besides its parameters, and why it can be left out."""


def scopes(layout: Layout) -> tuple[str, ...]:
    """The prefixes of everything that is inside the trunk."""
    by_part: dict[str, list[str]] = {}
    for name, key in layout.keys.items():
        by_part.setdefault(part_of(name), []).append(key)
    scopes: list[str] = []
    for keys in by_part.values():
        shared = common_path(keys)
        if layout.prefix.startswith(shared):  # beside others, such as conv1 and bn1 beside fc
            depth = shared.count(".") + 1
            scopes += {".".join(key.split(".")[:depth]) + "." for key in keys}
            scopes += [f"{shared}{name}." for name in layout.dialect.after_stem]
        else:
            scopes.append(shared)
    scopes += [block for block in layout.blocks() if not block.endswith(".")]  # Caffe2's blobs
    return tuple(scopes)


def others_in(state: State, layout: Layout) -> Iterator[str]:
    """The entries in the trunk that are not its parameters."""
    used = set(layout.keys.values())
    inside = scopes(layout)
    return (key for key in state if key.startswith(inside) and key not in used)


def why_harmless(key: str) -> str | None:
    """Why an entry of a trunk can be left out; None if it cannot."""
    return next((why for pattern, why in _HARMLESS if re.search(pattern, f".{key}")), None)


def biases_in(state: State, layout: Layout) -> dict[str, str]:
    """The keys of convolutions' biases, and the running mean that follows each, by its name."""
    biases = {}
    # A framework may leave the means out, but has the weights.
    there = [n for n in layout.arch.shapes if f"{n.rpartition('.')[0]}.weight" in layout.keys]
    norms = [name for name in there if name.endswith(".running_mean")]
    convs = [name for name in layout.keys if len(layout.arch.shapes[name]) == 4]
    for conv, mean in zip(convs, norms, strict=True):  # in network order, they alternate
        key = layout.keys[conv].removesuffix("weight") + "bias"
        if key in state and key not in layout.keys.values():
            biases[key] = mean
    return biases


def holds_more(layout: Layout, key: str) -> str:
    return (
        f"{signs_of_others([key])}expected the blocks of a plain {layout.arch.name}, found {key} "
        "in one of them or in its stem. Give a network without such parts"
    )
