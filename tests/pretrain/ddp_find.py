"""Searches as `find` runs them, with BatchNorm over the global batch; run by test_ddp.py.

PyTorch's SyncBatchNorm needs GPUs, so this has the same in plain operations: all that is left
between one process and two are sums in another order.
"""

import logging
import sys
from pathlib import Path

import pytorch_lightning  # noqa: F401  # sets its loggers' levels, which are set below
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce

from lth_plugins import Ticket
from lth_plugins.errors import LthError
from lth_plugins.pretrain import TASKS, load_config
from lth_plugins.pretrain.find import find
from lth_plugins.pretrain.moco import MoCo
from lth_plugins.pretrain.simclr import SimCLR
from lth_plugins.pruning.search.search import agree
from lth_plugins.training.supervised import Supervised

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "pretrain"


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


if __name__ == "__main__":
    out, *overrides = sys.argv[1:]
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    for kind in (SyncedSupervised, SyncedSimCLR, SyncedMoCo):
        task = kind.__name__.removeprefix("Synced").lower()
        TASKS.register(f"synced_{task}", kind)
        given = [f"task=synced_{task}", f"out={out}/{task}", *overrides]
        find(load_config(CONFIGS / f"digits_{task}.yaml", given))
    if dist.is_initialized():
        try:
            agree(Ticket.load(f"{out}/moco/round_0{dist.get_rank()}.ticket"))
        except LthError as error:
            print(f"rank {dist.get_rank()}: {error}", flush=True)
