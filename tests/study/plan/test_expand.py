"""What a study's configuration comes to: its runs, their commands and their digests."""

import dataclasses
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest

import lth_plugins as lth
from lth_plugins.errors import ConfigError, LthError, RunError
from lth_plugins.pruning.search.imp import round_path
from lth_plugins.study.plan.config import StudyConfig, load_config
from lth_plugins.study.plan.expand import plan
from lth_plugins.study.plan.kinds import FIND, STRUCTURE
from lth_plugins.study.plan.runs import Run, StoredPlan, read_plan, write_plan

ROOT = Path(__file__).resolve().parents[3]

STUDY = """
out: runs/study
archs: [resnet18]
seeds: [0, 1, 2]
rounds: [1, 3]
baselines: {random: [3], reversed: [3], reinit: [0, 3], transplant: [3]}
sources:
  supervised: {config: configs/pretrain/digits_supervised.yaml}
  moco: {config: configs/pretrain/digits_moco.yaml}
tasks:
  cls: {tool: classification, config: configs/transfer/digits_r18.yaml}
  seg: {tool: segmentation, config: configs/mmseg/digits/fcn_r18_ticket.py}
  det:
    tool: detection
    config: configs/detectron2/digits/faster_rcnn_R_18_FPN_ticket.yaml
    metric: bbox/AP50
    overrides: [SOLVER.MAX_ITER=20]
"""


@pytest.fixture(autouse=True)
def _in_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


@pytest.fixture(autouse=True)
def _all_frameworks_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan imports none of them; what is left out without them has a test of its own."""
    monkeypatch.setattr("lth_plugins.study.plan.tools.Tool.missing", None)


def load(folder: Path, *overrides: str, text: str = STUDY) -> StudyConfig:
    path = folder / "study.yaml"
    path.write_text(text)
    return load_config(path, overrides)


def runs_of(folder: Path, *overrides: str, text: str = STUDY) -> Sequence[Run]:
    return plan(load(folder, *overrides, text=text)).runs


def one(runs: Sequence[Run], **wanted: object) -> Run:
    (found,) = (r for r in runs if all(getattr(r, k) == v for k, v in wanted.items()))
    return found


def test_a_study_is_sources_by_rounds_by_tasks_by_seeds_and_baselines(tmp_path: Path) -> None:
    runs = runs_of(tmp_path)
    kinds = Counter(run.kind for run in runs)
    each = 2 * 3 * 3  # sources, tasks and seeds
    # With two sources, each lends its weights to the other.
    assert kinds == {
        "find": 2,
        "dense": each,
        "ticket": 2 * each,
        "random": each,
        "reversed": each,
        "reinit": 2 * each,
        "transplant": each,
    }
    assert len({run.digest for run in runs}) == len({run.name for run in runs}) == len(runs)
    assert {run.metric for run in runs} == {"", "top1", "mIoU", "bbox/AP50"}


def test_every_run_comes_after_those_that_it_needs(tmp_path: Path) -> None:
    seen: set[str] = set()
    for run in runs_of(tmp_path):
        assert set(run.needs) <= seen
        assert len(run.needs) == {"find": 0, "transplant": 2}.get(run.kind, 1)
        seen.add(run.digest)


def test_the_search_goes_as_far_as_any_run_needs(tmp_path: Path) -> None:
    runs = runs_of(tmp_path, "baselines.random=[7]")
    search = one(runs, kind=FIND, source="moco")
    assert "rounds=7" in search.command and search.outputs == (round_path(search.folder, 7),)
    assert one(runs, kind="random", task="cls", source="moco", seed=0).ticket == search.outputs[0]


@pytest.mark.parametrize(
    ("task", "counted", "ticket"),
    [
        ("cls", "rounds=2", "--ticket"),
        ("seg", "--imp-rounds", "--ticket"),
        ("det", "--imp-rounds", "MODEL.TICKET.PATH"),
    ],
)
def test_a_source_may_find_tickets_on_a_task(
    task: str, counted: str, ticket: str, tmp_path: Path
) -> None:
    """From the dense ticket of another source; they are trained on that task alone."""
    source = f"sources.own={{task: {task}, weights: moco, overrides: [batch_size=4], rounds: [2]}}"
    runs = runs_of(tmp_path, source)
    search = one(runs, source="own", kind=FIND)
    moco = one(runs, source="moco", kind=FIND)
    assert search.needs == (moco.digest,) and search.ticket == round_path(moco.folder, 0)
    command = search.command
    assert counted in command and command[command.index(ticket) + 1] == f"{search.ticket}"
    assert "--resume" not in command and any(f"{search.folder}" in part for part in command)
    if task != "cls":
        assert command[command.index(counted) + 1] == "2"
    assert any("batch_size" in part for part in command), "its own changes come after the task's"
    own = [run for run in runs if run.source == "own" and run is not search]
    trained = {(run.task, run.kind, run.round) for run in own}
    assert trained == {(task, "dense", 0), (task, "ticket", 2), (task, "reinit", 0)}
    assert all(run.needs == (search.digest,) for run in own)
    other = runs_of(tmp_path, source.replace("=4]", "=8]"))
    assert one(other, source="own", kind=FIND).digest != search.digest


def test_a_source_has_rounds_of_its_own_and_a_task_sources_of_its_own(tmp_path: Path) -> None:
    changes = ("sources.moco.rounds=[3]", "tasks.seg.sources=[supervised]", "seeds=[0]")
    runs = runs_of(tmp_path, *changes, "baselines={random: [1, 3], reinit: [0], channel: [1]}")
    moco = [r for r in runs if r.source == "moco"]
    assert {r.task for r in moco} == {"find", "cls", "det"}
    assert "rounds=3" in one(moco, kind=FIND).command
    expected = [("dense", 0), ("random", 3), ("reinit", 0), ("reversed", 3), ("ticket", 3)]
    assert (
        sorted({(r.kind, r.round) for r in moco if r.task == "cls"} - {("transplant", 3)})
        == expected
    )
    assert {r.task for r in runs if r.source == "supervised"} == {
        *("find", "structure", "cls", "seg", "det")
    }


def test_an_override_may_name_the_folder_of_its_run(tmp_path: Path) -> None:
    runs = runs_of(tmp_path, "tasks.seg.overrides=['val_evaluator.output_dir={out}/predictions']")
    run = one(runs, task="seg", kind="dense", source="moco", seed=1)
    assert f"val_evaluator.output_dir={run.folder}/predictions" in run.command


PACKAGE = {
    "zoo_study.py": """
from dataclasses import replace
from lth_plugins.study.plan.kinds import KINDS
from lth_plugins.study.plan.tools import TOOLS
mine = replace(TOOLS["classification"], metrics=("mine",))
scrambled = replace(KINDS["random"], label="scrambled mask")
""",
    "zoo_study-1.dist-info/METADATA": "Metadata-Version: 2.1\nName: zoo_study\nVersion: 1\n",
    "zoo_study-1.dist-info/entry_points.txt": "[lth_plugins.study_tools]\nmine = zoo_study:mine\n"
    "[lth_plugins.study_kinds]\nscrambled = zoo_study:scrambled\n",
}

USES_PACKAGE = """
import sys
from lth_plugins.study.plan.config import load_config
from lth_plugins.study.plan.expand import plan
for run in plan(load_config(sys.argv[1], sys.argv[2:])).runs:
    print(run.kind, run.metric, "random=true" in run.command)
"""


def test_another_package_adds_a_tool_and_a_kind(tmp_path: Path) -> None:
    for name, text in PACKAGE.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    load(tmp_path)
    changes = ["tasks.cls.tool=mine", "baselines={scrambled: [1]}", "seeds=[0]"]
    done = subprocess.run(
        [sys.executable, "-c", USES_PACKAGE, tmp_path / "study.yaml", *changes],
        env={**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"},
        capture_output=True,
        text=True,
    )
    assert "scrambled mine True" in done.stdout.splitlines(), done.stderr


# What each tool is told, where SUP and MOCO stand for the folders of the two searches.
COMMANDS = {
    ("cls", "ticket"): "--ticket MOCO/round_03.ticket arch=resnet18 seed=2 out=OUT",
    ("cls", "random"): "seed=2 weights=MOCO/round_00.ticket random=true out=OUT",
    ("cls", "reversed"): "seed=2 weights=MOCO/round_00.ticket reverse=true out=OUT",
    ("cls", "reinit"): "seed=2 load_weights=false out=OUT",
    ("cls", "transplant"): "seed=2 weights=SUP/round_00.ticket out=OUT",
    ("seg", "ticket"): "--ticket MOCO/round_03.ticket --work-dir OUT --resume "
    "--cfg-options randomness.seed=2",
    ("seg", "random"): "randomness.seed=2 model.backbone.init_cfg.weights=MOCO/round_00.ticket "
    "model.backbone.init_cfg.random=True model.backbone.init_cfg.seed=2",
    ("seg", "reversed"): "init_cfg.weights=MOCO/round_00.ticket "
    "model.backbone.init_cfg.reverse=True",
    ("seg", "reinit"): "randomness.seed=2 model.backbone.init_cfg.load_weights=False",
    ("seg", "transplant"): "randomness.seed=2 model.backbone.init_cfg.weights=SUP/round_00.ticket",
    ("det", "ticket"): "--resume MODEL.TICKET.PATH MOCO/round_03.ticket SOLVER.MAX_ITER 20 SEED 2 "
    "OUTPUT_DIR OUT",
    ("det", "random"): "SEED 2 MODEL.TICKET.WEIGHTS MOCO/round_00.ticket MODEL.TICKET.RANDOM True "
    "MODEL.TICKET.RANDOM_SEED 2 OUTPUT_DIR OUT",
    ("det", "reversed"): "MODEL.TICKET.WEIGHTS MOCO/round_00.ticket MODEL.TICKET.REVERSE True",
    ("det", "reinit"): "SEED 2 MODEL.TICKET.LOAD_WEIGHTS False OUTPUT_DIR OUT",
    ("det", "transplant"): "SEED 2 MODEL.TICKET.WEIGHTS SUP/round_00.ticket OUTPUT_DIR OUT",
}


def test_each_kind_of_run_is_an_option_of_its_tool(tmp_path: Path) -> None:
    runs = runs_of(tmp_path)
    moco, sup = (one(runs, kind=FIND, source=s).folder for s in ("moco", "supervised"))
    for (task, kind), expected in COMMANDS.items():
        run = one(runs, task=task, kind=kind, source="moco", round=3, seed=2)
        command = " ".join(run.command).replace(str(run.folder), "OUT")
        command = command.replace(str(moco), "MOCO").replace(str(sup), "SUP")
        assert expected in command
        assert run.command[:2] == ("-m", "lth_plugins") and str(run.config) in run.command
        # The tool's inputs are all there before it starts.
        needed = {Path(part.split("=")[-1]) for part in run.command if part.endswith(".ticket")}
        assert needed <= set(run.inputs)


PERTURBED = (
    "perturbations={swap: {rounds: [3], strengths: [0.25, 1]}, "
    "noise: {rounds: [1, 2], strengths: [0.5]}}"
)


def test_a_ticket_is_perturbed_anew_for_each_seed_and_trained_on_every_task(tmp_path: Path) -> None:
    runs = runs_of(tmp_path, PERTURBED)
    perturbed = [run for run in runs if run.strength]
    makers = [run for run in perturbed if not run.trains]
    assert len(makers) == 2 * 3 * 4 and len(perturbed) == len(makers) * (1 + 3)
    assert len({run.digest for run in runs}) == len({run.name for run in runs}) == len(runs)

    search = one(runs, kind=FIND, source="moco")
    of_moco = {"source": "moco", "seed": 2}
    maker = one(makers, kind="swap", strength=0.25, **of_moco)
    given, dense = (round_path(search.folder, k) for k in (3, 0))
    assert " ".join(maker.command) == (
        f"-m lth_plugins ticket perturb {given} {maker.outputs[0]} --weights {dense} "
        "--swap 0.25 --seed 2"
    )
    assert maker.needs == (search.digest,) and maker.inputs == (given, dense)
    noise = one(makers, kind="noise", round=1, **of_moco)
    assert "--noise 0.5" in " ".join(noise.command) and "--weights" not in noise.command

    training = one(runs, task="det", kind="swap", strength=0.25, **of_moco)
    assert training.needs == (maker.digest,) and training.ticket == maker.outputs[0]
    assert training.ticket in training.inputs and "MODEL.TICKET.WEIGHTS" not in training.command
    assert "det moco resnet18 round 3 swap 0.25 seed 2" in training.title


CHANNELS = "baselines={channel: [3], channel_l1: [1], narrow: [1, 3]}"


def test_a_ticket_is_structured_once_and_trained_by_each_seed_on_every_task(tmp_path: Path) -> None:
    runs = runs_of(tmp_path, CHANNELS)
    assert len({run.digest for run in runs}) == len({run.name for run in runs}) == len(runs)
    makers = [run for run in runs if run.task == STRUCTURE and run.source == "moco"]
    assert [(m.kind, m.round) for m in makers] == [
        ("channel", 1),
        ("channel", 3),
        ("channel_l1", 1),
    ]
    each = 2 * 3 * 3  # sources, tasks and seeds
    trained = Counter(run.kind for run in runs if run.trains)
    assert [trained[kind] for kind in ("channel", "channel_l1", "narrow")] == [each, each, 2 * each]

    search, maker = one(runs, kind=FIND, source="moco"), makers[1]
    given, dense = (round_path(search.folder, k) for k in (3, 0))
    assert " ".join(maker.command) == (
        f"-m lth_plugins ticket structure {given} {maker.outputs[0]} --weights {dense} "
        "--kind channel"
    )
    assert maker.needs == (search.digest,) and maker.inputs == (given, dense)
    assert runs.index(search) < runs.index(maker) < min(runs.index(r) for r in runs if r.trains)

    of = {"task": "det", "source": "moco", "round": 3, "seed": 2}
    channel, narrow = (one(runs, kind=kind, **of) for kind in ("channel", "narrow"))
    assert channel.ticket == narrow.ticket == maker.outputs[0]
    assert channel.needs == narrow.needs == (maker.digest,)
    assert "MODEL.TICKET.LOAD_WEIGHTS False" in " ".join(narrow.command)
    assert not [part for part in channel.command if "WEIGHTS" in part]
    assert "det moco resnet18 round 3 narrow seed 2" in narrow.title


def test_a_digest_depends_on_what_decides_the_result_and_on_nothing_else(tmp_path: Path) -> None:
    def digests(*overrides: str, text: str = STUDY) -> dict[str, str]:
        runs = runs_of(tmp_path, *overrides, text=text)
        found = [r for r in runs if r.kind in (FIND, "ticket") and r.source == "moco"]
        return {f"{r.task} {r.round} {r.seed}": r.digest for r in found if r.seed == 0}

    def changed(*overrides: str, text: str = STUDY) -> set[str]:
        before, after = digests(), digests(*overrides, text=text)
        return {name.split()[0] for name in before if before[name] != after.get(name)}

    everything = {"find", "cls", "seg", "det"}
    assert changed("out=elsewhere", "executor=slurm", "partition=gpu", "parallel=3") == set()
    assert changed("tasks.cls.overrides=[data.root=elsewhere]") == set()
    assert changed("tasks.det.metric=bbox/AP") == set()
    assert changed("tasks.cls.overrides=[training.epochs=9]") == {"cls"}
    assert changed("tasks.seg.overrides=[train_cfg.max_iters=9]") == {"seg"}
    # What a search is told changes its tickets, and so whatever is trained from them.
    assert changed("sources.moco.overrides=[training.epochs=7]") == everything
    assert changed("prepare=[tools/make_digit_scenes.py --out x]") == everything


def test_another_root_of_image_folders_is_another_dataset(tmp_path: Path) -> None:
    def digests(*overrides: str) -> list[str]:
        runs = runs_of(tmp_path, *overrides)
        return [one(runs, kind=FIND, source="moco").digest] + [
            one(runs, kind="dense", source="supervised", task=task, seed=0).digest
            for task in ("cls", "seg")
        ]

    configs = {
        "tasks.cls": "configs/transfer/imagefolder_r50.yaml",
        "sources.moco": "configs/pretrain/mocov2_r50.yaml",
    }
    folders = [f"{of}.config={path}" for of, path in configs.items()]
    a, b = (
        digests(*folders, *(f"{of}.overrides=[data.root={root}]" for of in configs))
        for root in ("/a", "/b")
    )
    assert [x == y for x, y in zip(a, b, strict=True)] == [False, False, True]


def test_a_longer_search_is_the_same_search(tmp_path: Path) -> None:
    short, long = (
        one(runs_of(tmp_path, f"rounds={r}"), kind=FIND, source="moco") for r in ("[3]", "[8]")
    )
    assert short.digest == long.digest and short.folder == long.folder


@pytest.mark.parametrize("suffix", [".yaml", ".py"])
def test_the_files_that_a_configuration_is_based_on_count(tmp_path: Path, suffix: str) -> None:
    based = {
        ".yaml": "_BASE_: [!!python/object/apply:no.such [thing], base.yaml]\nSEED: 1\n",
        ".py": "_base_ = [__import__('no_such').path + 'x.py', './base.py']\nseed = 1\n",
    }
    tool = {".yaml": "detection", ".py": "segmentation"}[suffix]
    (tmp_path / f"config{suffix}").write_text(based[suffix])
    base = tmp_path / f"base{suffix}"
    task = f"tasks.det={{tool: {tool}, config: {tmp_path / 'config'}{suffix}, metric: null}}"
    digests = []
    for content in ("", "# other\n", ""):
        base.write_text(content)
        run = one(runs_of(tmp_path, task), task="det", kind="dense", source="moco", seed=0)
        digests.append(run.digest)
    assert digests[0] == digests[2] != digests[1]


def test_tickets_that_are_there_count_by_their_content(
    tmp_path: Path, ticket18: lth.Ticket, resnet18_state: dict
) -> None:
    folder = tmp_path / "resnet18"
    folder.mkdir()
    text = f"""
out: runs/study
archs: [resnet18]
seeds: [0, 1]
rounds: [5]
sources: {{mine: {{tickets: '{tmp_path}/{{arch}}'}}}}
tasks: {{cls: {{tool: classification, config: configs/transfer/digits_r18.yaml}}}}
"""
    with pytest.raises(lth.TicketError, match=r"found nothing at .*resnet18/round_00\.ticket"):
        runs_of(tmp_path, text=text)
    lth.Ticket.dense(resnet18_state, source="test", recipe={}).save(round_path(folder, 0))
    ticket18.save(round_path(folder, 5))
    before = runs_of(tmp_path, text=text)
    assert [run.kind for run in before] == ["dense", "ticket"] * 2 and not before[0].needs
    ticket18.reversed().save(round_path(folder, 5))
    after = runs_of(tmp_path, text=text)
    assert [a.digest == b.digest for a, b in zip(before, after, strict=True)] == [True, False] * 2


GIVEN = """
out: runs/study
archs: [resnet18]
seeds: [0, 1]
rounds: [5, 7]
baselines: {reinit: [0, 5]}
sources: {mine: {tickets: {5: given_of_tests, 7: FILE}}}
tasks: {cls: {tool: classification, config: configs/transfer/digits_r18.yaml}}
"""


@pytest.fixture
def given(tmp_path: Path, ticket18: lth.Ticket, ticket18_file: Path) -> str:
    """A study of tickets by their rounds, one a name and one a file; none is dense."""
    lth.TicketCatalog.register("given_of_tests", ticket18_file)
    return GIVEN.replace("FILE", f"{ticket18.reversed().save(tmp_path / 'reversed.ticket')}")


def test_tickets_are_given_by_their_rounds_without_the_dense_one(
    given: str, tmp_path: Path, ticket18_file: Path, resnet18_state: dict
) -> None:
    """From scratch, masks of one are made of the first ticket; nothing else is made."""
    maker, *trainings = runs_of(tmp_path, text=given)
    expected = [("ticket", 5), ("ticket", 7), ("reinit", 0), ("reinit", 5)] * 2
    assert [(run.kind, run.round) for run in trainings] == expected
    assert " ".join(maker.command) == (
        f"-m lth_plugins ticket perturb {ticket18_file} {maker.outputs[0]} --unmask"
    )
    files = {5: ticket18_file, 7: tmp_path / "reversed.ticket", 0: maker.outputs[0]}
    for run in trainings:
        assert run.ticket == files[run.round]
        assert run.needs == (() if run.round else (maker.digest,))
    dense = lth.Ticket.dense(resnet18_state, source="test", recipe={}).save(tmp_path / "d.ticket")
    whole = f"sources.mine.tickets={{0: {dense}}}"
    runs = runs_of(tmp_path, whole, "baselines.random=[7]", text=given)
    assert {run.kind for run in runs} == {"dense", "ticket", "reinit", "random"}
    assert {run.ticket for run in runs if run.round == 0} == {dense}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("baselines.random=[5]", "random needs all weights of the dense network, and sources.mine"),
        ("perturbations.swap={rounds: [5], strengths: [1]}", "swap needs all weights"),
        ("baselines.channel=[7]", "channel needs all weights"),
        ("rounds=[5,6]", r"sources\.mine\.tickets to have a ticket of each round .* none of \[6\]"),
        ("sources.mine.tickets={5: ginen_of_tests}", "did you mean given_of_tests"),
        ("sources.mine.tickets={five: given_of_tests}", "a path or a name for rounds of 0 or more"),
        ("sources.mine.tickets=7", "to be a folder, or tickets by their rounds"),
        ("connectivity={rounds: [0], tasks: [cls]}", r"those that are trained, \[5, 7\]"),
        ("sources.own={task: cls, weights: mine}", r"unknown sources\.own\.weights 'mine'"),
    ],
)
def test_what_the_given_tickets_cannot_give_is_refused(
    given: str, tmp_path: Path, override: str, message: str
) -> None:
    rounds = ["rounds=[5]"] if "ginen" in override else []
    with pytest.raises(LthError, match=message):
        runs_of(tmp_path, override, *rounds, text=given)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed=[1]", r"unknown key seed; did you mean seeds\?"),
        ("sources.moco.round=3", r"unknown key sources\.moco\.round; .*sources\.moco\.rounds"),
        ("tasks.cls.ticket=x", r"unknown key tasks\.cls\.ticket"),
        ("sources.moco=x", r"sources\.moco|Source"),
        ("tasks.cls.tool=classify", r"unknown tasks\.cls\.tool 'classify'; known are classif"),
        ("tasks.cls.metric=top5", r"unknown tasks\.cls\.metric 'top5'; known are top1"),
        ("baselines.ticket=[1]", "unknown baseline 'ticket'; known are random, reversed"),
        ("baselines.random=[0]", r"baselines\.random to be rounds of 1 or more"),
        ("perturbations.shuffle={rounds: [1], strengths: [1]}", "unknown perturbation 'shuffle'"),
        ("perturbations.swap={rounds: [1], strengths: [2]}", r"swap\.strengths to be at most 1"),
        ("perturbations.noise={rounds: [1], strengths: [0]}", "strengths to be more than 0"),
        ("perturbations.noise={rounds: [], strengths: [1]}", r"noise\.rounds to have one or more"),
        ("rounds=[0,1]", "expected rounds to be 1 or more, found 0"),
        ("rounds=[1,1]", "rounds to have one or more, each once"),
        ("seeds=[]", "seeds to have one or more"),
        ("seeds=[-1]", "seeds to be a list of numbers of 0 or more"),
        ("parallel=0", "parallel to be 1 or more"),
        ("archs=[vgg]", "unknown archs 'vgg'"),
        ("executor=pbs", "unknown executor 'pbs'; known are local, slurm"),
        ("sources.moco.rounds=[1,1]", r"moco\.rounds to have one or more, each once"),
        ("tasks.cls.sources=[x]", r"unknown tasks\.cls\.sources 'x'; known are supervised, moco"),
        ("tasks.cls.shown={images: x}", r"cls\.shown is for boxes and label maps"),
        ("tasks.d={tool: detection, config: x, shown: {count: 0}}", "count to be 1 or more"),
        ("tasks.d={tool: detection, config: x, shown: {images: x}}", r"d\.shown\.truth beside"),
        (
            "tasks.s={tool: segmentation, config: x, shown: {images: x, truth: y}}",
            r"s\.shown\.classes, the names",
        ),
        ("sources.moco.tickets=x", r"sources\.moco to have one of config"),
        (
            "sources.own={task: x, weights: moco}",
            r"unknown sources\.own\.task 'x'; known are cls",
        ),
        ("sources.own={task: cls}", r"unknown sources\.own\.weights 'None'; known are supervised"),
        ("sources.moco.weights=supervised", r"moco\.weights is what a search on a task starts"),
        ("tasks.find={tool: classification, config: x}", "'find' cannot name a source or a task"),
        ("tasks.a/b={tool: classification, config: x}", "'a/b' cannot name"),
        ("sources.moco.config=no.yaml", r"found none at no\.yaml"),
        ("tasks.cls.config=no.yaml", r"found none at no\.yaml"),
        ("tasks.seg.config=no.py", r"found none at no\.py"),
        ("tasks.det.config=no.yaml", r"found none at no\.yaml"),
        ("tasks.cls.overrides=[epochs=1]", "unknown key epochs"),
        ("tasks.det.overrides=[SEED]", r"expected key=value in the overrides of .*'SEED'"),
        ("sources.moco.overrides=[training.epoch=1]", r"unknown key training\.epoch"),
        (
            "tasks.again={tool: classification, config: configs/transfer/digits_r18.yaml}",
            "again supervised resnet18 round 0 dense seed 0 and cls .* are the same",
        ),
    ],
)
def test_what_is_unknown_missing_or_given_twice_is_refused(
    tmp_path: Path, override: str, message: str
) -> None:
    with pytest.raises(LthError, match=message):
        runs_of(tmp_path, override)


def test_a_transplant_needs_another_source(tmp_path: Path) -> None:
    text = STUDY.replace("  moco: {config: configs/pretrain/digits_moco.yaml}\n", "")
    with pytest.raises(ConfigError, match="transplant lays the masks of one source.*supervised"):
        runs_of(tmp_path, text=text)
    assert runs_of(tmp_path, "baselines.transplant=[]", text=text)


def test_a_task_whose_framework_is_missing_is_left_out_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    monkeypatch.chdir(ROOT)
    monkeypatch.setitem(sys.modules, "detectron2", None)  # as where it is not installed
    planned = plan(load(tmp_path))
    assert planned.left_out == {
        "det": "detectron2 is not installed (`make detectron2` looks for it again)"
    }
    assert {run.task for run in planned.runs} == {"find", "cls", "seg"}
    alone = STUDY.replace("  cls: {", "  #").replace("  seg: {", "  #")
    with pytest.raises(RunError, match=r"a task that can run here.*det: detectron2 is not"):
        plan(load(tmp_path, text=alone))


@pytest.mark.parametrize(
    ("name", "trainings"),
    [
        ("demo", 6),
        ("demo_full", 12),
        ("demo_photos", 4),
        ("digits", 162),
        ("digits_channels", 45),
        ("digits_sensitivity", 60),
        ("paper", 3312),
    ],
)
def test_the_studies_that_are_shipped_expand(name: str, trainings: int) -> None:
    config = load_config(ROOT / f"configs/study/{name}.yaml")
    runs = plan(config).runs
    assert sum(run.trains for run in runs) == trainings
    # What a run needs is there, made by another run, or data.
    made = {run.folder for run in runs if not run.trains}
    data = ("digit_scenes", "digit_scenes_calm", "digit_scenes_small", "camvid", "bccd")
    made |= {Path("datasets", name) for name in data}
    assert all(path.is_file() or path.parent in made for run in runs for path in run.inputs)


def test_a_plan_is_read_as_it_was_written(tmp_path: Path) -> None:
    config = load(tmp_path, f"out={tmp_path}")
    runs = plan(config).runs
    settings, overrides = dataclasses.asdict(config), [f"out={tmp_path}"]
    path = tmp_path / "study.yaml"
    write_plan(tmp_path, path, runs, {"x": "a reason"}, overrides, settings)
    assert read_plan(tmp_path) == StoredPlan(
        path, tuple(runs), {"x": "a reason"}, tuple(overrides), settings, Path.cwd()
    )
    (tmp_path / "plan.json").write_text("{")
    with pytest.raises(RunError, match="cannot be read"):
        read_plan(tmp_path)
    with pytest.raises(RunError, match=r"found no plan\.json: start it"):
        read_plan(tmp_path / "elsewhere")


def test_a_source_may_ask_for_its_tickets_as_trained(tmp_path: Path) -> None:
    runs = runs_of(tmp_path, "sources.moco.trained=true")
    search = one(runs, kind=FIND, source="moco")
    assert "keep=trained" in search.command
    assert search.outputs == (search.folder / "round_03.trained.ticket",)
    wanted = {"source": "moco", "task": "cls", "seed": 0, "weights": "moco"}
    found = one(runs, kind="ticket", round=3, **wanted)
    assert found.ticket == search.folder / "round_03.trained.ticket"
    assert one(runs, kind="dense", **wanted).ticket == round_path(search.folder, 0)
    rewound = one(runs_of(tmp_path), kind="ticket", round=3, **wanted)
    assert rewound.digest != found.digest and rewound.ticket == round_path(search.folder, 3)
    with pytest.raises(ConfigError, match=r"sources\.moco\.trained is for the search of a pre-"):
        load(
            tmp_path,
            "sources.moco.trained=true",
            "sources.moco.config=null",
            "sources.moco.task=cls",
            "sources.moco.weights=supervised",
        )
