"""C1: masks are those of torch.nn.utils.prune, round by round and bit for bit."""

import pytest
import torch
import torchvision
from torch import nn
from torch.nn.utils import prune as torch_prune
from torch.utils._python_dispatch import TorchDispatchMode

from lth_plugins import ConfigError, Masks, Ticket, TicketError, TicketMeta, prune
from lth_plugins.pruning import SCOPES
from lth_plugins.ticket import ARCHITECTURES

PAPER = [100, 80, 64, 51.2, 40.96, 32.77, 26.21, 20.97, 16.78, 13.42]
PAPER += [10.74, 8.59, 6.87, 5.50, 4.40, 3.52, 2.81, 2.25, 1.80]


def without_ties(arch: str) -> nn.Module:
    """Prunable weights that all differ in magnitude: consecutive float bit patterns, shuffled."""
    model = torchvision.models.get_model(arch)
    prunable = ARCHITECTURES[arch].prunable
    total = sum(model.get_parameter(name).numel() for name in prunable)
    generator = torch.Generator().manual_seed(0)
    bits = torch.randperm(total, generator=generator, dtype=torch.int32) + 0x3A000000
    signs = torch.randint(0, 2, (total,), generator=generator) * 2 - 1
    values = bits.view(torch.float32) * signs
    with torch.no_grad():
        for name in prunable:
            parameter = model.get_parameter(name)
            parameter.copy_(values[: parameter.numel()].view_as(parameter))
            values = values[parameter.numel() :]
    return model


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arch", "numel", "rounds"),
    [
        ("resnet18", 11_157_504, 8),
        ("resnet50", 23_445_504, 2),
        pytest.param("resnet50", 23_445_504, 18, marks=pytest.mark.soak),
    ],
)
def test_rounds_equal_torch_bit_for_bit(arch: str, numel: int, rounds: int) -> None:
    model = without_ties(arch)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    modules = {
        n: model.get_submodule(n.removesuffix(".weight")) for n in ARCHITECTURES[arch].prunable
    }
    masks = Masks.ones(ARCHITECTURES[arch].prunable)
    assert masks.numel == numel
    densities = [masks.density]
    for _ in range(rounds):
        torch_prune.global_unstructured(
            [(module, "weight") for module in modules.values()],
            torch_prune.L1Unstructured,
            amount=0.2,
        )
        masks = prune(state, 0.2, masks)
        for name, module in modules.items():
            assert torch.equal(masks[name], module.weight_mask.bool()), name
        densities.append(masks.density)
    assert [round(100 * d, 2) for d in densities] == PAPER[: rounds + 1]


class Kernels(TorchDispatchMode):
    """Notes what PyTorch computes while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, kernel, types, args=(), kwargs=None):
        self.names.add(str(kernel))
        return kernel(*args, **(kwargs or {}))


@pytest.mark.parametrize("scope", SCOPES)
def test_pruning_wakes_none_of_pytorchs_threads(resnet18_state, scope: str) -> None:
    """Beside other work each wake-up waits for the slowest thread: 2 to 7 times as long in all."""
    with Kernels() as computed:
        masks = prune(resnet18_state, 0.2, scope=scope)
        prune(resnet18_state, 0.2, masks, scope=scope)
    views = ("detach", "lift_fresh", "view")
    assert computed.names <= {f"aten.{name}.default" for name in views}


def test_layer_scope_takes_the_fraction_in_every_layer(resnet18_state) -> None:
    densities = prune(resnet18_state, 0.25, scope="layer").densities()
    assert all(density == pytest.approx(0.75, abs=1e-4) for density in densities.values())


def test_random_criterion_ignores_the_weights(resnet18_state) -> None:
    zeros = {name: torch.zeros_like(value) for name, value in resnet18_state.items()}
    assert prune(resnet18_state, 0.5, criterion="random") == prune(zeros, 0.5, criterion="random")


def test_a_model_in_any_dialect_gives_the_same_masks(resnet18_state) -> None:
    nested = {f"module.backbone.{name}": value for name, value in resnet18_state.items()}
    assert prune(nested, 0.2) == prune(resnet18_state, 0.2)


def test_nothing_is_pruned_twice(resnet18_state) -> None:
    first = prune(resnet18_state, 0.2)
    second = prune(resnet18_state, 0.2, first)
    assert second.issubset(first) and second.kept == first.kept - round(0.2 * first.kept)
    ticket = Ticket(first, resnet18_state, TicketMeta(arch="resnet18", source="test"))
    assert prune(ticket, 0.2) == second


@pytest.mark.parametrize("fraction", [-0.1, 1.1, float("nan")])
def test_a_fraction_outside_of_0_to_1_is_refused(resnet18_state, fraction: float) -> None:
    with pytest.raises(ConfigError, match=r"expected a fraction"):
        prune(resnet18_state, fraction)


@pytest.mark.parametrize("argument", [{"criterion": "magic"}, {"scope": "universe"}])
def test_unknown_names_are_refused_with_the_known_ones(resnet18_state, argument) -> None:
    with pytest.raises(ConfigError, match="unknown .* known are"):
        prune(resnet18_state, 0.2, **argument)


def test_weights_that_are_not_numbers_are_refused_by_name(resnet18_state) -> None:
    resnet18_state["layer2.0.conv1.weight"][0, 0, 0, 0] = float("nan")
    with pytest.raises(TicketError, match=r"layer2\.0\.conv1\.weight is not a number"):
        prune(resnet18_state, 0.2)
