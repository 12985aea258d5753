"""The part of a study's report that is about masks: densities, cost, likeness, kernels."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from markupsafe import Markup

from lth_plugins.errors import LthError
from lth_plugins.study.analyse.cost import Cost, Counter, total
from lth_plugins.study.analyse.similarity import Matrix, Overlaps, Packed, compare, pack
from lth_plugins.study.analyse.structure import (
    DeadChannels,
    KernelMap,
    dead_channels,
    kernel_map,
)
from lth_plugins.study.report import plots, tables, templates
from lth_plugins.study.report.assets import Assets
from lth_plugins.study.report.mask_plots import draw_kernels, draw_matrix
from lth_plugins.study.report.tables import Column, Table, Value, number, span
from lth_plugins.ticket import ResNet, Ticket
from lth_plugins.ticket.arch import STAGES
from lth_plugins.ticket.transplant import Alignment, align

SIZE = 224  # of the image that FLOPs are counted for, pixels


@dataclass(frozen=True)
class TicketMasks:
    """What the report says about a ticket's masks, without holding its weights.

    Attributes:
        source: as the report calls it.
        round: of IMP.
        kind: "ticket", or the structure that was made of it.
        path: the ticket's file.
        arch: the architecture.
        packed: the masks.
        aligned: the masks with their channels in the order of the first source's; None where the
            source is not aligned.
        densities: of each layer.
        density: of all layers.
        channels: dead ones of each layer.
        kernels: all k×k kernels.
        costs: of each layer, and outside.
    """

    source: str
    round: int
    kind: str
    path: Path
    arch: ResNet
    packed: Packed
    aligned: Packed | None
    densities: Mapping[str, float]
    density: float
    channels: Mapping[str, DeadChannels]
    kernels: KernelMap
    costs: Mapping[str, Cost]


Alignments = Mapping[str, Alignment | None]
"""By source; None for the first of an architecture, whose order the others get."""


def align_sources(dense: Mapping[str, Path]) -> tuple[Alignments, list[str]]:
    """Align the dense networks of sources, each with the first one of its architecture.

    Args:
        dense: their dense tickets, by source.

    Returns:
        The alignments of those that can be read, and a sentence about each of the others. A single
        source is not read: there is nothing to align it with.
    """
    if len(dense) < 2:
        return {}, []
    firsts: dict[str, Ticket] = {}
    found: dict[str, Alignment | None] = {}
    problems = []
    for source, path in sorted(dense.items()):
        try:
            ticket = Ticket.load(path)
            first = firsts.setdefault(ticket.arch.name, ticket)
            found[source] = None if first is ticket else align(ticket, first)
        except LthError as error:
            problems.append(f"masks of {source} are not aligned with others: {error}")
    return found, problems


def read_tickets(
    paths: Mapping[tuple[str, int, str], Path], alignments: Alignments
) -> tuple[list[TicketMasks], list[str]]:
    """Read the tickets of a study, one after another.

    Args:
        paths: by source, round and kind (see `TicketMasks`).
        alignments: of `align_sources`.

    Returns:
        Those that can be read, and a sentence about each of the others.
    """
    counters: dict[str, Counter] = {}
    found, problems = [], []
    for (source, k, kind), path in sorted(paths.items()):
        try:
            ticket = Ticket.load(path)
        except LthError as error:
            of = f"{source}, round {k}{'' if kind == 'ticket' else f', {kind}'}"
            problems.append(f"masks of {of}, are not shown: {error}")
            continue
        masks, arch = ticket.masks, ticket.arch
        alignment, packed = alignments.get(source), pack(masks)
        aligned = packed if source in alignments else None
        if alignment is not None:
            aligned = pack(alignment.masks(masks))
        if arch.name not in counters:
            counters[arch.name] = Counter(arch, SIZE)
        found.append(
            TicketMasks(
                *(source, k, kind, path, arch, packed, aligned, masks.densities(), masks.density),
                *(dead_channels(masks, arch), kernel_map(masks), counters[arch.name](masks)),
            )
        )
    return found, problems


def sections(tickets: Sequence[TicketMasks], show: Assets, made_here: bool) -> list[Markup]:
    """The parts of the page, under `plots.style`; of each architecture, if there are several.

    Args:
        tickets: to tell of.
        show: where figures and tables go.
        made_here: whether the page ends with the runs that made them.
    """
    if not tickets:
        return []
    links = {(k, "round"): show.href(t.path) for k, t in enumerate(tickets)}
    parts = [
        templates.heading("What the masks look like"),
        show.table(_table(tickets, made_here), "tickets", links),
    ]
    unstructured = [t for t in tickets if t.kind == "ticket"]
    for arch in sorted({t.arch.name for t in unstructured}):
        own = [t for t in unstructured if t.arch.name == arch]
        parts += _densities(own, show) + _kernels(own, show) + _likeness(own, show)
    return parts


def _table(tickets: Iterable[TicketMasks], made_here: bool) -> Table:
    columns = (
        Column("source", "Source"),
        Column("round", "Round"),
        Column("kind", "Masks"),
        Column("left", "Weights left (%)", number(2)),
        Column("parameters", "Parameters (M)", number(2)),
        Column("dense_parameters", "dense", number(2)),
        Column("gflops", "GFLOPs", number(3)),
        Column("dense_gflops", "dense", number(3)),
        Column("dead_kernels", "Dead kernels (%)", number(2)),
        Column("dead_inputs", "Dead input channels"),
        Column("inputs", "of"),
        Column("dead_outputs", "Dead output channels"),
        Column("outputs", "of"),
    )
    rows = []
    for t in tickets:
        cost, channels = total(t.costs), t.channels.values()
        rows.append(
            (
                *(t.source, t.round, t.kind, 100 * t.density),
                *(cost.sparse_parameters / 1e6, cost.parameters / 1e6),
                *(cost.sparse_flops / 1e9, cost.flops / 1e9),
                100 * float(t.kernels.dead.mean()),
                *(sum(c.inputs for c in channels), sum(c.of_inputs for c in channels)),
                *(sum(c.outputs for c in channels), sum(c.of_outputs for c in channels)),
            )
        )
    caption = (
        f"The trunk without a head, for an image of {SIZE} × {SIZE} pixels. FLOPs are "
        "multiply-adds, as fvcore counts them. A kernel is the k×k weights between two channels "
        "(k > 1); it is dead, as a channel is, when nothing of it is left. Rounds lead to "
        "the tickets' files"
        + (", and what made them is at the end of this page." if made_here else ".")
    )
    return Table(caption, columns, tuple(rows))


def _densities(tickets: Sequence[TicketMasks], show: Assets) -> list[Markup]:
    figures, folded = [], []
    for source, own in _by_source(tickets):
        fig, axes = plots.figure(width=5.6, height=3.9)
        profiles = {f"round {t.round} ({100 * t.density:.2f} %)": t.densities for t in own}
        plots.draw_densities(axes, profiles)
        axes.set_title(source)
        sparsest = own[-1].densities
        alt = (
            f"Layer-wise densities of the tickets of {source}, layers in network order. In round "
            f"{own[-1].round} the densest layer keeps {100 * max(sparsest.values()):.1f} %, the "
            f"sparsest {100 * min(sparsest.values()):.1f} %. All values are in a table below."
        )
        figures.append(show.figure(fig, f"densities {source}", alt, "Densities of the layers."))
        (shown,) = (t for t in _comparable(tickets) if t.source == source)
        folded.append(
            templates.details(
                f"Layers of {source}, round {shown.round}",
                tables.to_html(_layers(source, [shown])),
                show.files(_layers(source, own), f"layers {source}", "All rounds:"),
            )
        )
    return [
        templates.heading("Layer-wise densities", 3),
        templates.figures(figures),
        *folded,
    ]


def _layers(source: str, tickets: Sequence[TicketMasks]) -> Table:
    """Each layer of each ticket of a source: density, dead channels, cost."""
    columns = (
        Column("layer", "Convolution"),
        Column("round", "Round"),
        Column("left", "Weights left (%)", number(2)),
        Column("parameters", "Parameters", number(0)),
        Column("dense_parameters", "dense", number(0)),
        Column("mflops", "MFLOPs", number(2)),
        Column("dense_mflops", "dense", number(2)),
        Column("dead_inputs", "Dead inputs"),
        Column("inputs", "of"),
        Column("dead_outputs", "Dead outputs"),
        Column("outputs", "of"),
    )
    rows = [
        (
            *(name.removesuffix(".weight"), t.round, 100 * density),
            *(t.costs[name].sparse_parameters, t.costs[name].parameters),
            *(t.costs[name].sparse_flops / 1e6, t.costs[name].flops / 1e6),
            *(t.channels[name].inputs, t.channels[name].of_inputs),
            *(t.channels[name].outputs, t.channels[name].of_outputs),
        )
        for t in tickets
        for name, density in t.densities.items()
    ]
    return Table(f"Layers of the tickets of {source}, by round.", columns, tuple(rows))


def _comparable(tickets: Sequence[TicketMasks]) -> list[TicketMasks]:
    """A ticket of each source: of the last round that all have, or its own last without such."""
    by_source = _by_source(tickets)
    common = set.intersection(*({t.round for t in own} for _, own in by_source))
    return [[t for t in own if not common or t.round in common][-1] for _, own in by_source]


def _kernels(tickets: Sequence[TicketMasks], show: Assets) -> list[Markup]:
    figures = []
    for ticket in _comparable(tickets):
        source = ticket.source
        fig, axes = plots.figure(width=5.6, height=3.4)
        draw_kernels(axes, ticket.kernels)
        axes.set_title(f"{source}, round {ticket.round}: {100 * ticket.density:.2f} % left")
        pieces = np.split(ticket.kernels.dead, list(ticket.kernels.starts.values())[1:])
        stages = ", ".join(
            f"{100 * dead.mean():.1f} % in {stage}"
            for stage, dead in zip(STAGES, pieces, strict=True)
        )
        alt = f"Map of the kernels of {source}, round {ticket.round}; completely pruned: {stages}."
        figures.append(show.figure(fig, f"kernels {source}", alt, f"Pruned: {stages}."))
    return [
        templates.heading("Kernel maps", 3),
        templates.paragraph(
            "Every k×k kernel (k > 1) is a dot, column after column from input to output; "
            "completely pruned ones are bright. Lines mark where a stage begins."
        ),
        templates.figures(figures),
    ]


def _likeness(tickets: Sequence[TicketMasks], show: Assets) -> list[Markup]:
    if len(tickets) < 2:
        return []
    labels = [(t.source, f"round {t.round}") for t in tickets]
    arch = tickets[0].arch.name
    overlaps = compare(
        {f"{source}, {name}": t.packed for (source, name), t in zip(labels, tickets, strict=True)}
    )
    parts = _parts(overlaps)
    figures = [
        image for part, own in parts.items() for image in _matrices(own, part, labels, arch, show)
    ]
    aligned = {label: t.aligned for label, t in zip(overlaps.labels, tickets, strict=True)}
    several = len({t.source for t in tickets}) > 1
    text = ""
    if several and all(packed is not None for packed in aligned.values()):
        own = compare({label: packed for label, packed in aligned.items() if packed is not None})
        figures += _matrices(own, "all stages, aligned", labels, arch, show)
        parts |= {f"{part}, aligned": found for part, found in _parts(own).items()}
        text = (
            " Networks of two sources have their channels in another order. Aligned masks are "
            f"permuted as the dense network of their source is most like {tickets[0].source}'s, by "
            "its weights."
        )
    return [
        templates.heading("Which masks are alike", 3),
        templates.paragraph(
            "Intersection over union of the kept weights; how many times as many weights two masks "
            "share as random masks of their layer-wise densities would (1: chance); and Hamming "
            "distance, the fraction of weights that one keeps and the other prunes. Rounds of a "
            f"source go from dense to sparse.{text}"
        ),
        templates.figures(figures),
        show.files(_pairs(parts, labels), f"likeness {arch}", "Each pair of masks:"),
    ]


def _parts(overlaps: Overlaps) -> dict[str, Overlaps]:
    return {"all stages": overlaps} | {stage: overlaps.of_stage(stage) for stage in STAGES}


_MEASURES = {"IoU": "iou", "Overlap / chance": "over_chance", "Hamming distance": "hamming"}


def _matrices(
    overlaps: Overlaps, part: str, labels: Sequence[tuple[str, str]], arch: str, show: Assets
) -> list[Markup]:
    figures = []
    for measure, method in _MEASURES.items():
        matrix: Matrix = getattr(overlaps, method)()
        fig, axes = plots.figure(width=4.8, height=4.2)
        draw_matrix(axes, matrix, labels, measure, logarithmic=method == "over_chance")
        axes.set_title(f"{measure}, {part}")
        others = matrix[np.triu_indices(len(matrix), 1)]
        alt = (
            f"Matrix of {len(labels)} masks, {part}: {measure} of two different ones is "
            f"{span(others.min(), others.max(), '.3g')}, median {np.median(others):.3g}."
        )
        name = f"{method} {part} {arch}"
        figures.append(show.figure(fig, name, alt, f"{measure}, {part}."))
    return figures


def _pairs(parts: Mapping[str, Overlaps], labels: Sequence[tuple[str, str]]) -> Table:
    columns = (
        Column("first", "Masks"),
        Column("second", "and"),
        Column("part", "Part"),
        *(Column(method, title, number(4)) for title, method in _MEASURES.items()),
    )
    names = [f"{source}, {name}" for source, name in labels]
    rows: list[tuple[Value, ...]] = []
    for part, overlaps in parts.items():
        found = [getattr(overlaps, method)() for method in _MEASURES.values()]
        for i, j in zip(*np.triu_indices(len(names), 1), strict=True):
            rows.append((names[i], names[j], part, *(float(matrix[i, j]) for matrix in found)))
    return Table("Likeness of masks, each pair once.", columns, tuple(rows))


def _by_source(tickets: Iterable[TicketMasks]) -> list[tuple[str, list[TicketMasks]]]:
    """Each source, and its tickets from dense to sparse."""
    found: dict[str, list[TicketMasks]] = {}
    for ticket in sorted(tickets, key=lambda t: (t.source, t.round)):
        found.setdefault(ticket.source, []).append(ticket)
    return list(found.items())
