"""A ticket in transformers' Trainer in two processes, as torchrun or accelerate start them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

import lth_plugins as lth
from lth_plugins.ticket import locate
from tests.processes import together
from tests.transformers.test_train import DETR, LEAK, leak, train


def _rank(rank: int, file: str, out: str) -> tuple[dict[str, torch.Tensor], str]:
    """The weights that a training ends with, and why one with a leak in the second stops."""
    os.environ |= dict.fromkeys(("RANK", "LOCAL_RANK"), f"{rank}")
    os.environ |= {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    ticket, acts = lth.Ticket.load(file), {2: leak} if rank else {}
    model = train(Path(out, "whole"), ticket, save_strategy="no", steps=2)
    with pytest.raises(lth.TicketError) as refused:
        train(Path(out, "leak"), ticket, acts, steps=2)
    return dict(model.state_dict()), str(refused.value)


@pytest.mark.slow
def test_two_processes_keep_the_zeros_and_see_a_leak_in_either(
    ticket18: lth.Ticket, ticket18_file: Path, tmp_path: Path
) -> None:
    (first, said), (second, there) = together(_rank, f"{ticket18_file}", f"{tmp_path}")
    keys = locate(first).keys
    for name, mask in ticket18.masks.items():
        assert not first[keys[name]][~mask].any() and first[keys[name]][mask].any(), name
    statistics = [name for name in first if "running_" in name or "num_batches" in name]
    assert all(torch.equal(v, second[n]) for n, v in first.items() if n not in statistics)
    final = lth.Ticket.load(tmp_path / "whole/final.ticket")
    assert final.masks == ticket18.masks and final.meta.source == DETR
    assert LEAK in said and LEAK in there
    assert [path.name for path in (tmp_path / "leak").iterdir()] == ["checkpoint-1"]
