"""Searches by tools/find_ticket.py, with BatchNorm over the global batch; run by test_ddp.py.

PyTorch's SyncBatchNorm needs GPUs, so this has the same in plain operations: all that is left
between one process and two are sums in another order.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce

from lth_plugins import Ticket
from lth_plugins.commands import find
from lth_plugins.errors import LthError
from lth_plugins.pretrain import TASKS
from lth_plugins.pretrain.moco import MoCo
from lth_plugins.pretrain.simclr import SimCLR
from lth_plugins.pruning.search.search import agree
from lth_plugins.training.supervised import Supervised

ROOT = Path(__file__).resolve().parents[2]


class _Synced(nn.modules.batchnorm._BatchNorm):
    def _check_input_dim(self, x: Tensor) -> None:
        pass

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not dist.is_initialized():
            return super().forward(x)
        others = [dim for dim in range(x.ndim) if dim != 1]
        count = x.numel() // x.shape[1] * dist.get_world_size()
        shape = [1, -1] + [1] * (x.ndim - 2)
        mean = all_reduce(x.sum(others)) / count
        centred = x - mean.view(shape)
        var = all_reduce((centred * centred).sum(others)) / count
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * count / (count - 1), self.momentum)
        scale = self.weight * torch.rsqrt(var + self.eps)
        return centred * scale.view(shape) + self.bias.view(shape)


class _OverTheGlobalBatch:
    """Mixed into a task: its BatchNorms are synced."""

    def build_head(self, classes: int) -> None:
        super().build_head(classes)
        for module in self.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.__class__ = _Synced


class SyncedSupervised(_OverTheGlobalBatch, Supervised):
    pass


class SyncedSimCLR(_OverTheGlobalBatch, SimCLR):
    pass


class SyncedMoCo(_OverTheGlobalBatch, MoCo):
    pass


ROUNDS = {"supervised": 2, "simclr": 1, "moco": 1}
for kind in (SyncedSupervised, SyncedSimCLR, SyncedMoCo):
    TASKS.register(f"synced_{kind.__name__.removeprefix('Synced').lower()}", kind)

SMALL = ["data.size=16", "data.subset=32", "batch_size=16", "evaluate_last=false"]
SMALL += ["pretrain.epochs=1", "training.epochs=1", "contrastive.queue=32"]
SMALL += ["trainer.precision=64-true", "trainer.accelerator=cpu"]
SMALL += ["optimizer.name=sgd", "optimizer.momentum=0"]  # no state: small checkpoints
SMALL += ["teacher=dense"]


def search(out: Path, devices: int) -> None:
    """Search by the tool for each pre-training, in a folder of its name."""
    for task, rounds in ROUNDS.items():
        given = [f"task=synced_{task}", f"out={out / task}", f"rounds={rounds}"]
        config = ROOT / f"configs/pretrain/digits_{task}.yaml"
        assert find.main([f"{config}", *given, *SMALL, f"trainer.devices={devices}"]) == 0


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    search(folder, devices=2)
    try:
        agree(Ticket.load(folder / f"moco/round_0{dist.get_rank()}.ticket"))
    except LthError as error:
        print(f"rank {dist.get_rank()}: {error}", flush=True)
