"""Checkpoints of mmengine: reading one, and whether it has all that a model uses."""

from collections.abc import Mapping
from typing import Any

from mmengine.config import Config
from mmengine.runner import CheckpointLoader, find_latest_checkpoint
from torch import nn

from lth_plugins.errors import TicketError
from lth_plugins.masking.loading import reading


def read_checkpoint(path: str) -> dict[str, Any]:
    """Read a checkpoint, with whatever is beside the model's state dict.

    Raises:
        TicketError: if there is none, or it cannot be read.
    """
    with reading(path):
        return CheckpointLoader.load_checkpoint(path, map_location="cpu")


def read_state(path: str) -> Mapping[str, Any]:
    """The state dict of the model in a checkpoint, as it was saved.

    Raises:
        TicketError: as `read_checkpoint`.
    """
    checkpoint = read_checkpoint(path)
    return checkpoint.get("state_dict", checkpoint)


def first_checkpoint(cfg: Config) -> str | None:
    """The checkpoint that a training begins with, as mmengine's Runner finds it.

    That is the one to load or, of a run that is resumed without naming one, the latest.
    """
    latest = find_latest_checkpoint(cfg.work_dir) if cfg.get("resume") else None
    return cfg.get("load_from") or latest


def state_of(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """The state dict of the model in a checkpoint, under the model's own names."""
    state = checkpoint.get("state_dict", checkpoint)
    return {name.removeprefix("module."): value for name, value in state.items()}


def check_whole(model: nn.Module, state: Mapping[str, Any], path: str) -> None:
    """Check that a checkpoint has every entry that testing the model uses.

    Raises:
        TicketError: if it lacks one, which would be random.
    """
    names = {name.removeprefix("module.") for name in state}
    tested = [
        name
        for name in model.state_dict()
        if not name.startswith("auxiliary_head.") and not name.endswith("num_batches_tracked")
    ]
    absent = [name for name in tested if name not in names]
    if absent:
        raise TicketError(
            f"expected the {len(tested)} entries of a trained {type(model).__name__} in {path}, "
            f"found {len(tested) - len(absent)} of them, and none such as {absent[0]}, which would "
            "be random: give the checkpoint that was trained with this config"
        )
