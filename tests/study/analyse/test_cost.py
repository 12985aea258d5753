"""The cost of a network, and of what its masks keep."""

import pytest
import torch

import lth_plugins as lth
from lth_plugins.study.analyse.cost import Cost, Counter, total
from lth_plugins.ticket import ARCHITECTURES, Masks

R18 = ARCHITECTURES["resnet18"]
NAME = "layer2.0.conv2.weight"  # 128 x 128 x 3 x 3


def test_cost_of_a_resnet18() -> None:
    counter = Counter(R18, size=64)
    dense = counter(Masks.ones(R18.prunable))
    # 64 outputs of 64 inputs, 3 x 3, at 16 x 16 pixels (64 / 4).
    assert dense["layer1.0.conv1.weight"].flops == 64 * 64 * 9 * 16 * 16
    assert total(dense).sparse_flops == total(dense).flops
    parameters = sum(p.numel() for p in _trunk_parameters())
    assert total(dense).parameters == total(dense).sparse_parameters == parameters

    mask = torch.ones(128, 128, 3, 3, dtype=torch.bool)
    mask[:64] = False
    halved = Masks(dict(Masks.ones(R18.prunable)) | {NAME: mask})
    half = counter(halved)
    assert half[NAME] == Cost(dense[NAME].flops, dense[NAME].flops / 2, 128 * 128 * 9, 64 * 128 * 9)
    assert total(half).flops == total(dense).flops
    assert total(half).sparse_flops == total(dense).flops - dense[NAME].flops / 2


def _trunk_parameters() -> list[torch.nn.Parameter]:
    import torchvision

    model = torchvision.models.resnet18()
    model.fc = torch.nn.Identity()
    return list(model.parameters())


@pytest.mark.parametrize("name", ["resnext50_32x4d", "resnet18d"])
def test_cost_of_grouped_convolutions_and_deep_stems(name: str) -> None:
    arch = ARCHITECTURES[name]
    costs = Counter(arch, size=32)(Masks.ones(arch.prunable))
    assert set(costs) == {*arch.prunable, "outside"}
    assert min(cost.flops for cost in costs.values()) > 0


def test_masks_of_another_architecture_are_refused() -> None:
    with pytest.raises(lth.TicketError, match="prunable parameters of resnet18"):
        Counter(R18, size=32)(Masks.ones(ARCHITECTURES["resnet34"].prunable))
