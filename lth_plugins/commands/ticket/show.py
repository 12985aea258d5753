"""Looking at tickets: list, show and diff."""

import argparse
import json
import os
import sys
import textwrap
from collections import defaultdict
from typing import Any

import torch
from rich.bar import Bar
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lth_plugins import Masks, Ticket
from lth_plugins.errors import printable
from lth_plugins.ticket.arch import STAGES, part_of
from lth_plugins.ticket.card import facts
from lth_plugins.ticket.zoo import zoo


def show(args: argparse.Namespace) -> None:
    ticket = Ticket.load(args.ticket)
    if args.json:
        _print_json({**_described(ticket), "layers": _counts(ticket.masks)})
        return
    console = _console()
    for name, value in facts(ticket).items():
        _print_fact(console, name, value)
    console.print()

    layers = _table("density of each layer", "weights", "kept", "density")
    longest = max(map(len, ticket.all_masks))
    layers.add_column("", width=max(4, min(20, COLUMNS - longest - len("1,000,000 " * 2) - 11)))
    by_stage: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for name, mask in ticket.masks.items():
        kept, numel = int(mask.sum()), mask.numel()
        layers.add_row(*_layer(name, numel, kept), end_section=False)
        by_stage[part_of(name)][0] += numel
        by_stage[part_of(name)][1] += kept
    layers.add_section()
    for stage in STAGES:
        layers.add_row(*_layer(f"all of {stage}", *by_stage[stage]))
    layers.add_row(*_layer("all", ticket.masks.numel, ticket.masks.kept), style="bold")
    if ticket.outside:
        layers.add_section()
        for name, mask in ticket.outside.masks.items():
            layers.add_row(*_layer(name, mask.numel(), int(mask.sum())))
        masks = ticket.outside.masks
        layers.add_row(*_layer("all outside the trunk", masks.numel, masks.kept), style="bold")
    console.print(layers)


COLUMNS = 80
"""The width of tables, unless the names of parameters need more."""


def _console() -> Console:
    """A console as wide as the terminal; in a pipe or a file nothing is wrapped."""
    fits = sys.stdout.isatty() or "COLUMNS" in os.environ
    return Console(width=None if fits else 1000)


def _print_fact(console: Console, name: str, value: str) -> None:
    """Print a fact, wrapped below itself; 64 digits of a digest fit on one line."""
    indent = len("architecture  ")
    for line in textwrap.wrap(printable(value), max(20, console.width - indent)):
        console.print(Text(f"{name:<{indent}}{line}"), soft_wrap=True)
        name = ""


def _table(title: str, *counts: str) -> Table:
    """A table of parameters and counts, with its columns close together."""
    table = Table(title=title, title_justify="left", box=SIMPLE, padding=0, show_edge=False)
    table.add_column("parameter", overflow="fold")
    for name in counts:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _described(ticket: Ticket) -> dict[str, Any]:
    """The description, counts and digest of a ticket, as plain JSON types."""
    masks = ticket.masks
    return {
        **ticket.meta.to_dict(),
        "sparsity": ticket.sparsity,
        "weights": masks.numel,
        "kept": masks.kept,
        "outside": _counts(ticket.outside.masks),
        "digest": ticket.digest,
    }


def _counts(masks: Masks) -> dict[str, dict[str, int]]:
    return {n: {"weights": mask.numel(), "kept": int(mask.sum())} for n, mask in masks.items()}


def _print_json(content: dict[str, Any]) -> None:
    print(json.dumps(content, indent=1))


def _shown(text: str) -> Text:
    """Text from a file, without the markup of rich or of a terminal."""
    return Text(printable(text))


def _layer(name: str, numel: int, kept: int) -> tuple[Text, str, str, str, Bar]:
    density = kept / numel
    return _shown(name), f"{numel:,}", f"{kept:,}", f"{100 * density:6.2f} %", Bar(1, 0, density)


def list_(args: argparse.Namespace) -> None:
    files = zoo()
    tickets = {name: Ticket.load(path) for name, path in files.items()}
    if args.json:
        _print_json({name: _described(ticket) for name, ticket in tickets.items()})
        return
    console = _console()
    if not tickets:
        console.print("No ticket comes with this installation.")
        return
    table = Table("name", "architecture", "source", box=SIMPLE, padding=0, show_edge=False)
    for name in ("weights kept", "sparsity", "file"):
        table.add_column(name, justify="right", no_wrap=True)
    for name, ticket in tickets.items():
        kept, size = f"{ticket.masks.kept:,}", f"{files[name].stat().st_size / 1e6:.1f} MB"
        percent = f"{100 * ticket.sparsity:.2f} %"
        table.add_row(name, ticket.meta.arch, _shown(ticket.meta.source), kept, percent, size)
    console.print(table)
    console.print('\nlth.Ticket.load("NAME") loads one; docs/zoo.md says what each is good for.')


def diff(args: argparse.Namespace) -> None:
    first, second = Ticket.load(args.first), Ticket.load(args.second)
    ours, theirs = facts(first), facts(second)
    differing = {n: (ours[n], theirs[n]) for n in ours if ours[n] != theirs[n]}
    comparable = first.arch == second.arch
    overlaps = _overlaps(first, second) if comparable else {}
    weights = _differing_weights(first, second) if comparable else []
    if args.json:
        described = {"first": _described(first), "second": _described(second)}
        keys = ("both", "first_only", "second_only")
        counts_of = {n: dict(zip(keys, c.tolist(), strict=True)) for n, c in overlaps.items()}
        _print_json({**described, "layers": counts_of, "differing_weights": weights})
        return
    console = _console()
    if not differing:
        console.print("The tickets are the same.")
        return
    for name, pair in {"tickets": (args.first, args.second), **differing}.items():
        _print_fact(console, name, pair[0])
        _print_fact(console, "", pair[1])
    console.print()
    if not comparable:
        console.print("They are for different architectures: there is nothing more to compare.")
        return

    names = ("both", "first only", "second only", "IoU")
    layers = _table("kept weights of each layer", *names)
    for name, counts in overlaps.items():
        layers.add_row(name, *_overlap(counts))
    layers.add_section()
    layers.add_row("all", *_overlap(sum(overlaps.values(), torch.zeros(3).long())), style="bold")
    console.print(layers)
    console.print(f"statistics, and weights that both keep, differ in {len(weights)} entries of θ")


def _overlaps(first: Ticket, second: Ticket) -> dict[str, torch.Tensor]:
    """How many weights both keep, and each alone, by parameter."""
    return {
        name: torch.stack([(a & b).sum(), (a & ~b).sum(), (b & ~a).sum()])
        for (name, a), b in zip(first.masks.items(), second.masks.values(), strict=True)
    }


def _differing_weights(first: Ticket, second: Ticket) -> list[str]:
    """The entries of θ that differ where both keep them."""

    def shared(ticket: Ticket, name: str) -> torch.Tensor:
        value = ticket.weights[name]
        if name not in first.masks:
            return value
        return value.masked_fill(~(first.masks[name] & second.masks[name]), 0)

    return [n for n in first.weights if not torch.equal(shared(first, n), shared(second, n))]


def _overlap(counts: torch.Tensor) -> list[str]:
    both, union = int(counts[0]), int(counts.sum())
    return [f"{int(count):,}" for count in counts] + [f"{both / union:.4f}" if union else "–"]
