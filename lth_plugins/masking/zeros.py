"""Zeros where a mask prunes: in place, exact, and as fast as a CPU allows."""

import numpy as np
import torch
from torch import Tensor
from torch.autograd.graph import increment_version


def laid_out(mask: Tensor, parameter: Tensor) -> Tensor:
    """A mask on a parameter's device; laid out otherwise (channels last) it costs three times."""
    return torch.empty_like(parameter, dtype=torch.bool).copy_(mask)


_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _bits(values: Tensor) -> np.ndarray:
    return values.detach().view(_BITS[values.element_size()]).numpy()


def zero(values: Tensor, pruned: Tensor) -> None:
    """Zero the pruned values in place, whatever they are: an overflow, too."""
    if values.is_meta:
        return
    if not values.is_cpu:
        values.masked_fill_(pruned, 0)
        return
    # On a CPU masked_fill_ branches on every value, and needs three times as long.
    bits = _bits(values)
    np.bitwise_and(bits, pruned.view(torch.int8).numpy() - 1, out=bits)
    increment_version(values)


def count_leaks(values: Tensor, pruned: Tensor) -> int:
    """How many of the pruned values are not zero."""
    if values.is_meta:
        return 0
    if values.is_cpu and not np.logical_and(_bits(values), pruned.view(torch.int8).numpy()).any():
        return 0  # in a fifth of the time of PyTorch's count
    return int(torch.count_nonzero((values != 0) & pruned))


def state_of(gradient: Tensor) -> tuple[int, int]:
    """What changes when a gradient is replaced, or written to."""
    return gradient.data_ptr(), gradient._version
