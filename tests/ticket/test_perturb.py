"""Perturbed tickets: what changes, what stays, and that they say what was done to them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import lth_plugins as lth
from lth_plugins.study.analyse.similarity import compare, pack
from lth_plugins.ticket.perturb import noisy, swapped, unmasked

LAYER = "layer2.0.conv1.weight"


def test_swapping_keeps_every_layers_density(ticket18: lth.Ticket) -> None:
    found = swapped(ticket18, 0.3, seed=1)
    assert found.masks.densities() == ticket18.masks.densities()
    assert found.meta.recipe["swap"] == 0.3 and found.meta.recipe["swap_seed"] == 1
    assert found.meta.parent == ticket18.digest


def test_the_more_is_swapped_the_less_is_shared(ticket18: lth.Ticket) -> None:
    fractions = (0.0, 0.25, 0.5, 1.0)
    packed = {"whole": pack(ticket18.masks)}
    packed |= {str(f): pack(swapped(ticket18, f, seed=0).masks) for f in fractions}
    shared = compare(packed).over_chance()[0, 1:]
    assert shared[0] == pytest.approx(1 / ticket18.density, rel=0.5)
    assert shared[0] > shared[1] > shared[2] > shared[3]
    assert shared[3] == pytest.approx(1, abs=0.01)  # as random as it can be
    assert swapped(ticket18, 0, seed=0).masks == ticket18.masks


def test_the_same_seed_gives_the_same_ticket(ticket18: lth.Ticket) -> None:
    assert swapped(ticket18, 0.5, 3) == swapped(ticket18, 0.5, 3) != swapped(ticket18, 0.5, 4)
    assert noisy(ticket18, 0.5, 3) == noisy(ticket18, 0.5, 3) != noisy(ticket18, 0.5, 4)


def test_noise_is_relative_to_the_layers_kept_weights(ticket18: lth.Ticket) -> None:
    found = noisy(ticket18, 0.5, seed=0)
    assert found.masks == ticket18.masks
    for name, mask in ticket18.masks.items():
        noise = (found.weights[name] - ticket18.weights[name])[mask]
        expected = 0.5 * ticket18.weights[name][mask].std()
        assert noise.std() == pytest.approx(expected.item(), rel=0.05)
        assert torch.equal(found.weights[name][~mask], ticket18.weights[name][~mask])
    assert torch.equal(found.weights["conv1.weight"], ticket18.weights["conv1.weight"])
    assert found.meta.recipe["noise"] == 0.5 and found.meta.parent == ticket18.digest


def test_a_layer_with_a_single_weight_left_gets_no_noise(ticket18: lth.Ticket) -> None:
    lonely = torch.zeros(ticket18.masks[LAYER].shape, dtype=torch.bool)
    lonely[0, 0, 0, 0] = True
    masks = lth.Masks({**ticket18.masks, LAYER: lonely})
    ticket = ticket18.with_masks(masks, {})
    assert torch.equal(noisy(ticket, 1.0, 0).weights[LAYER], ticket.weights[LAYER])


@pytest.mark.parametrize(
    ("disturb", "values", "message"),
    [
        (swapped, (-0.1, 1.1, float("nan")), r"in \[0, 1\], found"),
        (noisy, (-0.1, float("inf"), float("nan")), "finite strength"),
    ],
)
def test_a_value_out_of_range_is_refused(ticket18: lth.Ticket, disturb, values, message) -> None:
    for value in values:
        with pytest.raises(lth.ConfigError, match=message):
            disturb(ticket18, value, 0)


def test_the_tool_perturbs_a_ticket_file(
    ticket_tool: Callable[..., Any],
    ticket18_file: Path,
    _resnet18_weights: dict[str, Tensor],
    tmp_path: Path,
) -> None:
    dense = lth.Ticket.dense(_resnet18_weights).save(tmp_path / "dense.ticket")
    out = tmp_path / "out.ticket"
    options = ("--weights", dense, "--swap", 0.2, "--noise", 0.1, "--seed", 7)
    done = ticket_tool("perturb", ticket18_file, out, *options)
    assert done.returncode == 0 and "wrote" in done.stdout
    ticket = lth.Ticket.load(ticket18_file).with_weights(lth.Ticket.load(dense))
    assert lth.Ticket.load(out) == noisy(swapped(ticket, 0.2, 7), 0.1, 7)


def test_the_tool_unmasks_a_ticket_whose_pruned_weights_are_unknown(
    ticket_tool: Callable[..., Any], ticket18_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.ticket"
    assert ticket_tool("perturb", ticket18_file, out, "--unmask").returncode == 0
    ticket, found = lth.Ticket.load(ticket18_file), lth.Ticket.load(out)
    assert found == unmasked(ticket) and found.density == 1 and found.meta.round == 0
    assert found.meta.parent == ticket.digest and found.meta.input == ticket.meta.input
    kept = ticket.masks[LAYER]
    assert torch.equal(found.weights[LAYER][kept], ticket.weights[LAYER][kept])
    assert not found.weights[LAYER][~kept].any()


def test_the_tool_says_what_is_missing(
    ticket_tool: Callable[..., Any], ticket18_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.ticket"
    assert "expected --shuffle, --swap" in ticket_tool("perturb", ticket18_file, out).stderr
    assert not out.exists()
