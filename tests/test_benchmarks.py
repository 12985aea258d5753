"""Every benchmark still runs: at a tiny size, once, and whatever it then measures."""

import re
from pathlib import Path

import pytest
import torch
import torchvision
from torch.sparse._semi_structured_conversions import (
    sparse_semi_structured_from_dense_cutlass,
    sparse_semi_structured_to_dense_cutlass,
)

import lth_plugins as lth
from benchmarks import compact, run
from benchmarks.report import COLUMNS, Row, at_least, at_most, results, section
from lth_plugins.deploy.onnx import resnet
from lth_plugins.pruning.structure import NM, structured

COMMITTED = (run.FOLDER / "RESULTS.md").read_text()


APART = ("compaction", "second-order", "slimming")
"""Sections with tests of their own, of which some take minutes."""


@pytest.mark.parametrize("name", [n for n in run.SECTIONS if n not in APART])
def test_a_section_is_measured_and_written_alone(name: str, tmp_path: Path, capsys) -> None:
    out = tmp_path / "RESULTS.md"
    out.write_text(COMMITTED)
    assert run.main(["--tiny", "--only", name, "--out", str(out)]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert len(rows) >= len(run.SECTIONS[name].benchmarks)
    assert all(row.count("|") == len(COLUMNS) + 1 for row in rows)
    (old, new) = (text.split("\n## ") for text in (COMMITTED, out.read_text()))
    assert [a.splitlines()[0] for a in old] == [b.splitlines()[0] for b in new]
    changed = [b for a, b in zip(old, new, strict=True) if a != b]
    assert len(changed) == 1 and changed[0].startswith(f"{run.SECTIONS[name].title}\n")
    if name == "files":
        assert any("imports no other package" in row for row in rows)


def test_compaction_is_timed_beside_the_flops_it_saves(capsys) -> None:
    assert run.main(["--tiny", "compact"]) == 0
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines()]
    assert [row[4] for row in rows] == ["≥ 1.8 ×", "≥ 1.6 ×", "≥ 1.8 ×", "≥ 1.6 ×", "–"]
    for row in rows:
        assert 50 <= float(re.search(r"(\d+) % of the inner channels removed", row[0])[1]) < 60
        assert 1.5 < float(re.search(r"of the (\S+) × fewer FLOPs", row[-1])[1]) < 2.5


def test_a_slimmed_classifier_is_timed_beside_the_flops_it_saves(capsys) -> None:
    assert run.main(["--tiny", "slim-classifier", "slim-training"]) == 0
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines()]
    rows = [row for row in rows if len(row) == len(COLUMNS)]
    assert [row[4] for row in rows] == ["≥ 1.7 ×", "≥ 1.7 ×", "≥ 1.8 ×", "≤ 0.05 ×", "≤ 0.05 ×"]
    for row in rows[:3]:
        assert 1.9 < float(re.search(r"of the (\S+) × fewer FLOPs", row[-1])[1]) < 2.3
    for row in rows[3:]:
        ordinary, removal = map(float, re.findall(r"(\S+) ms", row[1]))
        assert 0 < ordinary < removal


@pytest.mark.soak
def test_cap_is_timed_and_compared_with_magnitude(capsys) -> None:
    assert run.main(["--tiny", "cap", "cap-quality"]) == 0
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines()]
    rows = [row for row in rows if len(row) == len(COLUMNS)]
    assert [row[4] for row in rows] == ["≤ 10 minutes", "≤ 8 GB", "≥ 0 points", "≥ 0 points"]
    assert all("with the masks alone" in row[1] for row in rows[2:])


@pytest.mark.soak
@pytest.mark.detectron2
@pytest.mark.mmseg
def test_slimmed_detectors_and_segmentors_are_timed_too(capsys) -> None:
    assert run.main(["--tiny", "slim-detectors", "slim-segmentors"]) == 0
    assert capsys.readouterr().out.count("fewer FLOPs |") == 15


@pytest.mark.soak
@pytest.mark.detectron2
@pytest.mark.mmseg
def test_a_compacted_detector_and_segmentor_are_timed_too(capsys) -> None:
    assert run.main(["--tiny", "compact-hosts"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 4


def test_what_sparse_tensor_cores_are_given_is_2_to_4_and_the_same_network() -> None:
    """All but their products themselves, which need a GPU."""
    dense = lth.Ticket.dense(torchvision.models.resnet18(), source="random")
    model = resnet(structured(dense, NM()).sparse_weights())
    products = compact.with_products(model)
    images = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        torch.testing.assert_close(products(images), model(images), atol=1e-4, rtol=0)
    pointwise = [m for m in products.modules() if isinstance(m, compact.Pointwise)]
    assert len(pointwise) == 3
    for module in pointwise:
        weight = module.weight.detach().half()
        kept, places = sparse_semi_structured_from_dense_cutlass(weight)  # refuses what is not
        assert torch.equal(sparse_semi_structured_to_dense_cutlass(kept, places), weight)


def test_an_unknown_benchmark_is_refused_with_the_known_ones(capsys) -> None:
    with pytest.raises(SystemExit):
        run.main(["speed"])
    assert "unknown benchmark speed; known are prune" in capsys.readouterr().err


def test_what_misses_stays_in_the_table_with_its_reason() -> None:
    slow = Row("a prune", "2 s", "4 s", 2.0, at_least(20), reason="the machine is busy")
    small = Row("a file", "1 MB", "1 MB", 1.0, at_most(1.05))
    text = section("A part", [slow, small], ["detector: needs detectron2"], "CPU, 2 threads", 60.0)
    assert text.startswith("## A part\n")
    assert "| a prune | 2 s | 4 s | 2 × | ≥ 20 × | **no** |" in text
    assert "| a file | 1 MB | 1 MB | 1 × | ≤ 1.05 × | yes |" in text
    assert "Misses:\n\n- a prune: the machine is busy\n\n" in text
    assert "Not measured:\n\n- detector: needs detectron2\n" in text
    assert "commit" in text and "CPU, 2 threads; 1 minutes" in text


def test_sections_that_are_not_measured_again_stay_to_the_letter() -> None:
    one, two = (section(t, [Row(t, "1", "2", 2.0, None)], [], "CPU", 1.0) for t in ("One", "Two"))
    before = results({"One": one, "Two": two})
    new = one.replace("| 1 |", "| 3 |")
    assert results({"One": new, "Two": ""}, before) == before.replace(one, new)
    assert results({"One": "", "Between": "## Between\n\nx\n", "Two": ""}, before) == (
        before.replace(two, f"## Between\n\nx\n\n{two}")
    )
    assert two not in results({"One": ""}, before)


def test_what_is_only_tried_does_not_replace_what_was_measured(capsys) -> None:
    with pytest.raises(SystemExit):
        run.main(["--tiny", "--only", "files"])
    assert "measures nothing worth keeping" in capsys.readouterr().err
