"""Sparse training: steps of RigL and AC/DC beside those of the same network, masked or dense."""

import copy
import itertools
from collections.abc import Callable, Iterator

import torch
import torchvision

import lth_plugins as lth
from benchmarks.measure import Run, in_turns
from benchmarks.report import Row, at_most
from benchmarks.setting import Setting
from benchmarks.training import Trained, cross_entropy
from lth_plugins.ticket import Ticket

SPARSITY = 0.9
LONG = 1_000_000  # iterations: the methods' schedules stay at their beginning


def steps(setting: Setting) -> Iterator[Row]:
    """A step between two updates of RigL, one with an update, and one of AC/DC's dense phases."""
    torch.manual_seed(0)
    model = torchvision.models.get_model(setting.arch).to(setting.device)
    state = {name: value.cpu() for name, value in model.state_dict().items()}
    dense = Ticket.dense(state, source="benchmark")
    loss = cross_entropy(setting.batch, setting.image, setting.device)

    def masked() -> Trained:
        other = copy.deepcopy(model)
        lth.attach(other, dense, load_weights=False)
        return Trained.start(other, loss)

    def trains(period: int) -> Run:
        one = masked()
        sparse = lth.SparseTraining("rigl", sparsity=SPARSITY, delta_t=period)
        sparse.start(one.model, LONG)
        return _steps_of(one, sparse)

    fixed = masked()
    lth.SparseTraining("rigl", sparsity=SPARSITY).start(fixed.model, LONG)
    phase = masked()
    acdc = lth.SparseTraining("acdc", sparsity=SPARSITY)
    acdc.start(phase.model, LONG)
    ways = {
        "masked": fixed.step,
        "between": trains(LONG // 2),
        "update": trains(1),
        "dense": Trained.start(model, loss).step,
        "phase": _steps_of(phase, acdc),
    }
    times = in_turns({name: _always(run) for name, run in ways.items()}, setting.steps)
    what = f"{setting.arch}, {setting.batch} × {setting.image} px"
    for label, ours, theirs, bound, limit in (
        ("RigL, a step between updates / masked", "between", "masked", 1.02, "1 is no method"),
        ("RigL, a step with an update / masked", "update", "masked", 1.2, "one in ΔT = 100 steps"),
        ("AC/DC, a step of a dense phase / dense", "phase", "dense", 1.02, "1 is no method"),
    ):
        yield Row(
            f"{label}: {what}",
            str(times[ours]),
            f"{times[theirs]} ({theirs})",
            times[ours].over(times[theirs]),
            at_most(bound),
            limit,
        )


def _steps_of(one: Trained, sparse: lth.SparseTraining) -> Run:
    done = itertools.count(1)

    def run() -> None:
        one.step()
        sparse.after_step(one.model, next(done))

    return run


def _always(run: Run) -> Callable[[], Run]:
    return lambda: run
