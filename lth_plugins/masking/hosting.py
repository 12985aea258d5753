"""What every host checks about the ticket on its model, in the words of its own configuration.

A host's hooks watch for leaks with `require_ticket`, `verify_everywhere`, `describe` and
`check_zeros`; the sentences below refuse its configuration. `loading` checks what is loaded,
`input` the model's input.
"""

import logging
import re
from collections.abc import Mapping
from importlib.metadata import version

from torch import Tensor, nn

from lth_plugins.errors import NotFound, RunError, TicketError
from lth_plugins.masking.attachment import Attachment, attached
from lth_plugins.masking.loading import why_refused
from lth_plugins.masking.zeros import count_nonzero
from lth_plugins.resilience.ranks import first_of
from lth_plugins.ticket.locating import locate

logger = logging.getLogger(__name__)


def warn_if_untested(package: str, first: str, last: str) -> None:
    """Warn of a host in another version than those that its plug-in was tested with.

    Args:
        package: the host's, as it is installed.
        first, last: the range of tested versions, both included; "5.23" stands for all 5.23.x.
    """
    found = version(package)
    parts = [_numbers(one) for one in (first, found, last)]
    if not parts[0] <= parts[1][: len(parts[0])] or parts[1][: len(parts[2])] > parts[2]:
        tested = first if first == last else f"{first} to {last}"
        logger.warning(
            "%s %s is installed, and its plug-in was tested with %s: what it promises may not "
            "hold. Install a tested version, or run the tests of lth_plugins with this one",
            *(package, found, tested),
        )


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text.partition("+")[0]))


def require_ticket(model: nn.Module, advice: str) -> Attachment:
    """The ticket on a model that is to be trained.

    Raises:
        TicketError: if there is none, with this advice; or because the model refuses to train.
    """
    handle = attached(model)
    if handle is None:
        raise TicketError(why_refused(model) or advice)
    return handle


def verify_everywhere(handle: Attachment) -> None:
    """Verify a ticket on all processes of a training, before one of them saves.

    Each has a replica of its own, and a leak in any stops all of them.

    Raises:
        TicketError: as `Attachment.verify`; on all processes what the first of them found.
        RunError: if another process has ended instead, as on a leak that its state dict named.
    """
    problem = None
    try:
        handle.verify()
    except TicketError as error:
        problem = error
    try:
        found = first_of(problem)
    except RuntimeError as error:  # of a backend
        raise problem or RunError(
            "expected all processes to verify the ticket before a checkpoint is written, found "
            "that one has ended: its own message says why. Nothing was written"
        ) from error
    if found is not None:
        raise found


def describe(handle: Attachment) -> str:
    """Say how dense the attached ticket is, for a log."""
    masks = handle.masks
    return (
        f"Ticket: {masks.kept:,} of {masks.numel:,} prunable weights, density "
        f"{100 * masks.density:.2f} %"
    )


def can_be_written(handle: Attachment) -> bool:
    """Whether a fine-tuned ticket can be made of a model; a warning says so where it has a part."""
    if handle.absent_stages:
        logger.warning(
            "no fine-tuned ticket is written: the model has a part of %s", handle.meta.arch
        )
    return not handle.absent_stages


def check_zeros(state: Mapping[str, Tensor], masks: Mapping[str, Tensor], what: str) -> None:
    """Check that the pruned weights of a whole model's state dict are zero.

    Args:
        state: a state dict.
        masks: by torchvision's names in the trunk, and by the state dict's outside it.
        what: the state dict is, for the message.

    Raises:
        TicketError: naming the first parameter that leaks.
    """
    keys = locate(state, slimmed=True).keys  # the masks say the widths
    for name, mask in masks.items():
        key = keys.get(name, name)
        if leaked := count_nonzero(state[key], ~mask):
            raise TicketError(
                f"expected the pruned weights of {key} to be zero in {what}, found {leaked} that "
                "are not: it was trained with other masks, or something wrote to it outside of an "
                "optimizer step"
            )


def without_ticket(error: NotFound) -> str:
    """Why a model whose ticket is missing refuses to train, for `refuse_to_run`."""
    return (
        f"{error}. Without its ticket the model infers from a trained checkpoint, but it is not "
        "trained, nor used before a checkpoint was loaded"
    )


def has_statistics(module: nn.Module) -> bool:
    """Whether a module has BatchNorm statistics, which are part of a ticket."""
    return any(key.endswith(".running_var") for key in module.state_dict())


def no_statistics(where: str, advice: str) -> str:
    """The refusal of a network without BatchNorm."""
    return (
        f"expected BatchNorm in {where}, whose statistics are part of a ticket, found none: "
        f"{advice}"
    )


def frozen_statistics(setting: str, advice: str, accept: str) -> str:
    """The refusal of a setting that keeps BN statistics from adapting to a sparse ticket."""
    return (
        f"{setting} keeps the BN statistics of the dense network, which are wrong for the "
        f"sub-network: {advice}, or {accept} if the ticket's statistics are its own"
    )


def frozen_stages(setting: str, advice: str) -> str:
    """The warning of a setting that freezes stages which a sparse ticket has pruned."""
    return (
        f"{setting} freezes pruned stages together with the BN statistics of the dense network: "
        f"{advice} lets them adapt"
    )
