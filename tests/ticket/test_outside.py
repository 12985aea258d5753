"""What a ticket prunes outside the trunk takes part in all that is done with the ticket."""

import copy
import pickle
from dataclasses import replace

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune

import lth_plugins as lth
from lth_plugins import Masks, Ticket, TicketError
from lth_plugins.ticket import Outside
from tests.masking.models import unchanged

FC = "fc.weight"


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(1)
    return torchvision.models.resnet18()


def test_trunk_and_outside_are_ranked_together_as_pytorch_would(whole18, resnet18_state) -> None:
    model = torchvision.models.resnet18()
    model.load_state_dict(resnet18_state)
    names = [name.removesuffix(".weight") for name in whole18.all_masks]
    parameters = [(model.get_submodule(name), "weight") for name in names]
    torch_prune.global_unstructured(parameters, torch_prune.L1Unstructured, amount=0.9)
    for name in names:
        expected = model.get_submodule(name).weight_mask.bool()
        assert torch.equal(whole18.all_masks[f"{name}.weight"], expected), name


def test_sparsity_counts_the_trunk_alone(whole18) -> None:
    assert whole18.all_masks.sparsity == pytest.approx(0.9, abs=1e-6)
    assert whole18.sparsity == whole18.masks.sparsity != whole18.all_masks.sparsity
    assert FC not in whole18.masks


def test_reversed_and_random_masks_are_so_everywhere(whole18) -> None:
    assert whole18.reversed().all_masks == ~whole18.all_masks
    random = whole18.shuffled(3)
    assert random.all_masks.densities() == whole18.all_masks.densities()
    assert random.outside.masks != whole18.outside.masks
    assert random.masks == whole18.without_outside().shuffled(3).masks


def test_masks_of_the_trunk_alone_leave_the_outside(whole18) -> None:
    other = whole18.with_masks(whole18.masks.shuffled(1), {})
    assert other.outside.masks == whole18.outside.masks and other.masks != whole18.masks


def test_other_weights(whole18, resnet18_state, ticket18) -> None:
    moved = {name: value + 1 for name, value in resnet18_state.items()}
    both = whole18.with_weights(moved)
    assert torch.equal(both.outside.weights[FC], moved[FC])
    assert torch.equal(both.weights["conv1.weight"], moved["conv1.weight"])
    assert whole18.with_weights(both).outside.weights[FC].equal(moved[FC])
    # A ticket that is given whole brings both, where its weights alone lack the outside.
    loaded = replace(whole18, known=whole18.masks)
    with pytest.raises(TicketError, match=r"ticket\.with_weights\(dense\), where"):
        loaded.reversed()
    assert loaded.with_weights(whole18).reversed().all_masks == ~whole18.all_masks
    # A ticket of a trunk has no weights outside it, which keeps its own.
    dense = Ticket.dense(moved)
    assert whole18.with_weights(dense).outside.weights[FC].equal(whole18.outside.weights[FC])
    trunk = {name: value for name, value in moved.items() if not name.startswith("fc")}
    with pytest.raises(
        TicketError, match=r"expected a weight of shape \(1000, 512\) for fc.weight"
    ):
        whole18.with_weights(trunk)


def test_a_file_knows_the_surviving_weights_outside_only(whole18, tmp_path) -> None:
    stored = Ticket.load(whole18.save(tmp_path / "a.ticket"))
    other = Masks({**whole18.masks, FC: ~whole18.outside.masks[FC]})
    with pytest.raises(TicketError, match="outside the trunk that the ticket does not know"):
        stored.with_masks(other, {})
    assert stored.with_weights(whole18).with_masks(other, {}).outside.masks[FC].any()


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("fc.bias", (1000,), "found fc.bias of shape"),
        ("layer1.0.conv1.weight", (64, 64, 3, 3), "is in the trunk"),
        (FC, (1000, 511), r"expected a weight of shape \(1000, 511\)"),
        ("gc.weight", (1000, 512), "expected a weight .* for gc.weight, found none"),
    ],
)
def test_what_cannot_be_outside_is_refused(name, shape, message, resnet18_state) -> None:
    dense = Ticket.dense(resnet18_state)
    with pytest.raises(TicketError, match=message):
        replace(dense, outside=Outside.dense({name: shape}, resnet18_state))


def train(model: nn.Module) -> None:
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=0.1)
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    for _ in range(2):
        optimizer.zero_grad()
        model(images).square().mean().backward()
        optimizer.step()


def zeros(state: dict[str, Tensor], ticket: Ticket) -> bool:
    return not any(state[name][~mask].any() for name, mask in ticket.all_masks.items())


def test_attaching_to_a_whole_model(whole18, model, resnet18_state) -> None:
    handle = lth.attach(model, whole18)
    assert torch.equal(model.fc.weight * ~whole18.outside.masks[FC], torch.zeros(1000, 512))
    kept = whole18.outside.masks[FC]
    assert torch.equal(model.fc.weight[kept], whole18.outside.weights[FC][kept])
    train(model)
    assert zeros(model.state_dict(), whole18)
    handle.verify()
    tuned = handle.ticket()
    assert tuned.all_masks == whole18.all_masks
    assert torch.equal(tuned.outside.weights[FC], model.fc.weight)
    model.load_state_dict(resnet18_state)
    assert zeros(model.state_dict(), whole18)
    with torch.no_grad():
        model.fc.weight.fill_(1)
    with pytest.raises(TicketError, match=r"pruned weights of fc\.weight"):
        handle.verify()


def test_a_backbone_first_and_the_outside_once_the_model_is_whole(whole18, model) -> None:
    lth.attach(model, whole18, whole=False)
    dense = model.fc.weight.detach().clone()
    assert dense.all(), "nothing outside the trunk is touched yet"
    for stray in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), model):
        with pytest.raises(TicketError, match="call lth_plugins.attach_rest"):
            train(stray)
        with pytest.raises(TicketError, match="call lth_plugins.attach_rest"):
            lth.attached(stray).verify()
        lth.attach_rest(stray)
        lth.attach_rest(stray)  # nothing is left to do
        train(stray)
        lth.attached(stray).verify()
        assert lth.attached(stray).all_masks == whole18.all_masks


def test_another_model_is_refused_and_unchanged(whole18) -> None:
    model = torchvision.models.resnet18(num_classes=4)
    said = (
        r"shape \(1000, 512\), found one of \(4, 512\).* only its trunk .*: ticket\.without_outside"
    )
    with unchanged(model), pytest.raises(TicketError, match=said):
        lth.attach(model, whole18)
    lth.attach(model, whole18.without_outside())
    train(model)


def test_gradual_pruning_includes_the_outside(whole18, model) -> None:
    handle = lth.attach(model, whole18)
    pruning = lth.SparseTraining("gradual", target=0.91, begin=0, end=1, period=1)
    pruning.start(model, 1)
    pruning.after_step(model, 1)
    masks = handle.all_masks
    assert masks.kept == masks.numel - round(0.91 * masks.numel)
    assert masks.issubset(whole18.all_masks)
    assert 0 < masks[FC].sum() < whole18.outside.masks[FC].sum()
