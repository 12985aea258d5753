"""Which weights of a whole model IMP prunes besides the trunk: those of its neck, or of its heads.

Sparsity stays counted over the trunk, but all are ranked together. Girish et al., arXiv 2012.04643,
prune whole detectors, by a list of modules; here the layers that heads end in, few weights of which
each is a class's or a coordinate's, stay dense unless one says otherwise.
"""

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from torch import nn

from lth_plugins.errors import ConfigError, unknown
from lth_plugins.ticket.arch import Shape
from lth_plugins.ticket.locating import locate

BACKBONE, NECK, ALL = MODEL_SCOPES = ("backbone", "backbone+neck", "all")
PREDICTORS = "predictors"


def outside_trunk(
    model: nn.Module, scope: str, exclude: Sequence[str], neck: str, predictors: Sequence[str]
) -> dict[str, Shape]:
    """The convolutions and linear layers outside the trunk that a scope prunes.

    Args:
        model: a host's whole model.
        scope: one of `MODEL_SCOPES`.
        exclude: patterns of module names to leave dense, such as ``roi_heads.box_head`` or
            ``*.lateral_convs.*``; what is inside a module goes with it. "predictors" stands for
            the layers that heads end in.
        neck: what the names of the neck's modules begin with; the trunk's are not counted.
        predictors: the patterns that `PREDICTORS` stands for; they need not occur.

    Returns:
        The shapes of their weights by parameter name, in the model's order.

    Raises:
        ConfigError: if the scope is unknown or prunes nothing outside the trunk of this model, or a
            pattern matches nothing.
    """
    if scope not in MODEL_SCOPES:
        raise unknown("scope", scope, MODEL_SCOPES)
    trunk = set(locate(model).modules(model).values())
    found = {
        name: tuple(module.weight.shape)
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear) and module not in trunk
    }
    wanted = {
        name: shape
        for name, shape in found.items()
        if scope == ALL or (scope == NECK and name.startswith(neck))
    }
    for pattern in exclude:
        if pattern != PREDICTORS and not any(_matches(name, pattern) for name in wanted):
            raise ConfigError(
                f"expected a module to leave out of scope {scope!r} by the name {pattern!r}, found "
                f"none among {_parts(wanted)}: correct the name, or remove it"
            )
    patterns = [pattern for pattern in exclude if pattern != PREDICTORS]
    if PREDICTORS in exclude:
        patterns += predictors
    kept = {
        f"{name}.weight": shape
        for name, shape in wanted.items()
        if not any(_matches(name, pattern) for pattern in patterns)
    }
    if not kept and scope != BACKBONE:
        raise ConfigError(
            f"scope {scope!r} prunes nothing outside the backbone of this {type(model).__name__}, "
            f"which has {_parts(found)} there: choose scope 'backbone'"
            + (", or 'all'" if scope == NECK and found else ", or list less in exclude")
        )
    return kept


def _matches(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")


def _parts(names: Iterable[str]) -> str:
    """The modules that hold these layers, two levels deep."""
    return ", ".join(dict.fromkeys(".".join(name.split(".")[:2]) for name in names)) or "nothing"
