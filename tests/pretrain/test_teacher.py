"""Rounds that learn from the dense network: teacher=dense. Real digits, few and small."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lth_plugins import Ticket
from lth_plugins.errors import ConfigError, TicketError
from lth_plugins.pretrain import load_config
from lth_plugins.pretrain.data import open_images
from lth_plugins.pretrain.find import Pretraining, search_of
from lth_plugins.pretrain.moco import MoCo
from lth_plugins.pretrain.simclr import SimCLR
from lth_plugins.ticket import IMAGENET
from lth_plugins.training.fit import fit
from lth_plugins.training.module import Task
from lth_plugins.training.supervised import Supervised
from tests.ticket.states import trunk

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "pretrain"
SMALL = ["data.size=16", "data.subset=32", "batch_size=16", "checkpoint_steps=1"]
SMALL += ["pretrain.epochs=1", "training.epochs=1", "training.warmup_epochs=0"]
SMALL += ["trainer.accelerator=cpu", "contrastive.queue=32"]


def config(task: str, out: Path, *overrides: str) -> Any:
    return load_config(CONFIGS / f"digits_{task}.yaml", [*SMALL, f"out={out}", *overrides])


def find(out: Path, *overrides: str) -> list[dict[str, Any]]:
    """Find two tickets; the lines of metrics.jsonl without times."""
    search_of(config("supervised", out, "rounds=2", "evaluate_last=false", *overrides)).run()
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{**line, "seconds": 0} for line in lines]


def test_each_round_learns_from_the_dense_network_and_resumes_bit_for_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, again, plain = (tmp_path / name for name in ("whole", "again", "plain"))
    lines = find(whole, "teacher=dense", "distill.weight=2")
    assert "train_distill" not in lines[0] and lines[1]["train_distill"] > 0

    train, steps = Supervised.training_step, []

    def killed(self: Supervised, batch: Any, index: int) -> Any:
        steps.append(index)
        if self.teacher is not None and index == 1:
            raise ConnectionError("pulled the plug")
        return train(self, batch, index)

    with monkeypatch.context() as patch, pytest.raises(ConnectionError):
        patch.setattr(Supervised, "training_step", killed)
        find(again, "teacher=dense", "distill.weight=2")
    assert steps == [0, 1, 0, 1]
    assert find(again, "teacher=dense", "distill.weight=2") == lines
    for name in ("round_01.ticket", "round_02.ticket", "pretrained.safetensors"):
        assert (again / name).read_bytes() == (whole / name).read_bytes(), name

    assert find(plain)[0] == lines[0]
    found, other = (Ticket.load(out / "round_02.ticket") for out in (whole, plain))
    assert found.meta.recipe["teacher"] == "dense" and found.meta.recipe["distill"] == {"weight": 2}
    assert "teacher" not in other.meta.recipe and found.masks != other.masks
    assert set(load_file(whole / "pretrained.safetensors")) == set(
        load_file(plain / "pretrained.safetensors")
    )


@pytest.mark.parametrize("kind", [MoCo, SimCLR])
def test_contrastive_rounds_learn_features_also_in_half_precision(
    kind: type[Task], tmp_path: Path
) -> None:
    name = kind.__name__.lower()
    settings = config(name, tmp_path, "teacher=dense", "trainer.precision=bf16-mixed")
    task, teacher = (kind(settings, settings.training, 10, stream) for stream in (1, 2))
    stock, parameters = list(task.state_dict()), len(task.trained())
    with torch.no_grad():
        teacher.trunk.conv1.weight.neg_()
    before = {key: value.clone() for key, value in teacher.state_dict().items()}
    task.learn_from(teacher)
    assert list(task.state_dict()) == stock and len(task.trained()) == parameters
    images = open_images(settings.data, kind.views(settings, IMAGENET))
    assert 0 < fit(task, images, "round_01", tmp_path)["train_distill"] < 2
    assert not teacher.training and not any(p.requires_grad for p in teacher.parameters())
    assert all(torch.equal(value, before[key]) for key, value in teacher.state_dict().items())


def test_a_network_that_is_its_own_teacher_has_nothing_to_learn(tmp_path: Path) -> None:
    settings = config("supervised", tmp_path, "teacher=dense")
    task, teacher = (Supervised(settings, settings.training, 10, stream=1) for _ in range(2))
    task.learn_from(teacher)
    images = torch.randn(4, 3, 16, 16)
    loss = task.taught(images, task.eval().outputs(images))
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-6)
    with torch.no_grad():
        task.fc.bias[0] += 1
    assert task.taught(images, task.outputs(images)).item() > 1e-3


class Deaf(Supervised):
    distils = ""


def test_teachers_that_cannot_teach_are_refused_and_nothing_is_written(tmp_path: Path) -> None:
    out = tmp_path / "out"
    for task, overrides, message in (
        ("supervised", ["teacher=FILE"], "unknown teacher 'FILE'; known are dense"),
        ("supervised", ["distill.weight=2"], "expected a teacher with distill.weight"),
        ("supervised", ["teacher=dense", "distill.temperature=0"], "temperature to be more than 0"),
    ):
        with pytest.raises(ConfigError, match=message):
            config(task, out, *overrides)
    soft = config("simclr", out, "teacher=dense", "distill.temperature=2")
    with pytest.raises(ConfigError, match="temperature is for logits, and SimCLR learns features"):
        Pretraining(soft)
    with pytest.raises(ConfigError, match="learns from a teacher, found Deaf, which does not"):
        Deaf.check_teacher(config("supervised", out, "teacher=dense"))
    torch.save(trunk(value=0.01), tmp_path / "trunk.pth")
    with pytest.raises(TicketError, match="θ_p with its trained head as the teacher, found none"):
        Pretraining(config("supervised", out, "teacher=dense", f"init={tmp_path}/trunk.pth"))
    Pretraining(config("simclr", out, "teacher=dense", f"init={tmp_path}/trunk.pth"))
    assert not out.exists()
