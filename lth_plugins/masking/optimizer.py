"""Hooks on all optimizers: masked weights are exactly zero after every step of any of them.

Before a step they zero gradients that came another way than through the parameter's hook; after it
the pruned weights, so that momentum that predates a mask cannot bring a weight back.
"""

import logging
import weakref
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.optim.optimizer import (
    Optimizer,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from lth_plugins.errors import TicketError
from lth_plugins.masking.record import RECORDS
from lth_plugins.masking.shards import local
from lth_plugins.masking.weight import (
    ARMED,
    MARK,
    MaskedWeight,
    lost_masks,
)

logger = logging.getLogger(__name__)


def _parameters_of(optimizer: Optimizer) -> Iterator[Tensor]:
    return (parameter for group in optimizer.param_groups for parameter in group["params"])


def _before_optimizer_step(optimizer: Optimizer, *_: object) -> None:
    """Zero gradients that the hooks on parameters did not see, and refuse to train lost masks."""
    if torch.compiler.is_compiling():
        for parameter in _parameters_of(optimizer):
            mark = getattr(parameter, MARK, None)
            if mark is not None and parameter.grad is not None:
                local(parameter.grad).masked_fill_(mark["pruned"], 0)
        return
    # First: a mask follows a weight that was sharded after the ticket was attached.
    for record in list(RECORDS):
        root = record.root()
        lost = record.lost()
        if root is not None and lost and _trains(optimizer, root):
            raise lost_masks(list(lost), root, next(iter(lost.values())))
    slipped: list[MaskedWeight] = []
    for parameter in _parameters_of(optimizer):
        mask, mark = ARMED.get(id(parameter)), parameter.__dict__.get(MARK)
        if mask is None:
            if mark is not None:
                raise lost_masks([mark["name"]], nn.Module())
            continue
        if mask.incomplete:
            raise TicketError(mask.incomplete)
        if mark is None:
            mask.follow(mask.parameter)
        if mask.zero_gradient_that_slipped() and not mask.has_slipped:
            slipped.append(mask)
        mask.in_step = True
    if slipped:
        for mask in list(ARMED.values()):
            mask.has_slipped |= mask.meta is slipped[0].meta
        logger.warning(
            "Gradients of pruned weights reached an optimizer without being zeroed on the way "
            "(%s%s): they were assigned, or the model was converted or an optimizer put into its "
            "backward pass before. They are zero in the step; what looked at them before it, such "
            "as clipping, has seen them. This is said once",
            slipped[0].name,
            f" and {len(slipped) - 1} more" if len(slipped) > 1 else "",
        )


def _trains(optimizer: Optimizer, model: nn.Module) -> bool:
    own = {id(parameter) for parameter in model.parameters()}
    return any(id(parameter) in own for parameter in _parameters_of(optimizer))


def _after_optimizer_step(optimizer: Optimizer, *_: object) -> None:
    """Zero the pruned weights of whatever an optimizer has updated."""
    if torch.compiler.is_compiling():
        for parameter in _parameters_of(optimizer):
            if (mark := getattr(parameter, MARK, None)) is not None:
                with torch.no_grad():
                    local(parameter).masked_fill_(mark["pruned"], 0)
                mark["compiled_step"] = True
        return
    if not ARMED:
        return
    this = weakref.ref(optimizer)
    for parameter in _parameters_of(optimizer):
        mask = ARMED.get(id(parameter))
        if mask is not None:
            mask.zero_weight()
            mask.forget_loaded()
            mask.in_step, mask.optimizer = False, this
            if mask.collected is not None:
                mask.collected.stepped = True


def optimizer_of(mask: MaskedWeight) -> Optimizer | None:
    """What made the last step of a masked weight; None before the first.

    Raises:
        TicketError: if its steps are compiled, so that its state is out of reach.
    """
    mark = mask.parameter.__dict__.get(MARK)
    if mask.optimizer is None and mark is not None and mark["compiled_step"]:
        raise TicketError(
            f"expected an optimizer whose state of {mask.name} can be reset where its mask keeps "
            "weights that were pruned, found one with a compiled step: compile the model, and "
            "leave optimizer.step() as it is"
        )
    return None if mask.optimizer is None else mask.optimizer()


def reset_momentum(optimizer: Optimizer, parameter: Tensor, where: Tensor | None = None) -> None:
    """Zero what an optimizer remembers of a parameter: momentum, and moments of Adam and others.

    Args:
        optimizer: the optimizer. State that has not the parameter's shape stays, such as counts of
            steps.
        parameter: one of its parameters.
        where: of which entries, in this process's part of the parameter; None for all.
    """
    for value in optimizer.state.get(parameter, {}).values():
        if isinstance(value, Tensor) and value.shape == parameter.shape:
            part = local(value)
            part.zero_() if where is None else part.masked_fill_(where, 0)


register_optimizer_step_pre_hook(_before_optimizer_step)
register_optimizer_step_post_hook(_after_optimizer_step)
