"""C3 where parameters are sharded: by FSDP2 (`fully_shard`), in two and in four processes."""

from pathlib import Path

import pytest
import torch.distributed.checkpoint as dcp
import torchvision

import lth_plugins as lth
from tests.masking.sharded import PROCESSES, SCENARIOS, leaks, masked, work
from tests.processes import together


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where four processes save checkpoints."""
    return tmp_path_factory.mktemp("sharded")


@pytest.fixture(scope="module", autouse=True)
def wrong(ticket18: lth.Ticket, folder: Path) -> dict[str, list[str]]:
    """What went wrong in each process, by scenario, after all have run."""
    by_rank = together(work, ticket18, folder, processes=PROCESSES)
    return dict(zip(SCENARIOS, map(list, zip(*by_rank, strict=True)), strict=True))


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_a_ticket_holds_on_a_sharded_model(wrong: dict[str, list[str]], scenario: str) -> None:
    assert not any(wrong[scenario]), "\n".join(wrong[scenario])


@pytest.mark.parametrize("processes", [2, 4])
def test_one_process_loads_what_several_saved(folder, ticket18, processes: int) -> None:
    model = torchvision.models.resnet18(num_classes=4)
    states = {"model": model.state_dict()}
    dcp.load(states, checkpoint_id=folder / f"by_{processes}")
    assert not leaks(masked(states["model"], ticket18), ticket18)
    lth.attach(model, ticket18, load_weights=False)
    model.load_state_dict(states["model"])
    assert not lth.attached(model).zeroed_by_load
