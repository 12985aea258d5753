"""Configurations of a search: what is known, what is refused, what may change on resuming."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from lth_plugins.errors import ConfigError, LthError
from lth_plugins.pretrain import TASKS, load_config
from lth_plugins.pretrain.config import recipe
from lth_plugins.pretrain.find import pretraining
from lth_plugins.training.fit import resolve_precision

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "pretrain"
DIGITS = CONFIGS / "digits_supervised.yaml"


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_configuration_that_is_shipped_is_complete(path: Path) -> None:
    assert load_config(path).rounds > 0


def test_the_imagenet_configuration_is_the_papers() -> None:
    config = load_config(CONFIGS / "imagenet_supervised_r50.yaml")
    assert (config.arch, config.rounds, config.fraction) == ("resnet50", 18, 0.2)
    assert (config.training.epochs, config.training.lr, config.batch_size) == (10, 1e-4, 256)


def test_what_needs_hours_of_training_takes_the_precision_that_suits_the_device(
    tmp_path: Path,
) -> None:
    config = load_config(CONFIGS / "imagenet_supervised_r50.yaml")
    on_cpu = replace(config.trainer, accelerator="cpu")
    assert on_cpu.precision == "auto"
    assert resolve_precision(on_cpu, tmp_path).precision == "32-true"
    # A run that was started elsewhere keeps what it has.
    (tmp_path / "config.yaml").write_text("trainer: {precision: 16-mixed}")
    assert resolve_precision(on_cpu, tmp_path).precision == "16-mixed"
    assert resolve_precision(replace(on_cpu, precision="64-true"), tmp_path).precision == "64-true"


def test_keys_on_the_command_line_override_the_file() -> None:
    config = load_config(DIGITS, ["rounds=3", "training.lr=1e-3", "data.root=a/b"])
    assert (config.rounds, config.training.lr, config.data.root) == (3, 1e-3, "a/b")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("round=3", r"unknown key round; did you mean rounds\? Known are arch, .*rounds"),
        ("epochs=1", r"unknown key epochs; did you mean pretrain\.epochs or training\.epochs\?"),
        ("training.momentum=1", r"did you mean optimizer\.momentum or contrastive\.momentum\?"),
        ("precison=auto", r"unknown key precison; did you mean trainer\.precision\?"),
        ("task=mocco", r"unknown task 'mocco'; known are .*; did you mean 'moco'\?"),
        ("training.rl=3", r"unknown key training\.rl.*Known are training\.epochs, training\.lr"),
        ("rounds", "expected key=value"),
        ("rounds=many", "rounds: Value 'many'"),
        ("rounds=-1", "rounds to be 0 or more, found -1"),
        ("fraction=0", "fraction to be between 0 and 1, found 0.0"),
        ("fraction=1.0", "between 0 and 1, found 1.0"),
        ("seed=-1", "seed to be 0 or more"),
        ("batch_size=1", "batch_size to be 2 or more"),
        ("training.epochs=0", r"training\.epochs to be 1 or more"),
        ("training.lr=-1", r"training\.lr to be 0 or more"),
        ("data.size=4", r"data\.size to be 8 or more"),
        ("data=digits", r"expected data to be a group of data\.name, .* found 'digits'"),
        ("task=jigsaw", "unknown task 'jigsaw'; known are supervised"),
        ("arch=vgg16", "unknown arch 'vgg16'"),
        ("arch=resnet50d", "unknown arch 'resnet50d'"),
        ("criterion=size", "unknown criterion 'size'"),
        ("optimizer.name=lion", r"unknown optimizer\.name 'lion'; known are sgd, adamw"),
        ("scope=layer", "the key scope is now called allocation: write allocation=layer"),
        ("allocation=even", "unknown allocation 'even'; known are global, layer, erk"),
        ("contrastive.min_scale=0", "min_scale to be more than 0 and at most 1, found 0.0"),
        ("structure.kind=rows", "unknown structure 'rows'; known are channel, channel_l1"),
        ("structure.kind=nm", r"keeps N of M .* tools/ticket.py structure --kind nm"),
        ("structure.multiple=8", r"structure\.multiple needs structure\.kind"),
        ("early_bird=true", r"those of 5 epochs before, found training\.epochs="),
        ("training.schedule=step", r"unknown training\.schedule 'step'"),
    ],
)
def test_what_is_unknown_or_out_of_range_is_refused(override: str, message: str) -> None:
    with pytest.raises(LthError, match=message):
        load_config(DIGITS, [override])


def test_a_configuration_that_leaves_something_out_says_what(tmp_path: Path) -> None:
    path = tmp_path / "short.yaml"
    path.write_text("task: supervised\narch: resnet18\n")
    with pytest.raises(LthError, match="leaves out .*out.*training.epochs"):
        load_config(path)


def test_a_file_that_is_not_there_or_not_yaml_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LthError, match="expected a configuration file, found none"):
        load_config(tmp_path / "none.yaml")
    path = tmp_path / "odd.yaml"
    path.write_text("rounds: [1\n")
    with pytest.raises(LthError, match="cannot be read as YAML"):
        load_config(path)


def test_the_recipe_is_what_the_tickets_depend_on(tmp_path: Path) -> None:
    config = load_config(DIGITS)
    elsewhere = replace(config, out=str(tmp_path), rounds=18, evaluate_last=False)
    assert recipe(elsewhere) == recipe(config)
    for override in ("seed=1", "training.lr=1", "batch_size=8", "data.size=96", "arch=resnet34"):
        assert recipe(load_config(DIGITS, [override])) != recipe(config)
    # Defaults are absent, so that a new setting refuses no older folder.
    assert not {"structure", "fraction", "contrastive"} & recipe(config).keys()
    refilled = recipe(load_config(DIGITS, ["structure.kind=kernel", "structure.surplus=0.1"]))
    assert refilled["structure"] == {"kind": "kernel", "surplus": 0.1}


def test_a_pretraining_of_another_package_is_known_by_its_name() -> None:
    TASKS.register("rotations", object)
    assert load_config(DIGITS, ["task=rotations"]).task == "rotations"
    with pytest.raises(ConfigError, match="known are supervised, .*, rotations"):
        load_config(DIGITS, ["task=colours"])
    with pytest.raises(ConfigError, match="to be a subclass of Task"):
        pretraining("rotations")


def test_lightning_is_imported_by_who_trains_only() -> None:
    code = (
        "import sys, lth_plugins, lth_plugins.pretrain, lth_plugins.pruning.search.imp\n"
        "heavy = {'pytorch_lightning', 'lightning', 'lightly', 'torchvision', 'sklearn'}\n"
        "sys.exit(', '.join(heavy & set(sys.modules)) or 0)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
