"""Lottery Pools on real ResNet-18 weights, with a metric that is known in closed form."""

from dataclasses import replace

import pytest
import torch
import torchvision

import lth_plugins as lth
from lth_plugins import Ticket, TicketError, TicketMeta
from lth_plugins.pruning import pools
from lth_plugins.pruning.pools import Member, interpolated, pool

NAME = "layer1.0.conv1.weight"


@pytest.fixture(scope="module")
def members() -> list[Member]:
    """Rounds 1 to 3, each a little further from the first; their heads hold the round."""
    torch.manual_seed(0)
    state = torchvision.models.resnet18().state_dict()
    found = []
    for k in (1, 2, 3):
        weights = {n: v + 0.01 * k if n.endswith("conv1.weight") else v for n, v in state.items()}
        masks = lth.prune(weights, 1 - 0.8**k)
        meta = TicketMeta("resnet18", "digits", round=k, recipe={"trained_from": "a"})
        found.append(Member(Ticket(masks, weights, meta), {"fc.bias": torch.full((2,), float(k))}))
    return found


def test_between_two_lie_their_weights_pruned_to_the_density_of_one(members) -> None:
    one, two, _ = members
    between = interpolated(two, one, 0.3, two.ticket)
    assert between.ticket.masks.kept == two.ticket.masks.kept
    assert between.ticket.masks.issubset(one.ticket.masks | two.ticket.masks)
    first, second = (m.ticket.sparse_weights()[NAME] for m in (one, two))
    mixed = (0.7 * second + 0.3 * first) * between.ticket.masks[NAME]
    torch.testing.assert_close(between.ticket.weights[NAME] * between.ticket.masks[NAME], mixed)
    assert between.head["fc.bias"].tolist() == pytest.approx([1.7, 1.7])


def test_a_neighbour_is_taken_where_it_improves_by_the_coefficient_that_does_most(
    members, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The metric peaks where the head is at 1.62: 0.4 of the way from 2 to 1, so 1.6."""
    monkeypatch.setattr(pools, "COEFFICIENTS", (0.1, 0.4, 0.9))
    one, two, three = members
    measured: list[float] = []

    def measure(member: Member) -> tuple[Member, float]:
        value = float(member.head["fc.bias"][0])
        measured.append(value)
        assert member.ticket.masks.kept == two.ticket.masks.kept
        return member, -abs(value - 1.62)

    found = pool(two, -0.38, [three, one], measure)
    assert [(t.meta.round, c) for t, c in found.used] == [(1, 0.4)]  # 3 comes first, and is worse
    assert found.evaluations == len(measured) + 1 == 1 + 2 * 3
    assert (found.before, found.after) == (-0.38, pytest.approx(-0.02, abs=1e-6))
    meta = found.member.ticket.meta
    assert (meta.round, meta.parent) == (2, two.ticket.digest)
    used = {"round": 1, "ticket": one.ticket.digest, "coefficient": 0.4}
    assert meta.recipe == {"trained_from": "a", "pooled": [used]}

    worse = pool(two, 0.0, [one], measure)
    assert worse.member is two and not worse.used and worse.after == 0


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"recipe": {"trained_from": "b"}}, "trained from one θ, found .* of two searches"),
        ({"recipe": {}}, "expected trained tickets, found .* keep=trained"),
        ({}, "each ticket of the pool once"),
    ],
)
def test_tickets_that_do_not_belong_together_are_refused(members, change, said: str) -> None:
    one, two, _ = members
    other = replace(two, ticket=replace(two.ticket, meta=replace(two.ticket.meta, **change)))
    with pytest.raises(TicketError, match=said):
        pool(two, 0.0, [one, other], never)


def test_another_width_is_refused(members) -> None:
    wide = Ticket.dense(torchvision.models.resnet34(), recipe={"trained_from": "a"})
    with pytest.raises(TicketError, match="of one width .* found a resnet18 and a resnet34"):
        pool(members[0], 0.0, [Member(wide, {})], never)


def never(member: Member) -> tuple[Member, float]:
    raise AssertionError("nothing is measured")
