"""Processes that train together: forks of one that has imported the frameworks, and nothing else.

Forks of a process that has trained cannot train, and importing the frameworks again in each of
several processes takes longer than what they do here.
"""

import multiprocessing
import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing
from torch import distributed

from tests.reliability.starter import MODULES

multiprocessing.set_forkserver_preload(MODULES)


def together(function: Callable[..., Any], *args: Any, processes: int = 2) -> list[Any]:
    """Call a function in each of several new processes, which are one group of gloo.

    Args:
        function: of a module, as it is looked up by its name. It is given the process's rank, then
            ``args``.
        processes: how many.

    Returns:
        What each returned, by rank.

    Raises:
        Exception: with the traceback of the first that failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.start_processes(
            *(_call, (folder, processes, function, args), processes), start_method="forkserver"
        )
        found = [Path(folder, f"{rank}.pt") for rank in range(processes)]
        return [torch.load(path, weights_only=False) for path in found]


def _call(
    rank: int, folder: str, processes: int, function: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    store, patience = f"file://{folder}/store", timedelta(seconds=60)
    distributed.init_process_group("gloo", store, patience, world_size=processes, rank=rank)
    torch.save(function(rank, *args), Path(folder, f"{rank}.pt"))
    distributed.destroy_process_group()
