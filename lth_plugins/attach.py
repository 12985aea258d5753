"""How a mask lives on a model while any trainer trains it.

`attach` leaves the forward pass, the parameters and the state-dict keys as they are. It places
three hooks, all public PyTorch API: one on each masked parameter zeroes its gradient as soon as it
is accumulated (before clipping, unscaling and optimizers see it), one for all optimizers zeroes
the pruned weights after each step (momentum that predates a mask cannot bring a weight back), and
one on each masked module applies the mask to whatever is loaded. The mask rides on its module, so
deep copies and pickles of the model stay masked.

A ticket may also mask parameters outside the trunk, in the whole model of one host. Hosts attach a
ticket while they build a backbone, when there is no such model yet; `attach_rest` follows then.
"""

import logging
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from lth_plugins.ticket.arch import ARCHITECTURES, PARTS, STAGES, ResNet, part_of
from lth_plugins.ticket.dialects import Layout, locate
from lth_plugins.ticket.errors import TicketError
from lth_plugins.ticket.masks import Masks
from lth_plugins.ticket.rest import Rest
from lth_plugins.ticket.ticket import Ticket, TicketMeta
from lth_plugins.ticket.trunk import check_model, read_trunk

logger = logging.getLogger(__name__)

_ATTRIBUTE = "ticket_mask"
_WAITING = "ticket_waiting"


class MaskedWeight:
    """The mask of one layer's weight. `attach` makes them; nobody else needs to.

    Args:
        name: the parameter's name, in torchvision's naming if it is in the trunk.
        parameter: the parameter.
        pruned: boolean, the shape of the parameter, True where the weight is pruned.
        meta: the description of the ticket.
        in_trunk: whether it is in the trunk.
    """

    def __init__(
        self,
        name: str,
        parameter: nn.Parameter,
        pruned: Tensor,
        meta: TicketMeta,
        in_trunk: bool = True,
    ) -> None:
        self.name = name
        self.parameter = parameter
        self.meta = meta
        self.in_trunk = in_trunk
        self.is_whole = True  # False while the ticket's rest waits to be attached
        self._pruned = _laid_out(pruned, parameter)

    @property
    def pruned(self) -> Tensor:
        """The mask, on the parameter's device and in its memory layout; it follows the model."""
        mask, parameter = self._pruned, self.parameter
        if mask.device != parameter.device or mask.stride() != parameter.stride():
            self._pruned = _laid_out(mask, parameter)
        return self._pruned

    def arm(self) -> None:
        """Zero the pruned weights and keep their gradients and updates at zero from now on."""
        self.zero_weight()
        _armed[id(self.parameter)] = self
        # Held weakly: the parameter must not keep its own mask alive after a detach.
        this = weakref.ref(self)

        def zero_gradient(parameter: Tensor) -> None:
            mask = this()
            if mask is not None and mask.parameter is parameter and parameter.grad is not None:
                _zero(parameter.grad, mask.pruned)

        # PyTorch takes the hook only while a gradient is required; a frozen stage may be
        # unfrozen later, and must find it then.
        frozen = not self.parameter.requires_grad
        self.parameter.requires_grad_(True)
        self._hook = self.parameter.register_post_accumulate_grad_hook(zero_gradient)
        if frozen:
            self.parameter.requires_grad_(False)

    def disarm(self) -> None:
        """Take the hooks off; the weights stay as they are."""
        self._hook.remove()
        _armed.pop(id(self.parameter), None)

    def zero_weight(self) -> None:
        with torch.no_grad():
            _zero(self.parameter, self.pruned)

    def narrow(self, pruned: Tensor) -> None:
        """Prune other weights from now on; those pruned so far must be among them."""
        self._pruned = _laid_out(pruned, self.parameter)
        self.zero_weight()

    def ride_on(self, module: nn.Module) -> None:
        """Live on this module from now on: its copies copy this, and what it loads is masked."""
        module.__dict__[_ATTRIBUTE] = self
        self._load_hooks = (
            module.register_load_state_dict_pre_hook(self._before_load),
            module.register_load_state_dict_post_hook(self._after_load),
        )

    def leave(self, module: nn.Module) -> None:
        del module.__dict__[_ATTRIBUTE]
        for hook in self._load_hooks:
            hook.remove()

    def _before_load(
        self, module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: object
    ) -> None:
        value = state_dict.get(prefix + "weight")
        if isinstance(value, Tensor) and value.shape == self._pruned.shape:
            state_dict[prefix + "weight"] = value.masked_fill(self._pruned.to(value.device), 0)

    def _after_load(self, module: nn.Module, _: object) -> None:
        # load_state_dict(assign=True) puts another parameter in place.
        parameter = module.get_parameter("weight")
        if parameter is not self.parameter:
            self.disarm()
            self.parameter = parameter
            self.arm()

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "_hook"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # A copied parameter carries no hooks, so the copied mask arms it anew.
        self.__dict__.update(state)
        self.arm()


def _laid_out(mask: Tensor, parameter: Tensor) -> Tensor:
    """A mask on a parameter's device; laid out otherwise (channels last) it costs three times."""
    return torch.empty_like(parameter, dtype=torch.bool).copy_(mask)


_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _zero(values: Tensor, pruned: Tensor) -> None:
    """Zero the pruned values in place, whatever they are: an overflow, too."""
    if not values.is_cpu:
        values.masked_fill_(pruned, 0)
        return
    # That branches on every value on a CPU, and takes three times as long there.
    bits = values.detach().view(_BITS[values.element_size()]).numpy()
    np.bitwise_and(bits, pruned.view(torch.int8).numpy() - 1, out=bits)
    increment_version(values)


_armed: "weakref.WeakValueDictionary[int, MaskedWeight]" = weakref.WeakValueDictionary()


def _after_optimizer_step(optimizer: Optimizer, *_: object) -> None:
    if not _armed:
        return
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            mask = _armed.get(id(parameter))
            if mask is not None:
                mask.zero_weight()
                if not mask.is_whole:
                    raise TicketError(_REST_IS_MISSING)


_REST_IS_MISSING = (
    "the ticket also prunes outside the backbone, and that part is not attached: neck and heads "
    "would train dense. Call lth_plugins.attach_rest(model) once the whole model is built, before "
    "a checkpoint is loaded (in detectron2 in the trainer's build_model; TicketHook does it in "
    "mmengine), or leave that part out (MODEL.TICKET.REST False, init_cfg=dict(rest=False, …))"
)

register_optimizer_step_post_hook(_after_optimizer_step)


class Attachment:
    """A ticket on a model: what `attach` and `attached` return."""

    def __init__(self, model: nn.Module, masked: dict[nn.Module, MaskedWeight]) -> None:
        self._model = model
        self._masked = masked

    @property
    def meta(self) -> TicketMeta:
        """The description of the attached ticket."""
        return next(iter(self._masked.values())).meta

    @property
    def masks(self) -> Masks:
        """The attached masks of the trunk, by torchvision name."""
        return Masks({m.name: ~m.pruned for m in self._masked.values() if m.in_trunk})

    @property
    def all_masks(self) -> Masks:
        """The attached masks, also those outside the trunk, by the whole model's names."""
        return Masks({mask.name: ~mask.pruned for mask in self._masked.values()})

    def verify(self) -> None:
        """Check that every pruned weight is exactly zero.

        Raises:
            TicketError: naming the first parameter that is not, or whose mask was lost; or if a
                part of the ticket is not attached.
        """
        if not all(mask.is_whole for mask in self._masked.values()):
            raise TicketError(_REST_IS_MISSING)
        for module, mask in self._masked.items():
            if (
                module.__dict__.get(_ATTRIBUTE) is not mask
                or module.get_parameter("weight") is not mask.parameter
            ):
                raise TicketError(
                    f"the mask of {mask.name} no longer sits on the model: the parameter was "
                    "replaced or the ticket detached. Attach the ticket again"
                )
            leaked = int(torch.count_nonzero((mask.parameter != 0) & mask.pruned))
            if leaked:
                raise TicketError(
                    f"expected the pruned weights of {mask.name} to be zero, found {leaked} that "
                    "are not: something wrote to the parameter outside of an optimizer step "
                    "and load_state_dict. Attach the ticket again to zero them"
                )

    def narrow(self, masks: Masks, **recipe: Any) -> None:
        """Prune more: put sparser masks in the place of the attached ones.

        Args:
            masks: those to attach, for all that is masked now.
            recipe: how they were made, added to the ticket's description.

        Raises:
            TicketError: if they keep a weight that is pruned now. Nothing has changed then.
        """
        if not masks.issubset(self.all_masks):
            raise TicketError(
                "expected masks that keep only what the attached ones keep, found others: pruned "
                "weights are zero, and do not come back. Attach a ticket to start anew"
            )
        meta = replace(self.meta, recipe={**self.meta.recipe, **recipe})
        for mask in self._masked.values():
            mask.narrow(~masks[mask.name])
            mask.meta = meta

    def detach(self) -> None:
        """Take the masks off the model. The weights stay as they are, pruned ones at zero."""
        for module, mask in self._masked.items():
            if module.__dict__.get(_ATTRIBUTE) is mask:
                mask.leave(module)
                mask.disarm()
        for module in self._model.modules():
            module.__dict__.pop(_WAITING, None)

    def ticket(self, **changes: Any) -> Ticket:
        """The attached masks over the model's present weights.

        Args:
            changes: fields of `TicketMeta` to set, such as ``source="coco"``.

        Raises:
            TicketError: if a pruned weight is not zero, or the model lacks a stage of the trunk.
        """
        self.verify()
        there = {part_of(mask.name) for mask in self._masked.values() if mask.in_trunk}
        absent = [stage for stage in STAGES if stage not in there]
        if absent:
            raise TicketError(
                f"expected all stages of a {self.meta.arch} to make a ticket of, found none of "
                f"{', '.join(absent)}: a ticket is of the whole trunk. Keep the state dict of the "
                "model instead, or attach the ticket to a model that is built with all stages"
            )
        state = self._model.state_dict()
        weights = read_trunk(state, archs=[ARCHITECTURES[self.meta.arch]]).weights
        outside = [mask for mask in self._masked.values() if not mask.in_trunk]
        rest = Rest(
            Masks({mask.name: ~mask.pruned for mask in outside}),
            {mask.name: mask.parameter for mask in outside},
        )
        return Ticket(self.masks, weights, replace(self.meta, **changes), rest=rest)


def attach(
    model: nn.Module,
    ticket: Ticket,
    load_weights: bool = True,
    parts: Sequence[str] = PARTS,
    whole: bool = True,
) -> Attachment:
    """Put a ticket on a model: load its weights and keep its pruned weights at zero in training.

    Everything is checked before anything changes. A ticket already attached is replaced.

    Args:
        model: a model, of any known dialect, with a ResNet trunk somewhere in it.
        ticket: the ticket.
        load_weights: False keeps the model's own weights, masked: random re-initialisation.
        parts: the parts of the trunk this model has, of `PARTS`, for hosts that build a trunk in
            pieces (detectron2's C4 models).
        whole: False if the model is a backbone that is still to be built into a whole one. What
            the ticket prunes outside the trunk then waits for `attach_rest`; training before that
            is an error.

    Returns:
        A handle to verify, detach and export.

    Raises:
        TicketError: if the model has no such trunk, holds more in it than a plain ResNet's, places
            its strides elsewhere, or lacks parameters that the ticket prunes outside the trunk. The
            model is unchanged then.
    """
    layout = _locate(model, ticket.arch, parts)
    check_model(model, layout)
    modules = layout.modules(model)
    _check_strides(layout, modules, ticket.meta)

    meta = ticket.meta
    if not load_weights:
        meta = replace(meta, recipe={**meta.recipe, "weights": "the model's own"})
    state = model.state_dict(keep_vars=True)
    masked: dict[nn.Module, MaskedWeight] = {}
    for name, mask in ticket.masks.items():
        if part_of(name) not in parts:
            continue
        masked[modules[name]] = MaskedWeight(name, state[layout.keys[name]], ~mask, meta)
    waiting = bool(ticket.rest) and not whole
    outside = {} if waiting else _outside(model, ticket.rest, meta)

    previous = attached(model)
    if previous is not None:
        previous.detach()
    if load_weights:
        with torch.no_grad():
            for name, key in layout.keys.items():
                state[key].copy_(ticket.weights[name])
            for other in outside.values():
                other.parameter.copy_(ticket.rest.weights[other.name])
    _put_on(masked | outside)
    if waiting:
        model.__dict__[_WAITING] = (ticket.rest, meta, load_weights)
        for masked_weight in masked.values():
            masked_weight.is_whole = False
    logger.info(
        "Attached a %s ticket (%s, round %d, %.2f %% sparse) to a %s model",
        *(ticket.meta.arch, ticket.meta.source, ticket.meta.round, 100 * ticket.sparsity),
        layout.dialect.name,
    )
    return Attachment(model, masked | outside)


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
    rest, meta, load_weights = waiting[0].__dict__[_WAITING]  # C4 models have the same one twice
    outside = _outside(model, rest, meta)
    for module in waiting:
        del module.__dict__[_WAITING]
    for mask in _masked_in(model).values():
        mask.is_whole = True
    if load_weights:
        with torch.no_grad():
            for mask in outside.values():
                mask.parameter.copy_(rest.weights[mask.name])
    _put_on(outside)
    logger.info("Attached the ticket's masks outside the trunk: %r", rest.masks)


def _outside(model: nn.Module, rest: Rest, meta: TicketMeta) -> dict[nn.Module, MaskedWeight]:
    """The masks of what is outside the trunk, not put on yet."""
    modules = dict(model.named_modules())
    parameters = dict(model.named_parameters(remove_duplicate=False))
    masked: dict[nn.Module, MaskedWeight] = {}
    for name, mask in rest.masks.items():
        parameter = parameters.get(name)
        if parameter is None or parameter.shape != mask.shape:
            found = "none" if parameter is None else f"one of {tuple(parameter.shape)}"
            raise TicketError(
                "the ticket also prunes outside the trunk, in the model it was found in: expected "
                f"a parameter {name} of shape {tuple(mask.shape)}, found {found}. Attach it to "
                "such a model, or only its trunk to this one: ticket.without_rest()"
            )
        module = modules[name.removesuffix(".weight")]
        masked[module] = MaskedWeight(name, parameter, ~mask, meta, in_trunk=False)
    return masked


def _put_on(masked: Mapping[nn.Module, MaskedWeight]) -> None:
    for module, mask in masked.items():
        mask.arm()
        mask.ride_on(module)


def attached(model: nn.Module) -> Attachment | None:
    """The ticket on a model, also on a copy of one; None if there is none."""
    masked = _masked_in(model)
    return Attachment(model, masked) if masked else None


def _masked_in(model: nn.Module) -> dict[nn.Module, MaskedWeight]:
    return {m: m.__dict__[_ATTRIBUTE] for m in model.modules() if _ATTRIBUTE in m.__dict__}


def _locate(model: nn.Module, arch: ResNet, parts: Sequence[str]) -> Layout:
    try:
        return locate(model, parts, [arch])
    except TicketError:
        found = locate(model, parts)
    raise TicketError(
        f"the ticket is for {arch.description}, but the model's trunk is {found.arch.description} "
        f"({found.dialect.name} naming): configure the model's depth and stem as the ticket's"
    )


def _check_strides(layout: Layout, modules: Mapping[str, nn.Module], meta: TicketMeta) -> None:
    if not layout.arch.bottleneck:
        return
    for name, key in layout.keys.items():
        wrong = "conv2" if meta.stride_in_1x1 else "conv1"
        if name not in layout.arch.prunable or f".{wrong}." not in name:
            continue
        convolution = modules[name]
        stride = convolution.stride if isinstance(convolution, nn.Conv2d) else (1,)
        if max(stride) > 1:
            right, style = ("1x1", "caffe") if meta.stride_in_1x1 else ("3x3", "pytorch")
            raise TicketError(
                f"the ticket's bottlenecks place their stride in the {right} convolution, but the "
                f"model has stride {tuple(stride)} at {key}: set STRIDE_IN_1X1 to "
                f"{meta.stride_in_1x1} in detectron2, style='{style}' in mmseg and mmdet"
            )
