"""A hundred thousand mutated files, found by what they reach in the code that reads them."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RUNS = {
    "hub name": 20_000,
    "safetensors": 18_000,
    "pkl": 18_000,
    "zip": 20_000,
    "old": 16_000,
    "pickle in a zip": 14_000,
    "pickled tensors": 8_000,
    "npz": 8_000,
    "array in an npz": 8_000,
    "ticket's mask": 8_000,
    "ticket's description": 6_000,
    "ticket": 5_000,
    "ticket's digest": 5_000,
    "resnet": 500,
    "masks": 500,
    "weights": 500,
}
"""How many files of each target: those that take longer to read get fewer."""


@pytest.mark.soak
@pytest.mark.parametrize("target", RUNS)
def test_only_ticket_errors_come_out_of_the_fuzzer(target: str, capfd) -> None:
    if importlib.util.find_spec("atheris") is None:
        pytest.skip("atheris is not installed: it has wheels for Linux and Python 3.11 to 3.13")
    done = subprocess.run(
        [sys.executable, "-m", "tests.reliability.fuzz", target, str(RUNS[target]), "1"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    summary = done.stdout.splitlines()[-1]
    assert summary.startswith(f"{target}: {RUNS[target]:,} tried"), summary
    with capfd.disabled():
        print(f"\n{summary}")


def test_the_fuzzer_tries_a_hundred_thousand_files() -> None:
    from tests.reliability.targets import TARGETS

    assert RUNS.keys() == TARGETS.keys()
    assert sum(RUNS.values()) - RUNS["hub name"] >= 100_000
