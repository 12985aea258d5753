"""What the tests that start tools share."""

import subprocess
import sys
from pathlib import Path

import pytest
from torch import Tensor

import lth_plugins as lth

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, _resnet18_weights: dict[str, Tensor]) -> Path:
    """A folder with ``dense.ticket``, and digit scenes of 64 px in ``digit_scenes``."""
    folder = tmp_path_factory.mktemp("data")
    lth.Ticket.dense(_resnet18_weights, source="test").save(folder / "dense.ticket")
    sizes = f"--out {folder}/digit_scenes --train 16 --test 2 --min-size 64 --max-size 64"
    command = [sys.executable, "tools/make_digit_scenes.py", *sizes.split()]
    subprocess.run(command, cwd=ROOT, check=True)
    return folder
