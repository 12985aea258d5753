"""The weight initialiser ``Ticket``: how a config puts a ticket on a backbone.

mmengine's Runner initialises weights once the model and the optimizer are built and before it
loads or resumes a checkpoint, so masks sit on the model before the first step, and on everything
that is loaded later.
"""

import inspect
import logging
import weakref
from collections.abc import Iterator, Mapping, Sequence
from os import PathLike
from typing import Any

from mmengine.logging import print_log
from mmengine.model import BaseModule, initialize, update_init_info
from mmengine.registry import WEIGHT_INITIALIZERS
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from lth_plugins.masking.attachment import attach
from lth_plugins.masking.hosting import (
    frozen_stages,
    frozen_statistics,
    has_statistics,
    no_statistics,
)
from lth_plugins.masking.input import ModelInput, check_input
from lth_plugins.masking.loading import watch_loading
from lth_plugins.mmseg.input import input_of, to_lines
from lth_plugins.resilience.seeds import aside
from lth_plugins.ticket import ARCHITECTURES, Choice, ResNet, Ticket, TicketError, Wording, locate

_FROM_SCRATCH = [
    {"type": "Kaiming", "layer": "Conv2d"},
    {"type": "Constant", "val": 1, "layer": ["_BatchNorm", "GroupNorm"]},
]
_STREAM = 1


@WEIGHT_INITIALIZERS.register_module(name="Ticket")
class TicketInit:
    """Initialise a ResNet with a ticket, and keep it masked from then on.

    For ``init_cfg`` of a backbone: a ``TicketResNet``, or a stock ``ResNet`` of mmseg, mmdet or
    mmpretrain. It changes nothing when a trained checkpoint is only tested.

    Args:
        checkpoint: the ticket: a path, a catalog name or ``hf://owner/repo[/file]``.
        weights: another ticket, whose θ is used.
        load_weights: False for the random initialisation under the ticket's masks.
        reverse: what the ticket prunes, (1 - m, θ); needs ``weights``.
        random: a random mask of the same layer-wise densities; needs ``weights``.
        seed: of ``random``.
        rest: whether to prune outside the backbone what the ticket prunes there. `TicketHook` does,
            because neck and heads are initialised after the backbone.
        keep_input: accept a data preprocessor that returns another input than the ticket was
            trained on. Also for images that a pipeline loads as RGB or normalises itself: only
            the data preprocessor is checked, for BGR images in [0, 255].
        keep_norm_eval: accept a backbone with ``norm_eval=True``, for a ticket whose BN statistics
            are those of the sub-network, such as a fine-tuned one.
        allow_other_checkpoint: load a checkpoint (``load_from``, a resumed one) that was trained
            with other masks, or dense, under the ticket's; a warning says how many of its weights
            they zero.

    Raises:
        LthError: if the options contradict each other or the model, or there is no such ticket.
            The model is unchanged then.
    """

    def __init__(
        self,
        checkpoint: str | PathLike[str] | None = None,
        weights: str | PathLike[str] | None = None,
        load_weights: bool = True,
        reverse: bool = False,
        random: bool = False,
        seed: int = 0,
        rest: bool = True,
        keep_input: bool = False,
        keep_norm_eval: bool = False,
        allow_other_checkpoint: bool = False,
    ) -> None:
        self.choice = Choice(
            *(checkpoint or "", weights, reverse, random, seed, rest, load_weights), WORDING
        )
        self.keep_input = keep_input
        self.keep_norm_eval = keep_norm_eval
        self.allow_other_checkpoint = allow_other_checkpoint

    def __call__(self, module: nn.Module) -> None:
        ticket = self.choice.load()
        _check_trunk(module, ticket)
        if not self.keep_norm_eval:
            check_statistics(module, ticket)
        if not self.keep_input:
            _check_input(module, ModelInput.of(ticket.meta.input))
        if not self.choice.load_weights:
            with aside(_STREAM):  # heads start alike on every ticket
                initialize(module, _FROM_SCRATCH)
        attach(module, ticket, self.choice.load_weights, whole=False, wording=WORDING)
        watch(module, self.allow_other_checkpoint)
        print_log(f"Attached {ticket!r} to {type(module).__name__}", logger="current")
        if hasattr(module, "_params_init_info"):
            update_init_info(module, init_info=f"TicketInit: {ticket!r}")


_OPTION = "{0} in the backbone's init_cfg (--cfg-options model.backbone.init_cfg.{0}=FILE)"
WORDING = Wording(
    path=_OPTION.format("checkpoint"),
    weights=_OPTION.format("weights"),
    trunk_only="rest=False in the backbone's init_cfg",
    attach_outside="put TicketHook among custom_hooks",
    stride_in_1x1="backbone=dict(style='caffe', …)",
    stride_in_3x3="backbone=dict(style='pytorch', …)",
    channels="backbone=dict(in_channels={}, …)",
    other_checkpoint="allow_other_checkpoint=True in the backbone's init_cfg",
)
"""What the core's messages call the options of an ``init_cfg``."""

TICKET_OPTIONS = tuple(inspect.signature(TicketInit).parameters)
"""The keys of an ``init_cfg`` of type ``Ticket``."""


def choice_of(options: Mapping[str, Any]) -> Choice:
    """Which ticket the options of an ``init_cfg`` of type ``Ticket`` name."""
    return TicketInit(**{key: value for key, value in options.items() if key != "type"}).choice


def ticket_options(init_cfg: Any) -> Any:
    """The ``Ticket`` entry of an ``init_cfg``; None where there is none."""
    for entry in init_cfg if isinstance(init_cfg, Sequence) else [init_cfg]:
        if isinstance(entry, Mapping) and entry.get("type") in ("Ticket", TicketInit):
            return entry
    return None


def watch(backbone: nn.Module, allow_other_checkpoint: bool = False) -> None:
    """Have a backbone check what is loaded into it, as `watch_loading` does."""
    watch_loading(backbone, wording=WORDING, allow_other_checkpoint=allow_other_checkpoint)


# An initialiser is given the backbone alone; the data preprocessor is its owner's, or that one's
# (BiSeNetV1 has its ResNet inside). PyTorch calls a hook for each submodule that a module is given,
# which finds the owners with and without a Runner.
_owners: "weakref.WeakKeyDictionary[nn.Module, weakref.ref[nn.Module]]"
_owners = weakref.WeakKeyDictionary()
_holders: "weakref.WeakSet[nn.Module]" = weakref.WeakSet()  # of a backbone with a ticket


def _remember_owner(owner: nn.Module, _: str, submodule: nn.Module | None) -> None:
    if isinstance(submodule, BaseModule) and ticket_options(submodule.init_cfg) is not None:
        watch(submodule)  # before it is initialised, and where it is only tested
    elif submodule is None or submodule not in _holders:
        return
    _owners[submodule] = weakref.ref(owner)
    _holders.add(owner)


register_module_module_registration_hook(_remember_owner)


def _owners_of(module: nn.Module) -> Iterator[nn.Module]:
    """The modules that hold this one, the innermost first."""
    while module in _owners:
        owner = _owners[module]()
        if owner is None:
            return
        yield owner
        module = owner


def _check_trunk(module: nn.Module, ticket: Ticket) -> None:
    if not has_statistics(module):
        advice = "write backbone=dict(norm_cfg=dict(type='BN'), …), or SyncBN on several GPUs"
        raise TicketError(no_statistics(f"the {type(module).__name__}", advice))
    layout = locate(module, archs=(ticket.arch, *ARCHITECTURES.values()))
    if "layer1.0.conv1.weight" not in layout.keys.values():
        raise TicketError(
            f"expected init_cfg of type Ticket on a ResNet, found it on {type(module).__name__}, "
            "whose parts are initialised after it: move it into backbone=dict(…), or into the "
            "backbone_cfg in it where there is one"
        )
    if layout.arch != ticket.arch.reading(layout.arch.channels):
        raise TicketError(
            f"the ticket is for {ticket.arch.description}, but the backbone is "
            f"{layout.arch.description}: write backbone=dict({_settings(ticket.arch)}, …)"
            + (", and load the slimmed checkpoint that it is for" if ticket.arch.widths else "")
        )


def _settings(arch: ResNet) -> str:
    """The type and depth of the mmseg backbone that has this architecture."""
    depth = f"depth={2 + (3 if arch.bottleneck else 2) * sum(arch.depths)}"
    if arch.groups > 1:
        return f"type='ResNeXt', {depth}, groups={arch.groups}, base_width={arch.base_width}"
    variant = ("V1d" if arch.avg_down else "V1c") if arch.deep_stem else ""
    return f"type='TicketResNet{variant}', {depth}"


def check_statistics(module: nn.Module, ticket: Ticket) -> None:
    """Raise ``TicketError`` if a backbone would keep the dense network's BN statistics."""
    if not ticket.sparsity:
        return
    if getattr(module, "norm_eval", False):
        advice = "write backbone=dict(norm_eval=False, …)"
        accept = "keep_norm_eval=True in its init_cfg"
        raise TicketError(frozen_statistics("norm_eval=True in the backbone", advice, accept))
    if getattr(module, "frozen_stages", -1) > 0:
        _warn(frozen_stages(f"frozen_stages={module.frozen_stages}", "frozen_stages=0 or -1"))


def _warn(message: str) -> None:
    print_log(message, logger="current", level=logging.WARNING)


def _check_input(module: nn.Module, trained: ModelInput) -> None:
    preprocessors = (getattr(owner, "data_preprocessor", None) for owner in _owners_of(module))
    preprocessor = next(filter(None, preprocessors), None)
    if preprocessor is None:
        _warn(
            f"Found no data preprocessor in what holds the {type(module).__name__}: whether it "
            f"has {trained}, as the ticket had, is not checked"
        )
        return
    advice = to_lines(trained, preprocessor) + (
        "\nor keep_input=True in the backbone's init_cfg to train on that input all the same"
    )
    host = f"{type(preprocessor).__name__} returns"
    check_input("the ticket", trained, input_of(preprocessor), advice, host=host)
