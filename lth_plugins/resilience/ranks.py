"""The processes of a distributed training, where the main one decides for all.

Frameworks set up ``torch.distributed`` themselves; without it there is one process, the main one.
"""

from typing import TypeVar

from torch import distributed

T = TypeVar("T")


def is_main() -> bool:
    return not distributed.is_initialized() or distributed.get_rank() == 0


def from_main(value: T) -> T:
    """The main process's value, on all processes. It is sent pickled."""
    box = [value]
    if distributed.is_initialized():
        distributed.broadcast_object_list(box)
    return box[0]


def barrier() -> None:
    """Wait for all processes."""
    if distributed.is_initialized():
        distributed.barrier()
