"""`Masks`: which weights a ticket keeps. A value: it checks itself and never changes."""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from lth_plugins.errors import TicketError
from lth_plugins.ticket.counts import Counted, Counts
from lth_plugins.ticket.keys import some


def packed(mask: Tensor) -> Tensor:
    """A boolean tensor as bits, eight to a byte: what checkpoints hold of it."""
    return torch.from_numpy(np.packbits(mask.cpu().numpy()))


def unpacked(bits: Tensor, shape: Sequence[int]) -> Tensor:
    """The boolean tensor of this shape that was `packed`."""
    values = np.unpackbits(bits.numpy(), count=math.prod(shape)).view(np.bool_)
    return torch.from_numpy(values).view(tuple(shape))


class Masks(Mapping[str, Tensor], Counted):
    """An immutable mapping from parameter name to a boolean tensor; True keeps the weight.

    Args:
        masks: name to tensor, each with the shape of its parameter; boolean, or numeric with no
            value but 0 and 1. Tensors are copied, to the CPU.

    Raises:
        TicketError: if a mask is not a tensor or holds anything but 0 and 1.
    """

    def __init__(self, masks: Mapping[str, Tensor]) -> None:
        self._masks = {name: _to_bool(name, mask) for name, mask in masks.items()}

    @classmethod
    def ones(cls, shapes: Mapping[str, tuple[int, ...]]) -> "Masks":
        """The masks that keep everything, for parameters of these shapes."""
        # NumPy's, here and below: each small call of PyTorch would wake all of its threads.
        return cls.adopt({n: torch.from_numpy(np.ones(s, bool)) for n, s in shapes.items()})

    @classmethod
    def adopt(cls, masks: dict[str, Tensor]) -> "Masks":
        """Masks that take ownership of boolean tensors on the CPU, without copy or check."""
        result = cls({})
        result._masks = masks
        return result

    def __getitem__(self, name: str) -> Tensor:
        return self._masks[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._masks)

    def __len__(self) -> int:
        return len(self._masks)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Masks):
            return NotImplemented
        return self.keys() == other.keys() and all(
            torch.equal(m, other[n]) for n, m in self.items()
        )

    __hash__ = None  # type: ignore[assignment]  # equality reads every bit; use digest as a key

    def __and__(self, other: "Masks") -> "Masks":
        """Keep what both keep."""
        self._check_same_parameters(other)
        return Masks.adopt({name: mask & other[name] for name, mask in self.items()})

    def __or__(self, other: "Masks") -> "Masks":
        """Keep what either keeps."""
        self._check_same_parameters(other)
        return Masks.adopt({name: mask | other[name] for name, mask in self.items()})

    def __invert__(self) -> "Masks":
        """Keep what these prune, and prune what these keep."""
        return Masks.adopt({name: ~mask for name, mask in self.items()})

    def __repr__(self) -> str:
        return (
            f"Masks({len(self)} parameters, {self.kept:,} of {self.numel:,} weights kept, "
            f"{100 * self.sparsity:.2f} % sparse)"
        )

    @property
    def numel(self) -> int:  # type: ignore[override]
        """Number of prunable weights."""
        return self.counts.numel

    @property
    def kept(self) -> int:  # type: ignore[override]
        """Number of weights kept."""
        return self.counts.kept

    @cached_property
    def counts(self) -> Counts:
        """How many weights are kept, and there are, for every parameter by name."""
        return Counts({n: (int(np.count_nonzero(m.numpy())), m.numel()) for n, m in self.items()})

    @cached_property
    def digest(self) -> str:
        """SHA-256, in hexadecimal, over names, shapes and bits; equal masks have the same.

        The order of the names does not count. What wrote a checkpoint can note it, and what reads
        the checkpoint can tell whether it was trained with these masks.
        """
        content = hashlib.sha256()
        for name in sorted(self._masks):
            mask = self._masks[name]
            content.update(json.dumps([name, *mask.shape]).encode())
            content.update(np.packbits(mask.numpy()).data)
        return content.hexdigest()

    def densities(self) -> dict[str, float]:
        """Fraction kept, for every parameter by name."""
        return {n: kept / max(numel, 1) for n, (kept, numel) in self.counts.by_name.items()}

    def shuffled(self, seed: int) -> "Masks":
        """Random masks with the same number of kept weights in every parameter.

        The baseline that tells a ticket from its layer-wise densities (arXiv 2012.06908,
        section 4). The same seed gives the same masks.
        """
        generator = torch.Generator().manual_seed(seed)
        return Masks.adopt(
            {
                name: mask.flatten()[torch.randperm(mask.numel(), generator=generator)].view_as(
                    mask
                )
                for name, mask in self.items()
            }
        )

    def issubset(self, other: "Masks") -> bool:
        """Whether everything kept here is kept in ``other``."""
        if other is self:
            return True
        self._check_same_parameters(other)
        return not any(bool((mask & ~other[name]).any()) for name, mask in self.items())

    def check_shapes(self, expected: Mapping[str, tuple[int, ...]], what: str) -> None:
        """Raise ``TicketError`` unless names and shapes are exactly the expected ones.

        Args:
            expected: name to shape.
            what: whose parameters they are, for the message.
        """
        missing = [name for name in expected if name not in self]
        extra = [name for name in self if name not in expected]
        if missing or extra:
            raise TicketError(
                f"expected one mask for each of the {len(expected)} prunable parameters of {what}; "
                f"missing {some(missing)}, not prunable there {some(extra)}. Use torchvision's "
                "names (layer1.0.conv1.weight, …); the stem, biases and normalisation carry no mask"
            )
        for name, shape in expected.items():
            if tuple(self[name].shape) != tuple(shape):
                raise TicketError(
                    f"the mask of {name} has shape {tuple(self[name].shape)}, but the parameter of "
                    f"{what} has {tuple(shape)}: was the mask found on another architecture?"
                )

    def _check_same_parameters(self, other: "Masks") -> None:
        other.check_shapes({n: tuple(m.shape) for n, m in self.items()}, "the other masks")


def _to_bool(name: str, mask: Tensor) -> Tensor:
    if not isinstance(mask, Tensor):
        raise TicketError(f"the mask of {name} must be a tensor, found {type(mask).__name__}")
    mask = mask.detach()
    if mask.dtype != torch.bool:
        binary = (mask == 0) | (mask == 1)
        if not bool(binary.all()):
            value = mask[~binary].flatten()[0].item()
            raise TicketError(
                f"the mask of {name} must hold only 0 and 1, found {value:g}: "
                "is it a weight, or a soft mask that was never thresholded?"
            )
    return mask.to(device="cpu", dtype=torch.bool, copy=True).contiguous()
