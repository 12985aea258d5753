"""Ticket backbones as timm models."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from timm.data import resolve_model_data_config
from timm.models import resume_checkpoint
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.task import ClassificationTask
from timm.utils import CheckpointSaver, ModelEmaV3, dispatch_clip_grad
from torchvision.models.feature_extraction import create_feature_extractor

import lth_plugins as lth
import lth_plugins.timm
from lth_plugins import Ticket, TicketError


def test_a_ticket_model_is_timms_with_the_ticket_on_it(ticket18, ticket18_file) -> None:
    model = timm.create_model("ticket_resnet18", ticket=ticket18_file, num_classes=7)
    lth.attached(model).verify()
    assert lth.attached(model).masks == ticket18.masks
    assert list(model.state_dict()) == list(timm.create_model("resnet18").state_dict())
    assert model(torch.zeros(1, 3, 64, 64)).shape == (1, 7)


def test_a_model_that_was_given_a_ticket_can_be_copied(ticket18) -> None:
    model = timm.create_model("ticket_resnet18", ticket=ticket18)
    for clone in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert lth.attached(clone).ticket() == ticket18


def test_features_only_models_carry_it_too(ticket18) -> None:
    model = timm.create_model("ticket_resnet18", ticket=ticket18, features_only=True)
    assert lth.attached(model).masks == ticket18.masks
    assert len(model(torch.zeros(1, 3, 64, 64))) == 5
    # timm leaves out the stages after the last that is asked for.
    options = {"features_only": True, "out_indices": (1, 2, 3)}
    model = timm.create_model("ticket_resnet18", ticket=ticket18, **options)
    names = [name for name in ticket18.masks if not name.startswith("layer4")]
    assert list(lth.attached(model).masks) == names


def test_the_input_is_the_tickets(resnet18_state) -> None:
    ticket = Ticket.dense(resnet18_state, input=lth.ticket.UNIT_RANGE)
    config = resolve_model_data_config(timm.create_model("ticket_resnet18", ticket=ticket))
    assert config["mean"] == (0, 0, 0) and config["std"] == (1, 1, 1)


@pytest.mark.parametrize("options", [{}, {"pretrained": True}])
def test_without_a_ticket_it_says_what_to_give(options) -> None:
    with pytest.raises(TicketError, match="give ticket="):
        timm.create_model("ticket_resnet18", **options)


def test_a_ticket_of_another_depth_is_refused(ticket18) -> None:
    with pytest.raises(
        TicketError, match="the ticket is for a resnet18 .* the model's trunk is a resnet50"
    ):
        timm.create_model("ticket_resnet50", ticket=ticket18)


def test_bgr_is_refused(resnet18_state) -> None:
    ticket = Ticket.dense(resnet18_state, input=lth.InputSpec("BGR"))
    with pytest.raises(TicketError, match="timm gives models RGB"):
        timm.create_model("ticket_resnet18", ticket=ticket)


def test_every_shared_architecture_is_registered() -> None:
    assert len(timm.list_models("ticket_*")) >= 14


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_a_ticket_has_torchvisions_features(arch: str) -> None:
    torch.manual_seed(0)
    theirs = torchvision.models.get_model(arch)
    dense = Ticket.dense(theirs)
    ticket = Ticket(lth.prune(theirs, 0.9), theirs.state_dict(), dense.meta)
    lth.attach(theirs, ticket)
    ours = timm.create_model(f"ticket_{arch}", ticket=ticket, features_only=True)
    trunk = create_feature_extractor(theirs, ["relu", "layer1", "layer2", "layer3", "layer4"])
    image = torch.randn(1, 3, 64, 64)
    for ours_out, theirs_out in zip(ours.eval()(image), trunk.eval()(image).values(), strict=True):
        assert torch.equal(ours_out, theirs_out)


LEAK = "layer2.0.conv1.weight"


class Loop:
    """timm's train.py, of its own parts: it has no line about tickets."""

    def __init__(self, ticket: lth.Ticket, folder: Path, **options: bool) -> None:
        torch.manual_seed(0)
        self.model = timm.create_model("ticket_resnet18", ticket=ticket, num_classes=4, **options)
        self.optimizer = create_optimizer_v2(self.model, opt="sgd", lr=0.05, weight_decay=0.1)
        self.task = ClassificationTask(self.model, criterion_kwargs={"smoothing": 0.1})
        self.task.setup_ema(decay=0.9)
        self.scheduler, _ = create_scheduler_v2(self.optimizer, num_epochs=3, warmup_epochs=1)
        folder.mkdir(exist_ok=True)
        self.saver = CheckpointSaver(
            self.model, self.optimizer, task=self.task, checkpoint_dir=str(folder)
        )
        generator = torch.Generator().manual_seed(1)
        self.images = torch.rand(4, 3, 32, 32, generator=generator)

    def epoch(self, epoch: int) -> None:
        self.model.train()
        for step, part in enumerate((slice(0, 2), slice(2, 4))):
            self.optimizer.zero_grad()
            self.task(self.images[part], torch.arange(4)[part])["loss"].backward()
            dispatch_clip_grad(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.task.update_ema(step=2 * epoch + step + 1)
        self.scheduler.step(epoch + 1, 1.0 - epoch / 10)
        self.saver.save_checkpoint(epoch, metric=epoch)

    def resume(self, path: Path) -> None:
        """Start from a checkpoint, as ``--resume`` does."""
        start = resume_checkpoint(self.model, str(path), self.optimizer)
        checkpoint = torch.load(path, weights_only=True)
        self.task.load_checkpoint_state(checkpoint["state_dict_ema"], ema=True)
        self.scheduler.step(start)


@pytest.fixture(scope="module")
def trained(ticket18: lth.Ticket, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two epochs of timm's loop have saved."""
    folder = tmp_path_factory.mktemp("timm")
    loop = Loop(ticket18, folder)
    for epoch in range(2):
        loop.epoch(epoch)
    return folder


def test_timms_own_loop_saves_zeros_and_averages_them(trained: Path, ticket18: lth.Ticket) -> None:
    checkpoint = torch.load(trained / "last.pth.tar", weights_only=True)
    stock = timm.create_model("resnet18", num_classes=4)
    for entry in ("state_dict", "state_dict_ema"):
        state = checkpoint[entry]
        assert list(state) == list(stock.state_dict())
        stock.load_state_dict(state)
        assert all(not state[name][~mask].any() for name, mask in ticket18.masks.items()), entry
        assert not torch.equal(state[LEAK], ticket18.sparse_weights()[LEAK]), f"{entry} stands"
    assert not torch.equal(checkpoint["state_dict_ema"][LEAK], checkpoint["state_dict"][LEAK])


@pytest.mark.parametrize("averaged", [False, True])
def test_timms_own_saver_refuses_a_leak_and_keeps_what_it_has(
    averaged: bool, ticket18: lth.Ticket, tmp_path: Path
) -> None:
    loop = Loop(ticket18, tmp_path)
    loop.epoch(0)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    average = loop.task.get_trainable_module(ema=True)
    assert isinstance(average, ModelEmaV3)
    with torch.no_grad():
        (average.module if averaged else loop.model).get_parameter(LEAK).fill_(1.0)
    with pytest.raises(TicketError, match=LEAK):
        loop.saver.save_checkpoint(1)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_timms_own_loop_resumes_bit_for_bit(
    trained: Path, ticket18: lth.Ticket, tmp_path: Path
) -> None:
    loop = Loop(ticket18, tmp_path)
    loop.resume(trained / "checkpoint-0.pth.tar")
    loop.epoch(1)
    expected = torch.load(trained / "last.pth.tar", weights_only=True)
    found = torch.load(tmp_path / "last.pth.tar", weights_only=True)
    for entry in ("state_dict", "state_dict_ema"):
        same = {name: torch.equal(found[entry][name], v) for name, v in expected[entry].items()}
        assert all(same.values()), [name for name, equal in same.items() if not equal]


def test_a_checkpoint_of_another_ticket_is_refused(
    trained: Path, ticket18: lth.Ticket, tmp_path: Path
) -> None:
    other = ticket18.shuffled(3)
    loop = Loop(other, tmp_path)
    before = loop.model.state_dict()[LEAK].clone()
    with pytest.raises(TicketError, match=r"zero [1-9][\d,]* .* allow_other_checkpoint=True"):
        loop.resume(trained / "last.pth.tar")
    assert torch.equal(loop.model.state_dict()[LEAK], before)
    loop = Loop(other, tmp_path, allow_other_checkpoint=True)
    loop.resume(trained / "last.pth.tar")
    lth.attached(loop.model).verify()
