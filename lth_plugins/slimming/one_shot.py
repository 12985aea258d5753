"""Slimming at once: from a model and an example to a narrower model that is then trained."""

import copy
import logging
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from lth_plugins.masking.loading import noted_input
from lth_plugins.slimming import channels
from lth_plugins.slimming.check import check_same
from lth_plugins.slimming.cost import Flops
from lth_plugins.slimming.importance import IMPORTANCES
from lth_plugins.slimming.network import Kept, Network
from lth_plugins.slimming.selection import budget_of, settle
from lth_plugins.slimming.tickets import carry_ticket, check_carries
from lth_plugins.slimming.tracing import Forward, trace
from lth_plugins.slimming.widths import full_shapes, note_widths

logger = logging.getLogger(__name__)


def slim(
    model: nn.Module,
    example: Any,
    flops: float | None = None,
    *,
    latency: float | None = None,
    importance: str = "l2",
    loss: Callable[[nn.Module], Tensor] | None = None,
    keep: Iterable[str] = (),
    forward: Forward | None = None,
) -> nn.Module:
    """A copy of a model with fewer channels, in all of it, and a share of its FLOPs or its time.

    Channels are removed in coupled groups: those of the trunk's residual stream and inside its
    blocks, of necks and of heads. The outputs of the task stay. Train the result, with a new
    optimizer: it computes something else than the model.

    Args:
        model: any model of convolutions, linear layers and BatchNorm; not changed.
        example: what the model is called with; its cost is that for it.
        flops: the share of the model's FLOPs to keep, in (0, 1).
        latency: instead of ``flops``, the share of its time of inference on this machine and on the
            model's device, for the example: layers are timed, and the narrower model is.
        importance: what channels are ranked by; a name in `IMPORTANCES`.
        loss: for importances that need gradients ("taylor", "fisher"): the loss of a model on some
            batch.
        keep: names of modules whose output channels all stay.
        forward: how to run the model instead of ``model(example)``.

    Returns:
        A model of the same class and state-dict keys. Its checkpoint loads into a model that
        `adopt_widths` has given its widths. A ticket on the model is on it, too: the same zeros
        among the channels that are left.

    Raises:
        ConfigError: if a value is invalid, not one of ``flops`` and ``latency`` is given, or so
            little cannot be reached.
        TicketError: if the model fails on the example, the coupling of its channels cannot be
            followed, or it has a sparse ticket on a part of a trunk.
        RunError: if torch-pruning is not installed.
    """
    budget = budget_of(flops, latency)
    check_carries(model)
    run = forward or (lambda m: m(example))
    network = trace(model, run, keep)
    budget = replace(budget, cost=budget.cost.of(model, network, run))
    watched = model if loss is None else copy.deepcopy(model)
    worth = IMPORTANCES[importance]()
    worth.start(watched, network)
    if loss is not None:
        watched.train().zero_grad()
        loss(watched).backward()
        worth.after_backward()
    scores = worth.scores()
    worth.stop()
    kept = settle(model, network, scores, network.all_kept(), budget, run)
    return narrowed(copy.deepcopy(model), network, kept, run)


def check_coupling(model: nn.Module, network: Network, kept: Kept, forward: Forward) -> None:
    """Check on a copy that a model can lose channels, before it is trained.

    Raises:
        TicketError: as `check_same`.
    """
    _zeroed(copy.deepcopy(model), network, kept, forward)


def narrowed(model: nn.Module, network: Network, kept: Kept, forward: Forward) -> nn.Module:
    """A copy of a model without the channels that are not kept, which are zeroed in the model.

    Raises:
        TicketError: if it would compute something else than the model with zeros.
    """
    small = _zeroed(model, network, kept, forward)
    note_widths(small, full_shapes(model), noted_input(model.state_dict()))
    carry_ticket(model, small, network, kept)
    logger.info(describe(network, kept))
    return small


def _zeroed(model: nn.Module, network: Network, kept: Kept, forward: Forward) -> nn.Module:
    """Zero channels in a model; a copy without them, which was checked to compute the same."""
    channels.zero(model, network, kept)
    small = channels.narrow_copy(model, network, kept)
    check_same(model, small, network, forward)
    return small


def describe(network: Network, kept: Kept) -> str:
    """How much of a network is left, for a log."""
    left = sum(int(mask.sum()) for mask in kept.values())
    channels_in_all = sum(len(mask) for mask in kept.values())
    share = Flops()(network, kept) / Flops()(network, network.all_kept())
    return (
        f"{left:,} of {channels_in_all:,} removable channels are left, in {len(kept)} groups, and "
        f"{100 * share:.1f} % of the FLOPs"
    )
