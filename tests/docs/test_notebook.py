"""The quick start, a notebook: it runs as it stands, and is committed without outputs."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

import lth_plugins as lth

NOTEBOOK = Path(__file__).parents[2] / "docs/quickstart.ipynb"


def cells() -> list[dict]:
    return [one for one in json.loads(NOTEBOOK.read_text())["cells"] if one["cell_type"] == "code"]


def test_it_is_committed_without_outputs() -> None:
    assert [cell for cell in cells() if cell["outputs"] or cell["execution_count"]] == []


def test_where_the_package_is_missing_the_first_cell_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"needs lth_plugins, .*pip install .*\[digits,"):
        exec("".join(cells()[0]["source"]), {})


@pytest.mark.slow
def test_it_runs_from_the_ticket_to_the_onnx_file(tmp_path: Path) -> None:
    nbclient = pytest.importorskip("nbclient", reason="pip install -e '.[docs]' -c constraints.txt")
    nbformat = pytest.importorskip("nbformat")
    pytest.importorskip("onnxscript")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbclient.NotebookClient(notebook, timeout=500, kernel_name="python3").execute(cwd=str(tmp_path))
    printed = "".join(
        output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", ())
    )
    before, after = (float(part.split(" %")[0]) for part in printed.split("IoU ")[1:])
    assert min(before, after) > 40
    assert lth.Ticket.load(tmp_path / "tuned.ticket").sparsity > 0.95
    assert (tmp_path / "segmentor.onnx").stat().st_size < 16_000_000
