"""Structured tickets: what refilling keeps, what it costs, and that it is an ordinary ticket."""

import logging
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import lth_plugins as lth
from lth_plugins.pruning.structure import (
    NM,
    Channels,
    Kernels,
    L1Channels,
    channel_masks,
    make_structure,
    structured,
)
from lth_plugins.ticket import Ticket
from lth_plugins.ticket.arch import ARCHITECTURES, ResNet, Shape


def channels(masks: lth.Masks, conv: str) -> Tensor:
    """Which output channels of a convolution have a weight left."""
    return masks[f"{conv}.weight"].flatten(1).any(1)


class SmallResNet(ResNet):
    """A ResNet with a sixteenth of the channels inside: properties are tried on many."""

    @cached_property
    def shapes(self) -> dict[str, Shape]:
        def small(shape: Shape) -> Shape:
            return (*(max(min(size, 3), size // 16) for size in shape[:2]), *shape[2:])

        return {name: small(shape) for name, shape in super().shapes.items()}


SMALL = (
    SmallResNet("small basic blocks", False, (1, 1, 1, 1)),
    SmallResNet("small bottlenecks", True, (1, 1, 1, 1)),
)


@pytest.fixture(scope="module", autouse=True)
def _small_tickets_exist() -> Iterator[None]:
    known = {**ARCHITECTURES, **{arch.name: arch for arch in SMALL}}
    with pytest.MonkeyPatch.context() as patch:
        for module in ("meta", "ticket"):
            patch.setattr(f"lth_plugins.ticket.{module}.ARCHITECTURES", known)
        yield


@st.composite
def small_tickets(draw: st.DrawFn) -> Ticket:
    """Tickets with layers of very different densities, down to none of a layer's weights."""
    arch = draw(st.sampled_from(SMALL))
    most = draw(st.floats(0, 1))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    weights = {name: torch.randn(shape, generator=generator) for name, shape in arch.shapes.items()}
    masks = {
        name: torch.rand(shape, generator=generator) < most * torch.rand((), generator=generator)
        for name, shape in arch.prunable.items()
    }
    return Ticket(lth.Masks(masks), weights, lth.TicketMeta(arch.name))


def kept_inside(masks: lth.Masks, ticket: Ticket, scope: str) -> list[int]:
    """Weights kept by the convolutions inside each block, or all blocks together."""
    blocks: dict[str, int] = {}
    for name in {n for i in ticket.arch.inner for n in (i.conv, i.reader)}:
        block = name.rpartition(".")[0] if scope == "layer" else "all"
        blocks[block] = blocks.get(block, 0) + int(masks[f"{name}.weight"].sum())
    return [kept for _, kept in sorted(blocks.items())]


@settings(max_examples=25)
@given(
    ticket=small_tickets(),
    kind=st.sampled_from(["channel", "channel_l1"]),
    scope=st.sampled_from(["layer", "global"]),
    surplus=st.sampled_from([0.0, 0.3]),
    minimum=st.integers(1, 3),
    multiple=st.sampled_from([1, 2, 4]),
)
def test_channels_are_whole_and_within_the_budget_but_for_the_minimum(
    ticket: Ticket, kind: str, scope: str, surplus: float, minimum: int, multiple: int
) -> None:
    options = {"scope": scope, "surplus": surplus, "minimum": minimum, "multiple": multiple}
    structure = make_structure(kind, **options)
    found = structured(ticket, structure)
    assert found == structured(ticket, structure)
    assert list(found.masks) == list(ticket.arch.prunable)

    kept = {inner.conv: channels(found.masks, inner.conv) for inner in ticket.arch.inner}
    # Every weight between kept channels, none other, and shortcuts as they were.
    assert found.masks == channel_masks(ticket.masks, ticket.arch, kept)
    least = multiple * -(-minimum // multiple)
    for channel in kept.values():
        count, width = int(channel.sum()), len(channel)
        assert count >= min(least, width)
        assert count == width or count % multiple == 0

    smallest = {conv: torch.arange(len(channel)) < least for conv, channel in kept.items()}
    floor = kept_inside(channel_masks(ticket.masks, ticket.arch, smallest), ticket, scope)
    budgets = [round(b * (1 + surplus)) for b in kept_inside(ticket.masks, ticket, scope)]
    for now, budget, lowest in zip(
        kept_inside(found.masks, ticket, scope), budgets, floor, strict=True
    ):
        assert now <= max(budget, lowest)


@settings(max_examples=25)
@given(
    ticket=small_tickets(),
    scope=st.sampled_from(["layer", "global"]),
    surplus=st.sampled_from([0.0, 0.3]),
)
def test_kernels_are_whole_within_the_budget_and_the_rest_stays(
    ticket: Ticket, scope: str, surplus: float
) -> None:
    structure = Kernels(scope, surplus=surplus)
    found = structured(ticket, structure)
    assert found == structured(ticket, structure)
    assert list(found.masks) == list(ticket.arch.prunable)
    kept, before, whole = Counter[str](), Counter[str](), Counter[str]()
    spatial: list[str] = []
    for name, mask in found.masks.items():
        if mask[0, 0].numel() == 1:
            assert torch.equal(mask, ticket.masks[name])
            continue
        kernels = mask.flatten(2)
        assert kernels.any() and torch.equal(kernels.any(2), kernels.all(2))
        spatial.append(name)
        group = name if scope == "layer" else "all"
        kept[group] += int(mask.sum())
        before[group] += int(ticket.masks[name].sum())
        whole[group] += mask.numel()
    for group, count in kept.items():
        # As many 3x3 kernels as the budget has whole ones, but one in every convolution.
        budget = min(round(before[group] * (1 + surplus)) // 9 * 9, whole[group])
        convolutions = 1 if scope == "layer" else len(spatial)
        assert budget <= count <= budget + 9 * convolutions
        if scope == "layer":
            assert count == max(budget, 9)


def test_the_channels_kept_are_those_the_mask_left_most_in(ticket18: Ticket) -> None:
    found = structured(ticket18, Channels())
    for inner in ticket18.arch.inner:
        name = f"{inner.conv}.weight"
        left = (ticket18.weights[name].abs() * ticket18.masks[name]).flatten(1).sum(1)
        kept = channels(found.masks, inner.conv)
        assert left[kept].min() >= left[~kept].max()


def test_l1_channels_are_as_many_but_those_with_the_largest_weights(ticket18: Ticket) -> None:
    refilled, direct = (
        structured(ticket18, structure).masks for structure in (Channels(), L1Channels())
    )
    # As many weights in every layer: the same FLOPs.
    assert refilled.densities() == direct.densities() and refilled != direct
    for inner in ticket18.arch.inner:
        size = ticket18.weights[f"{inner.conv}.weight"].abs().flatten(1).sum(1)
        kept = channels(direct, inner.conv)
        assert size[kept].min() >= size[~kept].max()


@pytest.mark.parametrize(
    "structure", [Channels(), Channels("global"), Kernels(), Kernels("global")]
)
def test_the_budget_is_what_the_ticket_left(structure, ticket18: Ticket) -> None:
    found = structured(ticket18, structure)
    assert found.density <= ticket18.density
    # A channel of layer4 is some 9,000 of 11,000,000 weights.
    assert found.density == pytest.approx(ticket18.density, abs=0.01)
    plus = structured(ticket18, make_structure(structure.kind, scope=structure.scope, surplus=0.2))
    assert plus.density == pytest.approx(1.2 * ticket18.density, abs=0.01)


def test_each_block_keeps_its_own_budget_or_all_share_one(ticket18: Ticket) -> None:
    def kept(masks: lth.Masks) -> dict[str, int]:
        blocks = dict.fromkeys(inner.block for inner in ticket18.arch.inner)
        return {
            block: sum(int(m.sum()) for n, m in masks.items() if n.startswith(f"{block}.conv"))
            for block in blocks
        }

    budget = kept(ticket18.masks)
    by_layer = kept(structured(ticket18, Channels("layer")).masks)
    together = kept(structured(ticket18, Channels("global")).masks)
    for block, weights in budget.items():
        assert 0.95 * weights <= by_layer[block] <= weights
    assert any(together[block] > weights for block, weights in budget.items())
    assert sum(together.values()) <= sum(budget.values())


def test_convolutions_of_a_dense_ticket_lose_the_same_share(ticket18: Ticket) -> None:
    masks = structured(Ticket.dense(ticket18.weights), Channels("global", density=0.3)).masks
    shares = [channels(masks, i.conv).float().mean().item() for i in ticket18.arch.inner]
    assert max(shares) - min(shares) < 0.02


def test_a_structured_ticket_is_an_ordinary_one(ticket18: Ticket, tmp_path: Path) -> None:
    found = structured(ticket18, Channels(multiple=8))
    assert found.meta.parent == ticket18.digest
    assert found.meta.recipe["structure"]["kind"] == "channel"
    assert found.meta.recipe["structure"]["multiple"] == 8
    assert Ticket.load(found.save(tmp_path / "s.ticket")) == found


def test_a_minimum_is_kept_and_said(ticket18: Ticket, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        masks = structured(ticket18, Channels(density=1e-4, minimum=3, multiple=2)).masks
    counts = [int(channels(masks, inner.conv).sum()) for inner in ticket18.arch.inner]
    assert counts == [4] * len(counts)
    assert "8 of 8 convolutions keep the minimum of 4 channels" in caplog.text


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"minimum": 100}, "8 of 8 convolutions keep the minimum of 100"),  # layer1 has 64 only
        ({"minimum": 1024}, "8 of 8 convolutions keep the minimum of 1024"),
        ({"multiple": 1024}, "8 of 8 convolutions keep the minimum of 1024"),
        ({"density": 0.3, "minimum": 1}, ""),
        ({"density": 1.0, "minimum": 1024}, ""),  # as many as the budget has
        ({"density": 0.25, "minimum": 16, "scope": "layer"}, ""),
    ],
)
def test_a_minimum_is_said_if_and_only_if_the_budget_has_less(
    options: dict[str, Any], said: str, ticket18: Ticket, caplog: pytest.LogCaptureFixture
) -> None:
    dense = Ticket.dense(ticket18.weights)
    with caplog.at_level(logging.WARNING):
        found = structured(dense, Channels(**{"scope": "global", "density": 0.01, **options}))
    counts = [int(channels(found.masks, inner.conv).sum()) for inner in dense.arch.inner]
    assert min(counts) >= min(options.get("minimum", 1), 64)
    assert said in caplog.text and bool(said) == bool(caplog.text)


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_every_convolution_keeps_a_kernel_and_it_is_said(
    scope: str, ticket18: Ticket, caplog: pytest.LogCaptureFixture
) -> None:
    name = "layer3.0.conv2.weight"
    few = torch.zeros_like(ticket18.masks[name])
    few[3, 5, 0, :2] = True
    ticket = ticket18.with_masks(lth.Masks({**ticket18.masks, name: few}), {})
    with caplog.at_level(logging.WARNING):
        masks = structured(ticket, Kernels(scope)).masks
    assert masks[name].sum() == 9 and masks[name][3, 5].all()
    assert f"1 of 16 convolutions keep one kernel, for which the budget has no room: {name}" in (
        caplog.text
    )


@settings(max_examples=20)
@given(ticket=small_tickets(), n=st.integers(1, 2), m=st.sampled_from([2, 4]))
def test_n_of_m_are_kept_and_they_are_the_largest_of_the_tickets(
    ticket: Ticket, n: int, m: int
) -> None:
    for name, best in structured(ticket, NM(n, m)).masks.items():
        size = ticket.weights[name].abs()
        worth = torch.where(ticket.masks[name], size, -1 / (1 + size)).unflatten(1, (-1, m))
        best = best.unflatten(1, (-1, m))
        assert (best.sum(2) == n).all()
        lowest = worth.masked_fill(~best, float("inf")).amin(2)
        assert (lowest >= worth.masked_fill(best, -float("inf")).amax(2)).all()


def test_two_of_four_input_channels(ticket18: Ticket) -> None:
    found = structured(ticket18, NM())
    assert found.density == 0.5
    for name, mask in found.masks.items():
        assert (mask.unflatten(1, (-1, 4)).sum(2) == 2).all()
        refilled = (mask & ~ticket18.masks[name]).unflatten(1, (-1, 4)).any(2)
        lost = (~mask & ticket18.masks[name]).unflatten(1, (-1, 4)).any(2)
        assert not (refilled & lost).any()  # nothing pruned is kept in the place of what is not


def test_what_a_file_does_not_store_cannot_be_refilled(ticket18_file: Path) -> None:
    with pytest.raises(lth.TicketError, match="does not know"):
        structured(Ticket.load(ticket18_file), Channels())


def test_resnext_has_no_channels_to_prune_but_kernels_and_n_of_m() -> None:
    arch = ARCHITECTURES["resnext50_32x4d"]
    # All weights equal, and small: the file of a ResNeXt is not what is tested.
    weights = {name: torch.full(shape, 0.5) for name, shape in arch.shapes.items()}
    ticket = Ticket(lth.Masks.ones(arch.prunable), weights, lth.TicketMeta(arch.name))
    with pytest.raises(lth.TicketError, match="32 groups"):
        structured(ticket, Channels())
    with pytest.raises(lth.TicketError, match="multiples of 8, found 4"):
        structured(ticket, NM(4, 8))
    assert structured(ticket, NM(2, 4)).density == 0.5


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("rows", {}, "known are channel, channel_l1, kernel, nm"),
        ("nm", {"density": 0.5}, "'nm' has no density; it has n, m"),
        ("nm", {"n": 5}, "0 < N <= M, found 5:4"),
        ("channel", {"scope": "erk"}, "known are global, layer"),
        ("channel", {"density": 1.5}, "density of more than 0 and at most 1"),
        ("kernel", {"surplus": -0.1}, "surplus of 0 or more"),
        ("channel", {"minimum": 0}, "minimum to be 1 or more"),
    ],
)
def test_what_is_not_a_structure_is_refused(kind: str, options: dict, message: str) -> None:
    with pytest.raises(lth.ConfigError, match=message):
        make_structure(kind, **options)


@pytest.mark.slow
def test_a_channel_that_is_gone_stays_away() -> None:
    """Also where a block is pruned little for a while, and its budget would have room."""
    torch.manual_seed(0)
    arch = ARCHITECTURES["resnet50"]
    weights = {name: torch.rand(shape) for name, shape in arch.shapes.items()}
    ticket = Ticket(lth.Masks.ones(arch.prunable), weights, lth.TicketMeta(arch.name))
    for kept in (0.88, 0.88, 0.93, 0.90):  # of the 3x3 convolutions; more of the others
        other = 0.93 if kept == 0.88 else 0.99
        pruned = {
            name: mask & (torch.rand(mask.shape) < (kept if "conv2" in name else other))
            for name, mask in ticket.masks.items()
        }
        refilled = structured(replace(ticket, masks=lth.Masks(pruned)), Channels())
        assert refilled.masks.issubset(ticket.masks)
        ticket = replace(refilled, weights=weights)


def test_the_tool_structures_a_ticket_file(
    ticket_tool: Callable[..., Any], ticket18: Ticket, ticket18_file: Path, tmp_path: Path
) -> None:
    dense = Ticket.dense(ticket18.weights).save(tmp_path / "dense.ticket")
    out = tmp_path / "new folder" / "out.ticket"
    options = ("--kind", "channel", "--weights", dense, "--multiple", 8)
    done = ticket_tool("structure", ticket18_file, out, *options)
    assert done.returncode == 0, done.stderr
    assert "density 32.77 % before" in done.stdout
    known = Ticket.load(ticket18_file).with_weights(Ticket.load(dense))
    assert Ticket.load(out) == structured(known, Channels(multiple=8))
