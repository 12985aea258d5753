"""A ticket on a user's own LightningModule, under a real Trainer."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback, EMAWeightAveraging

import lth_plugins as lth
from lth_plugins.lightning import (
    GradualPruningCallback,
    SlimmingCallback,
    SparseTrainingCallback,
    TicketCallback,
)
from lth_plugins.slimming.widths import adopt_widths
from tests.lightning import two_processes
from tests.lightning.module import STEPS, Classifier, train
from tests.processes import together

LEAK = "layer2.0.conv1.weight"


def leaks_in(checkpoint: Path, ticket: lth.Ticket) -> list[str]:
    state = torch.load(checkpoint, weights_only=False)["state_dict"]
    return [n for n, mask in ticket.masks.items() if state[f"net.{n}"][~mask].any()]


@pytest.fixture(scope="module")
def whole(ticket18: lth.Ticket, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of two epochs in mixed precision that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    callback = TicketCallback(source="own task")
    train(Classifier(ticket18), folder, callback, precision="bf16-mixed")
    return folder


def test_checkpoints_are_masked_under_stock_keys_and_the_final_ticket_is_written(
    whole: Path, ticket18: lth.Ticket
) -> None:
    last = torch.load(whole / "epoch=1.ckpt", weights_only=False)["state_dict"]
    assert list(last) == list(Classifier(None).state_dict())
    assert not leaks_in(whole / "epoch=0.ckpt", ticket18) + leaks_in(
        whole / "epoch=1.ckpt", ticket18
    )
    final = lth.Ticket.load(whole / "final.ticket")
    assert final.masks == ticket18.masks and final.meta.source == "own task"
    assert all(torch.equal(value, last[f"net.{n}"]) for n, value in final.weights.items())
    assert not torch.equal(final.weights[LEAK], ticket18.sparse_weights()[LEAK])


def test_a_run_resumes_bit_for_bit(whole: Path, ticket18: lth.Ticket, tmp_path: Path) -> None:
    module = Classifier(ticket18)
    resume = {"resume": whole / "epoch=0.ckpt", "precision": "bf16-mixed"}
    train(module, tmp_path, TicketCallback(tmp_path / "own.ticket", source="own task"), **resume)
    expected = torch.load(whole / "epoch=1.ckpt", weights_only=False)["state_dict"]
    assert all(torch.equal(module.state_dict()[name], v) for name, v in expected.items())
    assert lth.Ticket.load(tmp_path / "own.ticket") == lth.Ticket.load(whole / "final.ticket")


@pytest.mark.parametrize("late", [False, True], ids=["in init", "in configure_model"])
def test_a_run_is_not_resumed_with_another_ticket(
    late: bool, whole: Path, ticket18: lth.Ticket, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    module = Classifier(ticket18.shuffled(3), late)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    resume = {"resume": whole / "epoch=0.ckpt"}
    with pytest.raises(lth.TicketError, match="expected a checkpoint that was trained with this"):
        train(module, tmp_path, TicketCallback(), **resume)
    assert not list(tmp_path.iterdir())
    if not late:
        assert all(torch.equal(module.state_dict()[name], value) for name, value in before.items())
    allowing = TicketCallback(allow_other_checkpoint=True)
    train(Classifier(ticket18.shuffled(3), late), tmp_path, allowing, **resume)
    assert lth.Ticket.load(tmp_path / "final.ticket").masks == ticket18.shuffled(3).masks


class Leak(Callback):
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.current_epoch == 1:
            with torch.no_grad():
                pl_module.get_parameter(f"net.{LEAK}").fill_(1.0)


def test_a_leak_stops_the_run_before_it_is_saved(ticket18: lth.Ticket, tmp_path: Path) -> None:
    with pytest.raises(lth.TicketError, match=LEAK):
        train(Classifier(ticket18), tmp_path, TicketCallback(), Leak())
    assert [path.name for path in tmp_path.iterdir()] == ["epoch=0.ckpt"]


def test_a_module_without_a_ticket_is_refused(tmp_path: Path) -> None:
    with pytest.raises(lth.TicketError, match=r"found none: write lth_plugins\.attach"):
        train(Classifier(None), tmp_path, TicketCallback())
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_written_is_refused_before_training(
    ticket18: lth.Ticket, tmp_path: Path
) -> None:
    for callback, error, message in (
        (TicketCallback(sorce="mine"), lth.ConfigError, "source, round, .* found sorce"),
        (TicketCallback(source=3), lth.TicketError, "expected source .* to be text"),
        (TicketCallback(tmp_path), lth.RunError, "found the folder"),
    ):
        with pytest.raises(error, match=message):
            train(Classifier(ticket18), tmp_path, callback)
    train(Classifier(ticket18), tmp_path, TicketCallback(), fast_dev_run=True)
    assert not list(tmp_path.iterdir())


def gradual(**options: Any) -> GradualPruningCallback:
    return GradualPruningCallback(target=0.9, begin=0, end=2 * STEPS, period=1, **options)


def rigl(**options: Any) -> SparseTrainingCallback:
    return SparseTrainingCallback("rigl", delta_t=1, t_end=1.0, **options)


@pytest.mark.parametrize("method", [gradual, rigl])
def test_sparse_training_resumes_with_its_masks(
    method: Callable[[], Callback], ticket18: lth.Ticket, tmp_path: Path
) -> None:
    finals = []
    for name, resume in (("whole", None), ("resumed", tmp_path / "whole/epoch=0.ckpt")):
        folder = tmp_path / name
        train(Classifier(ticket18), folder, TicketCallback(), method(), resume=resume)
        finals.append(lth.Ticket.load(folder / "final.ticket"))
    assert finals[0] == finals[1]
    masks = finals[0].masks
    if method is gradual:
        assert masks.kept == masks.numel - round(0.9 * masks.numel)
        assert masks.issubset(ticket18.masks)
    else:
        assert masks != ticket18.masks and masks.densities() == ticket18.masks.densities()


def test_several_batches_of_a_step_prune_once(
    ticket18: lth.Ticket, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "lth_plugins")
    pruning = GradualPruningCallback(target=0.9, begin=0, end=2, period=1)
    train(Classifier(ticket18), tmp_path, pruning, accumulate_grad_batches=STEPS)
    assert [r.getMessage().split(" after ")[1] for r in caplog.records if "dropped" in r.msg] == [
        "1 iterations",
        "2 iterations",
    ]


def test_gradual_pruning_refuses_what_it_does_not_fit(ticket18: lth.Ticket, tmp_path: Path) -> None:
    with pytest.raises(lth.ConfigError, match="within the training's 2 iterations, found end 4"):
        train(Classifier(ticket18), tmp_path, gradual(), epochs=1)
    with pytest.raises(lth.ConfigError, match="found both: averages"):
        train(Classifier(ticket18), tmp_path, gradual(), EMAWeightAveraging(decay=0.9))
    with pytest.raises(lth.ConfigError, match="found 2, gradual pruning included: choose one"):
        train(Classifier(ticket18), tmp_path, gradual(), rigl())
    assert not list(tmp_path.iterdir())


IMAGES = torch.rand(1, 3, 32, 32)


def slimming(**options: Any) -> SlimmingCallback:
    return SlimmingCallback(lambda module: module.net(IMAGES), flops=0.5, period=1, **options)


def test_a_module_is_slimmed_and_a_run_that_resumes_ends_with_the_same(
    ticket18: lth.Ticket, tmp_path: Path
) -> None:
    found = []
    for name, resume in (("whole", None), ("resumed", tmp_path / "whole/epoch=0.ckpt")):
        train(Classifier(ticket18), tmp_path / name, slimming(), resume=resume)
        found.append(torch.load(tmp_path / name / "slim.pth"))
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())
    ticket = lth.Ticket.load(tmp_path / "whole/slim.ticket")
    module = Classifier(None)
    adopt_widths(module, found[0])
    module.load_state_dict(found[0])
    assert module.net.conv1.out_channels < 64 and ticket.sparsity > 0.5
    lth.attach(module.net, ticket, load_weights=False).verify()


def test_slimming_refuses_what_it_does_not_fit(ticket18: lth.Ticket, tmp_path: Path) -> None:
    for callbacks, options, message in (
        ((slimming(end=9),), {}, "within the training's 4 iterations, found end 9"),
        ((slimming(), gradual()), {}, "expected slimming without GradualPruningCallback"),
        ((slimming(), EMAWeightAveraging(decay=0.9)), {}, "SlimmingCallback without WeightAver"),
        ((slimming(),), {"epochs": -1}, "found a training without an end: write end="),
    ):
        with pytest.raises(lth.ConfigError, match=message):
            train(Classifier(ticket18), tmp_path, *callbacks, **options)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_two_processes_keep_the_zeros_and_see_a_leak_in_either(
    ticket18: lth.Ticket, ticket18_file: Path, tmp_path: Path
) -> None:
    said = together(two_processes.train_and_leak, f"{ticket18_file}", f"{tmp_path}")
    assert not leaks_in(tmp_path / "whole/epoch=1.ckpt", ticket18)
    assert lth.Ticket.load(tmp_path / "whole/final.ticket").masks == ticket18.masks
    assert "that one has ended" in said[0] and LEAK in said[1]
    assert [path.name for path in (tmp_path / "leak").iterdir()] == ["epoch=0.ckpt"]
