"""`MaskedWeight`: the mask of one weight, on the module that has it.

It places hooks, all public PyTorch API: one on the parameter zeroes its gradient as soon as it is
accumulated (before clipping, unscaling and optimizers see it); on the module, one applies the mask
to whatever is loaded, one refuses to save a leak, and one refuses to train it. The mask rides on
its module, so deep copies and pickles of the model stay masked.

FSDP2 (`fully_shard`) puts a sharded parameter (DTensor) in the place of the module's weight, and a
whole one, which it makes of that, while the module is in use. The mask follows the sharded one.
"""

import logging
import weakref
from collections.abc import Sequence
from typing import Any, TypedDict, TypeGuard

import torch
from torch import Tensor, nn

from lth_plugins.errors import TicketError
from lth_plugins.masking.shards import is_sharded, local, sharded_like, total
from lth_plugins.masking.zeros import (
    count,
    count_leaks,
    count_nonzero,
    laid_out,
    sample,
    state_of,
    zero,
)
from lth_plugins.ticket.masks import packed, unpacked
from lth_plugins.ticket.meta import TicketMeta
from lth_plugins.ticket.obstacles import (
    NOT_FLATTENED,
    flattened_by,
    replaced_by,
    taken_by,
    weight_of,
)
from lth_plugins.ticket.wording import Wording

logger = logging.getLogger(__name__)

ATTRIBUTE = "ticket_mask"
"""Of a module: its `MaskedWeight`."""
MARK = "ticket_mask"
"""Of a parameter: its `Mark`."""

ARMED: "weakref.WeakValueDictionary[int, MaskedWeight]" = weakref.WeakValueDictionary()
"""The mask of every masked parameter, by its id."""


class Mark(TypedDict):
    """What a masked parameter carries, also for optimizer steps that are compiled.

    A saved parameter has it, too: a plain dictionary loads without unpickling code.

    Attributes:
        name: of its mask.
        pruned: its mask; this process's part if the parameter is sharded.
        compiled_step: whether a compiled step has zeroed it since that was last looked at.
    """

    name: str
    pruned: Tensor
    compiled_step: bool


class DenseGradient:
    """The gradient of a masked weight and of its pruned entries, of all batches of one step.

    Attributes:
        total: the sum over the batches so far, float32; None before the first.
        stepped: whether an optimizer has made the step.
    """

    def __init__(self) -> None:
        self.total: Tensor | None = None
        self.stepped = False

    def add(self, gradient: Tensor, pruned: Tensor) -> None:
        """Take up what a parameter has accumulated: of pruned entries, the last batch alone."""
        found = gradient.detach().to(torch.float32, copy=True)
        self.total = found if self.total is None else found.add_(self.total * pruned)


class MaskedWeight:
    """The mask of one layer's weight, as `attach` makes it.

    Args:
        name: the parameter's name, in torchvision's naming if it is in the trunk.
        parameter: the parameter.
        pruned: boolean, the shape of the parameter, True where the weight is pruned.
        meta: the description of the ticket.
        in_trunk: whether it is in the trunk.
    """

    optimizer: "weakref.ref[torch.optim.Optimizer] | None" = None
    """What made the last step of the parameter."""
    collected: DenseGradient | None = None
    """The dense gradient of the present step, where a method of sparse training asks for it."""

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
        self.incomplete = ""  # why nothing trains, while what is outside the trunk is not attached
        self.zeroed_by_load = 0
        self.has_slipped = False  # whether an optimizer was given a gradient that was not masked
        self._masked_gradient: tuple[int, int, int] | None = None
        self._clean: tuple[int, int, int] | None = None
        self._loaded: Tensor | None = None
        self._lay_out(pruned)

    def __repr__(self) -> str:
        return f"MaskedWeight({self.name}, {tuple(self.parameter.shape)})"

    def _lay_out(self, pruned: Tensor) -> None:
        """Have this mask, of the whole weight."""
        self._pruned = laid_out(pruned, self.parameter)
        self._bits = packed(pruned) if is_sharded(self.parameter) else None
        self._sample = sample(self._pruned) if self._pruned.is_cpu else None

    @property
    def pruned(self) -> Tensor:
        """The mask, on the parameter's device and in its memory layout; it follows the model.

        Where the parameter is sharded, it is this process's part.
        """
        mask, values = self._pruned, local(self.parameter)
        if values.is_meta:  # there the mask would lose its bits
            return mask
        if mask.device != values.device or (mask.stride() != values.stride() and mask.numel()):
            self._lay_out(mask if self._bits is None else self.whole)
            if self.is_armed:
                self._mark()
        return self._pruned

    @property
    def whole(self) -> Tensor:
        """The mask of the whole weight, also where the weight is sharded."""
        if self._bits is None:
            return self.pruned
        return unpacked(self._bits, self.parameter.shape)

    @property
    def is_armed(self) -> bool:
        """Whether the parameter still has its hook: conversions that swap tensors remove it."""
        return MARK in self.parameter.__dict__ and ARMED.get(id(self.parameter)) is self

    def arm(self) -> None:
        """Zero the pruned weights and keep their gradients and updates at zero from now on."""
        self.zero_weight()
        ARMED[id(self.parameter)] = self
        self.in_step = False  # whether an optimizer's step is under way
        self._masked_gradient = None
        self._stand_in: nn.Parameter | None = None
        self._mark()
        # Held weakly: the parameter must not keep its own mask alive after a detach.
        this = weakref.ref(self)

        # Compiled, it would be compiled anew for each shape.
        @torch.compiler.disable
        def zero_gradient(parameter: Tensor) -> None:
            mask = this()
            if mask is not None and mask.parameter is parameter and parameter.grad is not None:
                if mask.collected is not None:
                    mask.collected.add(parameter.grad, mask.pruned)
                zero(parameter.grad, mask.pruned)
                mask._masked_gradient = state_of(parameter.grad)

        # PyTorch registers the hook only while a gradient is required; a frozen stage may be
        # unfrozen later, and needs it then.
        frozen = not self.parameter.requires_grad
        self.parameter.requires_grad_(True)
        self._hooks = [self.parameter.register_post_accumulate_grad_hook(zero_gradient)]
        if frozen:
            self.parameter.requires_grad_(False)

    def disarm(self) -> None:
        """Remove the hooks; the weights stay as they are."""
        for hook in self._hooks:
            hook.remove()
        ARMED.pop(id(self.parameter), None)
        self.parameter.__dict__.pop(MARK, None)

    def follow(self, parameter: nn.Parameter) -> None:
        """Mask this parameter instead, or the same one again after its hooks were lost."""
        self.disarm()
        if parameter is not self.parameter:
            whole, self.parameter = self.whole, parameter
            self._lay_out(whole)
        # A swap leaves the dictionary of hooks on the parameter, but no longer calls them.
        parameter._post_accumulate_grad_hooks = parameter._post_accumulate_grad_hooks
        self.arm()

    def meet(self, module: nn.Module) -> None:
        """Follow the weight of a module that was sharded after the ticket was attached to it."""
        weight = module._parameters.get("weight")
        if weight is not None and is_sharded(weight) and not is_sharded(self.parameter):
            self.follow(weight)

    def sits_on(self, module: nn.Module) -> bool:
        """Whether the module's weight is the masked parameter, or what FSDP2 makes of that."""
        self.meet(module)
        weight = module._parameters.get("weight")
        if is_sharded(self.parameter) and weight is not None:
            return weight.shape == self.parameter.shape
        return weight is self.parameter

    def zero_weight(self) -> None:
        with torch.no_grad():
            zero(self.parameter, self.pruned)
        self._clean = state_of(self.parameter)

    def count_leaks(self) -> int:
        """How many pruned weights are not zero, in all processes that share the parameter."""
        return total(count_leaks(self.parameter, self.pruned), self.parameter)

    def zero_gradient_that_slipped(self) -> bool:
        """Zero a gradient that is not the one the hook saw, as before a step.

        Returns:
            Whether the hook had not seen it, and there was something to zero.
        """
        gradient, seen, self._masked_gradient = self.parameter.grad, self._masked_gradient, None
        if gradient is None or gradient.is_sparse:
            return False
        state = state_of(gradient)
        if state == seen:
            return False
        slipped = (seen is None or seen[0] != state[0]) and count_leaks(gradient, self.pruned) > 0
        zero(gradient, self.pruned)
        return slipped

    def replace(self, pruned: Tensor) -> Tensor:
        """Prune these weights from now on, and train the others.

        Those that were pruned start at 0, or at what a checkpoint that was loaded since the last
        step has for them.

        Returns:
            Which weights are no longer pruned; this process's part of a sharded parameter.
        """
        before, mark = self.pruned, self.parameter.__dict__.get(MARK)
        self._lay_out(pruned)
        loaded, self._loaded = self._loaded, None
        if loaded is not None and not (mark is not None and mark["compiled_step"]):
            with torch.no_grad():
                self.parameter.copy_(loaded)
            self.zero_weight()
            self.zeroed_by_load = count_nonzero(loaded) - count_nonzero(self.parameter)
        self._mark()
        self.zero_weight()
        return before & ~self._pruned

    def forget_loaded(self) -> None:
        """Drop what the mask zeroed when weights were loaded: it is trained as it is."""
        self._loaded = None

    def ride_on(self, module: nn.Module) -> None:
        """Sit on this module: its copies copy this, and what it loads is masked."""
        module.__dict__[ATTRIBUTE] = self
        self._module_hooks = (
            module.register_load_state_dict_pre_hook(mask_and_say),
            module.register_load_state_dict_post_hook(self._after_load),
            module.register_state_dict_pre_hook(self._before_save),
            module.register_forward_pre_hook(self._before_forward),
        )

    def leave(self, module: nn.Module) -> None:
        del module.__dict__[ATTRIBUTE]
        for hook in self._module_hooks:
            hook.remove()

    def leaked_in(self, module: nn.Module) -> int:
        """How many pruned weights are not zero in what is the module's weight now.

        Where it is computed from the masked parameter, that counts, too: it is what is saved.
        """
        if is_sharded(self.parameter):  # nothing is computed from a part
            return self.count_leaks()
        weight = weight_of(module)
        values = [weight] if weight is not None and weight.shape == self._pruned.shape else []
        if not values or any(p is self.parameter for p in module.parameters()):
            values.append(self.parameter)
        return max(count_leaks(value.detach(), self.pruned) for value in values)

    def _before_save(self, module: nn.Module, _: str, keep_vars: bool) -> None:
        self.meet(module)
        # With keep_vars the caller wants the parameters, to look at or write to.
        if not keep_vars and (leaked := self.leaked_in(module)):
            if replaced_by(module) is not None:
                raise lost_masks([self.name], module, module)
            raise TicketError(leak(self.name, leaked))

    def _before_forward(self, module: nn.Module, _: object) -> None:
        """Refuse to train a weight that something else than an optimizer filled."""
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            return
        if not (module.training and torch.is_grad_enabled()) or self.parameter.is_meta:
            return
        self.forget_loaded()
        self.meet(module)
        weight = module._parameters.get("weight")
        if taken_by(self.parameter) is not None:
            raise lost_masks([self.name], module, module)
        if self._is_stand_in(weight):
            self._mask_gradient_of(weight)
            if self._leaks_at_a_glance(weight):
                raise TicketError(leak(self.name, count(weight, self.pruned)))
        mark = self.parameter.__dict__.get(MARK)
        if mark is not None and mark["compiled_step"]:
            self._clean, mark["compiled_step"] = state_of(self.parameter), False
        if state_of(self.parameter) != self._clean or self._leaks_at_a_glance(self.parameter):
            leaked = count(local(self.parameter), self.pruned)
            if leaked and not self.in_step:
                raise TicketError(leak(self.name, leaked))
            if leaked:
                self.zero_weight()
            self._clean = state_of(self.parameter)

    def _is_stand_in(self, weight: Tensor | None) -> TypeGuard[nn.Parameter]:
        """Whether a whole parameter is in the place of the masked one, as FSDP2 puts it there."""
        return (
            isinstance(weight, nn.Parameter)
            and weight is not self.parameter
            and not is_sharded(self.parameter)
            and weight.is_leaf
            and weight.shape == self.parameter.shape
        )

    def _leaks_at_a_glance(self, parameter: Tensor) -> bool:
        """Whether one of some pruned weights is not zero, where reading them waits for no device.

        It notices what writes to ``parameter.data``, which does not count as an operation in place
        (`Tensor._version`).
        """
        values = local(parameter.detach())
        if not values.is_cpu or self._sample is None:
            return False
        return bool(values.take(self._sample).any())

    def _mask_gradient_of(self, weight: nn.Parameter) -> None:
        """Mask the gradient of a parameter in the place of the masked one.

        FSDP2 shares its gradient out over the processes. The sharded parameter is out of sight
        until the first backward pass has ended, and its gradient may be clipped then.
        """
        if weight is self._stand_in or not weight.requires_grad:
            return
        self._stand_in = weight
        this = weakref.ref(self)

        @torch.compiler.disable
        def zero_gradient(parameter: Tensor) -> None:
            mask = this()
            if mask is not None and parameter.grad is not None:
                zero(parameter.grad, mask.whole)

        self._hooks.append(weight.register_post_accumulate_grad_hook(zero_gradient))

    def _after_load(self, module: nn.Module, _: object) -> None:
        # load_state_dict(assign=True) puts another parameter in place, or other values into it.
        parameter = module._parameters.get("weight")
        if parameter is not None and (parameter is not self.parameter or not self.is_armed):
            self.follow(parameter)

    def _mark(self) -> None:
        self.parameter.__dict__[MARK] = Mark(
            name=self.name, pruned=self._pruned, compiled_step=False
        )

    def __getstate__(self) -> dict[str, Any]:
        own = ("_hooks", "_stand_in", "optimizer", "collected")
        return {k: v for k, v in self.__dict__.items() if k not in own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # A copied parameter carries no hooks, so the copied mask arms it anew.
        self.__dict__.update(state)
        self.arm()


_MASKED = "ticket_masked"
"""Of a tensor that is being loaded: the mask that a module further up has applied to it, and how
many weights that zeroed."""


def zeroed_so_far(value: Tensor) -> int:
    """How many weights of a tensor that is being loaded its mask has zeroed already."""
    return getattr(value, _MASKED, (None, 0))[1]


def mask_what_loads(module: nn.Module, state_dict: dict[str, Any], prefix: str) -> tuple[int, int]:
    """Mask what a module, and all in it, is about to load, unless that is done.

    Returns:
        How many weights that zeroed, and how many were not zero before.
    """
    zeroed = loaded = 0
    for path, sub in module.named_modules():
        mask = sub.__dict__.get(ATTRIBUTE)
        key = f"{prefix}{path}.weight" if path else f"{prefix}weight"
        value = state_dict.get(key)
        if mask is None or not isinstance(value, Tensor):
            continue
        if getattr(value, _MASKED, (None, 0))[0] is mask.pruned:
            continue
        if value.shape != mask.parameter.shape or value.is_meta:
            continue
        state_dict[key] = masked = value.detach().clone()
        pruned = local(sharded_like(mask.whole, value))
        local(masked).masked_fill_(pruned.to(masked.device), 0)
        before = count_nonzero(value)
        mask.zeroed_by_load = before - count_nonzero(masked)
        mask._loaded = value.detach().clone() if mask.zeroed_by_load else None
        setattr(masked, _MASKED, (mask.pruned, mask.zeroed_by_load))
        zeroed, loaded = zeroed + mask.zeroed_by_load, loaded + before
    return zeroed, loaded


def mask_and_say(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: object) -> None:
    """Mask what is about to be loaded, and say how much that zeroes.

    All modules between the one that a ticket was attached to and its masked ones have this hook,
    so wherever a load starts, one line is about all of it.
    """
    zeroed, loaded = mask_what_loads(module, state_dict, prefix)
    if zeroed:
        logger.warning(
            "%s of %s weights that were loaded were zeroed by the attached mask: they were "
            "trained with another ticket, or dense. If that is not what you want, load them into "
            "a model without a ticket, or attach the ticket that they were trained with",
            *(f"{zeroed:,}", f"{loaded:,}"),
        )


def lost_masks(
    names: Sequence[str], model: nn.Module, place: nn.Module | None = None
) -> TicketError:
    """The error for masks that are lost; ``place`` is where the first of them was."""
    which = f"the mask of {names[0]}" + (f" and {len(names) - 1} more" if len(names) > 1 else "")
    mask = None if place is None else place.__dict__.get(ATTRIBUTE)
    # FSDP that a forward pass has left unsharded shows in the masked parameter alone.
    by = flattened_by(model) or (None if mask is None else taken_by(mask.parameter))
    if by is not None:
        why = f"{by} was applied after the ticket was attached, and {NOT_FLATTENED}"
        return TicketError(f"{which} no longer sits on the model: {why}")
    replaced = replaced_by(place) if place is not None else None
    if replaced is not None:
        why = f"{replaced} for each such module, and attach the ticket again"
        return TicketError(f"{which} no longer sits on the model: {why}")
    what = "module" if mask is None else "parameter"
    return TicketError(
        f"{which} no longer sits on the model: the {what} was replaced, and would train dense. "
        "Attach the ticket again after such changes (load_weights=False keeps the model's "
        "weights, masked), or call lth_plugins.attached(model).detach() to train dense"
    )


def leak(name: str, leaked: int) -> str:
    return (
        f"expected the pruned weights of {name} to be zero, found {leaked} that "
        "are not: something wrote to the parameter outside of a torch.optim.Optimizer's step and "
        "load_state_dict. Call lth_plugins.attached(model).zero() after each such update; it "
        "zeroes them"
    )


def outside_is_missing(wording: Wording) -> str:
    return (
        "the ticket also prunes outside the backbone, and that part is not attached: neck and "
        f"heads would train dense. To attach it, {wording.attach_outside}; to leave it out, write "
        f"{wording.trunk_only}"
    )
