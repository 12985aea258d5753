"""The similarity of masks: all tickets of several searches, in pairs."""

from collections.abc import Iterator

import lth_plugins as lth
from benchmarks.measure import Run, Times, in_turns, peak_extra_rss
from benchmarks.peers import shared_as_floats
from benchmarks.report import Row, at_least, at_most
from benchmarks.setting import Setting, distinct_weights, prunable_weights
from lth_plugins import Masks
from lth_plugins.study.analyse.similarity import Overlaps, compare, pack


def matrix(setting: Setting) -> Iterator[Row]:
    """The matrix, computed from masks and packing included, and its memory."""
    tickets: dict[str, Masks] = {}
    for source in range(setting.sources):
        state = distinct_weights(setting.arch, source)
        masks = lth.prune(state, 0)
        for k in range(setting.rounds + 1):
            tickets[f"{source} {k}"] = masks
            masks = lth.prune(state, 0.2, masks)
    count = len(tickets)
    pairs = count * (count + 1) // 2
    first, *_, last = tickets.values()
    ways = {
        "ours": lambda: lambda: pack_and_compare(tickets),
        "peer": lambda: lambda: shared_as_floats(first, last),
    }
    times = in_turns(ways, min(setting.repeats, 3), warm_up=0)
    _check_same(compare({"a": pack(first), "b": pack(last)}), shared_as_floats(first, last))
    ours, pair = times["ours"], times["peer"]
    theirs = Times(tuple(pairs * seconds for seconds in pair.seconds))
    weights = prunable_weights(setting.arch)
    # Packing reads masks as bytes; a comparison reads one bit per weight of both masks.
    moved = count * weights + pairs * 2 * weights / 8
    what = f"similarity matrix of {count} {setting.arch} tickets"
    yield Row(
        what,
        str(ours),
        f"{theirs.median:.3g} s (float comparison: {pair} per pair, {pairs} pairs)",
        theirs.over(ours),
        at_least(20),
        setting.against_moving(moved, ours.median),
    )
    most = peak_extra_rss(prepare_matrix, setting.arch, count)
    yield Row(
        f"peak extra memory of the {what}",
        f"{most / 1e6:.0f} MB",
        f"{count * weights * 4 / 1e6:.0f} MB (the masks as floats)",
        most / 1e9,
        at_most(1),
        f"{8 * most / (count * weights):.2f} bits per weight",
        unit="GB",
    )


def pack_and_compare(tickets: dict[str, Masks]) -> Overlaps:
    return compare({label: pack(masks) for label, masks in tickets.items()})


def prepare_matrix(arch: str, count: int) -> Run:
    masks = lth.prune(distinct_weights(arch), 0.5)
    return lambda: compare({str(index): pack(masks) for index in range(count)})


def _check_same(ours: Overlaps, theirs: list[float]) -> None:
    if ours.both[0, 1].tolist() != theirs:
        raise SystemExit("the float comparison and ours count different weights")
