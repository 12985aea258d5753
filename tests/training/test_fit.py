"""What Lightning is asked to do around a training: who logs, and what is refused beforehand."""

from __future__ import annotations

import importlib.util
import os
import re
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lth_plugins import Ticket
from lth_plugins.errors import LthError
from lth_plugins.pretrain import load_config
from lth_plugins.pretrain.data import open_images
from lth_plugins.pretrain.find import search_of
from lth_plugins.pruning.search.search import Search
from lth_plugins.resilience.exit_codes import EXIT_CODE
from lth_plugins.ticket import UNIT_RANGE, InputSpec
from lth_plugins.training.fit import fit
from lth_plugins.training.supervised import Supervised

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "pretrain"
DIGITS = CONFIGS / "digits_supervised.yaml"
SMALL = ["data.size=16", "data.subset=32", "batch_size=16", "rounds=1", "trainer.accelerator=cpu"]
SMALL += ["pretrain.epochs=1", "training.epochs=1"]
HAS_WANDB = importlib.util.find_spec("wandb") is not None


def search(out: Path, *overrides: str, config: Path = DIGITS) -> Search:
    return search_of(load_config(config, [*SMALL, f"out={out}", *overrides]))


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
    with pytest.raises(LthError, match="wandb=tickets asks for .* pip install wandb"):
        search(tmp_path / "run", "wandb=tickets")
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU can do it")
def test_batchnorm_over_several_cpus_is_refused_before_training(tmp_path: Path) -> None:
    with pytest.raises(LthError, match="sync_batchnorm=true needs GPUs"):
        search(tmp_path / "run", "trainer.sync_batchnorm=true")
    assert not (tmp_path / "run").exists()


def test_what_lightning_cannot_do_is_refused_before_training(tmp_path: Path) -> None:
    for setting in ("trainer.precision=fp16", "trainer.accelerator=abacus", "trainer.devices=-3"):
        with pytest.raises(LthError, match="settings of Lightning in trainer, found"):
            search(tmp_path / "run", setting)
    assert not (tmp_path / "run").exists()


def test_a_job_of_slurm_that_srun_did_not_start_is_not_warned_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    (tmp_path / "srun").write_text("#!/bin/sh\n")
    (tmp_path / "srun").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    search(tmp_path / "run", "trainer.accelerator=cpu")
    assert not [w for w in recwarn if "srun" in str(w.message)]


def test_a_training_says_how_far_it_is_where_there_is_no_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("lth_plugins.progress.QUIET_SECONDS", 0)
    with caplog.at_level("INFO"):
        search(tmp_path / "run", "pretrain.epochs=2", "rounds=0").run()
    said = caplog.text
    assert "images to train on" in said and "10 classes" in said
    assert "pretrain: 2 epochs of " in said
    assert "pretrain: epoch 1/2, step 1 of 4" in said and "pretrain: epoch 1/2, val loss" in said
    assert re.search(r"epoch 2/2, step 4 of 4, about 0 s left, val top1 \d", said)


class KilledInItsFourthBatch(Supervised):
    def training_step(self, batch, batch_idx):
        if batch_idx == 3:
            raise ConnectionError("pulled the plug")
        return super().training_step(batch, batch_idx)


def test_a_training_killed_between_accumulated_batches_resumes_from_the_step_before(
    tmp_path: Path,
) -> None:
    settings = ["data.subset=64", "trainer.accumulate_grad_batches=2", "checkpoint_steps=1"]
    config = load_config(DIGITS, [*SMALL, *settings])
    images = open_images(config.data)

    def train(kind: type[Supervised], folder: Path) -> dict[str, torch.Tensor]:
        task = kind(config, config.pretrain, classes=10, stream=0)
        fit(task, images, "pretrain", folder)
        return task.state_dict()

    whole = train(Supervised, tmp_path / "whole")
    with pytest.raises(ConnectionError):
        train(KilledInItsFourthBatch, tmp_path / "killed")
    resumed = train(Supervised, tmp_path / "killed")
    assert [name for name, value in whole.items() if not torch.equal(resumed[name], value)] == []


@pytest.mark.parametrize("signalled_in", [0, 1], ids=["a batch", "the last batch"])
def test_sigterm_stops_a_search_that_validates_its_start(
    signalled_in: int,
    tmp_path: Path,
    resnet18_state: dict[str, torch.Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    step = Supervised.validation_step

    def validation_step(self, batch, batch_idx):
        if batch_idx == signalled_in:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, batch, batch_idx)

    monkeypatch.setattr(Supervised, "validation_step", validation_step)
    init = Ticket.dense(resnet18_state).save(tmp_path / "dense.ticket")
    with pytest.raises(SystemExit) as ended:
        list(search(tmp_path / "run", f"init={init}", "rounds=0").run())
    assert ended.value.code == EXIT_CODE
    assert not (tmp_path / "run/round_00.ticket").exists()


@pytest.mark.parametrize("task", ["supervised", "simclr", "moco"])
def test_a_search_prepares_images_as_the_network_that_it_starts_from_expects(
    task: str, tmp_path: Path, resnet18_state: dict[str, torch.Tensor]
) -> None:
    init = Ticket.dense(resnet18_state, input=UNIT_RANGE).save(tmp_path / "dense.ticket")
    settings = [f"init={init}", "rounds=0", *["contrastive.queue=32"] * (task == "moco")]
    found = search(tmp_path / "run", *settings, config=CONFIGS / f"digits_{task}.yaml")
    trained, val, bank = (
        getattr(found.host.images, name)[0][0] for name in ("train", "val", "bank")
    )
    views = [trained] if task == "supervised" else trained
    for image in (*views, val, bank):
        assert image.min() >= 0 and image.max() <= 1
    (path,) = found.run()
    assert Ticket.load(path).meta.input == UNIT_RANGE


def test_a_network_that_cannot_be_trained_here_is_refused(
    tmp_path: Path, resnet18_state: dict[str, torch.Tensor]
) -> None:
    dense = Ticket.dense(resnet18_state, input=InputSpec("BGR"))
    bgr = f"init={dense.save(tmp_path / 'bgr.ticket')}"
    with pytest.raises(LthError, match="that takes RGB, .* found BGR: give another"):
        search(tmp_path / "run", bgr, config=CONFIGS / "digits_simclr.yaml")
    caffe = replace(dense, meta=replace(dense.meta, stride_in_1x1=True))
    with pytest.raises(LthError, match="found them in the first 1x1"):
        search(tmp_path / "run", f"init={caffe.save(tmp_path / 'caffe.ticket')}")
    assert not (tmp_path / "run").exists()
