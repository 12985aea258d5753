"""How masks are chosen: criteria, selection, and the IMP loop."""

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lth_plugins.pruning.criteria import CRITERIA, Criterion, Loss
from lth_plugins.pruning.lazy_tensors import Computed
from lth_plugins.pruning.selection import SCOPES, select
from lth_plugins.ticket.keys import State
from lth_plugins.ticket.locating import locate
from lth_plugins.ticket.masks import Masks
from lth_plugins.ticket.ticket import Ticket

__all__ = ["CRITERIA", "SCOPES", "Criterion", "Loss", "prune", "select"]


def prune(
    state_dict_or_model: State | nn.Module | Ticket,
    fraction: float,
    masks: Masks | None = None,
    criterion: str | Criterion = "magnitude",
    scope: str = "global",
    loss: Loss | None = None,
) -> Masks:
    """Choose which weights of a ResNet to keep.

    With the defaults the masks are those of ``torch.nn.utils.prune.global_unstructured(…,
    L1Unstructured, amount=fraction)``, bit for bit where no magnitudes are equal (see
    `lth_plugins.pruning.selection` for ties).

    Args:
        state_dict_or_model: the weights to rank, in any known dialect; or a ticket, which prunes
            its θ further.
        fraction: of the weights kept so far, in [0, 1].
        masks: what is kept so far; by default the whole trunk, or what the ticket keeps. They may
            also name parameters of the model outside its trunk, by its own names; all are ranked
            together then.
        criterion: a name in `CRITERIA`, or a function that scores weights.
        scope: "global", "layer" (the same fraction of each parameter) or "erk".
        loss: what criteria that look at gradients differentiate: ``loss(model)``, a scalar.

    Returns:
        Masks that keep a subset of what was kept.

    Raises:
        TicketError: if the layout is unknown, or the masks do not fit it.
        ConfigError: if another argument is invalid.
    """
    if isinstance(state_dict_or_model, Ticket):
        ticket = state_dict_or_model
        masks = ticket.all_masks if masks is None else masks
        state_dict_or_model = {**ticket.outside.weights, **ticket.weights}
    layout = locate(state_dict_or_model, slimmed=masks is not None)  # masks say its widths
    state: State = (
        state_dict_or_model.state_dict()
        if isinstance(state_dict_or_model, nn.Module)
        else state_dict_or_model
    )
    shapes = dict(layout.arch.prunable)
    if masks is None:
        masks = Masks.ones(shapes)
    trunk = set(layout.keys) | set(layout.keys.values())
    shapes |= {n: tuple(state[n].shape) for n in masks if n in state and n not in trunk}
    masks.check_shapes(shapes, layout.arch.name)
    if isinstance(criterion, str):
        criterion = CRITERIA[criterion]
    weights: Mapping[str, Tensor] = Computed(
        masks, lambda n: state[layout.keys.get(n, n)].detach().cpu().float()
    )
    model = None
    if loss is not None and isinstance(state_dict_or_model, nn.Module):
        model = _masked_copy(state_dict_or_model, masks)
        weights = {name: weight.masked_fill(~masks[name], 0) for name, weight in weights.items()}
    return select(criterion(weights, model, loss), masks, fraction, scope)


def _masked_copy(model: nn.Module, masks: Masks) -> nn.Module:
    """What gradients are taken of: the sub-network, apart from the model in training."""
    model = copy.deepcopy(model)
    keys = locate(model).keys
    with torch.no_grad():
        for name, mask in masks.items():
            parameter = model.get_parameter(keys.get(name, name))
            parameter.masked_fill_(~mask.to(parameter.device), 0)
    return model.requires_grad_(True)
