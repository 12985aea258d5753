"""What the conformance tests share: tiny scenes, and tickets of ResNet-18."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import lth_plugins as lth
from lth_plugins.pruning.structure import Channels, structured

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six training and two test scenes of 64 px."""
    folder = tmp_path_factory.mktemp("conformance") / "digit_scenes"
    sizes = f"--out {folder} --train 6 --test 2 --min-size 64 --max-size 64"
    command = [sys.executable, "tools/make_digit_scenes.py", *sizes.split()]
    subprocess.run(command, cwd=ROOT, check=True)
    return folder


@pytest.fixture(scope="session")
def other18_file(ticket18: lth.Ticket, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Other masks over the same weights."""
    return ticket18.shuffled(3).save(tmp_path_factory.mktemp("tickets") / "other.ticket")


@pytest.fixture(scope="session")
def channels18_file(dense18_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Whole channels at three tenths of the weights."""
    ticket = structured(lth.Ticket.load(dense18_file), Channels(density=0.3, multiple=8))
    return ticket.save(tmp_path_factory.mktemp("tickets") / "channels.ticket")
