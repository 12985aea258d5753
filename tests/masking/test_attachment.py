"""C3: a mask costs nothing and never leaks, whatever a trainer does with the model."""

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import timm.optim
import torch
import torchvision
from torch import nn

import lth_plugins as lth
from lth_plugins import Ticket, TicketError
from tests.masking.models import backward, images, pruned_gradients, step_masked, unchanged

OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, 0.01),
    "SGD, momentum, weight decay": lambda p: torch.optim.SGD(
        p, 0.01, momentum=0.9, weight_decay=1e-2, nesterov=True
    ),
    "Adam": lambda p: torch.optim.Adam(p, 0.01, weight_decay=1e-2),
    "AdamW": lambda p: torch.optim.AdamW(p, 0.01),
    "RMSprop": lambda p: torch.optim.RMSprop(p, 0.01, momentum=0.9, centered=True),
    "LARS": lambda p: timm.optim.Lars(p, 0.1, momentum=0.9, weight_decay=1e-4),
    "LAMB": lambda p: timm.optim.Lamb(p, 0.01),
}


def test_attaching_loads_theta_under_the_masks(model, ticket18) -> None:
    lth.attach(model, ticket18)
    state = model.state_dict()
    for name, value in ticket18.sparse_weights().items():
        assert torch.equal(state[name], value), name


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_exact_zeros_after_every_step(model, ticket18, optimizer: str) -> None:
    handle = lth.attach(model, ticket18)
    before = model.layer1[0].conv1.weight.detach().clone()
    steps = OPTIMIZERS[optimizer](list(model.parameters()))
    for _ in range(3):
        step_masked(model, ticket18, steps)
    handle.verify()
    assert not torch.equal(model.layer1[0].conv1.weight, before), "it must have trained"


def test_the_clip_norm_is_that_of_the_sub_network(model, ticket18) -> None:
    dense = copy.deepcopy(model)
    lth.attach(model, ticket18)
    dense.load_state_dict(model.state_dict())
    backward(model)
    backward(dense)
    masks = ticket18.masks
    kept = [p.grad[masks[n]] if n in masks else p.grad for n, p in dense.named_parameters()]
    expected = torch.linalg.vector_norm(torch.stack([g.norm() for g in kept]))
    assert nn.utils.clip_grad_norm_(model.parameters(), 1.0) == pytest.approx(
        float(expected), rel=1e-5
    )
    assert nn.utils.clip_grad_norm_(dense.parameters(), 1.0) > 1.01 * expected, (
        "or the test shows nothing"
    )


def test_momentum_that_predates_the_mask_brings_nothing_back(model, ticket18) -> None:
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    backward(model)
    optimizer.step()
    handle = lth.attach(model, ticket18)
    for _ in range(2):
        optimizer.step()
        handle.verify()


def test_a_model_may_change_its_memory_format(model, ticket18) -> None:
    handle = lth.attach(model, ticket18)
    model.to(memory_format=torch.channels_last)
    step_masked(model, ticket18)
    assert handle.masks == ticket18.masks


def test_accumulation_keeps_gradients_masked(model, ticket18) -> None:
    lth.attach(model, ticket18)
    for _ in range(3):
        backward(model)
    assert all(not gradient.any() for gradient in pruned_gradients(model, ticket18))


def test_bf16_autocast(model, ticket18) -> None:
    handle = lth.attach(model, ticket18)
    optimizer = torch.optim.AdamW(model.parameters())
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(images()).square().mean()
    loss.backward()
    optimizer.step()
    handle.verify()


def test_a_pruned_weights_overflow_does_not_skip_the_step(model, ticket18) -> None:
    """With a loss scaler: only gradients of the sub-network decide."""
    handle = lth.attach(model, ticket18)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    weight = model.layer1[0].conv1.weight
    pruned = ~ticket18.masks["layer1.0.conv1.weight"]
    before = weight.detach().clone()
    # Infinite where the weight is pruned, one elsewhere.
    scaler.scale((weight * torch.where(pruned, float("inf"), 1.0)).nansum()).backward()
    assert torch.isfinite(weight.grad).all()
    scaler.step(optimizer)
    handle.verify()
    assert not torch.equal(weight, before)


def test_a_frozen_stage_that_is_unfrozen_later(model, ticket18) -> None:
    model.layer1.requires_grad_(False)
    lth.attach(model, ticket18)
    assert not any(p.requires_grad for p in model.layer1.parameters())
    model.layer1.requires_grad_(True)
    step_masked(model, ticket18)


def saved_and_loaded(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": saved_and_loaded,
}


@pytest.mark.parametrize("how", COPIES)
def test_copies_stay_masked_and_apart(model, ticket18, how: str) -> None:
    original = lth.attach(model, ticket18)
    backward(model)
    clone = COPIES[how](model)
    optimizer = torch.optim.SGD(clone.parameters(), 0.1, momentum=0.9)
    step_masked(clone, ticket18, optimizer)
    with torch.no_grad():
        clone.layer1[0].conv1.weight.fill_(1)
    optimizer.step()
    lth.attached(clone).verify()
    assert lth.attached(clone).masks == ticket18.masks
    lth.attached(clone).detach()
    original.verify()
    assert lth.attached(clone) is None and lth.attached(model) is not None


@pytest.mark.parametrize("assign", [False, True])
def test_a_stock_checkpoint_loads_masked(model, ticket18, stock, assign: bool) -> None:
    handle = lth.attach(model, ticket18)
    model.load_state_dict(stock, strict=False, assign=assign)
    handle.verify()
    step_masked(model, ticket18)
    name = "layer1.0.conv1.weight"
    assert stock[name][~ticket18.masks[name]].all(), "the checkpoint itself is not touched"


def test_averaged_models_are_sparse(model, ticket18) -> None:
    lth.attach(model, ticket18)
    average = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9)
    )
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(2):
        backward(model)
        optimizer.step()
        average.update_parameters(model)
    lth.attached(average).verify()


def test_synchronised_batch_norm_and_gradient_checkpointing(ticket18) -> None:
    model = timm.create_model("resnet18", num_classes=4)
    handle = lth.attach(model, ticket18)
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model).eval()
    model.set_grad_checkpointing(True)
    step_masked(model, ticket18)
    handle.verify()


def test_compiled_models(model, ticket18) -> None:
    handle = lth.attach(model, ticket18)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    optimizer = torch.optim.AdamW(model.parameters())
    for _ in range(2):
        optimizer.zero_grad()
        backward(compiled)
        assert all(not gradient.any() for gradient in pruned_gradients(model, ticket18))
        optimizer.step()
        handle.verify()


def test_a_new_ticket_replaces_the_old_one(model, ticket18) -> None:
    lth.attach(model, ticket18)
    sparser = ticket18.with_masks(lth.prune(ticket18.weights, 0.5, ticket18.masks), {})
    lth.attach(model, sparser)
    assert lth.attached(model).masks == sparser.masks
    step_masked(model, sparser)


def test_detaching_sets_the_weights_free(model, ticket18) -> None:
    handle = lth.attach(model, ticket18)
    handle.detach()
    assert lth.attached(model) is None
    backward(model)
    torch.optim.SGD(model.parameters(), 0.1).step()
    weight = model.layer1[0].conv1.weight
    assert weight[~ticket18.masks["layer1.0.conv1.weight"]].any()
    with pytest.raises(TicketError, match="no longer sits on the model"):
        handle.verify()


def test_the_fine_tuned_ticket(model, ticket18, tmp_path) -> None:
    handle = lth.attach(model, ticket18)
    backward(model)
    torch.optim.SGD(model.parameters(), 0.1).step()
    tuned = handle.ticket(source="coco", parent=ticket18.digest)
    assert tuned.masks == ticket18.masks and tuned.meta.source == "coco"
    assert not torch.equal(tuned.weights["conv1.weight"], ticket18.weights["conv1.weight"])
    assert Ticket.load(tuned.save(tmp_path / "a.ticket")) == tuned


def test_without_its_weights_the_model_keeps_its_own(model, ticket18) -> None:
    before = model.layer1[0].conv1.weight.detach().clone()
    lth.attach(model, ticket18, load_weights=False)
    mask = ticket18.masks["layer1.0.conv1.weight"]
    assert torch.equal(model.layer1[0].conv1.weight, before * mask)
    recipe = lth.attached(model).ticket().meta.recipe
    assert recipe == {**ticket18.meta.recipe, "weights": "the model's own"}


def test_a_trunk_in_pieces(model, ticket18) -> None:
    pieces = nn.ModuleDict({"heads": nn.ModuleDict({"layer4": model.layer4})})
    model.layer4 = nn.Identity()
    pieces["body"] = model
    lth.attach(pieces["body"], ticket18, parts=("stem", "layer1", "layer2", "layer3"))
    lth.attach(pieces["heads"], ticket18, parts=("layer4",))
    assert lth.attached(pieces).masks == ticket18.masks
    assert lth.attached(pieces).ticket() == ticket18


def test_what_lacks_a_stage_makes_no_ticket_and_says_which(model, ticket18) -> None:
    model.layer4 = nn.Identity()
    handle = lth.attach(model, ticket18, parts=("stem", "layer1", "layer2", "layer3"))
    with pytest.raises(TicketError, match="all stages of a resnet18 .* found none of layer4: "):
        handle.ticket()


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: torchvision.models.resnet34(), "for a resnet18 with .* trunk is a resnet34"),
        (
            lambda: timm.create_model("resnet18d"),
            "a stem of one 7x7 .* is a resnet18d with a deep stem",
        ),
        (lambda: nn.Sequential(nn.Conv2d(3, 8, 3)), "Is it a ResNet checkpoint"),
    ],
    ids=["depth", "stem", "no ResNet"],
)
def test_a_model_that_does_not_fit_is_refused_and_unchanged(ticket18, other, message) -> None:
    model = other()
    with unchanged(model), pytest.raises(TicketError, match=message):
        lth.attach(model, ticket18)


def test_another_stride_placement_is_refused_and_the_model_unchanged() -> None:
    model = torchvision.models.resnet50()
    ticket = Ticket.dense(model)
    for stage in (model.layer2, model.layer3, model.layer4):
        stage[0].conv1.stride, stage[0].conv2.stride = (2, 2), (1, 1)
    said = r"stride in the 3x3 .* stride \(2, 2\) at layer2.0.conv1.weight: build it with"
    with unchanged(model), pytest.raises(TicketError, match=said):
        lth.attach(model, ticket)
