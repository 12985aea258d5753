"""Registries are open: a decorator, a call or another package's entry point adds a value."""

import subprocess
import sys
from pathlib import Path

import pytest

from lth_plugins import LthError
from lth_plugins.errors import ConfigError
from lth_plugins.registry import Registry


@pytest.fixture
def shapes() -> Registry[object]:
    registry: Registry[object] = Registry("shape", "lth_plugins.test_shapes")
    registry.register("circle", "round")
    return registry


@pytest.fixture
def package(tmp_path: Path, monkeypatch) -> Path:
    """An installed package with three entry points, the last of which cannot be imported."""
    (tmp_path / "shape_maker.py").write_text("def square(): return 'four corners'\n")
    info = tmp_path / "shape_maker-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: shape-maker\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[lth_plugins.test_shapes]\nsquare = shape_maker:square\ncircle = shape_maker:square\n"
        "broken = shape_maker.missing\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    sys.modules.pop("shape_maker", None)


PACKAGE = """
from lth_plugins.ticket import Dialect
def ones(weights, model, loss):
    return {name: weight.new_ones(weight.shape) for name, weight in weights.items()}
upper = Dialect("upper", block=lambda stage, block: f"LAYER{stage}.{block}.")
"""
USE = """
import sys, torch, torchvision
sys.path.insert(0, sys.argv[1])
from lth_plugins import Ticket, prune
state = torchvision.models.resnet18().state_dict()
upper = {name.replace("layer", "LAYER"): value for name, value in state.items()}
ticket = Ticket.dense(upper)
assert all(torch.equal(value, state[name]) for name, value in ticket.weights.items())
masks = prune(upper, 0.5, criterion="ones")
assert not masks["layer1.0.conv1.weight"].any() and masks["layer4.1.conv2.weight"].all()
try:
    prune(upper, 0.5, criterion="one")
except ValueError as error:
    print(error)
"""


def test_an_installed_package_adds_a_criterion_and_a_dialect(tmp_path) -> None:
    (tmp_path / "another.py").write_text(PACKAGE)
    info = tmp_path / "another-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: another\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[lth_plugins.criteria]\nones = another:ones\n"
        "[lth_plugins.dialects]\nupper = another:upper\n"
    )
    done = subprocess.run([sys.executable, "-c", USE, tmp_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith(", ones; did you mean 'ones'?\n")


def test_a_call_or_a_decorator_registers(shapes) -> None:
    @shapes.register("area")
    def area() -> int:
        return 1

    assert shapes["area"] is area and shapes["circle"] == "round"
    assert list(shapes) == ["circle", "area"] and len(shapes) == 2
    assert shapes.get("cube") is None and "cube" not in shapes


def test_an_unknown_name_is_an_error_that_lists_what_is_registered(shapes) -> None:
    shapes.register("line", "straight")
    message = "unknown shape 'lime'; known are circle, line; did you mean 'line'\\?"
    with pytest.raises(ConfigError, match=f"^{message}$") as caught:
        shapes["lime"]
    assert isinstance(caught.value, LthError) and not shapes.get("lime")


def test_a_name_is_registered_once(shapes) -> None:
    shapes.register("circle", shapes["circle"])
    with pytest.raises(ConfigError, match="shape 'circle' is already registered"):
        shapes.register("circle", "another")


def test_an_installed_package_adds_a_value(shapes, package) -> None:
    assert list(shapes) == ["circle", "square", "broken"] and len(shapes) == 3
    assert "shape_maker" not in sys.modules  # listing imports nothing
    assert shapes["square"]() == "four corners"
    assert shapes["circle"] == "round"  # what is registered is not replaced from outside


def test_an_entry_point_that_cannot_be_loaded_says_whose_it_is(shapes, package) -> None:
    with pytest.raises(ConfigError, match=r"shape 'broken' of shape-maker cannot .*missing"):
        shapes["broken"]
