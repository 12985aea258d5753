"""What a watched backbone refuses to load, and what its state dicts note, in any host."""

import copy
import pickle
from dataclasses import replace
from io import BytesIO

import pytest
import torch
import torchvision
from torch import nn

import lth_plugins as lth
from lth_plugins import TicketError
from lth_plugins.masking.input import ModelInput
from lth_plugins.masking.loading import noted_input, refuse_to_run, watch_loading, why_refused
from lth_plugins.ticket import Outside, Wording

ALLOWING = Wording(other_checkpoint="allow it")
INPUT = ModelInput("RGB", [0.0, 0.0, 0.0], [255.0, 255.0, 255.0])


def watched(ticket: lth.Ticket | None, **options: object) -> nn.Module:
    model = torchvision.models.resnet18()
    if ticket is not None:
        lth.attach(model, ticket)
    watch_loading(model, wording=ALLOWING, **options)
    return model


def test_the_note_survives_files_copies_and_pickles(ticket18: lth.Ticket) -> None:
    model = watched(ticket18, model_input=INPUT)
    file = BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    for state in (
        torch.load(file, weights_only=True),
        copy.deepcopy(model).state_dict(),
        pickle.loads(pickle.dumps(model)).state_dict(),
    ):
        assert state._metadata[""]["ticket_masks"] == [ticket18.masks.digest]
        assert noted_input(state) == INPUT
        assert state.keys() == torchvision.models.resnet18().state_dict().keys()
    lth.attached(model).detach()
    assert noted_input(model.state_dict()) is None


def test_copies_and_pickles_check_what_they_load(ticket18: lth.Ticket) -> None:
    other = watched(ticket18.shuffled(1)).state_dict()
    model = watched(ticket18)
    for one in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with pytest.raises(TicketError, match=r"zero [1-9][\d,]* of its [\d,]+ surviving"):
            one.load_state_dict(other)
        one.load_state_dict(model.state_dict())


def test_another_checkpoint_loads_masked_where_that_is_allowed(
    ticket18: lth.Ticket, caplog: pytest.LogCaptureFixture
) -> None:
    other = watched(ticket18.shuffled(1)).state_dict()
    model = watched(ticket18, allow_other_checkpoint=True)
    model.load_state_dict(other)
    lth.attached(model).verify()
    assert "which is allowed (allow it)" in caplog.text
    assert "zeroed by the attached mask" not in caplog.text, "it is said once"


def test_masks_that_zero_nothing_are_other_masks(ticket18: lth.Ticket) -> None:
    """Trained on, the sparser run's pruned weights would come back to life."""
    sparser = ticket18.with_masks(lth.prune(dict(ticket18.weights), 0.5, ticket18.masks), {})
    with pytest.raises(TicketError, match=r"zero 0 of its [\d,]+ surviving weights"):
        watched(ticket18).load_state_dict(watched(sparser).state_dict())


def test_a_checkpoint_that_notes_nothing_is_judged_by_its_weights(
    ticket18: lth.Ticket, caplog: pytest.LogCaptureFixture
) -> None:
    def plain(ticket: lth.Ticket | None) -> dict[str, torch.Tensor]:
        return dict(watched(ticket).state_dict())

    watched(ticket18).load_state_dict(plain(ticket18))
    for other in (ticket18.shuffled(1), None):
        with pytest.raises(TicketError, match=r"says nothing about: .* zero [1-9][\d,]* of its"):
            watched(ticket18).load_state_dict(plain(other))
    assert "does not note its masks" not in caplog.text
    sparser = ticket18.with_masks(lth.prune(ticket18, 0.5), {})
    watched(ticket18).load_state_dict(plain(sparser))  # as of a file of safetensors
    zeros, kept = ticket18.masks.kept - sparser.masks.kept, ticket18.masks.kept
    assert f"{zeros:,} of the {kept:,} weights that the ticket keeps are zero" in caplog.text


def test_a_gradually_pruned_checkpoint_is_trained_with_its_own_masks_alone(
    ticket18: lth.Ticket,
) -> None:
    images = torch.zeros(2, 3, 32, 32)
    run = watched(ticket18)
    run.state_dict()
    sparser = lth.prune(dict(ticket18.weights), 0.5, ticket18.masks)
    lth.attached(run).replace(sparser)
    saved = run.state_dict()

    resumed = watched(ticket18)  # as by a trainer, which restores the masks after the weights
    resumed.load_state_dict(saved)
    resumed.eval()(images)
    for one in (resumed, copy.deepcopy(resumed)):
        with pytest.raises(TicketError, match=r"what was pruned would train again, .* Resume with"):
            one.train()(images)
    lth.attached(resumed).replace(sparser)
    resumed.train()(images)

    early = watched(ticket18)  # as by one that restores them before
    lth.attached(early).replace(sparser)
    early.load_state_dict(saved)
    early.train()(images)
    assert early.state_dict()._metadata[""]["ticket_masks"] == [
        ticket18.masks.digest,
        sparser.digest,
    ]
    wanted = watched(ticket18, allow_other_checkpoint=True)
    wanted.load_state_dict(saved)
    wanted.train()(images)


def test_the_count_holds_where_a_module_further_up_masks_first(
    ticket18: lth.Ticket, resnet18_state: dict[str, torch.Tensor]
) -> None:
    """A ticket that prunes a head has the whole model mask what is loaded."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(512, 10)
            self.backbone = torchvision.models.resnet18()

    head = {"head.weight": torch.randn(10, 512)}
    masks = lth.Masks({"head.weight": torch.rand(10, 512) < 0.5})
    model = Model()
    lth.attach(model.backbone, replace(ticket18, outside=Outside(masks, head)), whole=False)
    watch_loading(model.backbone, wording=ALLOWING)
    lth.attach_rest(model)
    dense = {**head, "head.bias": torch.zeros(10)}
    dense |= {f"backbone.{name}": value for name, value in resnet18_state.items()}
    alive = {n: resnet18_state[n] != 0 for n in ticket18.masks}
    zeroed = sum(int((alive[n] & ~mask).sum()) for n, mask in ticket18.masks.items())
    total = sum(int(one.sum()) for one in alive.values())
    with pytest.raises(TicketError, match=f"zero {zeroed:,} of its {total:,} surviving weights"):
        model.load_state_dict(dense)


def test_a_head_alone_is_none_of_a_backbones_business(ticket18: lth.Ticket) -> None:
    model = watched(ticket18)
    model.load_state_dict({"fc.bias": torch.zeros(1000)}, strict=False)
    with pytest.raises(TicketError, match="found none that fit 18 of them"):
        model.load_state_dict({"layer1.0.conv1.weight": torch.zeros(64, 64, 3, 3)}, strict=False)


def test_another_input_is_refused_with_or_without_a_ticket(ticket18: lth.Ticket) -> None:
    state = watched(ticket18, model_input=INPUT).state_dict()
    for ticket in (ticket18, None):
        watched(ticket, model_input=replace(INPUT, mean=[0.001, 0.0, 0.0])).load_state_dict(state)
        watched(ticket).load_state_dict(state)
        with pytest.raises(TicketError, match="trained on RGB .* the model has BGR"):
            watched(ticket, model_input=replace(INPUT, format="BGR")).load_state_dict(state)


def test_a_leaking_model_can_be_healed_by_loading(ticket18: lth.Ticket) -> None:
    model, good = watched(ticket18), watched(ticket18).state_dict()
    with torch.no_grad():
        model.layer2[0].conv1.weight.fill_(1)
    model.load_state_dict(good)
    lth.attached(model).verify()


def test_a_backbone_without_its_ticket_infers_once_something_was_loaded(
    ticket18: lth.Ticket,
) -> None:
    model = watched(None)
    refuse_to_run(model, "there is no ticket")
    assert why_refused(model) == "there is no ticket"
    images = torch.zeros(1, 3, 32, 32)
    with pytest.raises(TicketError, match="there is no ticket"):
        model.eval()(images)
    model.load_state_dict(watched(ticket18).state_dict())
    model(images)
    with torch.no_grad():
        model.train()(torch.zeros(2, 3, 32, 32))  # statistics alone are no training
    with pytest.raises(TicketError, match="there is no ticket"):
        model(images)
