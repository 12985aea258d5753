"""tools/find_ticket.py with a method of sparse training: one ticket, its weights as trained."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch

from lth_plugins import Ticket
from lth_plugins.errors import LthError
from lth_plugins.pretrain import load_config
from lth_plugins.pretrain.find import SparsePretraining, find
from lth_plugins.training.sparse import SparseTrainingCallback

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "pretrain"
SMALL = ["data.size=16", "data.subset=48", "batch_size=16", "checkpoint_steps=1", "rounds=0"]
SMALL += ["pretrain.epochs=2", "training.epochs=1", "pretrain.warmup_epochs=0"]
RIGL = ["method=rigl", "method_options.sparsity=0.9", "method_options.delta_t=1"]


def config(task: str, out: Path, *overrides: str) -> Any:
    queue = ["contrastive.queue=32"] if task == "moco" else []
    settings = [*SMALL, *queue, *RIGL, f"out={out}", *overrides]
    return load_config(CONFIGS / f"digits_{task}.yaml", settings)


@pytest.mark.parametrize("task", ["supervised", "moco"])
def test_a_sparse_pre_training_resumes_to_the_same_ticket(
    task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (whole,) = find(config(task, tmp_path / "whole"))
    after_step = SparseTrainingCallback.on_train_batch_end

    def stop(self: Any, trainer: pl.Trainer, module: pl.LightningModule, *rest: Any) -> None:
        after_step(self, trainer, module, *rest)
        if trainer.global_step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(SparseTrainingCallback, "on_train_batch_end", stop)
        with pytest.raises(SystemExit):
            find(config(task, tmp_path / "stopped"))
    assert not (tmp_path / "stopped/final.ticket").exists()
    (resumed,) = find(config(task, tmp_path / "stopped"))
    ticket = Ticket.load(whole)
    assert ticket.sparsity == pytest.approx(0.9, abs=1e-6)
    assert ticket.meta.recipe["rigl"]["delta_t"] == 1
    assert Ticket.load(resumed).digest == ticket.digest
    lines = [
        json.loads((tmp_path / run / "metrics.jsonl").read_text()) for run in ("whole", "stopped")
    ]
    assert {**lines[0], "seconds": 0} == {**lines[1], "seconds": 0}
    assert not (tmp_path / "stopped/checkpoints").exists()


def test_both_encoders_of_moco_carry_the_masks_that_move(tmp_path: Path) -> None:
    training = SparsePretraining(config("moco", tmp_path / "run"))
    training.run()
    task: Any = training.host.first
    ticket = Ticket.load(tmp_path / "run/final.ticket")
    queries, keys = task.trunk.state_dict(), task.key_trunk.state_dict()
    for name, mask in ticket.masks.items():
        assert torch.equal(queries[name], ticket.weights[name])
        assert not keys[name][~mask].any() and keys[name][mask].any()


def test_a_sparse_ticket_is_trained_on_and_a_dense_one_anew(
    tmp_path: Path, ticket18_file: Path
) -> None:
    options = ["source=digits", f"init={ticket18_file}", "method_options.sparsity=null"]
    training = SparsePretraining(config("supervised", tmp_path, *options))
    assert training.attachment.masks == Ticket.load(ticket18_file).masks


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("rounds=2", "method=rigl trains one sparse network, .* rounds=2 is something else"),
        ("early_bird=true", "early_bird=true is something else"),
        ("method=rigel", "unknown method 'rigel'.* did you mean 'rigl'"),
        ("method_options.delta_t=100", r"expected delta_t below .* of the training's 6 iterations"),
        ("method_options.sparsity=0.9999", "expected a fan-in of 1 or more"),
        ("method=null", "are of a method, and none is given: give method=gradual or rigl"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(
    change: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(LthError, match=message):
        find(config("supervised", tmp_path / "run", change))
    assert not (tmp_path / "run").exists()
