"""The processes of a distributed training, where the main one decides for all.

Frameworks set up ``torch.distributed`` themselves; without it there is one process, the main one.
"""

from typing import TypeVar

from torch import Tensor, distributed

T = TypeVar("T")


def is_main() -> bool:
    return not distributed.is_initialized() or distributed.get_rank() == 0


def from_main(value: T) -> T:
    """The main process's value, on all processes. It is sent pickled."""
    box = [value]
    if distributed.is_initialized():
        distributed.broadcast_object_list(box)
    return box[0]


def first_of(value: T | None) -> T | None:
    """The value of the first process that has one, on all processes. It is sent pickled."""
    values = [value]
    if distributed.is_initialized():
        values *= distributed.get_world_size()
        distributed.all_gather_object(values, value)
    return next((found for found in values if found is not None), None)


def mean_over_ranks(value: Tensor) -> Tensor:
    """The mean of a tensor over all processes; the tensor itself where there is one.

    It is sent as the processes' backend needs it, and comes back to its device.
    """
    if not distributed.is_initialized():
        return value
    device = "cuda" if distributed.get_backend() == "nccl" else "cpu"
    total = value.to(device, copy=True)
    distributed.all_reduce(total)
    return (total / distributed.get_world_size()).to(value.device)


def barrier() -> None:
    """Wait for all processes."""
    if distributed.is_initialized():
        distributed.barrier()
