"""The package is laid out so that each module is imported by its name."""

import importlib
import pkgutil
from pathlib import Path

import pytest

import lth_plugins

ROOT = Path(lth_plugins.__file__).parent
PACKAGES = [
    ".".join(("lth_plugins", *init.parent.relative_to(ROOT).parts))
    for init in sorted(ROOT.rglob("__init__.py"))
]


@pytest.mark.parametrize("name", PACKAGES)
def test_no_module_hides_behind_a_name_that_its_package_exports(name: str) -> None:
    package = pytest.importorskip(name, exc_type=ImportError)
    for module in pkgutil.iter_modules(package.__path__):
        try:
            found = importlib.import_module(f"{name}.{module.name}")
        except ModuleNotFoundError as error:
            assert not error.name.startswith("lth_plugins"), error  # a host that is not installed
        else:
            assert getattr(package, module.name) is found
