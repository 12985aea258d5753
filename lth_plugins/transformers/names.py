"""The names that ``save_pretrained`` gives to parameters, which are not always the model's.

It writes some models' parameters as earlier releases called them, for the Hub. ``from_pretrained``
knows both names, but the Trainer resumes by ``load_state_dict``, so that it leaves out the whole
trunk of a DETR with no more than a warning (huggingface/transformers, issues 43701 and 48805).
"""

from collections import OrderedDict
from typing import Any, cast

from torch import nn
from transformers.core_model_loading import revert_weight_conversion

_HOOK = "ticket_names"
"""Of a model: the hook that `load_by_both_names` has put on it."""


def own_names(model: nn.Module) -> dict[str, str]:
    """The model's name of each parameter and buffer, by that in its files where it differs."""
    own = model.state_dict(keep_vars=True)
    names = {id(value): name for name, value in own.items()}
    saved = revert_weight_conversion(cast(Any, model), dict(own))
    return {
        name: names[id(value)]
        for name, value in saved.items()
        if name not in own and id(value) in names
    }


def load_by_both_names(model: nn.Module) -> None:
    """Have a model's ``load_state_dict`` know the names in its files, too, as the first it does."""
    hook = model.__dict__.get(_HOOK) or model.register_load_state_dict_pre_hook(_respell)
    model.__dict__[_HOOK] = hook
    hooks = cast(OrderedDict[int, Any], model._load_state_dict_pre_hooks)
    hooks.move_to_end(hook.id, last=False)


def _respell(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: object) -> None:
    for name, own in own_names(module).items():
        if prefix + name in state_dict:
            state_dict.setdefault(prefix + own, state_dict.pop(prefix + name))
