"""A search in a training function in two processes; a script: they fork before they train."""

from __future__ import annotations

import multiprocessing
import sys
from pathlib import Path

import torch
import torch.distributed as dist
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


def search(rank: int, ticket: str, out: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{out}.store", rank=rank, world_size=2)
    dense = lth.Ticket.load(ticket)
    settings = {"iterations": 2, "rounds": 1, "checkpoint_period": 1}
    paths = lth.task_search(
        lambda: torchvision.models.resnet18(num_classes=2), fit, dense, out, **settings
    ).run()
    Path(f"{out}.{rank}").write_text(" ".join(lth.Ticket.load(path).digest for path in paths))
    dist.destroy_process_group()


if __name__ == "__main__":
    context = multiprocessing.get_context("fork")
    both = [context.Process(target=search, args=(rank, *sys.argv[1:])) for rank in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join()
    sys.exit(max(process.exitcode for process in both))
