"""What a ticket promises in every host's own trainer: its checkpoints, and stopping."""

from __future__ import annotations

import os
import shutil
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lth_plugins as lth
from lth_plugins.resilience.exit_codes import EXIT_CODE
from lth_plugins.resilience.sigterm import Stopped
from lth_plugins.ticket import locate
from tests.conformance.hosts import marked
from tests.conformance.test_models import LEAK
from tests.conformance.trainers import TRAINERS, Training, TrainingHost, at

ITERATIONS = 4


@dataclass(frozen=True)
class Run:
    """A complete run of a host, which the tests only read."""

    host: TrainingHost
    folder: Path
    ticket: Path

    @property
    def last(self) -> Path:
        return Path(self.folder, Path((self.folder / "last_checkpoint").read_text().strip()).name)


def stop(_: nn.Module) -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def leak(model: nn.Module) -> None:
    with torch.no_grad():
        model.get_parameter(locate(model).keys[LEAK]).fill_(1.0)


@pytest.fixture(scope="module", params=marked(TRAINERS))
def run(
    request: pytest.FixtureRequest,
    scenes: Path,
    ticket18_file: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Run:
    """A run that nothing disturbed."""
    host, folder = TRAINERS[request.param], tmp_path_factory.mktemp(request.param) / "whole"
    host.train(Training(scenes, folder, ticket18_file, ITERATIONS))
    return Run(host, folder, ticket18_file)


@pytest.mark.parametrize("name", marked(TRAINERS))
def test_a_run_reads_its_ticket_once(
    name: str, scenes: Path, ticket18: lth.Ticket, tmp_path: Path
) -> None:
    reads = []
    lth.TicketCatalog.register(f"counted_{name}", lambda: reads.append(name) or ticket18)
    TRAINERS[name].train(Training(scenes, tmp_path / "run", f"counted_{name}", 1))
    assert reads == [name]


def test_what_is_saved_is_masked_and_is_the_fine_tuned_ticket(
    run: Run, ticket18: lth.Ticket
) -> None:
    state, final = run.host.state(run.last), lth.Ticket.load(run.folder / "final.ticket")
    keys = locate(state).keys
    assert final.masks == ticket18.masks
    assert all(torch.equal(value, state[keys[name]]) for name, value in final.weights.items())
    for name, mask in ticket18.masks.items():
        assert not state[keys[name]][~mask].any(), name


def test_a_run_that_is_stopped_resumes_bit_for_bit(run: Run, scenes: Path, tmp_path: Path) -> None:
    host, folder, before = run.host, tmp_path / "stopped", signal.getsignal(signal.SIGTERM)
    with pytest.raises(Stopped) as ended:
        host.train(Training(scenes, folder, run.ticket, ITERATIONS, at({2: stop})))
    assert ended.value.code == EXIT_CODE and signal.getsignal(signal.SIGTERM) is before
    assert Path(ended.value.saved) == host.saved(folder, 2) and host.saved(folder, 2).exists()
    assert not host.saved(folder, 3).exists() and not (folder / "final.ticket").exists()
    host.train(Training(scenes, folder, run.ticket, ITERATIONS, resume=True))
    resumed = Run(host, folder, run.ticket)
    expected, found = host.state(run.last), host.state(resumed.last)
    assert [name for name, value in expected.items() if not torch.equal(found[name], value)] == []
    expected, found = (host.optimizer(one.last)["state"] for one in (run, resumed))
    assert expected.keys() == found.keys()
    for key, values in expected.items():
        for name, value in values.items():
            assert torch.equal(torch.as_tensor(found[key][name]), torch.as_tensor(value)), name
    assert lth.Ticket.load(folder / "final.ticket") == lth.Ticket.load(run.folder / "final.ticket")


def test_a_leak_stops_the_run_before_it_is_saved(run: Run, scenes: Path, tmp_path: Path) -> None:
    folder = tmp_path / "leak"
    with pytest.raises(lth.TicketError, match=LEAK):
        run.host.train(Training(scenes, folder, run.ticket, ITERATIONS, at({2: leak})))
    assert list(folder.glob("*.pth")) == [run.host.saved(folder, 1)]
    assert not (folder / "final.ticket").exists()


def test_a_run_is_not_resumed_with_another_ticket(
    run: Run, scenes: Path, other18_file: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "other"
    folder.mkdir()
    shutil.copy(run.last, folder)
    (folder / "last_checkpoint").write_text(run.host.note(folder / run.last.name))
    with pytest.raises(lth.TicketError, match=r"trained with masks .* zero [1-9][\d,]*") as caught:
        run.host.train(Training(scenes, folder, other18_file, ITERATIONS + 1, resume=True))
    assert run.host.other in str(caught.value)
    assert [path.name for path in folder.glob("*.pth")] == [run.last.name]


def trained_sparse(
    run: Run, scenes: Path, folder: Path, method: str, **options: Any
) -> tuple[lth.Ticket, lth.Ticket]:
    """What a method ends with in a whole run, and in one that was stopped after two steps."""
    finals = []
    for name, stops in (("whole", False), ("stopped", True)):
        arguments = (scenes, folder / name, run.ticket, ITERATIONS)
        if stops:
            with pytest.raises(Stopped):
                run.host.train(Training(*arguments, at({2: stop}), method=(method, options)))
        run.host.train(Training(*arguments, resume=stops, method=(method, options)))
        finals.append(lth.Ticket.load(folder / name / "final.ticket"))
    return finals[0], finals[1]


def test_sparse_training_resumes_with_its_masks(
    run: Run, scenes: Path, ticket18: lth.Ticket, tmp_path: Path
) -> None:
    """Two updates before the stop, and one after it."""
    whole, stopped = trained_sparse(run, scenes, tmp_path, "rigl", delta_t=1, t_end=1.0)
    assert whole == stopped
    masks = whole.masks
    assert masks != ticket18.masks and masks.densities() == ticket18.masks.densities()
    assert whole.meta.recipe["rigl"]["delta_t"] == 1


def test_a_gradually_pruned_run_resumes_with_its_masks(
    run: Run, scenes: Path, ticket18: lth.Ticket, tmp_path: Path
) -> None:
    schedule = {"target": 0.9, "begin": 0, "end": 3, "period": 1}
    whole, stopped = trained_sparse(run, scenes, tmp_path, "gradual", **schedule)
    assert whole == stopped
    masks = whole.masks
    assert masks.kept == masks.numel - round(0.9 * masks.numel)
    assert masks.issubset(ticket18.masks)
