"""tools/ticket.py: one-shot tickets, what a ticket is shown as, and what its errors advise."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import lth_plugins as lth
from lth_plugins import Ticket
from lth_plugins.pruning.criteria.random import Random


@pytest.fixture
def dense(resnet18_state, tmp_path) -> Path:
    return Ticket.dense(resnet18_state, source="test").save(tmp_path / "dense.ticket")


@pytest.mark.parametrize("allocation", ["global", "layer", "erk"])
def test_one_command_prunes_a_dense_ticket(
    ticket_tool, dense, tmp_path, resnet18_state, allocation
) -> None:
    out = tmp_path / "sparse.ticket"
    options = ["--sparsity", "0.59", "--allocation", allocation]
    done = ticket_tool("prune", dense, out, *options)
    assert done.returncode == 0, done.stderr
    found = Ticket.load(out)
    assert found.masks == lth.prune(resnet18_state, 0.59, scope=allocation)
    assert found.sparsity == pytest.approx(0.59, abs=1e-4) and "59.0" in done.stdout
    assert found.meta.round == 1 and found.meta.source == "test"
    assert found.meta.parent == Ticket.load(dense).digest
    assert found.meta.recipe["pruned"] == {
        "sparsity": 0.59,
        "criterion": "magnitude",
        "allocation": allocation,
    }
    name = "layer1.0.conv1.weight"
    assert torch.equal(found.weights[name], resnet18_state[name] * found.masks[name])


def test_one_command_makes_a_sparse_ticket_of_a_checkpoint(
    ticket_tool, tmp_path, resnet18_state
) -> None:
    state = {f"module.encoder_q.{name}": value for name, value in resnet18_state.items()}
    torch.save({"state_dict": state}, tmp_path / "moco.pth")
    out = tmp_path / "sparse.ticket"
    command = ["prune", tmp_path / "moco.pth", out, "--sparsity", "0.5", "--source", "moco"]
    done = ticket_tool(*command)
    assert done.returncode == 0 and "recognised" in done.stdout, done.stderr
    found = Ticket.load(out)
    assert found.masks == lth.prune(resnet18_state, 0.5) and found.meta.source == "moco"


def test_a_sparse_ticket_is_pruned_further_whatever_it_is_called(
    ticket_tool, ticket18, tmp_path
) -> None:
    path = ticket18.save(tmp_path / "model.safetensors")
    assert ticket_tool("prune", path, tmp_path / "a.ticket", "--sparsity", "0.9").returncode == 0
    found = Ticket.load(tmp_path / "a.ticket")
    assert found.masks.issubset(ticket18.masks)
    assert found.masks.numel - found.masks.kept == round(0.9 * found.masks.numel)
    assert found.meta.round == ticket18.meta.round + 1


def test_random_masks_have_a_seed(ticket_tool, dense, tmp_path, resnet18_state) -> None:
    out, options = tmp_path / "a.ticket", ["--sparsity", "0.5", "--criterion", "random"]
    assert ticket_tool("prune", dense, out, *options, "--seed", "3").returncode == 0
    assert Ticket.load(out).masks == lth.prune(resnet18_state, 0.5, criterion=Random(3))
    assert Ticket.load(out).meta.recipe["pruned"]["seed"] == 3


def test_what_is_pruned_outside_the_trunk_stays(ticket_tool, whole18, tmp_path) -> None:
    path, out = whole18.save(tmp_path / "whole.ticket"), tmp_path / "a.ticket"
    done = ticket_tool("prune", path, out, "--sparsity", "0.99")
    assert done.returncode == 0 and "outside     stays as it is" in done.stdout, done.stderr
    assert Ticket.load(out).outside.masks == whole18.outside.masks


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--sparsity", "59"], "found 59; for 59 % write 0.59"),
        (["--sparsity", "59%"], "found 59%; for 59 % write 0.59"),
        (["--sparsity", "1"], "from 0 to below 1, found 1"),
        (["--sparsity", "-0.1"], "--sparsity"),
        (["--sparsity", "nan"], "found nan"),
        (["--sparsity", "much"], "such as 0.59, found 'much'"),
        ([], "--sparsity"),
        (["--sparsity", "0.6"], "67.23 % sparse already: give a higher --sparsity than 0.6723"),
        (["--sparsity", "0.9", "--criterion", "snip"], "'snip' ranks weights by the gradients"),
        (["--sparsity", "0.9", "--criterion", "magnitud"], "did you mean 'magnitude'"),
        (["--sparsity", "0.9", "--seed", "1"], "--seed with --criterion random alone"),
        (["--sparsity", "0.9", "--mask", "zeros"], "--mask says how to read a checkpoint"),
    ],
)
def test_a_prune_that_cannot_be_is_one_sentence_and_writes_nothing(
    ticket_tool, ticket18_file, tmp_path, options: list[str], said: str
) -> None:
    done = ticket_tool("prune", ticket18_file, tmp_path / "out.ticket", *options)
    assert done.returncode == 2 and said in done.stderr, done.stderr
    assert not list(tmp_path.iterdir())


def test_no_command_writes_over_what_it_reads(
    ticket_tool, ticket18_file, resnet18_state, tmp_path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(resnet18_state, "a.pth")
    shutil.copy(ticket18_file, "a.ticket")
    os.symlink("a.pth", "link.pth")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for command in (
        ["prune", "a.pth", "a.pth", "--sparsity", "0.9"],
        ["prune", "a.ticket", "./a.ticket", "--sparsity", "0.9"],
        ["prune", "a.pth", tmp_path / "link.pth", "--sparsity", "0.9"],
        ["import", "a.pth", "--source", "moco", "--out", "a.pth"],
        ["convert", "a.ticket", "a.ticket", "--to", "mmseg"],
        ["perturb", "a.ticket", "a.pth", "--weights", "a.pth"],
        ["structure", "a.ticket", "a.ticket", "--kind", "channel"],
        ["export", "a.pth", "a.pth"],
    ):
        done = ticket_tool(*command)
        assert done.returncode == 2 and "for both, which would be lost" in done.stderr, done.stderr
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_where_weights_are_lacking_the_option_for_them_is_named(
    ticket_tool, ticket18_file, tmp_path
) -> None:
    out = tmp_path / "out.ticket"
    for command in (
        ["perturb", ticket18_file, out, "--shuffle"],
        ["perturb", ticket18_file, out, "--swap", 0.2],
        ["structure", ticket18_file, out, "--kind", "channel"],
    ):
        done = ticket_tool(*command)
        assert done.returncode == 2 and "as --weights FILE" in done.stderr, done.stderr
        assert "with_weights(" not in done.stderr
    assert not out.exists()


def test_a_sparse_ticket_from_elsewhere_is_not_called_round_0(ticket18, resnet18_state) -> None:
    elsewhere = Ticket(ticket18.masks, resnet18_state, lth.TicketMeta("resnet18", "theirs"))
    assert "round" not in repr(elsewhere) and "67.23 % sparse" in repr(elsewhere)
    assert "round 0" in repr(Ticket.dense(resnet18_state)) and "round 5" in repr(ticket18)


@pytest.fixture(scope="module")
def long_file(ticket18: Ticket, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ticket with much to show."""
    meta = replace(ticket18.meta, recipe={"a long recipe": "word " * 40})
    return replace(ticket18, meta=meta).save(tmp_path_factory.mktemp("long") / "a.ticket")


def test_a_ticket_is_shown_whole_at_80_columns_and_in_a_pipe(ticket_tool, long_file) -> None:
    ticket = Ticket.load(long_file)
    for columns, width in (("80", 80), (None, 1000)):
        text = ticket_tool("show", long_file, columns=columns).stdout
        lines = text.splitlines()
        assert all(len(line) <= width for line in lines) and "…" not in text
        assert any(ticket.digest in line for line in lines)
        shown = [line.split()[0] for line in lines if line.startswith("layer")]
        assert shown == list(ticket.masks)
        assert "resnet18" in text and f"{100 * ticket.sparsity:.2f} %" in text and "█" in text
    assert ("word " * 40).strip() in text, "a pipe wraps nothing"


def test_json_has_all_of_a_ticket(ticket_tool, whole18, tmp_path) -> None:
    path = whole18.save(tmp_path / "a.ticket")
    shown = json.loads(ticket_tool("show", path, "--json").stdout)
    ticket = Ticket.load(path)
    assert shown["digest"] == ticket.digest and shown["sparsity"] == ticket.sparsity
    assert {name: shown[name] for name in ticket.meta.to_dict()} == ticket.meta.to_dict()
    for part, masks in (("layers", ticket.masks), ("outside", ticket.outside.masks)):
        assert {name: counts["kept"] for name, counts in shown[part].items()} == {
            name: int(mask.sum()) for name, mask in masks.items()
        }


def test_a_difference_is_shown_whole_at_80_columns(ticket_tool, long_file, tmp_path) -> None:
    ticket = Ticket.load(long_file)
    sparser = ticket.with_masks(lth.prune(ticket.weights, 0.2, ticket.masks), {})
    other = sparser.save(tmp_path / "b.ticket")
    text = ticket_tool("diff", long_file, other, columns="80").stdout
    assert all(len(line) <= 80 for line in text.splitlines()) and "…" not in text
    assert ticket.digest in text and sparser.digest in text
    assert all(name in text for name in ticket.masks)
    both = json.loads(ticket_tool("diff", long_file, other, "--json").stdout)
    assert sum(layer["both"] for layer in both["layers"].values()) == sparser.masks.kept
    assert not both["differing_weights"]
