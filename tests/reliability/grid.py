"""A cell of the grid: a real model takes real steps on a ticket, in one of the ways of trainers.

`test_grid.py` runs cells of one process itself, and the others by `answer_in_both`. All of it is on
the CPU.
"""

from __future__ import annotations

import copy
import hashlib
import itertools
import multiprocessing
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cache, lru_cache
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import timm.optim
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import lth_plugins as lth
from lth_plugins.ticket import locate
from tests.conformance.hosts import BUILT, HOSTS

STEPS = 2
OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, 0.01, momentum=0.9, weight_decay=1e-2, nesterov=True),
    "AdamW": lambda p: torch.optim.AdamW(p, 1e-3, weight_decay=1e-2),
    "LARS": lambda p: timm.optim.Lars(p, 0.1, momentum=0.9, weight_decay=1e-2),
}
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
AXES: dict[str, tuple[Any, ...]] = {
    "host": tuple(HOSTS),
    "optimizer": tuple(OPTIMIZERS),
    "precision": tuple(PRECISIONS),
    "option": ("clip", "accumulate", "EMA", "SyncBN", "frozen", "checkpointing", "compile"),
    "processes": (1, 2),
}


@dataclass(frozen=True)
class Cell:
    """One way to train: a value of each of `AXES`.

    Attributes:
        precision: of autocast; fp16 also has a ``GradScaler``.
        option: what else the trainer does.
        processes: 2 are DistributedDataParallel over gloo.
        ddp: further arguments of that.
    """

    host: str
    optimizer: str
    precision: str
    option: str
    processes: int
    ddp: Mapping[str, bool] = field(default_factory=dict, hash=False)

    def __str__(self) -> str:
        return "-".join([*(str(getattr(self, axis)) for axis in AXES), *self.ddp])


GRID = [Cell(*values) for values in itertools.product(*AXES.values())]
FEW = [
    Cell("faster_rcnn_fpn", "SGD", "fp32", "clip", 1),
    Cell("faster_rcnn_fpn", "AdamW", "bf16", "SyncBN", 2),
    Cell("faster_rcnn_fpn", "LARS", "fp16", "EMA", 1),
    Cell("faster_rcnn_c4", "SGD", "fp32", "EMA", 1),
    Cell("faster_rcnn_c4", "AdamW", "fp32", "checkpointing", 1),
    Cell("faster_rcnn_c4", "LARS", "fp32", "frozen", 1),
    Cell("mask_rcnn", "SGD", "fp16", "checkpointing", 1),
    Cell("mask_rcnn", "AdamW", "fp32", "clip", 2),
    Cell("mask_rcnn", "LARS", "fp32", "accumulate", 1),
    Cell("retinanet", "SGD", "fp32", "accumulate", 2),
    Cell("retinanet", "AdamW", "fp32", "frozen", 1),
    Cell("retinanet", "LARS", "fp32", "checkpointing", 2),
    Cell("fcn", "SGD", "fp32", "SyncBN", 1),
    Cell("fcn", "AdamW", "fp32", "EMA", 2),
    Cell("fcn", "LARS", "fp32", "SyncBN", 1),
    Cell("deeplabv3plus", "SGD", "fp32", "frozen", 2),
    Cell("deeplabv3plus", "AdamW", "fp32", "accumulate", 1),
    Cell("deeplabv3plus", "LARS", "fp32", "clip", 1),
    Cell("timm", "SGD", "bf16", "compile", 1),
    Cell("timm", "AdamW", "fp16", "clip", 2),
    Cell("timm", "LARS", "bf16", "compile", 2),
    Cell("torchvision_faster_rcnn", "SGD", "fp32", "frozen", 1),
    Cell("torchvision_faster_rcnn", "AdamW", "fp32", "checkpointing", 1),
    Cell("torchvision_faster_rcnn", "LARS", "fp32", "clip", 2),
    Cell("upernet", "SGD", "fp32", "checkpointing", 1),
    Cell("upernet", "AdamW", "bf16", "accumulate", 2),
    Cell("upernet", "LARS", "fp32", "SyncBN", 1),
    Cell("unet", "SGD", "fp32", "checkpointing", 1),
    Cell("unet", "AdamW", "fp32", "SyncBN", 1),
    Cell("unet", "LARS", "fp32", "EMA", 1),
]
"""The cheap ones among them, in which what may interact does meet; the tests say what does."""


def run(cell: Cell, tickets: Mapping[str, str]) -> None:
    """Take some steps, and check after each and at the end what a ticket promises.

    Args:
        cell: how to train; one of two processes is run in both.
        tickets: the file of a ticket for each architecture.

    Raises:
        AssertionError: if a promise is broken.
    """
    file = tickets[HOSTS[cell.host].arch]
    model = _model(cell, file)
    # Freezing replaces BatchNorm by one without a counter, in stock models, too.
    stock = _stock_keys(cell.host, "frozen" if cell.option == "frozen" else "")
    assert list(model.state_dict()) == stock, "other keys than the stock model's"
    masks = _masks(model, file)
    before = {name: value.clone() for name, value in model.state_dict().items()}

    wrapped = DistributedDataParallel(model, **cell.ddp) if cell.processes == 2 else model
    average = None
    if cell.option == "EMA":
        average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = OPTIMIZERS[cell.optimizer](trained)
    scaler = GradScaler("cpu", init_scale=128.0, enabled=cell.precision == "fp16")
    for step in range(STEPS):
        expected = None
        if cell.option == "clip":
            expected = _norm_of_survivors(cell, model, masks, scaler, step)
        optimizer.zero_grad()
        _backward(cell, wrapped, scaler, step)
        scaler.unscale_(optimizer)
        _check_zeros({n: p.grad for n, p in model.state_dict(keep_vars=True).items()}, masks)
        if expected is not None:
            norm = float(nn.utils.clip_grad_norm_(trained, max_norm=1.0))
            assert abs(norm - expected) <= 1e-4 * expected, f"norm {norm}, expected {expected}"
        scaler.step(optimizer)
        scaler.update()
        lth.attached(model).verify()
        if average is not None:
            average.update_parameters(model)

    after = model.state_dict(keep_vars=True)
    assert list(after) == stock, "other keys than the stock model's, after training"
    _check_zeros(after, masks)
    for name in masks:
        moved = not torch.equal(after[name], before[name])
        assert moved == after[name].requires_grad, f"{name} moved: {moved}"
    if average is not None:
        _check_zeros(average.module.state_dict(), masks)
    if cell.option == "compile":
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"], "nothing was compiled"
    if cell.processes == 2:
        _check_ranks_agree(model, statistics=cell.option == "SyncBN")


def _model(cell: Cell, ticket: str) -> nn.Module:
    """A model to train."""
    built = _build(cell.host, ticket, cell.option if cell.option in BUILT else "")
    model = copy.deepcopy(built).train()
    if cell.option == "compile":
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        HOSTS[cell.host].compiled(model).compile(backend="aot_eager")
    return model


def _check_zeros(values: Mapping[str, Tensor | None], masks: Mapping[str, Tensor]) -> None:
    """Weights, or gradients where there are any, are exactly zero where they are pruned."""
    for name, mask in masks.items():
        value = values[name]
        pruned = None if value is None else value.detach().masked_fill(mask, 0)  # fast
        assert pruned is None or not pruned.any(), f"{name} is not zero where it is pruned"


def _backward(cell: Cell, model: nn.Module, scaler: GradScaler, step: int) -> None:
    """Accumulate the gradients of a step; the same again if it is called again."""
    rank = dist.get_rank() if cell.processes == 2 else 0
    parts = 2 if cell.option == "accumulate" else 1
    dtype = PRECISIONS[cell.precision]
    for part in range(parts):
        torch.manual_seed(100 * step + 10 * part + rank)
        waits = part < parts - 1 and isinstance(model, DistributedDataParallel)
        with model.no_sync() if waits else nullcontext():
            with torch.autocast("cpu", dtype, enabled=dtype is not torch.float32):
                loss = HOSTS[cell.host].loss(model)
            scaler.scale(loss / parts).backward()


def _norm_of_survivors(
    cell: Cell, model: nn.Module, masks: Mapping[str, Tensor], scaler: GradScaler, step: int
) -> float:
    """The norm of the smaller network's gradients: a dense one's, at the surviving entries."""
    dense = copy.deepcopy(model)
    lth.attached(dense).detach()
    _backward(cell, dense, scaler, step)
    kept, pruned = [], []
    for name, parameter in dense.named_parameters():
        if parameter.grad is None:
            continue
        gradient = parameter.grad / scaler.get_scale()
        if cell.processes == 2:
            dist.all_reduce(gradient)
            gradient /= 2
        mask = masks.get(name)
        kept.append(gradient if mask is None else gradient[mask])
        pruned.append(gradient[:0] if mask is None else gradient[~mask])
    assert any(gradient.any() for gradient in pruned), "or this would show nothing"
    return float(torch.stack([gradient.norm() for gradient in kept]).norm())


def _check_ranks_agree(model: nn.Module, statistics: bool) -> None:
    """Masks and weights, and statistics where they are synchronised, are the same bit for bit."""
    values = dict(model.state_dict() if statistics else model.named_parameters())
    values |= {f"mask of {name}": mask for name, mask in lth.attached(model).masks.items()}
    digests = {
        name: hashlib.sha256(value.detach().numpy().tobytes()).hexdigest()
        for name, value in values.items()
    }
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, digests)
    apart = [name for name in digests if len({others[name] for others in everyone}) > 1]
    assert not apart, f"the processes differ in {apart[:3]}"


@lru_cache(maxsize=4)
def _build(host: str, ticket: str, option: str) -> nn.Module:
    """A model to copy."""
    torch.manual_seed(dist.get_rank() if dist.is_initialized() else 0)  # DDP evens out the heads
    return HOSTS[host].build(ticket, option)


@cache
def _stock_keys(host: str, option: str) -> list[str]:
    return list(HOSTS[host].build(None, option).state_dict())


@cache
def _ticket(file: str) -> lth.Ticket:
    return lth.Ticket.load(file)


def _masks(model: nn.Module, ticket: str) -> dict[str, Tensor]:
    """The masks of the file, by the model's names."""
    keys = locate(model.state_dict()).keys
    return {keys[name]: mask for name, mask in _ticket(ticket).masks.items()}


def answer_in_both(store: Path, tickets: Mapping[str, str], pipes: Sequence[Connection]) -> None:
    """Run cells in this process and in a fork of it, which need not import the frameworks.

    Args:
        store: a file by which the two meet.
        tickets: the file of a ticket for each architecture.
        pipes: of each of the two; both are given the same cells. See `_answer`.
    """
    other = multiprocessing.get_context("fork").Process(
        target=_answer, args=(store, 1, tickets, pipes[1])
    )
    other.start()
    _answer(store, 0, tickets, pipes[0])
    other.join()


def _answer(store: Path, rank: int, tickets: Mapping[str, str], pipe: Connection) -> None:
    """Send for each cell what went wrong, or an empty text, until there are no more or one did."""
    minutes = timedelta(minutes=10)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=minutes
    )
    wrong = ""
    with suppress(EOFError):
        while not wrong:
            cell = pipe.recv()
            try:
                run(cell, tickets)
            except Exception:
                wrong = traceback.format_exc()
            pipe.send(wrong)
    dist.destroy_process_group()
