"""Similarities of masks equal those computed bit by bit, of the whole and of each stage."""

import numpy as np
import pytest
import torch

import lth_plugins as lth
from lth_plugins.study.analyse.similarity import Overlaps, compare, pack
from lth_plugins.ticket import Masks

SHAPES = {
    "layer1.0.conv1.weight": (5, 3, 3, 3),
    "layer1.0.conv2.weight": (7, 5, 1, 1),
    "layer2.0.conv1.weight": (8, 8, 3, 3),
}


def random_masks(seed: int, density: float) -> Masks:
    generator = torch.Generator().manual_seed(seed)
    return Masks({n: torch.rand(s, generator=generator) < density for n, s in SHAPES.items()})


def compared(**masks: Masks) -> Overlaps:
    return compare({label: pack(own) for label, own in masks.items()})


def bits(masks: Masks, stage: str = "layer") -> np.ndarray:
    return np.concatenate([m.numpy().ravel() for n, m in masks.items() if n.startswith(stage)])


@pytest.mark.parametrize("stage", ["layer1", "layer2", None])
def test_measures_equal_those_counted_bit_by_bit(stage: str | None) -> None:
    masks = {f"m{d}": random_masks(seed, d) for seed, d in enumerate((0.2, 0.5, 0.9))}
    found = compared(**masks)
    found = found.of_stage(stage) if stage else found
    for i, a in enumerate(masks.values()):
        for j, b in enumerate(masks.values()):
            x, y = bits(a, stage or "layer"), bits(b, stage or "layer")
            assert found.iou()[i, j] == pytest.approx((x & y).sum() / (x | y).sum())
            assert found.hamming()[i, j] == pytest.approx((x ^ y).mean())


def test_random_masks_of_unequal_layers_overlap_as_chance_has_it() -> None:
    shape = (64, 64, 3, 3)

    def masks(seed: int) -> Masks:
        g = torch.Generator().manual_seed(seed)
        layers = {"layer1.0.conv1.weight": 0.9, "layer2.0.conv1.weight": 0.05}
        return Masks({name: torch.rand(shape, generator=g) < d for name, d in layers.items()})

    found = compared(a=masks(1), b=masks(2))
    assert found.over_chance()[0, 1] == pytest.approx(1, abs=0.01)
    assert found.iou()[0, 1] > 0.7  # which alone would look like likeness


def test_over_chance_by_hand() -> None:
    a = Masks({"layer1.0.conv1.weight": torch.tensor([1, 1, 0, 0]).bool()})
    b = Masks({"layer1.0.conv1.weight": torch.tensor([1, 0, 0, 0]).bool()})
    # Chance: 4 weights, half of them and a quarter of them: 4 / 8 in both; found: 1.
    assert compared(a=a, b=b).over_chance()[0, 1] == 2


def test_empty_masks_are_alike() -> None:
    empty = Masks({"layer1.0.conv1.weight": torch.zeros(9, dtype=torch.bool)})
    found = compared(a=empty, b=empty)
    assert found.iou()[0, 1] == 1 and found.over_chance()[0, 1] == 1 and found.hamming()[0, 1] == 0


def test_a_ticket_and_what_it_left_out_share_nothing(ticket18: lth.Ticket) -> None:
    found = compared(a=ticket18.masks, b=~ticket18.masks)
    assert found.iou()[0].tolist() == [1, 0] and found.hamming()[0].tolist() == [0, 1]
    assert found.kept.sum(1).tolist() == [ticket18.masks.kept, (~ticket18.masks).kept]


def test_masks_of_another_architecture_are_refused(ticket18: lth.Ticket) -> None:
    with pytest.raises(lth.TicketError, match="found others in second than in first"):
        compared(first=ticket18.masks, second=random_masks(0, 0.5))
    with pytest.raises(lth.TicketError, match="found none"):
        compared()
