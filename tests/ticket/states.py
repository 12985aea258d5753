"""State dicts for tests of what reads them."""

import pickle
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lth_plugins.ticket import ARCHITECTURES, InputSpec

State = dict[str, Tensor]
Rule = tuple[str, str | Callable[[re.Match[str]], str]]

S2_BANDS = "B1,B2,B3,B4,B5,B6,B7,B8,B8A,B9,B10,B11,B12"
SENTINEL_2 = InputSpec(S2_BANDS, (0.0,) * 13, (10000.0,) * 13, scale=1)
"""What the MoCo of SSL4EO-S12 was trained on: all 13 bands, as files hold them over 10,000."""


def full(value: float | int | bool, *shape: int) -> Tensor:
    """A tensor that is one number everywhere, in memory and in a file."""
    return torch.tensor(value).expand(shape)


def trunk(
    arch: str = "resnet18", value: float = 1.0, counter: int | None = 7, channels: int = 3
) -> State:
    """A trunk's state dict in torchvision's names, with BatchNorm's counters unless it is None."""
    return {
        name: full(counter if name.endswith("tracked") else float(value), *shape)
        for name, shape in ARCHITECTURES[arch].reading(channels).shapes.items()
        if counter is not None or not name.endswith("tracked")
    }


def head(name: str, *widths: int) -> State:
    """The linear layers of a classifier or, of more than two widths, of a projection head."""
    state: State = {}
    for i in range(len(widths) - 1):
        layer = name if len(widths) == 2 else f"{name}.{2 * i}"
        state[f"{layer}.weight"] = full(1.0, widths[i + 1], widths[i])
        state[f"{layer}.bias"] = full(1.0, widths[i + 1])
    return state


def renamed(state: Mapping[str, Any], *rules: Rule) -> dict[str, Any]:
    """The same entries under other names: each regular expression is replaced in turn."""
    found = {}
    for name, value in state.items():
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        found[name] = value
    return found


def under(prefix: str, state: Mapping[str, Any]) -> dict[str, Any]:
    return {prefix + name: value for name, value in state.items()}


def save(content: Any, path: Path) -> Path:
    if path.suffix == ".pkl":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path)
    return path
