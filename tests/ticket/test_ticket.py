"""A ticket knows itself, checks itself, and does not follow the model it came from."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import torchvision

import lth_plugins as lth
from lth_plugins import InputSpec, Ticket, TicketError, TicketMeta


def test_a_dense_ticket_of_a_model(resnet18_state) -> None:
    ticket = Ticket.dense(resnet18_state, source="imagenet")
    assert (ticket.meta.arch, ticket.meta.round, ticket.sparsity) == ("resnet18", 0, 0)
    assert "fc.weight" not in ticket.weights and "conv1.weight" in ticket.weights


def test_training_on_does_not_change_the_ticket() -> None:
    model = torchvision.models.resnet18()
    ticket = Ticket.dense(model)
    before = ticket.weights["layer1.0.conv1.weight"].clone()
    with torch.no_grad():
        model.layer1[0].conv1.weight.zero_()
    assert torch.equal(ticket.weights["layer1.0.conv1.weight"], before)


def test_the_digest_is_that_of_the_content(ticket18, resnet18_state) -> None:
    same = Ticket(ticket18.masks, resnet18_state, ticket18.meta)
    assert same == ticket18 and same.digest == ticket18.digest and len({same, ticket18}) == 1
    changed = dict(resnet18_state)
    changed["bn1.running_mean"] = changed["bn1.running_mean"] + 1
    assert ticket18.with_weights(changed).digest != ticket18.digest
    assert Ticket(ticket18.masks, resnet18_state, replace(ticket18.meta, round=9)) != ticket18
    pruned = {
        n: v.masked_fill(~ticket18.masks[n], 7) if n in ticket18.masks else v
        for n, v in resnet18_state.items()
    }
    assert Ticket(ticket18.masks, pruned, ticket18.meta) == ticket18, (
        "pruned weights are no content"
    )


def test_reversed_keeps_what_was_pruned(ticket18) -> None:
    reverse = ticket18.reversed()
    assert reverse.masks == ~ticket18.masks
    assert reverse.meta.parent == ticket18.digest
    assert reverse.meta.recipe["masks"] == "reversed"


def test_shuffled_is_recorded_and_repeatable(ticket18) -> None:
    shuffled = ticket18.shuffled(3)
    assert shuffled == ticket18.shuffled(3)
    assert shuffled.meta.recipe["masks_seed"] == 3
    assert shuffled.masks.densities() == ticket18.masks.densities()


def test_a_ticket_from_a_file_needs_all_of_theta_for_other_masks(
    ticket18, resnet18_state, tmp_path
) -> None:
    loaded = Ticket.load(ticket18.save(tmp_path / "a.ticket"))
    for derive in (loaded.reversed, lambda: loaded.shuffled(0)):
        with pytest.raises(TicketError, match="Give it all of θ first"):
            derive()
    with pytest.raises(TicketError, match="does not know"):
        loaded.with_masks(~loaded.masks, {})
    dense = Ticket.load(Ticket.dense(resnet18_state).save(tmp_path / "dense.ticket"))
    assert loaded.with_weights(dense).reversed().masks == ~ticket18.masks


def test_weights_of_another_ticket_bring_their_input_along(ticket18, resnet18_state) -> None:
    other = Ticket.dense(resnet18_state, source="simclr", input=lth.ticket.UNIT_RANGE)
    mixed = ticket18.with_weights(other)
    assert mixed.meta.input == lth.ticket.UNIT_RANGE
    assert mixed.meta.recipe["weights"] == other.digest


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.pop("layer1.0.conv1.weight"), r"missing layer1\.0\.conv1\.weight"),
        (
            lambda m: m.update({"conv1.weight": torch.ones(64, 3, 7, 7)}),
            r"not prunable there conv1\.weight",
        ),
        (
            lambda m: m.update({"layer1.0.conv1.weight": torch.ones(2, 2)}),
            r"has shape \(2, 2\), but the parameter of resnet18 has \(64, 64, 3, 3\)",
        ),
        (
            lambda m: m.update({"layer1.0.conv1.weight": torch.full((64, 64, 3, 3), 0.5)}),
            "only 0 and 1, found 0.5",
        ),
    ],
    ids=["missing", "extra", "shape", "non-binary"],
)
def test_masks_that_do_not_fit_are_refused(ticket18, resnet18_state, change, message) -> None:
    masks = dict(ticket18.masks)
    change(masks)
    with pytest.raises(TicketError, match=message):
        Ticket(masks, resnet18_state, ticket18.meta)


def test_weights_of_another_depth_are_refused(ticket18) -> None:
    with pytest.raises(TicketError, match="says resnet18, but the weights are a resnet34's"):
        ticket18.with_weights(torchvision.models.resnet34().state_dict())


def test_weights_that_are_not_finite_are_refused(ticket18, resnet18_state) -> None:
    resnet18_state["layer3.0.conv1.weight"][0] = float("inf")
    with pytest.raises(
        TicketError, match=r"layer3\.0\.conv1\.weight holds a weight that is not finite"
    ):
        ticket18.with_weights(resnet18_state)


@pytest.mark.parametrize(
    "make",
    [
        lambda: TicketMeta(arch="resnet51"),
        lambda: TicketMeta(arch="resnet50", recipe={"when": object()}),
        lambda: TicketMeta(arch="resnet50", round=8.0),  # type: ignore[arg-type]
        lambda: TicketMeta(arch="resnet50", source=None),  # type: ignore[arg-type]
        lambda: TicketMeta(arch="resnet50", stride_in_1x1=1),  # type: ignore[arg-type]
        lambda: InputSpec(format="HSV"),
        lambda: InputSpec(mean=(0.5, 0.5)),  # type: ignore[arg-type]
        lambda: InputSpec(std=(1.0, 0.0, 1.0)),
    ],
)
def test_a_description_that_cannot_be_is_refused(make) -> None:
    with pytest.raises(TicketError):
        make()


def test_a_description_survives_its_dictionary() -> None:
    meta = TicketMeta("resnet50d", "moco", 3, InputSpec("BGR"), {"lr": 0.1}, "f" * 64, True)
    assert TicketMeta.from_dict(meta.to_dict()) == meta


def test_importing_the_package_imports_no_framework() -> None:
    code = (
        "import sys, lth_plugins; "
        "heavy = {'torchvision', 'timm', 'lightning', 'detectron2', 'mmengine', 'mmseg', "
        "'fvcore', 'sklearn', 'scipy', 'matplotlib', 'huggingface_hub'}; "
        "found = heavy & set(sys.modules); assert not found, found"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
