"""What Lightning is asked to do around a training: who logs, and what is refused beforehand."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from lth_plugins import TicketError
from lth_plugins.pretrain import load_config
from lth_plugins.pretrain.find import Search

DIGITS = Path(__file__).resolve().parents[2] / "configs" / "pretrain" / "digits_supervised.yaml"
SMALL = ["data.size=16", "data.subset=32", "batch_size=16", "rounds=1", "trainer.accelerator=cpu"]
SMALL += ["pretrain.epochs=1", "training.epochs=1"]
HAS_WANDB = importlib.util.find_spec("wandb") is not None


def search(out: Path, *overrides: str) -> Search:
    return Search(load_config(DIGITS, [*SMALL, f"out={out}", *overrides]))


@pytest.mark.skipif(not HAS_WANDB, reason="wandb is not installed: pip install wandb")
def test_each_training_is_a_run_of_its_own_in_weights_and_biases(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    out = tmp_path / "run"
    list(search(out, "wandb=tickets").run())
    assert len(list((out / "wandb").glob("offline-run-*"))) == 2
    # Beside TensorBoard's, not instead of them.
    assert {path.name for path in (out / "logs").iterdir()} == {"pretrain", "round_01"}


@pytest.mark.skipif(HAS_WANDB, reason="wandb is installed")
def test_weights_and_biases_that_is_not_there_is_missed_before_training(tmp_path: Path) -> None:
    with pytest.raises(TicketError, match="wandb=tickets asks for .* pip install wandb"):
        search(tmp_path / "run", "wandb=tickets")
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU can do it")
def test_batchnorm_over_several_cpus_is_refused_before_training(tmp_path: Path) -> None:
    with pytest.raises(TicketError, match="sync_batchnorm=true needs GPUs"):
        search(tmp_path / "run", "trainer.sync_batchnorm=true")
    assert not (tmp_path / "run").exists()
