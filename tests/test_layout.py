"""Each module is imported by its name, and the core is for any host."""

import ast
import importlib
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

import lth_plugins
from lth_plugins.ticket import DIALECTS

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


def test_the_public_names_are_there_and_wait_for_no_framework() -> None:
    code = """
import sys
import lth_plugins.study.run.status
assert "torch" not in sys.modules, "the status of a study needs no PyTorch"
import lth_plugins as lth
assert {name for name in lth.__all__ if getattr(lth, name, None) is None} == set()
assert not {"detectron2", "mmengine", "timm", "transformers"} & set(sys.modules)
assert set(lth.__all__) <= set(dir(lth)) and not hasattr(lth, "lottery")
assert lth.ticket.Ticket is lth.Ticket
"""
    subprocess.run([sys.executable, "-c", code], check=True)


ABOVE_THE_CORE = (
    "commands",
    "detectron2",
    "lightning.py",
    "mmseg",
    "smp.py",
    "study",
    "timm.py",
    "torchvision.py",
    "transformers",
)
HOSTS = re.compile(r"detectron2|mmseg|mmdet|mmpretrain|mmengine|MODEL\.|init_cfg|STRIDE_IN_1X1")


def strings(file: Path) -> set[str]:
    """What a module says, without its docstrings."""
    nodes = list(ast.walk(ast.parse(file.read_text())))
    bare = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
    constants = [n for n in nodes if isinstance(n, ast.Constant) and id(n) not in bare]
    return {node.value for node in constants if isinstance(node.value, str)}


def test_the_core_says_nothing_of_a_host() -> None:
    """But the names of dialects, which are data."""
    core = [
        file for file in ROOT.rglob("*.py") if file.relative_to(ROOT).parts[0] not in ABOVE_THE_CORE
    ]
    said = [(file.name, text) for file in core for text in strings(file) if HOSTS.search(text)]
    assert [(name, text) for name, text in said if text not in DIALECTS] == []
