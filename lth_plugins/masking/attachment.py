"""How a mask lives on a model while any trainer trains it.

`attach` leaves the forward pass, the parameters and the state-dict keys as they are. It places
hooks, all public PyTorch API: one on each masked parameter zeroes its gradient as soon as it is
accumulated (before clipping, unscaling and optimizers see it); two for all optimizers zero
gradients that came another way before each step, and the pruned weights after it (momentum that
predates a mask cannot bring a weight back); on each masked module one applies the mask to whatever
is loaded, and one refuses to save a leak. The mask rides on its module, so deep copies and pickles
of the model stay masked.

What takes a weight away from its module takes the mask away. So the model that a ticket was
attached to has a `_Record` of what was attached, each masked parameter a mark, and the next
optimizer step, state dict or `Attachment.verify` names what is missing.

A ticket may also mask parameters outside the trunk, in the whole model of one host. Hosts attach a
ticket while they build a backbone, when there is no such model yet; `attach_rest` follows then.
"""

import copy
import logging
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version
from torch.optim.optimizer import (
    Optimizer,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from lth_plugins.errors import LthError, TicketError
from lth_plugins.ticket.arch import ARCHITECTURES, PARTS, STAGES, ResNet, part_of
from lth_plugins.ticket.layout import Layout
from lth_plugins.ticket.locating import locate
from lth_plugins.ticket.masks import Masks
from lth_plugins.ticket.meta import TicketMeta
from lth_plugins.ticket.obstacles import (
    USE_DDP,
    check_has_values,
    check_model,
    check_not_replaced,
    check_not_sharded,
    frozen_norms,
    is_flattened,
    replaced_by,
    sharded_by,
    weight_of,
)
from lth_plugins.ticket.outside import Outside
from lth_plugins.ticket.ticket import Ticket
from lth_plugins.ticket.trunk import read_trunk

logger = logging.getLogger(__name__)

_ATTRIBUTE = "ticket_mask"
"""Of a module: its `MaskedWeight`."""
_MARK = "ticket_mask"
"""Of a parameter: the name of its mask, and the mask, for whoever traces an optimizer's step."""
_RECORD = "ticket_record"
"""Of the module that a ticket was attached to: its `_Record`."""
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
        self.zeroed_by_load = 0
        self.has_slipped = False  # whether an optimizer was given a gradient that was not masked
        self._masked_gradient: tuple[int, int] | None = None
        self._pruned = _laid_out(pruned, parameter)

    def __repr__(self) -> str:
        return f"MaskedWeight({self.name}, {tuple(self._pruned.shape)})"

    @property
    def pruned(self) -> Tensor:
        """The mask, on the parameter's device and in its memory layout; it follows the model."""
        mask, parameter = self._pruned, self.parameter
        if parameter.is_meta:  # there the mask would lose its bits
            return mask
        if mask.device != parameter.device or mask.stride() != parameter.stride():
            self._pruned = _laid_out(mask, parameter)
            if self.is_armed:
                self._mark()
        return self._pruned

    @property
    def is_armed(self) -> bool:
        """Whether the parameter still has its hook: conversions that swap tensors take it off."""
        return _MARK in self.parameter.__dict__ and _armed.get(id(self.parameter)) is self

    def arm(self) -> None:
        """Zero the pruned weights and keep their gradients and updates at zero from now on."""
        self.zero_weight()
        _armed[id(self.parameter)] = self
        self._masked_gradient = None
        self._mark()
        # Held weakly: the parameter must not keep its own mask alive after a detach.
        this = weakref.ref(self)

        # Compiled, it would be compiled anew for each shape.
        @torch.compiler.disable
        def zero_gradient(parameter: Tensor) -> None:
            mask = this()
            if mask is not None and mask.parameter is parameter and parameter.grad is not None:
                _zero(parameter.grad, mask.pruned)
                mask._masked_gradient = _state_of(parameter.grad)

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
        self.parameter.__dict__.pop(_MARK, None)

    def follow(self, parameter: nn.Parameter) -> None:
        """Mask this parameter instead, or the same one again after its hooks were lost."""
        self.disarm()
        self.parameter = parameter
        # A swap leaves the dictionary of hooks on the parameter, and nobody who calls them.
        parameter._post_accumulate_grad_hooks = parameter._post_accumulate_grad_hooks
        self.arm()

    def zero_weight(self) -> None:
        with torch.no_grad():
            _zero(self.parameter, self.pruned)

    def zero_gradient_that_slipped(self) -> bool:
        """Zero a gradient that is not the one the hook saw, as before a step.

        Returns:
            Whether the hook had not seen it, and there was something to zero.
        """
        gradient, seen, self._masked_gradient = self.parameter.grad, self._masked_gradient, None
        if gradient is None or gradient.is_sparse:
            return False
        state = _state_of(gradient)
        if state == seen:
            return False
        slipped = (seen is None or seen[0] != state[0]) and _leaked(gradient, self.pruned) > 0
        _zero(gradient, self.pruned)
        return slipped

    def narrow(self, pruned: Tensor) -> None:
        """Prune other weights from now on; those pruned so far must be among them."""
        self._pruned = _laid_out(pruned, self.parameter)
        self._mark()
        self.zero_weight()

    def ride_on(self, module: nn.Module) -> None:
        """Live on this module from now on: its copies copy this, and what it loads is masked."""
        module.__dict__[_ATTRIBUTE] = self
        self._module_hooks = (
            module.register_load_state_dict_pre_hook(_mask_what_loads),
            module.register_load_state_dict_post_hook(self._after_load),
            module.register_state_dict_pre_hook(self._before_save),
        )

    def leave(self, module: nn.Module) -> None:
        del module.__dict__[_ATTRIBUTE]
        for hook in self._module_hooks:
            hook.remove()

    def leaked_in(self, module: nn.Module) -> int:
        """How many pruned weights are not zero in what is the module's weight now.

        Where it is computed from the masked parameter, that counts, too: it is what is saved.
        """
        weight = weight_of(module)
        values = [weight] if weight is not None and weight.shape == self._pruned.shape else []
        if not values or any(p is self.parameter for p in module.parameters()):
            values.append(self.parameter)
        return max(_leaked(value.detach(), self.pruned) for value in values)

    def _before_save(self, module: nn.Module, _: str, keep_vars: bool) -> None:
        # With keep_vars whoever asks wants the parameters, to look at or write to.
        if not keep_vars and _refuses_to_save and (leaked := self.leaked_in(module)):
            if replaced_by(module) is not None:
                raise _lost_masks([self.name], module, module)
            raise TicketError(_leak(self.name, leaked))

    def _after_load(self, module: nn.Module, _: object) -> None:
        # load_state_dict(assign=True) puts another parameter in place, or other values into it.
        parameter = module._parameters.get("weight")
        if parameter is not None and (parameter is not self.parameter or not self.is_armed):
            self.follow(parameter)

    def _mark(self) -> None:
        self.parameter.__dict__[_MARK] = (self.name, self._pruned)

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


def _bits(values: Tensor) -> np.ndarray:
    return values.detach().view(_BITS[values.element_size()]).numpy()


def _zero(values: Tensor, pruned: Tensor) -> None:
    """Zero the pruned values in place, whatever they are: an overflow, too."""
    if values.is_meta:
        return
    if not values.is_cpu:
        values.masked_fill_(pruned, 0)
        return
    # That branches on every value on a CPU, and takes three times as long there.
    bits = _bits(values)
    np.bitwise_and(bits, pruned.view(torch.int8).numpy() - 1, out=bits)
    increment_version(values)


def _zero_traced(parameter: Tensor, values: Tensor | None) -> None:
    """Zero the pruned ones of a parameter's values by what `torch.compile` can trace."""
    mark = getattr(parameter, _MARK, None)
    if mark is not None and values is not None:
        with torch.no_grad():
            values.masked_fill_(mark[1], 0)


def _leaked(values: Tensor, pruned: Tensor) -> int:
    """How many of the pruned values are not zero."""
    if values.is_meta:
        return 0
    if values.is_cpu and not np.logical_and(_bits(values), pruned.view(torch.int8).numpy()).any():
        return 0  # found out in a fifth of the time that PyTorch takes
    return int(torch.count_nonzero((values != 0) & pruned))


def _state_of(gradient: Tensor) -> tuple[int, int]:
    """What tells a gradient from another one, and from itself once it is written to."""
    return gradient.data_ptr(), gradient._version


_refuses_to_save = True


@contextmanager
def _looking_only() -> Iterator[None]:
    """State dicts that are asked for in here are not saved: a leak is no error in them."""
    global _refuses_to_save
    before, _refuses_to_save = _refuses_to_save, False
    try:
        yield
    finally:
        _refuses_to_save = before


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
        mask = sub.__dict__.get(_ATTRIBUTE)
        key = f"{prefix}{path}.weight" if path else f"{prefix}weight"
        value = state_dict.get(key)
        if mask is None or not isinstance(value, Tensor):
            continue
        if getattr(value, _MASKED, (None, 0))[0] is mask.pruned:
            continue
        if value.shape != mask.pruned.shape or value.is_meta:
            continue
        state_dict[key] = masked = value.masked_fill(mask.pruned.to(value.device), 0)
        before = int(torch.count_nonzero(value))
        mask.zeroed_by_load = before - int(torch.count_nonzero(masked))
        setattr(masked, _MASKED, (mask.pruned, mask.zeroed_by_load))
        zeroed, loaded = zeroed + mask.zeroed_by_load, loaded + before
    return zeroed, loaded


def _mask_what_loads(
    module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: object
) -> None:
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


_armed: "weakref.WeakValueDictionary[int, MaskedWeight]" = weakref.WeakValueDictionary()
_records: "weakref.WeakSet[_Record]" = weakref.WeakSet()


class _Record:
    """What was attached to a module: it remembers masks whose modules are gone.

    It sits on that module, whose copies and pickles have it, too, and knows it weakly.
    """

    def __init__(self, root: nn.Module, masked: Mapping[nn.Module, MaskedWeight]) -> None:
        self.places: dict[str, tuple[str, torch.Size]] = {}
        """The name and shape of each masked weight, by the path of its module."""
        on_the_way = {""}
        for path, module in root.named_modules():
            if module in masked:
                mask = masked[module]
                self.places[path] = mask.name, mask.parameter.shape
                parts = path.split(".")
                on_the_way |= {".".join(parts[:i]) for i in range(len(parts))}
        modules = [root.get_submodule(path) for path in sorted(on_the_way)]
        self._hooks = [m.register_load_state_dict_pre_hook(_mask_what_loads) for m in modules]
        self._hooks.append(root.register_state_dict_pre_hook(_check_what_is_saved))
        root.__dict__.setdefault(_RECORD, []).append(self)
        self.root = weakref.ref(root)
        _records.add(self)

    def lost(self) -> dict[str, nn.Module]:
        """The weights that are in the model without their mask, by name; their places."""
        root = self.root()
        if root is None:
            return {}
        suspects = {}
        for path in self.places:
            module = _at(root, path)
            if not _holds(module):
                suspects[path] = module
        if not suspects:
            return {}
        held = {mask.name: mask for module, mask in _masked_in(root).items() if _holds(module)}
        masked = {id(mask.parameter) for mask in held.values()}
        lost = {}
        for path, module in suspects.items():
            name, shape = self.places[path]
            if name in held:  # it was moved together with its module
                continue
            place = _nearest(root, path) if module is None else module
            # Where no such weight is left, nothing can leak: a stage that was cut off.
            if _ATTRIBUTE in place.__dict__ or any(
                p.shape == shape and id(p) not in masked
                for p in (place.parameters() if place is not root else ())
            ):
                lost[name] = place
        return lost

    def forget(self, modules: Iterable[nn.Module]) -> None:
        """No longer expect masks on these modules."""
        root = self.root()
        if root is not None:
            gone = set(modules)
            self.places = {p: v for p, v in self.places.items() if _at(root, p) not in gone}

    def leave(self) -> None:
        """Take the hooks off."""
        for hook in self._hooks:
            hook.remove()
        _records.discard(self)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "root": self.root()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        root = state["root"]
        self.root = weakref.ref(nn.Module() if root is None else root)
        _records.add(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Record":
        # Not more is copied than whoever copies asked for: the copy of the model, if there is one.
        result = type(self).__new__(type(self))
        memo[id(self)] = result
        state = {**self.__dict__, "root": memo.get(id(self.root()))}
        state["_hooks"] = copy.deepcopy(self._hooks, memo)
        result.__setstate__(state)
        return result


def _at(root: nn.Module, path: str) -> nn.Module | None:
    module: nn.Module | None = root
    for part in path.split("."):
        module = module._modules.get(part) if module is not None else None
    return module


def _nearest(root: nn.Module, path: str) -> nn.Module:
    """The last module on the way to a path that is there."""
    module = root
    for part in path.split("."):
        following = module._modules.get(part)
        if following is None:
            break
        module = following
    return module


def _holds(module: nn.Module | None) -> bool:
    """Whether a module has its mask, and the mask a parameter of the module."""
    mask = module.__dict__.get(_ATTRIBUTE) if module is not None else None
    if mask is None:
        return False
    parameter: nn.Parameter = mask.parameter
    assert module is not None
    if module._parameters.get("weight") is parameter:
        return not is_flattened(parameter)
    # The weight may be computed from it, and be zero where it is: torch.nn.utils.prune does so.
    there = any(p is parameter for p in module.parameters())
    return there and not is_flattened(parameter) and not mask.leaked_in(module)


def _check_what_is_saved(module: nn.Module, _: str, keep_vars: bool) -> None:
    """Refuse to save a model that has lost a mask.

    A module that has its mask is checked for leaks itself. Where its weight was replaced by one
    that is zero where it is pruned, as when normalisation is fused into it, there is no leak.
    """
    if keep_vars or not _refuses_to_save:
        return
    for record in module.__dict__.get(_RECORD, ()):
        record.root = weakref.ref(module)
        lost = record.lost()
        unknown = [name for name, place in lost.items() if _ATTRIBUTE not in place.__dict__]
        if unknown or (lost and sharded_by(module)):
            names = unknown or list(lost)
            raise _lost_masks(names, module, lost[names[0]])


def _lost_masks(
    names: Sequence[str], model: nn.Module, place: nn.Module | None = None
) -> TicketError:
    """The error for masks that are lost; ``place`` is where the first of them was."""
    which = f"the mask of {names[0]}" + (f" and {len(names) - 1} more" if len(names) > 1 else "")
    sharding = sharded_by(model)
    if sharding is not None:
        why = f"{sharding} was applied after the ticket was attached, and {USE_DDP}"
        return TicketError(f"{which} no longer sits on the model: {why}")
    replaced = replaced_by(place) if place is not None else None
    if replaced is not None:
        why = f"{replaced} for each such module, and attach the ticket again"
        return TicketError(f"{which} no longer sits on the model: {why}")
    what = "parameter" if place is not None and _ATTRIBUTE in place.__dict__ else "module"
    return TicketError(
        f"{which} no longer sits on the model: the {what} was replaced, and would train dense. "
        "Attach the ticket again after such changes (load_weights=False keeps the model's "
        "weights, masked), or call lth_plugins.attached(model).detach() to train dense"
    )


def _leak(name: str, leaked: int) -> str:
    return (
        f"expected the pruned weights of {name} to be zero, found {leaked} that "
        "are not: something wrote to the parameter outside of an optimizer step "
        "and load_state_dict. Attach the ticket again to zero them"
    )


def _parameters_of(optimizer: Optimizer) -> Iterator[Tensor]:
    return (parameter for group in optimizer.param_groups for parameter in group["params"])


def _before_optimizer_step(optimizer: Optimizer, *_: object) -> None:
    """Zero gradients that the hooks on parameters did not see, and refuse to train lost masks."""
    if torch.compiler.is_compiling():
        return
    slipped: list[MaskedWeight] = []
    for parameter in _parameters_of(optimizer):
        mask, mark = _armed.get(id(parameter)), parameter.__dict__.get(_MARK)
        if mask is None:
            if mark is not None:
                raise _lost_masks([mark[0]], nn.Module())
            continue
        if not mask.is_whole:
            raise TicketError(_REST_IS_MISSING)
        if mark is None:
            mask.follow(mask.parameter)
        if mask.zero_gradient_that_slipped() and not mask.has_slipped:
            slipped.append(mask)
    for record in list(_records):
        root = record.root()
        lost = record.lost()
        if root is not None and lost and _trains(optimizer, root):
            raise _lost_masks(list(lost), root, next(iter(lost.values())))
    if slipped:
        for mask in list(_armed.values()):
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
            _zero_traced(parameter, parameter)
        return
    if not _armed:
        return
    for parameter in _parameters_of(optimizer):
        mask = _armed.get(id(parameter))
        if mask is not None:
            mask.zero_weight()


_REST_IS_MISSING = (
    "the ticket also prunes outside the backbone, and that part is not attached: neck and heads "
    "would train dense. Call lth_plugins.attach_rest(model) once the whole model is built, before "
    "a checkpoint is loaded (in detectron2 in the trainer's build_model; TicketHook does it in "
    "mmengine), or leave that part out (MODEL.TICKET.REST False, init_cfg=dict(rest=False, …))"
)

register_optimizer_step_pre_hook(_before_optimizer_step)
register_optimizer_step_post_hook(_after_optimizer_step)


class Attachment:
    """A ticket on a model: what `attach` and `attached` return."""

    def __init__(self, model: nn.Module, masked: dict[nn.Module, MaskedWeight]) -> None:
        self._model = model
        self._masked = masked

    @property
    def meta(self) -> TicketMeta:
        """The description of the attached ticket."""
        if not self._masked:
            raise _lost_masks(list(_lost_in(self._model)), self._model)
        return next(iter(self._masked.values())).meta

    @property
    def masks(self) -> Masks:
        """The attached masks of the trunk, by torchvision name."""
        return Masks({m.name: ~m.pruned for m in self._masked.values() if m.in_trunk})

    @property
    def all_masks(self) -> Masks:
        """The attached masks, also those outside the trunk, by the whole model's names."""
        return Masks({mask.name: ~mask.pruned for mask in self._masked.values()})

    @property
    def zeroed_by_load(self) -> int:
        """How many non-zero weights the masks zeroed when weights were last loaded into the model.

        None where they were trained with this ticket; otherwise they come from another one, or
        from a dense network.
        """
        return sum(mask.zeroed_by_load for mask in self._masked.values())

    def verify(self) -> None:
        """Check that all that was attached is there, and every pruned weight exactly zero.

        Raises:
            TicketError: naming the first parameter that is not zero, or whose mask was lost; or if
                a part of the ticket is not attached.
        """
        if not all(mask.is_whole for mask in self._masked.values()):
            raise TicketError(_REST_IS_MISSING)
        for module, mask in self._masked.items():
            if module.__dict__.get(_ATTRIBUTE) is not mask:
                raise TicketError(
                    f"the mask of {mask.name} no longer sits on the model: the ticket was "
                    "detached, or another one attached. Attach the ticket again"
                )
        if lost := _lost_in(self._model):
            raise _lost_masks(list(lost), self._model, next(iter(lost.values())))
        for module, mask in self._masked.items():
            if module._parameters.get("weight") is not mask.parameter:
                raise _lost_masks([mask.name], self._model, module)
            if not mask.is_armed:
                mask.follow(mask.parameter)
            if leaked := _leaked(mask.parameter, mask.pruned):
                raise TicketError(_leak(mask.name, leaked))

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
        left = [m for m, mask in self._masked.items() if m.__dict__.get(_ATTRIBUTE) is mask]
        for module in left:
            self._masked[module].leave(module)
            self._masked[module].disarm()
        for record in list(_records):
            record.forget(left)
        for module in self._model.modules():
            module.__dict__.pop(_WAITING, None)
        if _masked_in(self._model):  # those of another attachment
            return
        for module in self._model.modules():
            for record in module.__dict__.pop(_RECORD, ()):
                record.leave()
        for parameter in self._model.parameters():
            parameter.__dict__.pop(_MARK, None)

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
        rest = Outside(
            Masks({mask.name: ~mask.pruned for mask in outside}),
            {mask.name: mask.parameter for mask in outside},
        )
        return Ticket(self.masks, weights, replace(self.meta, **changes), outside=rest)


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
            its strides elsewhere, or lacks parameters that the ticket prunes outside the trunk; if
            its parameters are sharded, computed from others, or on the meta device. The model is
            unchanged then.
    """
    check_not_sharded(model)
    if any(isinstance(module, torch.jit.ScriptModule) for module in model.modules()):
        raise TicketError(
            "expected a model of Python modules, found one of TorchScript, which takes no hooks: "
            "attach the ticket to the model that was scripted, and script it after detach()"
        )
    try:
        layout = _locate(model, ticket.arch, parts)
    except LthError:
        check_not_replaced(model.named_modules())
        raise
    check_model(model, layout)
    modules = layout.modules(model)
    check_not_replaced(
        (key.removesuffix(".weight"), modules[name])
        for name, key in layout.keys.items()
        if name.endswith(".weight")
    )
    _check_strides(layout, modules, ticket.meta)

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
    outside = {} if waiting else _outside(model, ticket.outside, meta)

    previous = attached(model)
    if previous is not None:
        previous.detach()
    if load_weights:
        with torch.no_grad():
            for name, key in layout.keys.items():
                state[key].copy_(ticket.weights[name])
            for other in outside.values():
                other.parameter.copy_(ticket.outside.weights[other.name])
    _put_on(model, masked | outside)
    if waiting:
        model.__dict__[_WAITING] = (ticket.outside, meta, load_weights)
        for masked_weight in masked.values():
            masked_weight.is_whole = False
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
    _put_on(model, outside)
    logger.info("Attached the ticket's masks outside the trunk: %r", rest.masks)


def _outside(model: nn.Module, rest: Outside, meta: TicketMeta) -> dict[nn.Module, MaskedWeight]:
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
                "such a model, or only its trunk to this one: ticket.without_outside(), in a host "
                "MODEL.TICKET.REST False or init_cfg=dict(rest=False, …)"
            )
        module = modules[name.removesuffix(".weight")]
        masked[module] = MaskedWeight(name, parameter, ~mask, meta, in_trunk=False)
    return masked


def _put_on(model: nn.Module, masked: Mapping[nn.Module, MaskedWeight]) -> None:
    for module, mask in masked.items():
        mask.arm()
        mask.zero_gradient_that_slipped()  # one of before: nobody has passed it by the mask
        mask.ride_on(module)
    _Record(model, masked)


def attached(model: nn.Module) -> Attachment | None:
    """The ticket on a model, also on a copy of one; None if there is none.

    A model that has lost its masks still has a ticket: `Attachment.verify` names what is missing.
    """
    masked = _masked_in(model)
    return Attachment(model, masked) if masked or _lost_in(model) else None


def _masked_in(model: nn.Module) -> dict[nn.Module, MaskedWeight]:
    return {m: m.__dict__[_ATTRIBUTE] for m in model.modules() if _ATTRIBUTE in m.__dict__}


def _lost_in(model: nn.Module) -> dict[str, nn.Module | None]:
    """The weights that are in a model without the mask that they had, by name; their places."""
    lost: dict[str, nn.Module | None] = {}
    for module in model.modules():
        for record in module.__dict__.get(_RECORD, ()):
            record.root = weakref.ref(module)
            lost |= record.lost()
    masked = {id(mask.parameter) for mask in _masked_in(model).values()}
    for parameter in model.parameters():
        if _MARK in parameter.__dict__ and id(parameter) not in masked:
            lost.setdefault(parameter.__dict__[_MARK][0], None)
    return lost


def _locate(model: nn.Module, arch: ResNet, parts: Sequence[str]) -> Layout:
    with _looking_only():
        try:
            return locate(model, parts, [arch])
        except LthError:
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
