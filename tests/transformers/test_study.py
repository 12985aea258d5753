"""A study of a training script of the user's own: the one of docs/study.md, as it is there."""

from __future__ import annotations

import re
import signal
from pathlib import Path

import pytest
import torch

import lth_plugins as lth
from lth_plugins.commands import script
from lth_plugins.errors import ConfigError, RunError
from lth_plugins.study.plan.config import load_config
from lth_plugins.study.plan.expand import plan
from lth_plugins.study.plan.runs import Run
from lth_plugins.study.plan.tools import TOOLS
from lth_plugins.study.run.script import MADE

ROOT = Path(__file__).parents[2]

STUDY = """
out: results
archs: [resnet18]
seeds: [3]
rounds: [7]
sources: {mine: {tickets: {0: dense.ticket, 7: sparse.ticket}}}
baselines: {random: [7], reversed: [7], reinit: [7]}
tasks:
  scenes: {tool: script, config: train.py, metric: score, margin: 1%, overrides: [max_steps=2]}
"""
# Beside the script: it is stopped, once, before the second batch.
SCENES = """
import os, signal
from tests.transformers.models import OPTIONS, Scenes, arguments, collate as collated, resnet

KIND = "DetrForObjectDetection"
CONFIG = {**OPTIONS[KIND], "backbone_config": resnet("timm", (4,))}
given = arguments("any", 1).to_dict()
names = ("save_steps", "save_strategy", "use_cpu", "report_to", "disable_tqdm",
         "per_device_train_batch_size", "remove_unused_columns", "dataloader_pin_memory")
ARGUMENTS, calls = {name: given[name] for name in names}, []

def train_set(processor):
    return Scenes(KIND, processor)

def test_set(processor):
    return Scenes(KIND, processor, 1)

def collate(items):
    calls.append(len(items))
    if len(calls) == 2:
        os.kill(os.getpid(), signal.SIGTERM)
    return collated(items)
"""
KEEPS_THE_TICKET = """
import random, shutil, sys
_, ticket, _, seed, _, out, option = sys.argv[1:]
shutil.copy(ticket, f"{out}/given")
print(seed, option, random.random())
sys.exit()
"""


@pytest.fixture
def folder(
    dense18_file: Path, ticket18_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """The working directory, with a study, its script and its tickets."""
    monkeypatch.chdir(tmp_path)
    section = (ROOT / "docs/study.md").read_text().split("## Your own script")[1]
    script = re.search(r"```python\n(.*?)```", section, re.DOTALL)[1]
    assert len(script.splitlines()) <= 25
    files = {"study.yaml": STUDY, "train.py": script, "scenes.py": SCENES}
    for name, text in files.items():
        Path(name).write_text(text)
    for name, file in {"dense": dense18_file, "sparse": ticket18_file}.items():
        Path(f"{name}.ticket").write_bytes(file.read_bytes())
    return tmp_path


def run(planned: Run) -> int:
    """Run a planned run's command in this process."""
    assert planned.command[:3] == ("-m", "lth_plugins", "script")
    return script.main(planned.command[3:])


def test_a_script_is_stopped_and_resumes(folder: Path, ticket18: lth.Ticket) -> None:
    ticket = next(run for run in plan(load_config("study.yaml")).runs if run.kind == "ticket")
    assert run(ticket) == 128 + signal.SIGTERM
    with pytest.raises(RunError, match="write its metrics to .*metrics.json, found no such file"):
        TOOLS["script"].measure(ticket.folder)
    before = (ticket.folder / "checkpoint-1/model.safetensors").stat().st_mtime_ns
    assert run(ticket) == 0
    assert (ticket.folder / "checkpoint-1/model.safetensors").stat().st_mtime_ns == before
    metrics = TOOLS["script"].measure(ticket.folder)
    assert metrics.keys() == {"score"} and 0 < metrics[ticket.metric] < 100
    assert lth.Ticket.load(ticket.folder / "final.ticket").masks == ticket18.masks


def test_each_condition_is_a_ticket_of_its_own(
    folder: Path,
    ticket18: lth.Ticket,
    dense18_file: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    Path("train.py").write_text(KEEPS_THE_TICKET)
    found = {}
    for planned in plan(load_config("study.yaml")).runs:
        assert run(planned) == 0
        assert not Path(planned.folder, MADE).exists()
        found[planned.kind] = lth.Ticket.load(planned.folder / "given")
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 5 and len(set(said)) == 1 and said[0].startswith("3 --max_steps=2 ")
    assert found["ticket"] == ticket18 and found["dense"] == lth.Ticket.load(dense18_file)
    assert found["random"].masks == ticket18.masks.shuffled(3)
    assert found["reversed"].masks == ~ticket18.masks
    assert found["reinit"].masks == ticket18.masks
    # torchvision's initialisation: normal, of a variance of 2 / (64 * 7 * 7).
    stem = found["reinit"].weights["conv1.weight"]
    assert stem.std() == pytest.approx((2 / (64 * 49)) ** 0.5, rel=0.05)
    assert not torch.equal(stem, ticket18.weights["conv1.weight"])


def test_a_script_that_fails_is_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("train.py").write_text("raise ValueError('out of data')")
    first, *_ = plan(load_config("study.yaml")).runs
    assert run(first) == 2
    assert "error: train.py raised ValueError: out of data" in capsys.readouterr().err
    for text, said in {"3": "found 3", '{"score": "3"}': "'3'", "x": "Expecting"}.items():
        (first.folder / "metrics.json").write_text(text)
        with pytest.raises(RunError, match=f"names and numbers in .*{said}"):
            TOOLS["script"].measure(first.folder)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("tasks.scenes.metric=null", "expected tasks.scenes.metric, found none"),
        ("tasks.scenes.margin=null", "only you know the scale of score"),
        ("tasks.scenes.config=no.py", "no.py"),
        ("sources.own={task: scenes, weights: mine}", "found scenes, of the tool script"),
    ],
)
def test_what_only_the_user_knows_is_asked_for(change: str, said: str, folder: Path) -> None:
    with pytest.raises(ConfigError, match=said):
        plan(load_config("study.yaml", [change]))
