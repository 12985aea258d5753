"""Looking at tickets: list, show and diff."""

import argparse
import json
import os
import sys
import textwrap
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from rich.bar import Bar
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lth_plugins.errors import printable
from lth_plugins.ticket.arch import STAGES, part_of
from lth_plugins.ticket.card import Described, facts
from lth_plugins.ticket.catalog import TicketCatalog
from lth_plugins.ticket.counts import Counts
from lth_plugins.ticket.file import Array, Content, read, read_facts
from lth_plugins.ticket.zoo import zoo


def show(args: argparse.Namespace) -> None:
    ticket = _read(args.ticket)
    if args.json:
        _print_json({**_described(ticket), "layers": _by_name(ticket.counts)})
        return
    console = _console()
    for name, value in facts(ticket).items():
        _print_fact(console, name, value)
    console.print()

    layers = _table("density of each layer", "weights", "kept", "density")
    trunk, outside = ticket.counts, ticket.outside_counts
    longest = max(map(len, (*trunk.by_name, *outside.by_name)))
    layers.add_column("", width=max(4, min(20, COLUMNS - longest - len("1,000,000 " * 2) - 11)))
    by_stage: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for name, (kept, numel) in trunk.by_name.items():
        layers.add_row(*_layer(name, numel, kept), end_section=False)
        by_stage[part_of(name)][0] += numel
        by_stage[part_of(name)][1] += kept
    layers.add_section()
    for stage in STAGES:
        layers.add_row(*_layer(f"all of {stage}", *by_stage[stage]))
    layers.add_row(*_layer("all", trunk.numel, trunk.kept), style="bold")
    if outside.by_name:
        layers.add_section()
        for name, (kept, numel) in outside.by_name.items():
            layers.add_row(*_layer(name, numel, kept))
        layers.add_row(*_layer("all outside the trunk", outside.numel, outside.kept), style="bold")
    console.print(layers)


def _read(ref: str) -> Content:
    """A ticket's content; PyTorch is not imported for it."""
    source = TicketCatalog.find(ref)
    return read(source) if isinstance(source, Path) else source().content


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


def _described(ticket: Described) -> dict[str, Any]:
    """The description, counts and digest of a ticket, as plain JSON types."""
    counts = ticket.counts
    return {
        **ticket.meta.to_dict(),
        "sparsity": counts.sparsity,
        "weights": counts.numel,
        "kept": counts.kept,
        "outside": _by_name(ticket.outside_counts),
        "digest": ticket.digest,
    }


def _by_name(counts: Counts) -> dict[str, dict[str, int]]:
    return {n: {"weights": numel, "kept": kept} for n, (kept, numel) in counts.by_name.items()}


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
    tickets = {name: read_facts(path) for name, path in files.items()}
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
        kept, size = f"{ticket.counts.kept:,}", f"{files[name].stat().st_size / 1e6:.1f} MB"
        percent = f"{100 * ticket.counts.sparsity:.2f} %"
        table.add_row(name, ticket.meta.arch, _shown(ticket.meta.source), kept, percent, size)
    console.print(table)
    console.print('\nlth.Ticket.load("NAME") loads one; docs/zoo.md says what each is good for.')


def diff(args: argparse.Namespace) -> None:
    first, second = _read(args.first), _read(args.second)
    ours, theirs = facts(first), facts(second)
    differing = {n: (ours[n], theirs[n]) for n in ours if ours[n] != theirs[n]}
    comparable = first.meta.network == second.meta.network
    overlaps = _overlaps(first.masks, second.masks) if comparable else {}
    weights = _differing_weights(first, second) if comparable else []
    aligned, how = _aligned(args, second)
    if args.json:
        described = {"first": _described(first), "second": _described(second)}
        keys = ("both", "first_only", "second_only")

        def counts_of(found: Mapping[str, Array]) -> dict[str, Any]:
            return {n: dict(zip(keys, c.tolist(), strict=True)) for n, c in found.items()}

        compared = {"layers": counts_of(overlaps), "differing_weights": weights}
        if aligned:
            compared["aligned_layers"] = counts_of(aligned)
        _print_json({**described, **compared})
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

    names = ["both", "first only", "second only", "IoU"] + ["IoU aligned"] * bool(aligned)
    layers = _table("kept weights of each layer", *names)
    for name, counts in overlaps.items():
        layers.add_row(name, *_overlap(counts), *([_iou(aligned[name])] if aligned else []))
    layers.add_section()
    totals = [sum(found.values(), np.zeros(3, int)) for found in (overlaps, aligned)]
    layers.add_row(
        "all", *_overlap(totals[0]), *([_iou(totals[1])] if aligned else []), style="bold"
    )
    console.print(layers)
    if aligned:
        console.print(f"aligned {how}", soft_wrap=True)
    console.print(f"statistics, and weights that both keep, differ in {len(weights)} entries of θ")


def _aligned(args: argparse.Namespace, second: Content) -> tuple[dict[str, Array], str]:
    """The overlaps once the first network's channels are in the second's order, and how it went."""
    if not args.align and all(v is None for v in (args.between, args.images, args.size)):
        return {}, ""
    from lth_plugins import Ticket
    from lth_plugins.commands.ticket.transplant import alignment_of, told

    first = Ticket.load(args.first)
    alignment = alignment_of(args, first, Ticket.load(args.second))
    assert alignment is not None  # of other options without --align it says so
    masks = {name: mask.numpy() for name, mask in alignment.masks(first.masks).items()}
    return _overlaps(masks, second.masks), told(alignment)


def _overlaps(first: Mapping[str, Array], second: Mapping[str, Array]) -> dict[str, Array]:
    """How many weights both keep, and each alone, by parameter."""
    return {
        name: np.array([np.count_nonzero(one) for one in (a & b, a & ~b, b & ~a)])
        for (name, a), b in zip(first.items(), second.values(), strict=True)
    }


def _differing_weights(first: Content, second: Content) -> list[str]:
    """The entries of θ that differ where both keep them."""

    def shared(ticket: Content, name: str) -> Array:
        value = ticket.weights[name]
        return value[first.masks[name] & second.masks[name]] if name in first.masks else value

    return [n for n in first.weights if not np.array_equal(shared(first, n), shared(second, n))]


def _overlap(counts: Array) -> list[str]:
    return [f"{int(count):,}" for count in counts] + [_iou(counts)]


def _iou(counts: Array) -> str:
    both, union = int(counts[0]), int(counts.sum())
    return f"{both / union:.4f}" if union else "–"
