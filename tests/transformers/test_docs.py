"""The script of docs/hosts/transformers.md runs as it is written there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import lth_plugins as lth
from tests.transformers.models import OPTIONS, Scenes, arguments, collate, resnet

PAGE = Path(__file__).parents[2] / "docs/hosts/transformers.md"


def test_the_script_of_the_page_trains(
    ticket18_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = re.search(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)[1]
    assert len(script.splitlines()) <= 25
    (tmp_path / "resnet18.ticket").write_bytes(ticket18_file.read_bytes())
    monkeypatch.chdir(tmp_path)
    kind = "DetrForObjectDetection"
    given = arguments(tmp_path, 1).to_dict()
    names = ("max_steps", "per_device_train_batch_size", "use_cpu", "report_to", "disable_tqdm")
    others = {"remove_unused_columns": False, "dataloader_pin_memory": False}
    exec(
        compile(script, PAGE.name, "exec"),
        {
            "CONFIG": {**OPTIONS[kind], "backbone_config": resnet("timm", (4,))},
            "ARGUMENTS": {**{name: given[name] for name in names}, **others},
            "RESUME": None,
            "make_dataset": lambda processor: Scenes(kind, processor),
            "collate": collate,
        },
    )
    assert (
        lth.Ticket.load("runs/detr/final.ticket") and Path("runs/detr/model.safetensors").exists()
    )
