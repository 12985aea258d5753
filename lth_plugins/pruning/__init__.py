"""How masks are chosen: criteria, selection, and the IMP loop."""

import copy
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lth_plugins.errors import ConfigError
from lth_plugins.pruning.criteria import CRITERIA, Criterion, Loss, Losses, Surgeon
from lth_plugins.pruning.lazy_tensors import Computed
from lth_plugins.pruning.selection import SCOPES, select
from lth_plugins.ticket.keys import State
from lth_plugins.ticket.locating import locate
from lth_plugins.ticket.masks import Masks
from lth_plugins.ticket.ticket import Ticket

__all__ = [
    "CRITERIA",
    "SCOPES",
    "Criterion",
    "Loss",
    "Losses",
    "Surgeon",
    "prune",
    "prune_and_update",
    "select",
]


def prune(
    state_dict_or_model: State | nn.Module | Ticket,
    fraction: float,
    masks: Masks | None = None,
    criterion: str | Criterion = "magnitude",
    scope: str = "global",
    loss: Losses | None = None,
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
        loss: what criteria that look at gradients differentiate: ``loss(model)``, a scalar; for
            "cap" and "woodfisher" also a list of such functions, each of another batch of images.

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
    ranking = _rank(state_dict_or_model, masks, criterion, loss)
    return select(ranking.scores(), ranking.masks, fraction, scope)


def prune_and_update(
    model: nn.Module,
    fraction: float,
    masks: Masks | None = None,
    criterion: str | Criterion = "cap",
    scope: str = "global",
    loss: Losses | None = None,
) -> tuple[Masks, dict[str, Tensor]]:
    """Choose which weights of a ResNet to keep, and move those to make up for the others.

    ::

        masks, state = lth.prune_and_update(model, 0.5, loss=losses)
        ticket = lth.Ticket(masks, state, lth.TicketMeta("resnet50", "imagenet"))

    Args:
        model: the weights to rank. It stays as it is.
        fraction, masks, criterion, scope, loss: as of `prune`.

    Returns:
        Masks that keep a subset of what was kept, and the state dict of the model with the updated
        weights, pruned ones at zero.

    Raises:
        TicketError: as `prune`, or if the gradients are no use.
        ConfigError: if the criterion updates no weights, or another argument is invalid.
    """
    ranking = _rank(model, masks, criterion, loss)
    if not isinstance(ranking.criterion, Surgeon):
        surgeons = [name for name in CRITERIA if isinstance(CRITERIA[name], Surgeon)]
        raise ConfigError(
            f"criterion {criterion!r} leaves the surviving weights as they are: choose "
            f"{' or '.join(surgeons)}, or take the masks alone, of lth.prune"
        )
    found = select(ranking.scores(), ranking.masks, fraction, scope)
    updated = ranking.criterion.update(ranking.weights, found, ranking.model, loss)
    state = {key: value.detach().clone() for key, value in model.state_dict().items()}
    for name, value in updated.items():
        state[ranking.keys.get(name, name)].copy_(value)
    return found, state


class _Ranking(NamedTuple):
    """What a criterion is called with, and the masks that it may prune of."""

    criterion: Criterion
    weights: Mapping[str, Tensor]
    model: nn.Module | None
    loss: Losses | None
    masks: Masks
    keys: Mapping[str, str]  # of the model, by torchvision name

    def scores(self) -> Mapping[str, Tensor]:
        return self.criterion(self.weights, self.model, self.loss)


def _rank(
    state_dict_or_model: State | nn.Module,
    masks: Masks | None,
    criterion: str | Criterion,
    loss: Losses | None,
) -> _Ranking:
    """Check the arguments of `prune` that say what is ranked by what."""
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
    return _Ranking(criterion, weights, model, loss, masks, layout.keys)


def _masked_copy(model: nn.Module, masks: Masks) -> nn.Module:
    """What gradients are taken of: the sub-network, apart from the model in training."""
    model = copy.deepcopy(model)
    keys = locate(model).keys
    with torch.no_grad():
        for name, mask in masks.items():
            parameter = model.get_parameter(keys.get(name, name))
            parameter.masked_fill_(~mask.to(parameter.device), 0)
    return model.requires_grad_(True)
