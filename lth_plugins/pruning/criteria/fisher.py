"""The empirical Fisher information of a network's weights, in blocks on its diagonal.

F = 1/N Σ g gᵀ, with g the gradient of the loss of one image (Singh & Alistarh, "WoodFisher", arXiv
2004.14340, section 3). The blocks are of consecutive weights of one parameter; what lies between
two blocks counts as 0. `surgery` knows what follows from F.
"""

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

from lth_plugins.errors import ConfigError, TicketError
from lth_plugins.pruning.criteria.criterion import Loss, masked_parameters

logger = logging.getLogger(__name__)

FISHER_BYTES = 1 << 31
"""The blocks that are summed at a time. A network with more of them is differentiated again."""

GRADIENT_BYTES = 1 << 28
"""The gradients of single images that are held at a time, of one parameter."""


def fisher_blocks(
    model: nn.Module, weights: Mapping[str, Tensor], losses: Sequence[Loss], block: int
) -> Iterator[tuple[str, Tensor]]:
    """Yield the blocks of one parameter after another.

    All images of a batch are differentiated together: the gradient of one is what its row of the
    batch adds to that of the batch's mean loss. Normalisation is evaluated with its stored
    statistics, so that no row depends on another. Where a layer reads other rows than images, such
    as the regions of a detector's head, each of them counts as one.

    Args:
        model: a copy, which is changed: nothing in it requires a gradient any more.
        weights: what to differentiate by, by the names of `masked_parameters`.
        losses: each is the mean over a batch of images, in its first dimension.
        block: weights in a block; a parameter with fewer has one block.

    Yields:
        The name and [blocks, block, block]: the last block is padded with zeros.

    Raises:
        TicketError: if there is no gradient, one is not finite, or all are zero.
        ConfigError: if a weight is used by other layers than convolutions and linear ones.
    """
    if not losses:
        raise TicketError(
            "expected the loss of at least one batch of images to compute gradients of, found none"
        )
    parameters = masked_parameters(model, weights)
    model.requires_grad_(False)
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.eval()
    _say_clipped(weights, block)
    anything = False
    for names in _chunks(weights, block):
        sums = {
            name: _Sum(name, parameters[name], min(block, weights[name].numel())) for name in names
        }
        with _Watch(sums.values()):
            for number, loss in enumerate(losses):
                _differentiate(loss(model), number)
        for name in names:
            fisher = sums.pop(name).mean()
            squares = fisher.diagonal(dim1=1, dim2=2)
            if not torch.isfinite(squares).all():
                raise TicketError(
                    f"expected finite gradients of the loss, found others of {name}: did training "
                    "diverge, or does the loss divide by 0?"
                )
            anything = anything or bool(squares.any())
            yield name, fisher
    if not anything:
        raise TicketError(
            "expected gradients of the loss, found that all are zero: the loss is as low as it can "
            "be, or does not depend on the weights. Give other images, or criterion magnitude"
        )


def blocked(values: Tensor, block: int) -> Tensor:
    """The last dimensions of a parameter's values as [..., blocks, block], padded with zeros.

    Args:
        values: [..., numel].
        block: of the parameter.
    """
    return F.pad(values, (0, -values.shape[-1] % block)).unflatten(-1, (-1, block))


class _Call(NamedTuple):
    """The arguments of a convolution, as PyTorch's has them."""

    input: Tensor
    weight: Tensor
    bias: Tensor | None = None
    stride: Any = 1
    padding: Any = 0
    dilation: Any = 1
    groups: int = 1


class _Sum:
    """Σ g gᵀ of one parameter's blocks."""

    def __init__(self, name: str, parameter: nn.Parameter, block: int) -> None:
        self.name, self.parameter, self.block = name, parameter, block
        count = math.ceil(parameter.numel() / block)
        self.total = torch.zeros(count, block, block, device=parameter.device)
        self.rows = 0

    def add(self, call: _Call, gradient: Tensor) -> None:
        """Add those of a call's rows, given the gradient of its output."""
        rows, largest = len(gradient), max(_read(call, slice(1)).numel(), self.parameter.numel())
        step = max(1, GRADIENT_BYTES // (4 * largest))
        for start in range(0, rows, step):
            some = slice(start, start + step)
            read, written = _read(call, some), _written(call, gradient[some])
            gradients = (written @ read.mT).flatten(1) * rows  # of a row's own loss, not the mean's
            by_block = blocked(gradients, self.block).permute(1, 2, 0)
            self.total.baddbmm_(by_block, by_block.mT)
        self.rows += rows

    def mean(self) -> Tensor:
        if not self.rows:
            raise TicketError(
                f"expected a loss that depends on {self.name}, found no gradient of it: give the "
                "loss of the whole network, without torch.no_grad()"
            )
        return self.total.div_(self.rows)


def _read(call: _Call, rows: slice) -> Tensor:
    """What an output reads at each of its positions: [rows, groups, weights, positions]."""
    values = call.input[rows].float()
    if call.weight.dim() == 2:
        return _positions_last(values)[:, None]
    if isinstance(call.padding, str):
        raise ConfigError(
            f"expected a convolution with its padding in numbers, found {call.padding!r}: give it "
            "as pixels"
        )
    kernel = call.weight.shape[2:]
    values = F.unfold(values, kernel, call.dilation, call.padding, call.stride)
    return values.unflatten(1, (call.groups, -1))


def _written(call: _Call, gradient: Tensor) -> Tensor:
    """The gradient of the outputs: [rows, groups, outputs, positions]."""
    gradient = gradient.float()
    if call.weight.dim() == 2:
        return _positions_last(gradient)[:, None]
    return gradient.flatten(2).unflatten(1, (call.groups, -1))


def _positions_last(values: Tensor) -> Tensor:
    """[rows, features, positions] of what a linear layer has: [rows, …, features]."""
    return values.reshape(len(values), -1, values.shape[-1]).mT


class _Watch(TorchFunctionMode):
    """Adds up what the backward pass gives of each call of a layer with one of these weights.

    Hooks on modules would not do: detectron2's convolutions normalise inside of theirs.
    """

    def __init__(self, sums: Any) -> None:
        super().__init__()
        self.sums = {id(one.parameter): one for one in sums}

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        output = function(*args, **(kwargs or {}))
        if function in (F.conv2d, F.linear) and torch.is_grad_enabled():
            call = _Call(*args, **(kwargs or {}))
            one = self.sums.get(id(call.weight))
            if one is not None:
                call = call._replace(input=call.input.detach())
                if not output.requires_grad:
                    output.requires_grad_()
                output.register_hook(lambda gradient: one.add(call, gradient))
        return output


def _differentiate(loss: Tensor, number: int) -> None:
    if loss.dim() > 0:
        raise ConfigError(
            f"expected the mean loss of a batch, a scalar, found {tuple(loss.shape)}: leave out "
            "reduction='none'"
        )
    if not torch.isfinite(loss):
        raise TicketError(
            f"expected finite gradients, found the loss {loss.item()} of batch {number}: did "
            "training diverge, or are images of it not numbers?"
        )
    if loss.requires_grad:  # else nothing in the chunk is used, which its sums say
        loss.backward()


def _chunks(weights: Mapping[str, Tensor], block: int) -> Iterator[list[str]]:
    """The names, so many at a time that their blocks are within `FISHER_BYTES`."""
    names: list[str] = []
    filled = 0
    for name, weight in weights.items():
        size = 4 * weight.numel() * min(block, weight.numel())
        if names and filled + size > FISHER_BYTES:
            yield names
            names, filled = [], 0
        names.append(name)
        filled += size
    yield names


def _say_clipped(weights: Mapping[str, Tensor], block: int) -> None:
    small = [name for name, weight in weights.items() if weight.numel() < block]
    if small:
        logger.warning(
            "A block of %d is larger than %d of %d parameters, which have one block each: %s",
            *(block, len(small), len(weights), ", ".join(small)),
        )
