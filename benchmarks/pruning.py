"""Choosing masks: one prune, all rounds of IMP, memory, and growth with the number of weights."""

from collections.abc import Iterator, Mapping

import numpy as np
import torch
from torch import Tensor

import lth_plugins as lth
from benchmarks.measure import (
    Run,
    Times,
    Way,
    in_turns,
    other_work,
    peak_extra_rss,
    peak_of_tensors,
    seconds_of,
)
from benchmarks.peers import modules_of, prune_as_open_lth, prune_as_torch
from benchmarks.report import Row, at_least, at_most
from benchmarks.setting import (
    BYTES,
    Setting,
    distinct_weights,
    prunable_of,
    prunable_weights,
)

FRACTION = 0.2
MOVED = BYTES + 1  # bytes per weight: the weight is read once and its mask is written
PEERS = ("torch.nn.utils.prune", "open_lth's way")


def one_prune(setting: Setting) -> Iterator[Row]:
    """One round from dense weights."""
    seconds = {}
    for arch in setting.sizes:
        count = prunable_weights(arch)
        state = {n: v.to(setting.device) for n, v in distinct_weights(arch).items()}
        ways: dict[str, Way] = {"ours": lambda state=state: lambda: lth.prune(state, FRACTION)}
        if arch != setting.sizes[0] or arch == setting.arch:
            ways |= _peers(prunable_of(state, arch))
        _check_same({name: way()() for name, way in ways.items()})  # warms them up, too
        repeats = setting.repeats if arch == setting.sizes[0] else min(setting.repeats, 3)
        times = in_turns(ways, repeats, warm_up=0)
        seconds[arch] = times["ours"].median / count
        for peer in [name for name in PEERS if name in ways]:
            yield _faster(
                f"one prune, {arch}, same masks", times["ours"], times[peer], peer, setting, count
            )
    small, large = setting.sizes[0], setting.sizes[-1]
    yield Row(
        f"one prune, time of a weight, {large} / {small}",
        f"{1e9 * seconds[large]:.2f} ns",
        f"{1e9 * seconds[small]:.2f} ns ({small})",
        seconds[large] / seconds[small],
        at_most(1.3),
        "linear is 1",
        "the smallest network's weights stay longer in the processor's caches",
    )


def beside_other_work(setting: Setting) -> Iterator[Row]:
    """One prune while every core is busy, where waking many threads costs a wait for each."""
    arch, count = setting.arch, prunable_weights(setting.arch)
    state = distinct_weights(arch)
    ways: dict[str, Way] = {
        "ours": lambda: lambda: lth.prune(state, FRACTION),
        PEERS[0]: _peers(prunable_of(state, arch))[PEERS[0]],
    }
    _check_same({name: way()() for name, way in ways.items()})
    with other_work():
        times = in_turns(ways, setting.steps, warm_up=0)
    what = f"one prune beside other work, {arch}, same masks"
    yield _faster(what, times["ours"], times[PEERS[0]], PEERS[0], setting, count)


def all_rounds(setting: Setting) -> Iterator[Row]:
    """All rounds of masks, from weights that stay the same; in each round all ways take turns."""
    arch, count = setting.arch, prunable_weights(setting.arch)
    state = {n: v.to(setting.device) for n, v in distinct_weights(arch).items()}
    weights = prunable_of(state, arch)
    modules = modules_of(weights)
    masks: dict[str, Mapping[str, object]] = {
        "ours": lth.Masks.ones({name: tuple(w.shape) for name, w in weights.items()}),
        PEERS[1]: {name: np.ones(tuple(w.shape), np.float32) for name, w in weights.items()},
    }
    steps = {
        "ours": lambda: lth.prune(state, FRACTION, masks["ours"]),
        PEERS[0]: lambda: prune_as_torch(modules, FRACTION),
        PEERS[1]: lambda: prune_as_open_lth(weights, masks[PEERS[1]], FRACTION),
    }
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(setting.rounds):
        for name, step in steps.items():
            seconds[name].append(seconds_of(lambda name=name, step=step: _keep(masks, name, step)))
        _check_same(masks)
    total = {name: Times((sum(values),)) for name, values in seconds.items()}
    what = f"all {setting.rounds} rounds of masks, {arch}, same masks"
    for peer in PEERS:
        yield _faster(what, total["ours"], total[peer], peer, setting, setting.rounds * count)


def memory(setting: Setting) -> Iterator[Row]:
    """The peak memory of one prune, its result included."""
    for arch in dict.fromkeys((setting.arch, setting.sizes[-1])):
        weights = prunable_weights(arch)
        whole = BYTES * weights
        ours = peak_extra_rss(prepare_ours, arch)
        for name, peer in ((PEERS[0], prepare_torch), (PEERS[1], prepare_open_lth)):
            theirs = peak_extra_rss(peer, arch)
            yield Row(
                f"peak extra memory of one prune, {arch} / W",
                f"{ours / 1e6:.0f} MB",
                f"{theirs / 1e6:.0f} MB = {theirs / whole:.2f} W ({name})",
                ours / whole,
                at_most(1.5),
                f"{ours / weights:.1f} B per weight; the result alone is 1 B",
                unit="W",
            )
    if setting.device.type == "cuda":
        arch, whole = setting.arch, setting.weight_bytes
        state = {n: v.to(setting.device) for n, v in distinct_weights(arch).items()}
        modules = modules_of(prunable_of(state, arch))
        on_gpu = peak_of_tensors(lambda: lth.prune(state, FRACTION), setting.device)
        theirs = peak_of_tensors(lambda: prune_as_torch(modules, FRACTION), setting.device)
        yield Row(
            f"peak extra GPU memory of one prune, {arch} / W",
            f"{on_gpu / 1e6:.0f} MB",
            f"{theirs / 1e6:.0f} MB = {theirs / whole:.2f} W ({PEERS[0]})",
            on_gpu / whole,
            at_most(1.5),
            "masks are chosen on the CPU",
            unit="W",
        )


def prepare_ours(arch: str) -> Run:
    state = distinct_weights(arch)
    return lambda: lth.prune(state, FRACTION)


def prepare_torch(arch: str) -> Run:
    modules = modules_of(prunable_of(distinct_weights(arch), arch))
    return lambda: prune_as_torch(modules, FRACTION)


def prepare_open_lth(arch: str) -> Run:
    weights = prunable_of(distinct_weights(arch), arch)
    masks = {name: np.ones(tuple(w.shape), np.float32) for name, w in weights.items()}
    return lambda: prune_as_open_lth(weights, masks, FRACTION)


def _peers(weights: Mapping[str, Tensor]) -> dict[str, Way]:
    ones = {name: np.ones(tuple(w.shape), np.float32) for name, w in weights.items()}

    def torchs() -> Run:
        modules = modules_of(weights)  # they can be pruned from dense only once
        return lambda: prune_as_torch(modules, FRACTION)

    return {
        PEERS[0]: torchs,
        PEERS[1]: lambda: lambda: prune_as_open_lth(weights, ones, FRACTION),
    }


def _keep(masks: dict[str, Mapping[str, object]], name: str, step: Run) -> None:
    masks[name] = step()  # type: ignore[assignment]


def _check_same(results: Mapping[str, Mapping[str, object]]) -> None:
    """Check that all ways found the same masks."""
    for peer, masks in results.items():
        for name, mask in results["ours"].items():
            if not torch.equal(torch.as_tensor(masks[name]).cpu().bool(), mask):
                raise SystemExit(f"{peer} and ours found different masks of {name}")


def _faster(what: str, ours: Times, theirs: Times, peer: str, setting: Setting, count: int) -> Row:
    moved = MOVED * count
    possible = theirs.median * setting.bandwidth / moved
    return Row(
        what,
        str(ours),
        f"{theirs} ({peer})",
        theirs.over(ours),
        at_least(20) if setting.device.type == "cpu" else None,
        setting.against_moving(moved, ours.median),
        f"a prune that moves each weight once and does nothing else would be {possible:.0f} ×",
    )
