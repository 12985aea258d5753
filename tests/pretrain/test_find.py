"""tools/find_ticket.py on real digits: it repeats, and refuses what does not fit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import torchvision
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lth_plugins import Ticket
from lth_plugins.commands import find as command
from lth_plugins.resilience.lock import LOCK

ROOT = Path(__file__).resolve().parents[2]
DIGITS = ROOT / "configs/pretrain/digits_supervised.yaml"
SETTINGS = ["data.size=16", "data.subset=32", "batch_size=16", "rounds=2", "checkpoint_steps=2"]
SETTINGS += ["pretrain.epochs=1", "training.epochs=1"]
ROUNDS = 2


def tool(*arguments: object) -> int:
    """The exit code of tools/find_ticket.py, run in this process."""
    return command.main([str(argument) for argument in arguments])


def find(out: Path, *overrides: str) -> None:
    assert tool(DIGITS, f"out={out}", *SETTINGS, *overrides) == 0


def artefacts(out: Path) -> dict[str, bytes]:
    files = (path for path in sorted(out.iterdir()) if path.is_file() and path.name != LOCK)
    return {path.name: path.read_bytes() for path in files}


def results(out: Path) -> list[dict]:
    """The lines of metrics.jsonl but for the time each round took."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("find") / "run"
    find(out)
    return out


def tickets(out: Path) -> list[Ticket]:
    return [Ticket.load(out / f"round_{k:02d}.ticket") for k in range(ROUNDS + 1)]


def test_a_run_leaves_its_tickets_its_metrics_and_no_checkpoints(run: Path) -> None:
    expected = {f"round_{k:02d}.ticket" for k in range(ROUNDS + 1)}
    expected |= {"config.yaml", "metrics.jsonl", "pretrained.safetensors", "recipe.json", LOCK}
    assert {path.name for path in run.iterdir()} == {*expected, "logs"}
    trainings = ["pretrain", *(f"round_{k:02d}" for k in range(1, ROUNDS + 1))]
    assert {path.name for path in (run / "logs").iterdir()} == set(trainings)
    for name in trainings:
        curves = EventAccumulator(str(run / "logs" / name)).Reload()
        assert {"train_loss", "train_top1", "val_top1"} <= set(curves.Tags()["scalars"])


def test_every_round_has_a_line_with_the_accuracy_of_its_trained_sub_network(run: Path) -> None:
    lines = results(run)
    assert [line["round"] for line in lines] == list(range(ROUNDS + 1))
    assert [line["density"] for line in lines] == [t.density for t in tickets(run)]
    for line in lines:
        assert line["sparsity"] == pytest.approx(1 - line["density"])
        assert {"train_loss", "train_top1", "val_loss", "val_top1", "val_top5"} <= set(line)
        assert 0 <= line["val_top1"] <= line["val_top5"] <= 1


def test_all_rounds_are_rewound_to_the_pretrained_network(run: Path) -> None:
    pretrained = load_file(run / "pretrained.safetensors")
    assert {"fc.weight", "fc.bias"} <= set(pretrained)
    for ticket in tickets(run):
        for name, value in ticket.sparse_weights().items():
            mask = ticket.masks.get(name, torch.ones_like(value, dtype=torch.bool))
            assert torch.equal(value, pretrained[f"trunk.{name}"] * mask), name


def test_a_ticket_says_where_it_was_found_without_paths_or_times(run: Path) -> None:
    meta = tickets(run)[2].meta
    assert (meta.arch, meta.source, meta.round) == ("resnet18", "digits", 2)
    assert meta.recipe["training"]["epochs"] == 1
    assert str(run) not in json.dumps(meta.to_dict())


def test_the_same_seed_gives_the_same_bytes_also_with_processes_that_load_images(
    run: Path, tmp_path: Path
) -> None:
    out = tmp_path / "again"
    find(out, "data.workers=2", "rounds=1")
    again, before = artefacts(out), artefacts(run)
    other = {"config.yaml", "metrics.jsonl"}  # these name the folder and the seconds
    assert again.keys() == before.keys() - {"round_02.ticket"}
    assert [name for name in again if again[name] != before[name] and name not in other] == []
    assert results(out) == results(run)[:2]


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run, tmp_path / "copy"))


def test_a_complete_run_does_nothing_and_can_be_given_more_rounds(run: Path, copy: Path) -> None:
    find(copy)
    unnamed = {**artefacts(run), "config.yaml": (copy / "config.yaml").read_bytes()}
    assert artefacts(copy) == unnamed
    # Round 3 prunes what training round 2 ends in: that is trained again, to the same end.
    find(copy, "rounds=3", "evaluate_last=false")
    assert Ticket.load(copy / "round_03.ticket").density == pytest.approx(0.8**3, abs=1e-6)
    assert results(copy) == results(run)


def test_a_run_starts_from_weights_that_others_trained(tmp_path: Path) -> None:
    model = torchvision.models.resnet18(num_classes=10)
    torch.save({"state_dict": model.state_dict()}, tmp_path / "theirs.pth")
    out = tmp_path / "run"
    find(out, f"init={tmp_path / 'theirs.pth'}", "rounds=1", "evaluate_last=false")
    pretrained = load_file(out / "pretrained.safetensors")
    assert torch.equal(pretrained["fc.weight"], model.fc.weight)
    assert torch.equal(pretrained["trunk.conv1.weight"], model.conv1.weight)
    assert results(out)[0]["round"] == 0 and "val_top1" in results(out)[0]


def refusal(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """What the tool says, in one line, when it refuses to start."""
    assert tool(*arguments) == 2
    message = capsys.readouterr().err.strip()
    assert message.startswith("lth find: error: ") and "\n" not in message
    return message


def test_another_recipe_is_refused_and_nothing_is_overwritten(
    copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = artefacts(copy)
    message = refusal(capsys, DIGITS, f"out={copy}", *SETTINGS, "training.lr=0.7")
    assert "training.lr is" in message and "0.7 was asked for" in message
    assert "seed is the default there, 1" in refusal(
        capsys, DIGITS, f"out={copy}", *SETTINGS, "seed=1"
    )
    assert artefacts(copy) == before


def test_bad_input_is_refused_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    for overrides, message in (
        (["rounds=-1"], "rounds to be 0 or more"),
        (["data.name=imagefolder", f"data.root={tmp_path}"], "expected a folder of images"),
        ([f"init={tmp_path / 'none.pth'}"], "found no such file"),
        (["batch_size=4096"], "expected at least one batch of 4096 images"),
    ):
        assert message in refusal(capsys, DIGITS, f"out={out}", *overrides)
    assert not out.exists()
    out.write_text("mine")
    assert "is a file" in refusal(capsys, DIGITS, f"out={out}")
    assert out.read_text() == "mine"


def test_initial_weights_that_do_not_fit_are_refused(
    tmp_path: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = tmp_path / "theirs.pth", tmp_path / "out"
    torch.save(torchvision.models.resnet34(num_classes=10).state_dict(), path)
    message = refusal(capsys, DIGITS, f"out={out}", f"init={path}")
    assert "expected resnet18 weights in init, found resnet34" in message
    torch.save(torchvision.models.resnet18(num_classes=7).state_dict(), path)
    message = refusal(capsys, DIGITS, f"out={out}", f"init={path}")
    assert "fc.weight of shape (10, 512), found (7, 512)" in message
    path.write_bytes(b"not a checkpoint")
    assert str(path) in refusal(capsys, DIGITS, f"out={out}", f"init={path}")
    message = refusal(capsys, DIGITS, f"out={out}", f"init={run / 'round_01.ticket'}")
    assert "expected dense weights in init" in message
    assert not out.exists()
