"""CAP and WoodFisher against matrices that are inverted whole, and gradients taken one by one."""

import copy
from collections.abc import Callable, Sequence

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import lth_plugins as lth
from lth_plugins import ConfigError, Masks, TicketError
from lth_plugins.pruning import select
from lth_plugins.pruning.criteria import fisher as fisher_module
from lth_plugins.pruning.criteria.cap import CAP, WoodFisher
from lth_plugins.pruning.criteria.fisher import blocked, fisher_blocks
from lth_plugins.pruning.criteria.surgery import (
    compensated,
    damped,
    elimination,
    inverse,
    saliency,
)

NAME = "layer1.0.conv1.weight"
IMAGES, LABELS = (
    torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(0)),
    torch.arange(6),
)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return torchvision.models.resnet18(num_classes=6)


def loss_of(rows: slice) -> Callable[[nn.Module], Tensor]:
    return lambda model: cross_entropy(model(IMAGES[rows]), LABELS[rows])


LOSSES = [loss_of(slice(0, 2)), loss_of(slice(2, 6))]


@pytest.fixture
def problem() -> tuple[Tensor, Tensor, Tensor]:
    """Weights, gradients [blocks, gradients, block] and F of three blocks of six weights."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(3, 6, generator=generator, dtype=torch.float64)
    gradients = torch.randn(3, 4, 6, generator=generator, dtype=torch.float64)
    fisher = damped(gradients.mT @ gradients / 4, weights, 1e-3)
    return weights, gradients, fisher


def test_every_image_of_a_batch_gives_the_gradient_it_has_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    model = torchvision.models.resnext50_32x4d(num_classes=6).eval()
    names = [NAME, "layer2.0.conv2.weight", "layer1.0.downsample.0.weight", "fc.weight"]
    weights = {name: model.get_parameter(name).detach() for name in names}
    alone: dict[str, list[Tensor]] = {name: [] for name in names}
    for k in range(len(IMAGES)):
        value = loss_of(slice(k, k + 1))(model)
        found = torch.autograd.grad(value, [model.get_parameter(name) for name in names])
        for name, gradient in zip(names, found, strict=True):
            alone[name].append(gradient.flatten())
    monkeypatch.setattr(fisher_module, "GRADIENT_BYTES", 1 << 19)  # an image or two at a time
    monkeypatch.setattr(fisher_module, "FISHER_BYTES", 1 << 23)  # a parameter or two at a time
    # 50 divides no parameter's size. The batches are of two and four images.
    for name, fisher in fisher_blocks(copy.deepcopy(model).train(), weights, LOSSES, 50):
        gradients = blocked(torch.stack(alone.pop(name)), 50)
        expected = torch.einsum("nbi,nbj->bij", gradients, gradients) / len(IMAGES)
        torch.testing.assert_close(fisher, expected, rtol=1e-4, atol=1e-6 * float(expected.max()))
    assert not alone


def test_the_inverse_is_the_explicit_one_and_that_of_woodburys_updates(problem) -> None:
    _, gradients, fisher = problem
    explicit = torch.linalg.inv(fisher)
    torch.testing.assert_close(inverse(fisher), explicit)
    recursive = torch.eye(6, dtype=torch.float64).expand(3, 6, 6) / 1e-3
    for k in range(4):  # arXiv 2004.14340, equation 4
        column = recursive @ gradients[:, k, :, None]
        scale = 4 + gradients[:, k, None, :] @ column
        recursive = torch.baddbmm(recursive, column, column.mT / scale, alpha=-1)
    torch.testing.assert_close(recursive, explicit)


def test_a_score_is_what_the_cheapest_way_to_prune_the_weight_costs(problem) -> None:
    """½ δᵀFδ at its minimum with δᵢ = -wᵢ, which the closed form of OBS gives."""
    weights, _, fisher = problem
    inverted = torch.linalg.inv(fisher)
    scores = saliency(weights, inverse(fisher))
    for k in range(6):
        change = -weights[:, k, None] * inverted[:, k] / inverted[:, k, k, None]
        cost = torch.einsum("bi,bij,bj->b", change, fisher, change) / 2
        torch.testing.assert_close(scores[:, k], cost)


def test_elimination_costs_what_pruning_set_after_set_does(problem) -> None:
    weights, _, fisher = problem
    scores = elimination(weights, inverse(fisher))
    for b in range(3):
        removed: list[int] = []
        total = most = 0.0
        while len(removed) < 6:
            left = [k for k in range(6) if k not in removed]
            rises = {k: brute_force(weights[b], fisher[b], [*removed, k])[1] - total for k in left}
            cheapest = min(rises, key=rises.__getitem__)
            most = max(most, rises[cheapest])
            assert scores[b, cheapest].item() == pytest.approx(most, rel=1e-6)
            total += rises[cheapest]
            removed.append(cheapest)


def test_what_is_left_takes_over_as_the_closed_form_says(problem) -> None:
    weights, _, fisher = problem
    kept = torch.tensor([[1, 0, 1, 1, 0, 1], [1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0]]).bool()
    moved = compensated(weights, fisher.clone(), kept)
    for b in range(3):
        pruned = [k for k in range(6) if not kept[b, k]]
        torch.testing.assert_close(moved[b], brute_force(weights[b], fisher[b], pruned)[0])
    assert torch.equal(moved[1], weights[1]) and not moved[2].any()


def brute_force(weights: Tensor, fisher: Tensor, pruned: Sequence[int]) -> tuple[Tensor, float]:
    """What a block comes to without these weights, and what that costs: OBS for several at once."""
    if not pruned:
        return weights, 0.0
    inverted = torch.linalg.inv(fisher)
    columns = inverted[:, pruned]
    change = -columns @ torch.linalg.inv(columns[pruned]) @ weights[pruned]
    after = weights + change
    after[pruned] = 0
    return after, float(change @ fisher @ change / 2)


def test_of_two_weights_that_stand_in_for_each_other_cap_prunes_one() -> None:
    """The third matters, but less than either of the two once the other is gone."""
    weights = torch.tensor([[1.0, 1.0, 0.5]], dtype=torch.float64)
    gradients = torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 1.0]], dtype=torch.float64)
    fisher = damped((gradients.mT @ gradients)[None], weights, 1e-3)
    alone, together = saliency(weights, inverse(fisher)), elimination(weights, inverse(fisher))
    assert sorted(alone[0].argsort()[:2].tolist()) == [0, 1]
    assert 2 in together[0].argsort()[:2]


def test_pruned_weights_have_no_part_in_what_others_cost(problem) -> None:
    _, gradients, _ = problem
    weights = torch.tensor([[1.0, 0, 2, 0, 3, 4]] * 3, dtype=torch.float64)
    there = [0, 2, 4, 5]
    fisher = damped(gradients.mT @ gradients / 4, weights, 1e-3)
    smaller = damped(gradients[..., there].mT @ gradients[..., there] / 4, weights[:, there], 1e-3)
    for costs in (saliency, elimination):
        found = costs(weights, inverse(fisher))
        torch.testing.assert_close(found[:, there], costs(weights[:, there], inverse(smaller)))
        assert not found[:, [1, 3]].any()


@pytest.mark.parametrize("criterion", [WoodFisher(), CAP()])
def test_a_criterion_updates_the_weights_that_its_scores_leave(model, criterion) -> None:
    """Two convolutions of ResNet-18, with what the gradients themselves give."""
    weights = {n: model.get_parameter(n).detach() for n in (NAME, "layer2.0.downsample.0.weight")}
    scores = criterion(weights, copy.deepcopy(model), LOSSES)
    whole = Masks.ones({name: tuple(score.shape) for name, score in scores.items()})
    masks = select(scores, whole, 0.5, "layer")
    moved = criterion.update(weights, masks, copy.deepcopy(model), LOSSES)
    fishers = dict(fisher_blocks(copy.deepcopy(model), weights, LOSSES, 64))
    for name, kept in masks.items():
        assert kept.sum() == kept.numel() // 2 and not moved[name][~kept].any()
        before, after = (blocked(of[name].flatten(), 64)[0].double() for of in (weights, moved))
        fisher = damped(fishers[name][:1].double(), before[None], criterion.damping)[0]
        pruned = (~kept.flatten()[:64]).nonzero()[:, 0].tolist()
        expected = brute_force(before, fisher, pruned)[0]
        torch.testing.assert_close(after, expected, rtol=1e-4, atol=1e-6)


class Halves:
    """Ranks by magnitude, and halves what stays."""

    def __call__(self, weights, model, loss):
        return {name: weight.abs() for name, weight in weights.items()}

    def update(self, weights, masks, model, loss):
        return {name: weight * masks[name] / 2 for name, weight in weights.items()}


def test_masks_and_updated_weights_make_a_ticket_and_leave_the_model_alone(model) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    first = lth.prune(model, 0.5)
    masks, state = lth.prune_and_update(model, 0.2, first, Halves(), loss=LOSSES)
    assert masks == lth.prune(model, 0.2, first)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert state.keys() == before.keys()
    for name, value in state.items():
        expected = before[name] * masks[name] / 2 if name in masks else before[name]
        assert torch.equal(value, expected), name
    ticket = lth.Ticket(masks, state, lth.TicketMeta("resnet18"))
    assert torch.equal(ticket.weights[NAME], state[NAME])


def test_a_block_that_is_larger_than_a_parameter_is_said(model, caplog) -> None:
    weights = {"layer1.0.conv1.weight": model.get_parameter(NAME).detach()[:1, :1]}
    next(fisher_module._chunks(weights, 64))
    fisher_module._say_clipped(weights, 64)
    assert "A block of 64 is larger than 1 of 1 parameters" in caplog.text
    assert f"which have one block each: {NAME}" in caplog.text


@pytest.mark.parametrize(
    ("losses", "said"),
    [
        ([], "at least one batch of images to compute gradients of, found none"),
        ([lambda m: m(IMAGES).sum() * 0], "found that all are zero"),
        ([LOSSES[0], lambda m: m(IMAGES).sum() * torch.nan], "found the loss nan of batch 1"),
        ([lambda m: (m(IMAGES).sum() * 0).sqrt()], f"finite gradients .* others of {NAME}"),
        ([lambda m: m.fc.weight.sum()], f"a loss that depends on {NAME}"),
        ([lambda m: m(IMAGES).sum(1)], "a scalar, found \\(6,\\)"),
    ],
)
def test_gradients_that_are_no_use_are_refused(model, losses: list, said: str) -> None:
    weights = {NAME: model.get_parameter(NAME).detach()}
    with pytest.raises((TicketError, ConfigError), match=said):
        CAP(block=4)(weights, copy.deepcopy(model), losses)


def test_bad_settings_are_refused(model) -> None:
    with pytest.raises(ConfigError, match="a block of 1 weight or more, found 0"):
        CAP(block=0)
    with pytest.raises(ConfigError, match=r"a damping of more than 0, found 0\.0"):
        WoodFisher(damping=0.0)
    with pytest.raises(ConfigError, match=r"found 2 that are not.* higher damping"):
        inverse(-torch.eye(2, dtype=torch.float64).expand(2, 2, 2))
    with pytest.raises(ConfigError, match="'magnitude' leaves .* choose woodfisher or cap"):
        lth.prune_and_update(model, 0.2, criterion="magnitude", loss=LOSSES)
    with pytest.raises(ConfigError, match="Snip takes one loss, found a list of 2"):
        lth.prune(model, 0.2, criterion="snip", loss=LOSSES)
