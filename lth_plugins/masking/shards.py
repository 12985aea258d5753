"""Tensors that are sharded over processes (DTensor), as FSDP2's `fully_shard` makes them.

A mask is sharded like its weight, and each process works on its own part. What is counted is the
sum over the processes, so that all of them raise the same error: counting is a collective then.
"""

import sys
from typing import Any, TypeGuard

import torch
from torch import Tensor, distributed, nn


def is_sharded(tensor: object) -> TypeGuard[Any]:
    """Whether a tensor is a DTensor."""
    # A tensor cannot be one where the module is not imported: import nothing here.
    module: Any = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor, without gradients; the tensor itself if it is whole."""
    if not is_sharded(tensor):
        return tensor
    with torch.no_grad():
        part: Tensor = tensor.to_local()
    return part


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, without gradients: a collective if it is sharded."""
    tensor = tensor.detach()
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def sharded_like(tensor: Tensor, other: Tensor) -> Tensor:
    """Shard a whole tensor, which all processes have, like another one; it stays whole otherwise.

    Nothing is communicated.
    """
    if not is_sharded(other):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    mesh = other.device_mesh
    there = tensor.detach().to(mesh.device_type)
    return distribute_tensor(there, mesh, other.placements, src_data_rank=None)


def reshard(model: nn.Module) -> bool:
    """Have FSDP2 put the sharded parameters on the modules of a model.

    Returns:
        Whether FSDP2 shards the model, or a part of it.
    """
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None:
        return False
    units = [module for module in model.modules() if isinstance(module, fsdp.FSDPModule)]
    for unit in units:
        unit.reshard()
    return bool(units)


def total(count: int, counted: Tensor) -> int:
    """Add up what the processes counted in their parts of a tensor: a collective if it is sharded.

    Replicas count the same; where they do not, the largest counts.
    """
    if not is_sharded(counted):
        return count
    mesh = counted.device_mesh
    here = torch.tensor(count, device=mesh.device_type)
    for dimension, placement in enumerate(counted.placements):
        operation = distributed.ReduceOp.SUM if placement.is_shard() else distributed.ReduceOp.MAX
        distributed.all_reduce(here, operation, mesh.get_group(dimension))
    return int(here)
