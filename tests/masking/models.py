"""What tests of masking do with a small model."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

import lth_plugins as lth
from lth_plugins import Ticket


def images(batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(batch))


def backward(model: nn.Module) -> None:
    model(images()).square().mean().backward()


def pruned_gradients(model: nn.Module, ticket: Ticket) -> list[Tensor]:
    return [model.get_parameter(name).grad[~mask] for name, mask in ticket.masks.items()]


def step_masked(
    model: nn.Module, ticket: Ticket, optimizer: torch.optim.Optimizer | None = None
) -> None:
    """One step of training, in which the gradients and values of pruned weights are zero."""
    optimizer = optimizer or torch.optim.SGD(model.parameters(), 0.1)
    optimizer.zero_grad()
    backward(model)
    assert all(not gradient.any() for gradient in pruned_gradients(model, ticket))
    optimizer.step()
    lth.attached(model).verify()


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """What happens inside leaves the model without a ticket, and its state as it is."""
    before = {name: value.clone() for name, value in model.state_dict().items()}
    yield
    assert lth.attached(model) is None
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
