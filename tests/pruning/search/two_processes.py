"""A search in a training function, as one of two processes runs it."""

from __future__ import annotations

from pathlib import Path

import torch
import torchvision
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import lth_plugins as lth
from lth_plugins.pruning.search.scripted import Training


def fit(model: nn.Module, run: Training) -> None:
    replica = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    for done in range(run.resume(optimizer=optimizer), run.iterations):
        images = torch.rand(2, 3, 32, 32)  # other ones in each process
        optimizer.zero_grad()
        nn.functional.cross_entropy(replica(images), torch.tensor([0, 1])).backward()
        optimizer.step()
        run.after_step(done + 1)


def search(rank: int, ticket: Path, out: Path) -> list[str]:
    """The digests of the tickets that it finds."""
    settings = {"iterations": 2, "rounds": 1, "checkpoint_period": 1}
    paths = lth.task_search(
        lambda: torchvision.models.resnet18(num_classes=2),
        *(fit, lth.Ticket.load(ticket), out),
        **settings,
    ).run()
    return [lth.Ticket.load(path).digest for path in paths]
