"""Masks are values: checked on the way in, never changed, counted as the paper counts."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from lth_plugins import Masks, TicketError


def random_masks(seed: int = 0, density: float = 0.5) -> Masks:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"a": (4, 3, 3, 3), "b": (5, 4, 1, 1)}
    return Masks({n: torch.rand(s, generator=generator) < density for n, s in shapes.items()})


@given(st.lists(st.lists(st.booleans(), min_size=1, max_size=40), min_size=1, max_size=4))
def test_counts_add_up(values: list[list[bool]]) -> None:
    masks = Masks({str(i): torch.tensor(v) for i, v in enumerate(values)})
    flat = [bit for value in values for bit in value]
    assert (masks.kept, masks.numel) == (sum(flat), len(flat))
    assert masks.density == pytest.approx(sum(flat) / len(flat))
    assert masks.sparsity == pytest.approx(1 - masks.density)
    assert masks.densities() == {str(i): sum(v) / len(v) for i, v in enumerate(values)}


@given(st.integers(0, 99), st.integers(0, 99))
def test_set_algebra(a: int, b: int) -> None:
    first, second = random_masks(a), random_masks(b)
    assert ~~first == first
    assert ~(first & second) == (~first | ~second)
    assert (first & ~first).kept == 0
    assert (first & second).issubset(first) and first.issubset(first | second)


def test_equal_masks_have_the_same_digest_and_others_another() -> None:
    masks = random_masks()
    assert masks.digest == Masks(dict(reversed(list(masks.items())))).digest
    assert masks.digest == "501b258e4ad41781dc86886dfc763b01aa74ca7aaf745fae0354778846c5712a"
    bit = masks["b"].clone()
    bit[0, 0] = ~bit[0, 0]
    others = [
        ~masks,
        Masks({**masks, "b": bit}),
        Masks({**masks, "b": masks["b"].view(4, 5, 1, 1)}),
        Masks({"a": masks["a"], "c": masks["b"]}),
        Masks({"a": masks["a"]}),
        Masks({}),
    ]
    assert len({masks.digest, *(other.digest for other in others)}) == 1 + len(others)


def test_changing_the_source_tensor_does_not_change_the_masks() -> None:
    source = torch.ones(3, dtype=torch.bool)
    masks = Masks({"a": source})
    source[0] = False
    assert masks.kept == 3


def test_numeric_masks_are_taken_when_binary() -> None:
    assert Masks({"a": torch.tensor([0.0, 1.0])}) == Masks({"a": torch.tensor([False, True])})


@pytest.mark.parametrize("value", [0.5, 2.0, -1.0, float("nan")])
def test_a_non_binary_mask_is_refused(value: float) -> None:
    with pytest.raises(TicketError, match=r"mask of a must hold only 0 and 1, found"):
        Masks({"a": torch.tensor([1.0, value])})


def test_something_else_than_a_tensor_is_refused() -> None:
    with pytest.raises(TicketError, match="mask of a must be a tensor, found list"):
        Masks({"a": [1, 0]})  # type: ignore[dict-item]


def test_masks_of_other_parameters_do_not_combine() -> None:
    with pytest.raises(TicketError, match="missing b, not prunable there none"):
        random_masks() & Masks({"a": torch.ones(4, 3, 3, 3)})
    with pytest.raises(TicketError, match="shape"):
        Masks({"a": torch.ones(2)}) | Masks({"a": torch.ones(3)})


def test_shuffled_masks_keep_every_layer_density_and_depend_on_the_seed() -> None:
    masks = random_masks(density=0.3)
    assert masks.shuffled(1).densities() == masks.densities()
    assert masks.shuffled(1) == masks.shuffled(1)
    assert masks.shuffled(1) != masks.shuffled(2)


def test_masks_of_ones_keep_everything() -> None:
    assert Masks.ones({"a": (2, 3)}).density == 1
