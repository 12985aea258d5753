"""State dicts for tests of what reads them."""

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch


def under(prefix: str, state: Mapping[str, Any]) -> dict[str, Any]:
    return {prefix + name: value for name, value in state.items()}


def save(content: Any, path: Path) -> Path:
    if path.suffix == ".pkl":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path)
    return path
