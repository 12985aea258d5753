"""Packages whose names are imported when they are first used."""

import importlib
import importlib.util
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def attributes(
    package: str, modules: Mapping[str, Sequence[str]]
) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """The ``__getattr__``, ``__dir__`` and ``__all__`` (PEP 562) of a package with lazy names.

    Its modules are attributes, too. Type checkers need the names imported where ``TYPE_CHECKING``.

    Args:
        package: its ``__name__``.
        modules: the names that each module has, by the module's name below the package; one that
            begins with a dot is below `lth_plugins` instead.
    """
    module_of = {name: module for module, names in modules.items() for name in names}

    def get(name: str) -> Any:
        if name in module_of:
            module = module_of[name]
            whole = f"lth_plugins{module}" if module[0] == "." else f"{package}.{module}"
            value = getattr(importlib.import_module(whole), name)
            setattr(sys.modules[package], name, value)  # the next time Python finds it there
            return value
        public = name.isidentifier() and not name.startswith("_")
        if public and importlib.util.find_spec(f"{package}.{name}"):
            return importlib.import_module(f"{package}.{name}")
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    def names() -> list[str]:
        return sorted({*vars(sys.modules[package]), *module_of})

    return get, names, sorted(module_of)
