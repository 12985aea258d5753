"""C3 where parameters are sharded: by FSDP2 (`fully_shard`), in two and in four processes."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch.distributed.checkpoint as dcp
import torch.multiprocessing
import torchvision

import lth_plugins as lth
from tests.masking.sharded import PROCESSES, SCENARIOS, leaks, masked, work


@pytest.fixture(scope="module")
def folder(ticket18: lth.Ticket, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where four processes have run all scenarios, and left what they saved."""
    path = tmp_path_factory.mktemp("sharded")
    # Not by forks of this process: those cannot train once it has.
    torch.multiprocessing.spawn(work, (ticket18, path), nprocs=PROCESSES)
    return path


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_a_ticket_holds_on_a_sharded_model(folder: Path, scenario: str) -> None:
    number = list(SCENARIOS).index(scenario)
    wrong: Sequence[str] = [(folder / f"{number}_{r}.txt").read_text() for r in range(PROCESSES)]
    assert not any(wrong), "\n".join(wrong)


@pytest.mark.parametrize("processes", [2, 4])
def test_one_process_loads_what_several_saved(folder, ticket18, processes: int) -> None:
    model = torchvision.models.resnet18(num_classes=4)
    states = {"model": model.state_dict()}
    dcp.load(states, checkpoint_id=folder / f"by_{processes}")
    assert not leaks(masked(states["model"], ticket18), ticket18)
    lth.attach(model, ticket18, load_weights=False)
    model.load_state_dict(states["model"])
    assert not lth.attached(model).zeroed_by_load
