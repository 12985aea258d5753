"""How masks are chosen: criteria, selection, and the IMP loop."""

from torch import nn

from lth_plugins.prune.criteria import CRITERIA, Criterion
from lth_plugins.prune.select import SCOPES, select
from lth_plugins.ticket.dialects import State, to_torchvision
from lth_plugins.ticket.errors import TicketError
from lth_plugins.ticket.masks import Masks

__all__ = ["CRITERIA", "SCOPES", "Criterion", "prune", "select"]


def prune(
    state_dict_or_model: State | nn.Module,
    fraction: float,
    masks: Masks | None = None,
    criterion: str | Criterion = "magnitude",
    scope: str = "global",
) -> Masks:
    """Choose which weights of a ResNet to keep.

    With the defaults the masks are those of ``torch.nn.utils.prune.global_unstructured(…,
    L1Unstructured, amount=fraction)``, bit for bit where no magnitudes are equal (see
    `lth_plugins.prune.select` for ties).

    Args:
        state_dict_or_model: the weights to rank, in any known dialect.
        fraction: of the weights kept so far, in [0, 1].
        masks: what is kept so far; everything by default.
        criterion: a name in `CRITERIA`, or a function that scores weights.
        scope: "global" or "layer".

    Returns:
        Masks that keep a subset of what was kept.

    Raises:
        TicketError: if the layout is unknown, the masks do not fit it, or an argument is not one.
    """
    arch, state = to_torchvision(state_dict_or_model)
    weights = {name: state[name].detach().cpu().float() for name in arch.prunable}
    if masks is None:
        masks = Masks.ones(arch.prunable)
    masks.check_shapes(arch.prunable, arch.name)
    if isinstance(criterion, str):
        if criterion not in CRITERIA:
            raise TicketError(f"unknown criterion {criterion!r}; known are {', '.join(CRITERIA)}")
        criterion = CRITERIA[criterion]
    return select(criterion(weights), masks, fraction, scope)
