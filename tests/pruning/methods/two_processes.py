"""RigL in two processes with other images each; a script: they fork before they train."""

from __future__ import annotations

import multiprocessing
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torchvision
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import lth_plugins as lth
from lth_plugins.pruning.methods import Snapshot, Update
from lth_plugins.pruning.methods.rigl import RigL

SEEN: dict[str, Tensor] = {}


class Watched(RigL):
    def update(self, now: Snapshot) -> Update:
        SEEN.update(now.gradients)
        return super().update(now)


def images(rank: int, batch: int) -> Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(10 * batch + rank))


def dense_gradients(model: nn.Module, names: list[str]) -> dict[str, Tensor]:
    """The mean over both processes of what two batches give, computed in one."""
    total = {name: torch.zeros(model.get_parameter(name).shape) for name in names}
    for rank in (0, 1):
        plain = torchvision.models.resnet18(num_classes=4)
        plain.load_state_dict(model.state_dict())
        for batch in (0, 1):
            plain(images(rank, batch)).square().mean().backward()
        for name in names:
            total[name] += plain.get_parameter(name).grad / 2
    return total


def train(rank: int, ticket: str, out: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{out}.store", rank=rank, world_size=2)
    torch.manual_seed(0)
    model = torchvision.models.resnet18(num_classes=4)
    handle = lth.attach(model, lth.Ticket.load(ticket))
    training = lth.SparseTraining(Watched(sparsity=0.9, delta_t=1))
    training.start(model, 4)
    expected = dense_gradients(model, list(handle.masks))
    replica = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    off = 0.0
    for step in (1, 2):
        optimizer.zero_grad()
        with replica.no_sync():
            replica(images(rank, 0)).square().mean().backward()
        replica(images(rank, 1)).square().mean().backward()
        optimizer.step()
        training.after_step(model, step)
        if step == 1 and rank == 0:
            off = max(float((SEEN[n] - e).abs().max() / e.abs().max()) for n, e in expected.items())
    handle.verify()
    Path(f"{out}.{rank}").write_text(f"{handle.masks.digest} {handle.masks.sparsity:.6f} {off}")
    dist.destroy_process_group()


if __name__ == "__main__":
    context = multiprocessing.get_context("fork")
    both = [context.Process(target=train, args=(rank, *sys.argv[1:])) for rank in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join()
    sys.exit(max(process.exitcode for process in both))
