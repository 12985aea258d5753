"""Configurations are checked before anything else happens."""

from __future__ import annotations

from pathlib import Path

import pytest
from pytorch_lightning import Trainer

from lth_plugins.errors import ConfigError, LthError
from lth_plugins.transfer import load_config
from lth_plugins.transfer.config import recipe
from lth_plugins.transfer.data import SOURCES
from lth_plugins.transfer.task import Probe

CONFIGS = Path(__file__).parents[2] / "configs" / "transfer"


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_configuration_needs_a_ticket_and_nothing_else(path: Path) -> None:
    with pytest.raises(ConfigError, match=r"leaves out ticket: give key=value"):
        load_config(path)

    assert load_config(path, ["ticket=t.ticket"]).data.name in SOURCES


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "svhn", "fashionmnist"])
def test_small_images_are_trained_as_in_the_paper(name: str) -> None:
    config = load_config(CONFIGS / f"{name}_r50.yaml", ["ticket=t.ticket"])

    assert (config.training.epochs, config.training.lr) == (182, 0.1)
    assert (config.training.warmup_epochs, config.training.milestones) == (1, [91, 136])
    assert (config.batch_size, config.stem) == (128, "small")
    assert vars(config.optimizer) == {"name": "sgd", "momentum": 0.9, "weight_decay": 2e-4}


def test_lr_warms_up_and_drops_to_a_tenth(tiny: Path, tmp_path: Path) -> None:
    phase = {"epochs": 200, "warmup_epochs": 10, "milestones": [91, 136]}
    settings = [f"training.{key}={value}" for key, value in phase.items()]
    task = Probe(
        load_config(tiny, ["ticket=t.ticket", f"out={tmp_path}", *settings]), 10, tmp_path / "lines"
    )
    task.trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    task.batches = 1
    factor = task.lr_factor

    assert factor(0) < factor(5) < factor(10) == factor(90) == 1
    assert [factor(91), factor(135), factor(136)] == pytest.approx([0.1, 0.1, 0.01])


def test_paths_and_machines_are_not_in_the_recipe(tiny: Path) -> None:
    here = load_config(tiny, ["ticket=a.ticket", "out=here"])
    there = load_config(
        tiny,
        ["ticket=b.ticket", "out=there", "data.root=r", "data.workers=3", "trainer.devices=auto"],
    )

    assert recipe(here) == recipe(there)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("epochs=3", r"unknown key epochs.*training"),
        ("data.nmae=svhn", r"did you mean data.name"),
        ("mode=probe", r"unknown mode 'probe'; known are finetune, linear"),
        ("stem=3x3", r"unknown stem '3x3'; known are standard, small"),
        ("arch=resnet50d", r"unknown arch 'resnet50d'"),
        ("batch_size=1", r"expected batch_size to be 2 or more, found 1"),
        ("batch_size=many", r"batch_size: .*'many'"),
        ("training.milestones=[3,2]", r"milestones to rise"),
        ("training.milestones=[2]", r"between 0 and training.epochs=2, found \[2\]"),
        ("training.milestones=[1] training.schedule=cosine", r"contradict"),
        ("mode=linear stem=small", r"would freeze a stem that is not the ticket's"),
        ("mode=linear rounds=2", r"mode=linear changes none of them"),
        ("random=true rounds=2", r"rounds finds tickets from a dense ticket"),
        ("rounds=2 criterion=grasp", r"criterion 'grasp' ranks weights by the gradients"),
        ("scope=erk", r"scope is now called allocation: write allocation=erk"),
        ("rounds=2 structure.kind=nm", r"rounds would not get sparser"),
    ],
)
def test_a_wrong_value_says_what_is_right(tiny: Path, override: str, message: str) -> None:
    with pytest.raises(LthError, match=message):
        load_config(tiny, ["ticket=t.ticket", "out=o", *override.split()])
