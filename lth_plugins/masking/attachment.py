"""How a mask lives on a model while any trainer trains it.

`attach` leaves the forward pass, the parameters and the state-dict keys as they are. It puts a
`MaskedWeight` on each masked module, and a `Record` of them on the model; hooks on all optimizers
(`masking.optimizer`) keep the zeros.

A ticket may also mask parameters outside the trunk, in the whole model of one host. Hosts attach a
ticket while they build a backbone, when there is no such model yet; `attach_rest` follows then.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from lth_plugins.errors import ConfigError, LthError, TicketError
from lth_plugins.masking.optimizer import optimizer_of, reset_momentum  # and its hooks
from lth_plugins.masking.record import RECORD, RECORDS, Record, lost_in, masked_in
from lth_plugins.masking.shards import is_sharded, sharded_like, whole
from lth_plugins.masking.weight import (
    ATTRIBUTE,
    MARK,
    DenseGradient,
    MaskedWeight,
    leak,
    lost_masks,
    outside_is_missing,
)
from lth_plugins.ticket.arch import PARTS, STAGES, ResNet, part_of
from lth_plugins.ticket.layout import Layout
from lth_plugins.ticket.locating import locate
from lth_plugins.ticket.masks import Masks
from lth_plugins.ticket.meta import InputSpec, TicketMeta
from lth_plugins.ticket.obstacles import (
    check_has_values,
    check_model,
    check_not_flattened,
    check_not_replaced,
    frozen_norms,
)
from lth_plugins.ticket.outside import Outside
from lth_plugins.ticket.ticket import Ticket
from lth_plugins.ticket.trunk import read_trunk
from lth_plugins.ticket.wording import SCRIPT, Wording

logger = logging.getLogger(__name__)

_WAITING = "ticket_waiting"


class Attachment:
    """A ticket on a model: what `attach` and `attached` return."""

    def __init__(self, model: nn.Module, masked: dict[nn.Module, MaskedWeight]) -> None:
        self._model = model
        self._masked = masked

    @property
    def meta(self) -> TicketMeta:
        """The description of the attached ticket."""
        if not self._masked:
            raise lost_masks(list(lost_in(self._model)), self._model)
        return next(iter(self._masked.values())).meta

    @property
    def masks(self) -> Masks:
        """The attached masks of the trunk, by torchvision name."""
        return Masks({m.name: ~m.whole for m in self._masked.values() if m.in_trunk})

    @property
    def all_masks(self) -> Masks:
        """The attached masks, also those outside the trunk, by the whole model's names."""
        return Masks({mask.name: ~mask.whole for mask in self._masked.values()})

    @property
    def absent_stages(self) -> list[str]:
        """The stages of the trunk that the model lacks: a ticket cannot be made of such a model."""
        there = {part_of(mask.name) for mask in self._masked.values() if mask.in_trunk}
        return [stage for stage in STAGES if stage not in there]

    @property
    def zeroed_by_load(self) -> int:
        """How many non-zero weights the masks zeroed when weights were last loaded into the model.

        0 where they were trained with this ticket; otherwise they come from another one, or
        from a dense network.
        """
        return sum(mask.zeroed_by_load for mask in self._masked.values())

    def verify(self) -> None:
        """Check that all that was attached is there, and every pruned weight exactly zero.

        Raises:
            TicketError: naming the first parameter that is not zero, or whose mask was lost; or if
                a part of the ticket is not attached. Where parameters are sharded this is a
                collective, and all processes raise the same.
        """
        self._check_masks()
        for mask in self._masked.values():
            if leaked := mask.count_leaks():
                raise TicketError(leak(mask.name, leaked))

    def _check_masks(self) -> None:
        """Raise ``TicketError`` unless each mask sits on its weight."""
        for module, mask in self._masked.items():
            if mask.incomplete:
                raise TicketError(mask.incomplete)
            if module.__dict__.get(ATTRIBUTE) is not mask:
                raise TicketError(
                    f"the mask of {mask.name} no longer sits on the model: the ticket was "
                    "detached, or another one attached. Attach the ticket again"
                )
        if lost := lost_in(self._model):
            raise lost_masks(list(lost), self._model, next(iter(lost.values())))
        for module, mask in self._masked.items():
            if not mask.sits_on(module):
                raise lost_masks([mask.name], self._model, module)
            if not mask.is_armed:
                mask.follow(mask.parameter)

    def zero(self) -> None:
        """Zero the pruned weights and their gradients.

        Optimizers of `torch.optim` need no such call. Make it after each update that is not theirs:
        of a training loop of your own, or of one that copies other weights into the model.

        Raises:
            TicketError: if a mask was lost, or a part of the ticket is not attached.
        """
        self._check_masks()
        for mask in self._masked.values():
            mask.zero_weight()
            mask.zero_gradient_that_slipped()

    def replace(self, masks: Masks, reset_all_momentum: bool = False, **recipe: Any) -> None:
        """Put other masks in the place of the attached ones, while a trainer trains the model.

        Weights that were pruned and are kept now start at 0, and so does what their optimizer
        remembers of them (`reset_momentum`). If a checkpoint was loaded and no step made since,
        they start at its values: it may be loaded before its masks are.

        Args:
            masks: those to attach, for all that is masked now.
            reset_all_momentum: reset what the optimizers of masked weights remember of all their
                parameters.
            recipe: how they were made, added to the ticket's description.

        Raises:
            TicketError: if they are masks of other parameters, or an optimizer's state cannot be
                reset. Nothing has changed then.
        """
        for mask in self._masked.values():
            found = masks[mask.name].shape if mask.name in masks else None
            if found != mask.parameter.shape:
                raise TicketError(
                    f"expected masks of what is masked now, with {mask.name} of shape "
                    f"{tuple(mask.parameter.shape)}, found {'none' if found is None else found} "
                    "there. Attach a ticket to start anew"
                )
        optimizers = {mask: optimizer_of(mask) for mask in self._masked.values()}
        meta = replace(self.meta, recipe={**self.meta.recipe, **recipe})
        for mask, optimizer in optimizers.items():
            grown = mask.replace(~masks[mask.name])
            mask.meta = meta
            if optimizer is not None and not reset_all_momentum:
                reset_momentum(optimizer, mask.parameter, grown)
        if reset_all_momentum:
            for optimizer in {id(one): one for one in optimizers.values() if one}.values():
                for parameter in list(optimizer.state):
                    reset_momentum(optimizer, parameter)

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        """The masked parameters that require a gradient, by name."""
        return {m.name: m.parameter for m in self._masked.values() if m.parameter.requires_grad}

    @property
    def weights(self) -> dict[str, nn.Parameter]:
        """The masked parameters, by name; of two of one name that which is trained."""
        return {m.name: m.parameter for m in self._masked.values()} | self.trained

    def collect_gradients(self) -> None:
        """Collect the gradients of masked weights in the next step, also of those pruned.

        `collected_gradients` ends it. No optimizer sees the gradients of pruned weights.

        Raises:
            TicketError: if parameters are sharded: no process has the gradient of a whole one.
        """
        for mask in self._masked.values():
            if is_sharded(mask.parameter):
                raise TicketError(
                    "expected whole parameters to collect the gradients of pruned weights, found "
                    f"{mask.name} sharded (FSDP2): train with "
                    "torch.nn.parallel.DistributedDataParallel, or choose a method that needs no "
                    "gradients"
                )
            mask.collected = DenseGradient()

    def collected_gradients(self) -> dict[str, Tensor] | None:
        """What was collected since `collect_gradients`, which ends.

        Returns:
            The sum over the batches of this process, on the parameter's device, float32, by name;
            none of parameters that got no gradient. None where no optimizer has made a step of it,
            as `torch.amp.GradScaler` skips those that overflow.
        """
        gradients, stepped = {}, False
        for mask in self._masked.values():
            found, mask.collected = mask.collected, None
            if found is not None and found.total is not None:
                gradients[mask.name] = found.total
                stepped |= found.stepped
        return gradients if stepped or not gradients else None

    def detach(self) -> None:
        """Take the masks off the model. The weights stay as they are, pruned ones at zero."""
        left = [m for m, mask in self._masked.items() if m.__dict__.get(ATTRIBUTE) is mask]
        for module in left:
            self._masked[module].leave(module)
            self._masked[module].disarm()
        for record in list(RECORDS):
            record.drop(left)
        for module in self._model.modules():
            module.__dict__.pop(_WAITING, None)
        if masked_in(self._model):  # those of another attachment
            return
        for module in self._model.modules():
            for record in module.__dict__.pop(RECORD, ()):
                record.leave()
        for parameter in self._model.parameters():
            parameter.__dict__.pop(MARK, None)

    def ticket(self, **changes: Any) -> Ticket:
        """The attached masks over the model's present weights.

        Sharded parameters are gathered: call it in all processes.

        Args:
            changes: fields of `TicketMeta` to set, such as ``source="coco"``.

        Raises:
            ConfigError: if a change is no field of `TicketMeta`.
            TicketError: if a pruned weight is not zero, or the model lacks a stage of the trunk.
        """
        known = [field.name for field in fields(TicketMeta)]
        if unknown := changes.keys() - known:
            raise ConfigError(
                f"expected changes of a ticket's {', '.join(known)}, found {min(unknown)}"
            )
        self.verify()
        if absent := self.absent_stages:
            raise TicketError(
                f"expected all stages of a {self.meta.arch} to make a ticket of, found none of "
                f"{', '.join(absent)}: a ticket is of the whole trunk. Keep the state dict of the "
                "model instead, or attach the ticket to a model that is built with all stages"
            )
        state = {key: whole(value) for key, value in self._model.state_dict().items()}
        weights = read_trunk(state, archs=[self.meta.network]).weights
        others = [mask for mask in self._masked.values() if not mask.in_trunk]
        outside = Outside(
            Masks({mask.name: ~mask.whole for mask in others}),
            {mask.name: whole(mask.parameter) for mask in others},
        )
        return Ticket(self.masks, weights, replace(self.meta, **changes), outside=outside)


def attach(
    model: nn.Module,
    ticket: Ticket,
    load_weights: bool = True,
    parts: Sequence[str] = PARTS,
    whole: bool = True,
    wording: Wording = SCRIPT,
) -> Attachment:
    """Put a ticket on a model: load its weights and keep its pruned weights at zero in training.

    Everything is checked before anything changes. A ticket already attached is replaced.

    Args:
        model: a model, of any known dialect, with a ResNet trunk somewhere in it.
        ticket: the ticket.
        load_weights: False keeps the model's own weights, masked: random re-initialisation.
        parts: the parts of the trunk this model has, of `PARTS`, for hosts that build a trunk in
            pieces.
        whole: False if the model is a backbone that is still to be built into a whole one. What
            the ticket prunes outside the trunk then waits for `attach_rest`; training before that
            is an error.
        wording: how messages call what a host's configuration would change.

    Returns:
        A handle to verify, detach and export.

    Raises:
        TicketError: if the model has no such trunk, holds more in it than a plain ResNet's, reads
            images of other channels, places its strides elsewhere, or lacks parameters that the
            ticket prunes outside the trunk; if its parameters are flattened, computed from others,
            or on the meta device. The model is unchanged then.
    """
    check_not_flattened(model)
    if any(isinstance(module, torch.jit.ScriptModule) for module in model.modules()):
        raise TicketError(
            "expected a model of Python modules, found one of TorchScript, which has no hooks: "
            "attach the ticket to the model that was scripted, and script it after detach()"
        )
    try:
        layout = _locate(model, ticket.arch, parts)
    except LthError:
        check_not_replaced(model.named_modules())
        raise
    if "stem" in parts:
        check_channels(layout.arch.channels, ticket.meta.input, wording)
    check_model(model, layout)
    modules = layout.modules(model)
    check_not_replaced(
        (key.removesuffix(".weight"), modules[name])
        for name, key in layout.keys.items()
        if name.endswith(".weight")
    )
    _check_strides(layout, modules, ticket.meta, wording)

    meta = ticket.meta
    if not load_weights:
        meta = replace(meta, recipe={**meta.recipe, "weights": "the model's own"})
    state = model.state_dict(keep_vars=True)
    check_has_values({key: state[key] for key in layout.keys.values()})
    masked: dict[nn.Module, MaskedWeight] = {}
    for name, mask in ticket.masks.items():
        if part_of(name) not in parts:
            continue
        masked[modules[name]] = MaskedWeight(name, state[layout.keys[name]], ~mask, meta)
    waiting = bool(ticket.outside) and not whole
    others = {} if waiting else _masked_outside(model, ticket.outside, meta, wording)

    previous = attached(model)
    if previous is not None:
        previous.detach()
    if load_weights:
        with torch.no_grad():
            for name, key in layout.keys.items():
                _copy(ticket.weights[name], state[key])
            for other in others.values():
                _copy(ticket.outside.weights[other.name], other.parameter)
    _put_on(model, masked | others)
    if waiting:
        model.__dict__[_WAITING] = (ticket.outside, meta, load_weights, wording)
        for masked_weight in masked.values():
            masked_weight.incomplete = outside_is_missing(wording)
    logger.info(
        "Attached a %s ticket (%s, round %d, %.2f %% sparse) to a %s model",
        *(ticket.meta.arch, ticket.meta.source, ticket.meta.round, 100 * ticket.sparsity),
        layout.dialect.name,
    )
    frozen = frozen_norms(model, modules) if ticket.sparsity else None
    if frozen is not None:
        logger.warning(
            "The trunk's normalisation is frozen (%s): it keeps the BN statistics of the dense "
            "network, which are wrong for the sub-network. Train it (nn.BatchNorm2d, SyncBatchNorm "
            "on several GPUs) or re-estimate the statistics (fvcore.nn.precise_bn), unless the "
            "ticket's statistics are its own",
            frozen,
        )
    return Attachment(model, masked | others)


def attach_rest(model: nn.Module) -> None:
    """Attach what a ticket prunes outside the trunk, once the backbone has become a whole model.

    For hosts, which attach a ticket while they build a backbone. It does nothing where all of the
    ticket is attached. Weights are loaded if the backbone's were: call it after the host has
    initialised the model, and before it loads a checkpoint.

    Args:
        model: the whole model, not wrapped (for DistributedDataParallel).

    Raises:
        TicketError: if the model lacks parameters that the ticket prunes. It is unchanged then.
    """
    waiting = [module for module in model.modules() if _WAITING in module.__dict__]
    if not waiting:
        return
    # All parts of a trunk that is built in pieces have the same.
    outside, meta, load_weights, wording = waiting[0].__dict__[_WAITING]
    others = _masked_outside(model, outside, meta, wording)
    for module in waiting:
        del module.__dict__[_WAITING]
    for mask in masked_in(model).values():
        mask.incomplete = ""
    if load_weights:
        with torch.no_grad():
            for mask in others.values():
                _copy(outside.weights[mask.name], mask.parameter)
    _put_on(model, others)
    logger.info("Attached the ticket's masks outside the trunk: %r", outside.masks)


def _masked_outside(
    model: nn.Module, outside: Outside, meta: TicketMeta, wording: Wording
) -> dict[nn.Module, MaskedWeight]:
    """The masked weights outside the trunk, not put on yet."""
    modules = dict(model.named_modules())
    parameters = dict(model.named_parameters(remove_duplicate=False))
    masked: dict[nn.Module, MaskedWeight] = {}
    for name, mask in outside.masks.items():
        parameter = parameters.get(name)
        if parameter is None or parameter.shape != mask.shape:
            found = "none" if parameter is None else f"one of {tuple(parameter.shape)}"
            raise TicketError(
                "the ticket also prunes outside the trunk, in the model it was found in: expected "
                f"a parameter {name} of shape {tuple(mask.shape)}, found {found}. Attach it to "
                f"such a model, or only its trunk to this one: {wording.trunk_only}"
            )
        module = modules[name.removesuffix(".weight")]
        masked[module] = MaskedWeight(name, parameter, ~mask, meta, in_trunk=False)
    return masked


def _copy(values: Tensor, target: Tensor) -> None:
    target.copy_(sharded_like(values, target))


def _put_on(model: nn.Module, masked: Mapping[nn.Module, MaskedWeight]) -> None:
    for module, mask in masked.items():
        mask.arm()
        mask.zero_gradient_that_slipped()  # an earlier gradient is not masked yet
        mask.ride_on(module)
    Record(model, masked)


def attached(model: nn.Module) -> Attachment | None:
    """The ticket on a model, also on a copy of one; None if there is none.

    A model that has lost its masks still has a ticket: `Attachment.verify` names what is missing.
    """
    masked = masked_in(model)
    return Attachment(model, masked) if masked or lost_in(model) else None


def _locate(model: nn.Module, arch: ResNet, parts: Sequence[str]) -> Layout:
    try:
        found = locate(model, parts, [arch])
    except LthError:
        found = locate(model, parts)
    if found.arch == arch.reading(found.arch.channels):
        return found
    advice = "configure the model's depth and stem as the ticket's"
    if arch.widths:
        advice = "give the model the widths of the slimmed checkpoint that the ticket is for"
    elif found.arch.widths:
        advice = "name the slim.ticket beside its checkpoint, or build the model in its full width"
    raise TicketError(
        f"the ticket is for {arch.description}, but the model's trunk is {found.arch.description} "
        f"({found.dialect.name} naming): {advice}"
    )


def check_channels(found: int, spec: InputSpec, wording: Wording) -> None:
    """Check that a stem reads images of as many channels as a ticket's input has.

    Raises:
        TicketError: if it does not.
    """
    if found != spec.channels:
        raise TicketError(
            f"the ticket reads images of {spec.label}, but the model's stem reads {found}: build "
            f"the model with {wording.channels.format(spec.channels)} and give it such images, or "
            f"take a ticket of weights that read {found}"
        )


def _check_strides(
    layout: Layout, modules: Mapping[str, nn.Module], meta: TicketMeta, wording: Wording
) -> None:
    if not layout.arch.bottleneck:
        return
    for name, key in layout.keys.items():
        wrong = "conv2" if meta.stride_in_1x1 else "conv1"
        if name not in layout.arch.prunable or f".{wrong}." not in name:
            continue
        convolution = modules[name]
        stride = convolution.stride if isinstance(convolution, nn.Conv2d) else (1,)
        if max(stride) > 1:
            right = "1x1" if meta.stride_in_1x1 else "3x3"
            advice = wording.stride_in_1x1 if meta.stride_in_1x1 else wording.stride_in_3x3
            raise TicketError(
                f"the ticket's bottlenecks place their stride in the {right} convolution, but the "
                f"model has stride {tuple(stride)} at {key}: build it with {advice}"
            )
