"""Between two seeds of a ticket: interpolation, its barrier, and what is refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import torchvision

import lth_plugins as lth
from lth_plugins.pruning.search.imp import round_path
from lth_plugins.study.analyse.connectivity import (
    PLACES,
    Line,
    check_end,
    connect,
    interpolate,
    read_line,
)
from lth_plugins.study.plan.config import load_config
from lth_plugins.study.plan.expand import plan
from lth_plugins.study.plan.kinds import LINE
from lth_plugins.study.plan.runs import write_plan

ROOT = Path(__file__).resolve().parents[3]


def test_the_ends_are_the_networks_and_counters_are_not_interpolated() -> None:
    one, other = (torchvision.models.resnet18().state_dict() for _ in range(2))
    other["bn1.num_batches_tracked"] += 7
    for at, end in ((0.0, one), (1.0, other)):
        found = interpolate(one, other, at)
        assert all(torch.allclose(v, end[n]) for n, v in found.items() if v.is_floating_point())
        assert found["bn1.num_batches_tracked"] == 0
    half = interpolate(one, other, 0.5)["bn1.running_var"]
    assert torch.allclose(half, (one["bn1.running_var"] + other["bn1.running_var"]) / 2)
    with pytest.raises(lth.TicketError, match=r"same entries and shapes, found another fc\.weight"):
        interpolate(one, {**other, "fc.weight": torch.zeros(3, 512)}, 0.5)


def test_both_ends_have_the_masks_of_the_ticket(ticket18: lth.Ticket) -> None:
    trained = {**torchvision.models.resnet18().state_dict(), **ticket18.sparse_weights()}
    check_end(trained, ticket18)
    with pytest.raises(lth.TicketError, match=r"masks of one ticket, found weights .* 1 layers"):
        check_end({**trained, "layer1.0.conv1.weight": torch.ones(64, 64, 3, 3)}, ticket18)


def test_a_barrier_is_the_mean_of_the_ends_less_the_lowest() -> None:
    assert Line((80.0, *[70.0] * 9, 82.0)).barrier == 11
    assert Line((80.0, *[81.0] * 9, 80.0)).barrier == 0


STUDY = """
out: study
archs: [resnet18]
seeds: [0, 1]
rounds: [5]
sources: {mine: {tickets: .}}
connectivity: {rounds: [5], tasks: [cls]}
tasks:
  cls:
    tool: classification
    config: cls.yaml
    overrides: [data.subset=64, training.epochs=1, "training.milestones=[]"]
"""


@pytest.mark.slow
def test_a_line_is_planned_evaluated_by_the_tool_and_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ticket18: lth.Ticket
) -> None:
    from dataclasses import asdict

    from lth_plugins.transfer import load_config as load_transfer
    from lth_plugins.transfer.run import classify

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    Path("study.yaml").write_text(STUDY)
    Path("cls.yaml").write_text((ROOT / "configs/transfer/digits_r18.yaml").read_text())
    for k in (0, 5):
        ticket18.save(round_path(tmp_path, k)) if k else lth.Ticket.dense(
            ticket18.weights, source="test"
        ).save(round_path(tmp_path, k))
    config = load_config("study.yaml")
    runs = plan(config).runs
    write_plan(config.folder, Path("study.yaml"), runs, {}, (), asdict(config))
    (line,) = (run for run in runs if run.kind == LINE)
    ends = [run for run in runs if run.digest in line.needs]
    assert [(run.kind, run.seed) for run in ends] == [("ticket", 0), ("ticket", 1)]
    assert not line.trains and line.title.endswith("between two seeds")
    tops = []
    for run in ends:
        ticket = [f"ticket={run.ticket}"] if f"ticket={run.ticket}" not in run.command else []
        given = [part for part in run.command[4:] if "=" in part]
        tops.append(classify(load_transfer("cls.yaml", [*ticket, *given]))["top1"])
    # Most of the line was evaluated before the run was stopped.
    line.folder.mkdir(parents=True)
    known = {f"{at:g}": 50.0 for at in PLACES if at not in (0.0, 0.5, 1.0)}
    (line.folder / "line.json").write_text(json.dumps(known))
    found = connect(config.folder, line.name)
    assert found.values[0] == pytest.approx(100 * tops[0])
    assert found.values[-1] == pytest.approx(100 * tops[1])
    assert found.values[1] == 50 and found == read_line(line.folder)
    assert not list(line.folder.glob("between*"))
    # A seed of another ticket is refused.
    with pytest.raises(lth.RunError, match="found none named nothing"):
        connect(config.folder, "nothing")
    (line.folder / "line.json").unlink()
    shutil.copy(ends[0].folder / "model.safetensors", tmp_path)
    ticket18.shuffled(1).save(round_path(tmp_path, 5))
    with pytest.raises(lth.TicketError, match="masks of one ticket"):
        connect(config.folder, line.name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("connectivity.tasks=[no]", "unknown connectivity.tasks no|connectivity.tasks"),
        ("connectivity.rounds=[7]", r"among those that are trained, \[0, 5\], found \[7\]"),
        ("connectivity.rounds=[]", "both rounds and tasks"),
        ("seeds=[4]", r"between two seeds, and seeds is \[4\]"),
    ],
)
def test_lines_that_cannot_be_drawn_are_refused(tmp_path: Path, change: str, message: str) -> None:
    path = tmp_path / "study.yaml"
    path.write_text(STUDY)
    with pytest.raises(lth.ConfigError, match=message):
        load_config(path, [change])
