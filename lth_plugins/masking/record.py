"""`Record`: what was attached to a model, so that a mask that is lost is named.

What takes a weight away from its module takes the mask away. The model that a ticket was attached
to has a record of what was attached, each masked parameter a mark, and the next optimizer step,
state dict or `Attachment.verify` names what is missing.
"""

import copy
import weakref
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from lth_plugins.masking.shards import reshard
from lth_plugins.masking.weight import ATTRIBUTE, MARK, MaskedWeight, lost_masks, mask_and_say
from lth_plugins.ticket.obstacles import flattened_by, taken_by

RECORD = "ticket_record"
"""Of the module that a ticket was attached to: its `Record`."""

RECORDS: "weakref.WeakSet[Record]" = weakref.WeakSet()


class Record:
    """What was attached to a module, also where the masked modules are gone.

    It sits on that module, so that copies and pickles have it, too, and refers to it weakly.
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
        self._hooks = [m.register_load_state_dict_pre_hook(mask_and_say) for m in modules]
        self._hooks.append(root.register_state_dict_pre_hook(_check_what_is_saved))
        root.__dict__.setdefault(RECORD, []).append(self)
        self.root = weakref.ref(root)
        RECORDS.add(self)

    def lost(self) -> dict[str, nn.Module]:
        """The weights that are in the model without their mask, by name; their places."""
        root = self.root()
        if root is None:
            return {}
        suspects = self._suspects(root)
        if suspects and reshard(root):
            suspects = self._suspects(root)
        if not suspects:
            return {}
        held = {mask.name: mask for module, mask in masked_in(root).items() if _holds(module)}
        masked = {id(mask.parameter) for mask in held.values()}
        lost = {}
        for path, module in suspects.items():
            name, shape = self.places[path]
            if name in held:  # it was moved together with its module
                continue
            place = _nearest(root, path) if module is None else module
            # Where no such weight is left, nothing can leak: a stage that was cut off.
            if ATTRIBUTE in place.__dict__ or any(
                p.shape == shape and id(p) not in masked
                for p in (place.parameters() if place is not root else ())
            ):
                lost[name] = place
        return lost

    def _suspects(self, root: nn.Module) -> dict[str, nn.Module | None]:
        """The places where a mask does not sit on its weight."""
        places = {path: _at(root, path) for path in self.places}
        return {path: module for path, module in places.items() if not _holds(module)}

    def drop(self, modules: Iterable[nn.Module]) -> None:
        """No longer expect masks on these modules."""
        root = self.root()
        if root is not None:
            gone = set(modules)
            self.places = {p: v for p, v in self.places.items() if _at(root, p) not in gone}

    def leave(self) -> None:
        """Take the hooks off."""
        for hook in self._hooks:
            hook.remove()
        RECORDS.discard(self)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "root": self.root()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        root = state["root"]
        self.root = weakref.ref(nn.Module() if root is None else root)
        RECORDS.add(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Record":
        # Refer to the copy of the model if this copy includes one; copy no model for it.
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
    mask = module.__dict__.get(ATTRIBUTE) if module is not None else None
    if mask is None:
        return False
    parameter: nn.Parameter = mask.parameter
    assert module is not None
    if mask.sits_on(module):
        return taken_by(parameter) is None
    # The weight may be computed from it, and be zero where it is: torch.nn.utils.prune does so.
    there = any(p is parameter for p in module.parameters())
    return there and taken_by(parameter) is None and not mask.leaked_in(module)


def _check_what_is_saved(module: nn.Module, _: str, keep_vars: bool) -> None:
    """Refuse to save a model that has lost a mask.

    A module that has its mask is checked for leaks itself. Where its weight was replaced by one
    that is zero where it is pruned, as when normalisation is fused into it, there is no leak.
    """
    if keep_vars:
        return
    for record in module.__dict__.get(RECORD, ()):
        record.root = weakref.ref(module)
        lost = record.lost()
        unknown = [name for name, place in lost.items() if ATTRIBUTE not in place.__dict__]
        if unknown or (lost and flattened_by(module)):
            names = unknown or list(lost)
            raise lost_masks(names, module, lost[names[0]])


def masked_in(model: nn.Module) -> dict[nn.Module, MaskedWeight]:
    return {m: m.__dict__[ATTRIBUTE] for m in model.modules() if ATTRIBUTE in m.__dict__}


def roots_in(model: nn.Module) -> list[nn.Module]:
    """The modules in a model that a ticket was attached to."""
    return [module for module in model.modules() if module.__dict__.get(RECORD)]


def lost_in(model: nn.Module) -> dict[str, nn.Module | None]:
    """The weights that are in a model without the mask that they had, by name; their places."""
    lost: dict[str, nn.Module | None] = {}
    for module in model.modules():
        for record in module.__dict__.get(RECORD, ()):
            record.root = weakref.ref(module)
            lost |= record.lost()
    masked = {id(mask.parameter) for mask in masked_in(model).values()}
    for parameter in model.parameters():
        if MARK in parameter.__dict__ and id(parameter) not in masked:
            lost.setdefault(parameter.__dict__[MARK]["name"], None)
    return lost
