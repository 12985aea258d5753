"""Ticket backbones as timm models."""

import copy
import pickle

import pytest
import timm
import torch
import torchvision
from timm.data import resolve_model_data_config
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
