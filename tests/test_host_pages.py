"""The script on the page of each host runs as it stands there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import lth_plugins as lth

PAGES = Path(__file__).parents[1] / "docs/hosts"
LINES = 25


def boxes() -> list[Any]:
    target = {"boxes": torch.tensor([[4.0, 4.0, 30.0, 40.0]]), "labels": torch.tensor([3])}
    return [([torch.rand(3, 64, 64)] * 2, [target] * 2)]


def labels() -> Any:
    return DataLoader(TensorDataset(torch.rand(2, 3, 32, 32), torch.tensor([1, 2])), 2)


@pytest.mark.parametrize(
    ("page", "batches"), [("torchvision", boxes), ("lightning", labels), ("timm", labels)]
)
def test_the_first_script_of_a_page_runs(
    page: str, batches: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (PAGES / f"{page}.md").read_text()
    script = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]
    assert len(script.splitlines()) <= LINES
    monkeypatch.chdir(tmp_path)
    exec(compile(script, f"{page}.md", "exec"), {"data_loader": batches(), "__name__": page})
    tuned = lth.Ticket.load(tmp_path / "tuned.ticket")
    assert tuned.masks == lth.Ticket.load("cifar10-simclr-r18-s96").masks
    assert tuned.meta.source == "my task"
