"""A small search on digits, and what its tests call a whole state."""

from collections.abc import Sequence
from pathlib import Path

import torch

from lth_plugins.pretrain import load_config
from lth_plugins.pretrain.find import search_of
from lth_plugins.pruning.search.search import Search

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "pretrain"

State = dict[str, torch.Tensor]


def small_search(
    out: Path, *overrides: str, settings: Sequence[str], task: str = "supervised"
) -> Search:
    """A search in a folder, on 32 digits of 16 px in batches of 16, with a module's settings."""
    small = ["data.size=16", "data.subset=32", "batch_size=16", "trainer.accelerator=cpu"]
    queue = ["contrastive.queue=32"] if task == "moco" else []
    given = [*small, *settings, *queue, f"out={out}", *overrides]
    return search_of(load_config(CONFIGS / f"digits_{task}.yaml", given))
