"""The report of a study: what it shows, that every link leads somewhere, and bad inputs first."""

import json
import math
import re
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest

import lth_plugins as lth
from lth_plugins.study.plan.kinds import LINE
from lth_plugins.study.plan.runs import write_plan
from lth_plugins.study.report.study import write_study_report
from lth_plugins.study.report.tables import span
from tests.study.conftest import TASKS
from tests.study.reader import Reader


def test_the_report_has_all_parts(study_report: Path) -> None:
    read = Reader(study_report)
    for part in (
        "Which tickets win",
        "it and all denser ones that were measured are matching",
        "Metrics against remaining weights",
        "Beside baselines",
        "Whole channels",
        "number of remaining weights",
        "Sensitivity to perturbations",
        "Layer-wise densities",
        "Kernel maps",
        "Which masks are alike",
        "Every run",
    ):
        assert part in read.text
    # Curves of 2 tasks; baselines; sizes; swaps; for 2 sources densities and kernels; 3 measures of
    # 5 parts, and of all stages aligned.
    assert len(read.all("img")) == 2 + 1 + 1 + 1 + 2 * 2 + 3 * 6
    assert "python tools/train_det.py OUTPUT_DIR 'runs/<" in read.text


@pytest.fixture(params=["study_report", "demo_report"])
def report(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


def test_a_report_is_self_contained_and_escaped(report: Path) -> None:
    html = report.read_text()
    for tag, attributes in Reader(report).elements:
        assert tag not in ("script", "iframe", "object")
        for name in ("src", "srcset", "data", "poster"):
            assert attributes.get(name, "data:").startswith("data:")
    assert "url(" not in html and "@import" not in html
    assert not re.search(r"https?:", html)
    assert not re.search("<(demo|installed|det-|find-)", html) and "runs/&lt;" in html


def test_every_link_leads_somewhere(report: Path) -> None:
    read = Reader(report)
    ids = {attributes["id"] for _, attributes in read.elements if "id" in attributes}
    targets = [a["href"] for a in read.all("a")]
    for target in set(targets):
        if target.startswith("#"):
            assert target[1:] in ids
        else:
            assert (report.parent / unquote(target)).exists()
    assert len(ids) == len([1 for _, a in read.elements if "id" in a])


def test_a_mean_leads_to_its_runs(study_report: Path) -> None:
    html = study_report.read_text()
    anchor = re.search(r'href="#(runs-\d+)">36\.00</a>', html)[1]
    rows = html.split(f'id="{anchor}"')[1].split("</tbody>")[0]
    assert "round 8, ticket: bbox/AP 36.00 ± 0.20" in rows
    for value in ("36.00", "36.20", "35.80"):
        assert f"<td>{value}</td>" in rows
    assert len(re.findall('href="[^"]*/runs/det-moco-[^"]*">folder</a>', rows)) == 3
    assert len(re.findall('href="[^"]*digits.yaml">config</a>', rows)) == 3
    assert "OUTPUT_DIR" in rows


def test_every_image_tells_what_it_shows_and_every_figure_has_a_pdf(report: Path) -> None:
    alts = [image["alt"] for image in Reader(report).all("img")]
    assert all(len(alt) > 20 for alt in alts) and "nan" not in " ".join(alts)
    files = list((report.parent / "figures").glob("*.pdf"))
    assert len(files) == len([alt for alt in alts if not alt.startswith("Image ")])
    assert all(file.read_bytes().startswith(b"%PDF") for file in files)


def rows_of(folder: Path, table: str) -> list[dict[str, Any]]:
    return json.loads((folder / f"{table}.json").read_text())["rows"]


def test_the_verdict_is_written_in_every_format(study_report: Path) -> None:
    folder = study_report.parent / "tables"
    rows = rows_of(folder, "verdict")
    tests = rows_of(folder, "tests")
    found = {
        (said["source"], said["task"], said["round"]): said | tested
        for said, tested in zip(rows, tests, strict=True)
    }
    good = found["moco (resnet18)", "det", 1]
    assert (good["within_std"], good["verdict"], good["reason"]) == (True, "matching", "")
    assert good["mean"] == pytest.approx(40.1) and 0 < good["p_welch"] < good["p_holm"] < 0.05
    assert good["power_holm"] > 80 and good["test"] == "Welch"  # of no known tool
    assert good["margin"] == 0.5 and good["margin_percent"] == pytest.approx(1.25)
    assert good["low"] < good["difference"] < good["high"] and -1 <= good["correlation"] <= 1
    assert good["left"] == pytest.approx(80)
    bad = found["moco (resnet18)", "det", 8]
    assert (bad["within_std"], bad["verdict"]) == (False, "not matching")
    assert bad["p_not_holm"] < 0.05 and bad["high"] < -0.5
    lonely = found["moco (resnet18)", "seg", 8]
    assert lonely["verdict"] == "open" and lonely["within_std"] is lonely["p_holm"] is None
    assert "it takes 3 to decide" in lonely["reason"]

    csv = (folder / "verdict.csv").read_text().splitlines()
    assert csv[0].startswith("source,task,round,left,verdict,within_std")
    assert len(csv) == 1 + len(rows)
    markdown = (folder / "verdict.md").read_text().splitlines()
    assert markdown[0].startswith("| Source | Task | Round |")
    assert sum(line.startswith("| moco") for line in markdown) == 5


def test_winning_and_universal_tickets(study_report: Path) -> None:
    rows = json.loads((study_report.parent / "tables/winners.json").read_text())["rows"]
    found = {(r["source"], r["task"]): r for r in rows if r["criterion"] == "verdict"}
    assert found["simclr (resnet18)", "det"]["round"] == 1
    assert found["simclr (resnet18)", "det"]["why"] == "round 8 is not matching"
    assert found["simclr (resnet18)", "seg"]["why"] == "round 8 is open"
    on_all = found["simclr (resnet18)", "all tasks"]
    assert on_all["round"] is None
    assert on_all["why"] == "round 1 is not decided on every task, cls is left out"


def test_what_lies_between_two_seeds_is_beside_the_verdict(
    pretend_study: Any, tmp_path: Path
) -> None:
    study = pretend_study
    study.add("dense", 0, (40.0, 40.1, 39.9))
    study.add("ticket", 1, (40.0, 40.1, 39.9))
    for k, lowest in ((0, 39.0), (1, 30.0)):
        run = study.run(f"line-{k}", LINE, "moco", k, "det")
        study.mark(run, {})
        values = {f"{i / 10:g}": 40.0 if i != 5 else lowest for i in range(11)}
        (run.folder / "line.json").write_text(json.dumps(values))
    late = study.run("line-2", LINE, "moco", 2, "det")
    settings = {"tasks": TASKS}
    study.plan(settings=settings)
    read = Reader(write_study_report(study.folder, tmp_path / "report.html"))
    assert f"{late.title} is planned" in read.text
    rows = json.loads((tmp_path / "tables/lines.json").read_text())["rows"]
    assert [(r["round"], r["verdict"], r["barrier"]) for r in rows] == [
        (0, "dense", 1.0),
        (1, "matching", 10.0),
    ]
    assert "det: paired by seed t test, margin 0.5 points, level 0.05." in read.text
    assert "Barriers: moco, round 0 1.00, moco, round 1 10.00." in " ".join(
        image["alt"] for image in read.all("img")
    )
    (tested,) = rows_of(tmp_path / "tables", "tests")
    assert tested["test"] == "paired" and tested["correlation"] == pytest.approx(1)


def test_channels_are_beside_the_ticket_and_the_dense_network(study_report: Path) -> None:
    folder = study_report.parent / "tables"
    rows = json.loads((folder / "channels.json").read_text())["rows"]
    assert [r["kind"] for r in rows] == [
        *("dense", "ticket", "channel ticket", "L1 channels", "narrower network"),
    ]
    dense, ticket, *channels = rows
    assert [r["round"] for r in channels] == [8, 8, 8] and len({r["left"] for r in channels}) == 1
    assert channels[0]["left"] == pytest.approx(ticket["left"], rel=0.05)
    (flops,) = {r["gflops"] for r in channels}  # the same, to the multiply-add
    assert 0 < flops < dense["gflops"] and 0 < ticket["gflops"] < dense["gflops"]
    assert channels[2]["mean"] == 30.5 and channels[2]["std"] == pytest.approx(0.5**0.5)
    masks = json.loads((folder / "tickets.json").read_text())["rows"]
    assert {r["gflops"] for r in masks if r["kind"].startswith("channel")} == {flops}


def test_flops_are_told_of_all_that_is_trained(study_report: Path) -> None:
    rows = json.loads((study_report.parent / "tables/means.json").read_text())["rows"]
    of = {
        r["kind"]: r["gflops"]
        for r in rows
        if (r["task"], r["source"]) == ("det", "moco (resnet18)") and r["round"] in (0, 8)
    }
    assert of["dense"] == pytest.approx(1.82, abs=0.01)  # torchvision gives 1.81 for a ResNet-18
    assert of["ticket"] == of["random mask"] == of["swap"]
    # Together, but for what is never pruned, a ticket and its reverse are the dense network.
    assert of["dense"] < of["ticket"] + of["reversed mask"] < 1.1 * of["dense"]
    other = [r for r in rows if r["source"] == "moco (resnet34)"]
    assert {r["gflops"] for r in other} == {None}  # its masks are not there


def test_weights_left_of_masks_that_cannot_be_read_are_not_guessed(study_report: Path) -> None:
    rows = json.loads((study_report.parent / "tables/means.json").read_text())["rows"]
    other = {r["round"]: r["left"] for r in rows if r["source"] == "moco (resnet34)"}
    assert other == {0: 100, 1: None}
    (curves,) = (a["alt"] for a in Reader(study_report).all("img") if "weights, det." in a["alt"])
    assert "moco (resnet34): 45.00 at 100.00 %;" in curves  # that point alone


def test_the_curve_of_a_perturbed_dense_network_starts_at_that_network(
    pretend_study: Any, tmp_path: Path
) -> None:
    study = pretend_study
    study.add("dense", 0, (40.0, 40.1))
    study.add("swap", 0, (30.0, 30.1), strength=0.5)
    study.plan()
    read = Reader(write_study_report(study.folder, tmp_path / "report.html"))
    (alt,) = (a["alt"] for a in read.all("img") if "strength of swap" in a["alt"])
    assert "det, moco, round 0: 40.05 at 0, 30.05 at 0.5." in alt


def test_similarity_of_sources_as_they_are_and_aligned(study_report: Path) -> None:
    rows = json.loads((study_report.parent / "tables/likeness-resnet18.json").read_text())["rows"]
    across = [r for r in rows if "moco" in r["first"] and "simclr" in r["second"]]
    parts = {"all stages", "layer1", "layer2", "layer3", "layer4"}
    assert {r["part"] for r in across} == parts | {f"{part}, aligned" for part in parts}
    sparse = [r for r in across if "round 8" in r["first"] and "round 8" in r["second"]]
    assert all(0 < r["iou"] < 0.9 for r in sparse)
    assert all((r["over_chance"] > 1.1) == ("aligned" in r["part"]) for r in sparse)
    alts = [a["alt"] for a in Reader(study_report).all("img")]
    assert any("all stages, aligned: IoU" in alt for alt in alts)


def test_what_is_missing_is_told_first(study_report: Path) -> None:
    lines = Reader(study_report).first_lines
    assert "task cls is left out: lightning is not <installed>" in lines
    assert "masks of moco (resnet34), round 1, are not shown: expected a ticket file" in lines


def test_bad_inputs_are_named_in_the_first_lines(pretend_study: Any, tmp_path: Path) -> None:
    study = pretend_study
    study.add("dense", 0, (40.0, 40.1, 39.9))
    study.add("ticket", 1, (40.0, math.nan, 40.1))
    study.add("ticket", 2, (40.0, None, 40.1))
    study.add("ticket", 3, (40.0, 40.1, 39.9))
    study.add("ticket", 4, (40.0, 40.1, 39.9))
    study.add("dense", 0, (30.0,), task="seg")
    study.add("dense", 0, (None, None), task="det2")
    first_seeds = {run.round: run for run in study.runs if run.task == "det" and run.seed == 0}
    third, fourth = first_seeds[3], first_seeds[4]
    study.mark(third, {"bbox/AP": 50.0}, name="copy-of-it")
    (study.folder / "steps" / f"{fourth.name}.json").write_text("{")
    study.plan()
    read = Reader(write_study_report(study.folder, tmp_path / "report.html"))
    for words in (
        "the same digest",
        "copy-of-it",
        "its bbox/AP is nan",
        "bbox/AP is missing",
        "task seg has one seed",
        "task det2: unknown metric bbox/AP, none of its 2 finished runs has it; there is other",
        f"{fourth.name}.json cannot be read",
    ):
        assert words in read.first_lines
    rows = rows_of(tmp_path / "tables", "verdict")
    reasons = {r["round"]: r["reason"] for r in rows if r["task"] == "det"}
    assert reasons[1] == reasons[2] == reasons[4] == "1 of 3 sparse seeds have no value"
    assert reasons[3] == ""
    seeds = {r["round"]: r["seeds"] for r in rows if r["task"] == "det"}
    assert seeds == {1: 2, 2: 2, 3: 3, 4: 2}  # those that the mean is of
    means = json.loads((tmp_path / "tables/means.json").read_text())["rows"]
    assert {r["round"]: r["seeds"] for r in means if r["task"] == "det"} == {0: 3, **seeds}


def test_a_study_that_has_only_been_planned(pretend_study: Any, tmp_path: Path) -> None:
    study = pretend_study
    study.add("dense", 0, (40.0,) * 3)
    study.add("ticket", 1, (40.0,) * 3)
    for marker in (study.folder / "steps").iterdir():
        marker.unlink()
    study.plan()
    read = Reader(write_study_report(study.folder, tmp_path / "report.html"))
    assert "6 trainings: 6 planned" in read.text
    assert "0 dense seeds: it takes 3 to decide" in read.text


def sentences(study: Any, tmp_path: Path) -> Reader:
    study.plan()
    return Reader(write_study_report(study.folder, tmp_path / "report.html"))


def test_one_seed_and_one_round_are_told_as_such(
    pretend_study: Any, tmp_path: Path, ticket18: lth.Ticket
) -> None:
    study = pretend_study
    study.add("dense", 0, (40.0,))
    ticket18.save(study.folder / "round.ticket")
    study.add("ticket", 1, (40.0,), ticket=study.folder / "round.ticket")
    study.add("reinit", 1, (30.0,), ticket=study.folder / "round.ticket")
    text = sentences(study, tmp_path).text
    assert "3 trainings: 3 done" in text
    assert "Each point is a single seed, so nothing tells the noise." in text
    assert "one standard deviation to both sides" not in text
    assert "1 dense seed: it takes 3 to decide" in text
    assert "Random weights are the ticket's masks" in text and "Random masks" not in text
    assert "The dashed line is the dense network." in text
    assert "Rounds lead to the tickets' files." in text and "end of this page" not in text


def test_equal_ends_of_a_range_are_one_number(pretend_study: Any, tmp_path: Path) -> None:
    study = pretend_study
    study.add("dense", 0, (40.0, 41.0, 39.0))
    study.add("ticket", 1, (40.0, 41.0, 39.0))
    text = sentences(study, tmp_path).text
    assert re.search(r"deviations found: \d+ % here", text) and " to 7 %" not in text
    assert span(5.2, 5.4, ".0f") == "5" and span(5, 8, ".0f") == "5 to 8"


def test_a_study_in_which_all_has_failed_has_no_curves_and_says_so(
    pretend_study: Any, tmp_path: Path
) -> None:
    study = pretend_study
    for kind, k in (("dense", 0), ("ticket", 1), ("random", 1)):
        study.add(kind, k, (math.nan,) * 3)
    study.add("swap", 1, (math.nan,) * 3, strength=0.5)
    read = sentences(study, tmp_path)
    assert "No training has a value yet." in read.text and not read.all("img")
    assert "Beside baselines" not in read.text and "Sensitivity" not in read.text


def test_what_has_no_value_is_neither_drawn_nor_promised(
    pretend_study: Any, tmp_path: Path
) -> None:
    study = pretend_study
    study.add("dense", 0, (math.nan,) * 3)
    study.add("reinit", 0, (30.0, 31.0, 32.0), ticket=study.folder / "ticket")
    study.add("swap", 3, (30.0, 30.1), strength=0.5)  # its ticket was not trained itself
    read = sentences(study, tmp_path)
    assert "nan" not in " ".join(a["alt"] for a in read.all("img"))
    assert "The dashed line" not in read.text
    assert "0 is the ticket itself" not in read.text and "swap: bbox/AP." in read.text


def test_what_the_command_line_changed_is_shown(tmp_path: Path) -> None:
    folder = tmp_path / "study"
    settings = {"seeds": [7], "tasks": {"cls": {"tool": "classification"}}}
    write_plan(folder, tmp_path / "study.yaml", [], {}, ["seeds=[7]"], settings)
    text = Reader(write_study_report(folder, tmp_path / "report.html")).text
    assert f"planned by {tmp_path}/study.yaml with 'seeds=[7]'." in text
    assert "configuration, changes included" in text and "seeds:\n- 7" in text


def test_many_problems_are_folded_but_all_there(pretend_study: Any, tmp_path: Path) -> None:
    study = pretend_study
    study.add("ticket", 1, (math.nan,) * 30)
    study.plan()
    read = Reader(write_study_report(study.folder, tmp_path / "report.html"))
    assert read.first_lines.count("its bbox/AP is nan") == 30
    assert "and 11 more" in read.first_lines


def test_a_folder_without_a_study_is_refused(tmp_path: Path) -> None:
    with pytest.raises(lth.RunError, match="expected a study in"):
        write_study_report(tmp_path, tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()
