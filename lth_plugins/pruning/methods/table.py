"""The table of methods, open to other packages: `METHODS` and `make_method`."""

from dataclasses import MISSING, Field, fields
from typing import Any

from lth_plugins.errors import ConfigError, unknown
from lth_plugins.pruning.methods.acdc import ACDC
from lth_plugins.pruning.methods.gradual import Gradual
from lth_plugins.pruning.methods.method import Method
from lth_plugins.pruning.methods.rigl import RigL
from lth_plugins.pruning.methods.set import SET
from lth_plugins.pruning.methods.srigl import SRigL
from lth_plugins.registry import Registry

METHODS: Registry[type[Method]] = Registry("method", "lth_plugins.methods")
"""Methods by name. Another package adds one with ``METHODS.register(name, method)`` or an entry
point of the group ``lth_plugins.methods``."""

METHODS.register(Gradual.name, Gradual)
METHODS.register(RigL.name, RigL)
METHODS.register(SET.name, SET)
METHODS.register(SRigL.name, SRigL)
METHODS.register(ACDC.name, ACDC)


def options_of(method: str) -> dict[str, Field[Any]]:
    """The options of the method of this name, as fields of its dataclass.

    Raises:
        ConfigError: if there is none.
    """
    return {field.name: field for field in fields(METHODS[method])}  # type: ignore[arg-type]


def make_method(method: str | Method, **options: Any) -> Method:
    """The method of this name.

    Args:
        method: a name in `METHODS`; a method is returned as it is.
        options: its attributes.

    Raises:
        ConfigError: if there is no such method, or an option is unknown, missing or invalid.
    """
    if isinstance(method, Method):
        if options:
            raise ConfigError(f"expected no options beside a method, found {min(options)}")
        return method
    known = options_of(method)
    for name in options:
        if name not in known:
            raise unknown(f"option of method {method}", name, known)
    absent = [
        name
        for name, field in known.items()
        if name not in options and field.default is MISSING and field.default_factory is MISSING
    ]
    if absent:
        raise ConfigError(f"method {method} needs {', '.join(absent)}: give them as its options")
    try:
        return METHODS[method](**options)
    except TypeError as error:  # a comparison of a value of another type
        raise ConfigError(f"invalid option of method {method} in {options}: {error}") from None
