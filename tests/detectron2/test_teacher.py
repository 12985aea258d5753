"""Detectors that learn the features of a dense teacher, in detectron2's own trainers."""

import copy
import hashlib
import json
import pickle
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, DatasetMapper
from detectron2.engine import DefaultTrainer
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import lth_plugins as lth
from lth_plugins.detectron2 import (
    DistillHook,
    add_distill_config,
    add_slim_config,
    add_teacher,
    apply_ticket_input,
    build_optimizer,
)
from lth_plugins.detectron2.teacher import check_teacher, load_teacher
from tests.processes import together

Command = Callable[..., Namespace]
LOSSES = ("loss_distill_foreground", "loss_distill_background")
CLASSES = ("loss_distill_class_foreground", "loss_distill_class_background")


@pytest.fixture
def teach(tiny_cfg: Callable[..., CfgNode], tmp_path: Path) -> Callable[..., CfgNode]:
    def make(kind: str, **options: Any) -> CfgNode:
        """The config of a student whose teacher is the model itself, as it is built."""
        cfg = tiny_cfg(kind, {"DATASETS.TEST": (), **options})
        add_distill_config(cfg)
        add_slim_config(cfg)
        apply_ticket_input(cfg)
        torch.manual_seed(0)
        torch.save({"model": build_model(cfg).state_dict()}, tmp_path / "teacher.pth")
        cfg.DISTILL.TEACHER = str(tmp_path / "teacher.pth")
        return cfg

    return make


def scenes_of(cfg: CfgNode, start: int = 0) -> list[dict[str, Any]]:
    """Two training images, the same each time."""
    mapper = DatasetMapper(cfg, is_train=True, augmentations=[])
    entries = DatasetCatalog.get(cfg.DATASETS.TRAIN[0])[start : start + 2]
    return [mapper(copy.deepcopy(entry)) for entry in entries]


def losses_of(model: nn.Module, scenes: list[dict[str, Any]]) -> dict[str, Tensor]:
    with EventStorage():
        return model(scenes)


def build_narrow(cfg: CfgNode) -> nn.Module:
    """A student whose FPN has half the channels of its teacher's."""
    narrow = cfg.clone()
    narrow.defrost()
    narrow.MODEL.FPN.OUT_CHANNELS = 128
    model = build_model(narrow)
    add_teacher(model, cfg)
    return model


@pytest.mark.parametrize("kind", ["fpn", "c4", "retinanet"])
def test_a_student_learns_and_its_teacher_does_not(
    kind: str, teach: Callable[..., CfgNode]
) -> None:
    cfg = teach(kind)
    torch.manual_seed(0)
    model = build_model(cfg)
    stock, parameters = list(model.state_dict()), dict(model.named_parameters())
    state = torch.get_rng_state()
    add_teacher(model, cfg)
    assert torch.equal(torch.get_rng_state(), state)  # the student draws as without a teacher
    assert list(model.state_dict()) == stock and dict(model.named_parameters()).keys() == (
        parameters.keys()
    )
    model.load_state_dict(model.state_dict(), strict=True)

    scenes = scenes_of(cfg)
    model.train().backbone.eval()  # with the statistics that a teacher has
    if kind == "c4":
        model.roi_heads.res5.eval()
    named = LOSSES + (CLASSES if kind != "retinanet" else ())
    losses = losses_of(model, scenes)
    assert {name for name in losses if "distill" in name} == {*named}
    assert all(losses[name].item() == 0 for name in named)
    trunk = (
        "backbone.res4.0.conv1.weight" if kind == "c4" else "backbone.bottom_up.res4.0.conv1.weight"
    )
    with torch.no_grad():
        parameters[trunk].mul_(1.5)
    losses = losses_of(model, scenes)
    assert all(losses[name] > 0 for name in named)
    sum(losses[name] for name in LOSSES).backward(retain_graph=True)
    assert parameters[trunk].grad.any()
    heads = [p for name, p in parameters.items() if not name.startswith("backbone.")]
    assert all(p.grad is None or not p.grad.any() for p in heads)
    for name in named[len(LOSSES) :]:
        model.zero_grad()
        losses[name].backward(retain_graph=True)
        assert parameters["roi_heads.box_predictor.cls_score.weight"].grad.any()
        assert parameters[trunk].grad.any()

    model.eval()
    with torch.no_grad():
        assert "instances" in model(scenes)[0]


def test_copies_and_pickles_learn_alike_also_under_autocast(teach: Callable[..., CfgNode]) -> None:
    cfg = teach("fpn")
    model = build_narrow(cfg).train()
    scenes = scenes_of(cfg)
    expected = [losses_of(model, scenes)[name].item() for name in LOSSES]
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert [losses_of(other, scenes)[name].item() for name in LOSSES] == expected
    with torch.autocast("cpu", torch.bfloat16):
        losses = losses_of(model, scenes)
    assert losses[LOSSES[0]].dtype == torch.float32
    assert [losses[name].item() for name in LOSSES] == pytest.approx(expected, rel=0.1)


def test_a_narrower_student_has_trained_layers_that_no_checkpoint_of_it_shows(
    teach: Callable[..., CfgNode],
) -> None:
    cfg = teach("fpn")
    model = build_narrow(cfg).train()
    ours = [name for name, _ in model.named_parameters() if "distillation" in name]
    assert len(ours) == 10 and not any("distillation" in key for key in model.state_dict())
    optimizer = build_optimizer(cfg, model)
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    losses = losses_of(model, scenes_of(cfg))
    sum(losses.values()).backward()
    for name in ours:
        parameter = model.get_parameter(name)
        assert id(parameter) in trained and parameter.grad.any(), name
    # The teacher is not moved by what moves the student.
    before = copy.deepcopy(load_teacher(cfg).state_dict())
    optimizer.step()
    after = load_teacher(cfg).state_dict()
    assert all(torch.equal(value, after[key]) for key, value in before.items())


def gradients(model: nn.Module, scenes: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Of the layers that adapt features, from the images of one process."""
    torch.manual_seed(1)  # detectors draw samples
    model.zero_grad()
    sum(losses_of(model, scenes).values()).backward()
    return {n.removeprefix("module."): p.grad.clone() for n, p in model.named_parameters()}


def in_process(rank: int, cfg: CfgNode, scenes: list[list[dict[str, Any]]]) -> dict[str, Tensor]:
    torch.manual_seed(0)
    model = DistributedDataParallel(build_narrow(cfg).train(), broadcast_buffers=False)
    return gradients(model, scenes[rank])


def test_processes_average_what_they_learn(teach: Callable[..., CfgNode]) -> None:
    cfg = teach("fpn")
    scenes = [scenes_of(cfg, start=2 * rank) for rank in range(2)]
    found = together(in_process, cfg, scenes)
    torch.manual_seed(0)
    model = build_narrow(cfg).train()
    alone = [gradients(copy.deepcopy(model), scenes[rank]) for rank in range(2)]
    adapted = [name for name in alone[0] if name.startswith("distillation.")]
    assert adapted
    for name in adapted:
        assert torch.equal(found[0][name], found[1][name])
        mean = (alone[0][name] + alone[1][name]) / 2
        assert torch.allclose(found[0][name], mean, rtol=1e-3, atol=1e-6), name


def test_a_run_resumes_bit_for_bit_with_what_adapts_its_features(
    train_det: ModuleType, teach: Callable[..., CfgNode], tmp_path: Path
) -> None:
    cfg = teach("fpn", **{"SOLVER.CHECKPOINT_PERIOD": 1, "SOLVER.MAX_ITER": 3})

    class Narrow(train_det.Trainer):
        @classmethod
        def build_model(cls, cfg: CfgNode) -> nn.Module:
            return build_narrow(cfg)

    def train(out: Path) -> Any:
        given = cfg.clone()
        given.OUTPUT_DIR = str(out)
        out.mkdir(exist_ok=True)
        torch.manual_seed(0)
        trainer = Narrow(given)
        trainer.resume_or_load(resume=True)
        trainer.train()
        return torch.load(out / "model_final.pth", weights_only=True)

    whole, again = tmp_path / "whole", tmp_path / "again"
    expected = train(whole)
    lines = [json.loads(line) for line in (whole / "metrics.json").read_text().splitlines()]
    assert all(lines[-1][name] > 0 for name in LOSSES)
    again.mkdir()
    (again / "model_0000000.pth").write_bytes((whole / "model_0000000.pth").read_bytes())
    (again / "last_checkpoint").write_text("model_0000000.pth")
    found = train(again)
    assert not any("distillation" in key for key in expected["model"])
    kept = expected["trainer"]["hooks"]["DistillHook"]["adaptation"]
    first = torch.load(again / "model_0000000.pth", weights_only=True)["trainer"]["hooks"]
    for key, value in kept.items():
        assert torch.equal(found["trainer"]["hooks"]["DistillHook"]["adaptation"][key], value)
        assert not torch.equal(first["DistillHook"]["adaptation"][key], value)
    assert all(torch.equal(found["model"][key], value) for key, value in expected["model"].items())
    assert all(
        torch.equal(
            found["trainer"]["_trainer"]["optimizer"]["state"][key]["momentum_buffer"],
            value["momentum_buffer"],
        )
        for key, value in expected["trainer"]["_trainer"]["optimizer"]["state"].items()
    )


def test_detectron2s_own_trainer_needs_two_lines_and_no_ticket(
    teach: Callable[..., CfgNode], tmp_path: Path
) -> None:
    class Trainer(DefaultTrainer):
        @classmethod
        def build_model(cls, cfg: CfgNode) -> nn.Module:
            model = super().build_model(cfg)
            add_teacher(model, cfg)
            return model

        def build_hooks(self) -> list[Any]:
            return [DistillHook(), *super().build_hooks()]

    cfg = teach("retinanet", **{"SOLVER.MAX_ITER": 1})
    cfg.MODEL.BACKBONE.NAME = "build_retinanet_resnet_fpn_backbone"
    Path(cfg.OUTPUT_DIR).mkdir()
    Trainer(cfg).train()
    saved = torch.load(Path(cfg.OUTPUT_DIR, "model_final.pth"), weights_only=True)
    assert len(saved["trainer"]["hooks"]["DistillHook"]["teacher"]) == 64
    build_model(cfg).load_state_dict(saved["model"], strict=True)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="detectron2's AMP trainer needs CUDA")
def test_a_detector_learns_under_amp(train_det: ModuleType, teach: Callable[..., CfgNode]) -> None:
    cfg = teach("fpn", **{"SOLVER.AMP.ENABLED": True, "MODEL.DEVICE": "cuda"})
    Path(cfg.OUTPUT_DIR).mkdir()
    train_det.Trainer(cfg).train()
    line = json.loads(Path(cfg.OUTPUT_DIR, "metrics.json").read_text().splitlines()[-1])
    assert all(line[name] > 0 for name in LOSSES)


def without(state: dict[str, Tensor], key: str) -> None:
    del state[key]


def of_classes(state: dict[str, Tensor], count: int) -> None:
    head = "roi_heads.box_predictor."
    for part in ("weight", "bias"):
        state[f"{head}cls_score.{part}"] = state[f"{head}cls_score.{part}"][: count + 1]
        state[f"{head}bbox_pred.{part}"] = state[f"{head}bbox_pred.{part}"][: 4 * count]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: of_classes(s, 3), "a teacher of 10 classes, as the config has, found one of 3"),
        (lambda s: without(s, "backbone.fpn_output2.bias"), "found none that fit 1 of them"),
        (
            lambda s: s.update({"backbone.bottom_up.res2.2.conv1.weight": torch.zeros(1)}),
            r"found 1 parameters of another model in .* such as backbone.bottom_up.res2.2.conv1",
        ),
    ],
    ids=["classes", "lacks", "deeper"],
)
def test_a_teacher_of_another_model_is_refused(
    change: Callable[[dict[str, Tensor]], None], message: str, teach: Callable[..., CfgNode]
) -> None:
    cfg = teach("fpn")
    saved = torch.load(cfg.DISTILL.TEACHER, weights_only=True)
    change(saved["model"])
    torch.save(saved, cfg.DISTILL.TEACHER)
    with pytest.raises(lth.TicketError, match=message):
        check_teacher(cfg)


def test_a_retinanet_of_other_classes_and_another_input_are_refused(
    teach: Callable[..., CfgNode],
) -> None:
    cfg = teach("retinanet")
    cfg.MODEL.RETINANET.NUM_CLASSES = 4
    with pytest.raises(lth.TicketError, match="of 4 classes, as the config has, found one of 10"):
        check_teacher(cfg)
    cfg.MODEL.RETINANET.NUM_CLASSES = 10
    check_teacher(cfg)
    cfg.MODEL.PIXEL_MEAN = [1.0, 2.0, 3.0]
    with pytest.raises(lth.TicketError, match="the teacher was trained on RGB input .* config has"):
        check_teacher(cfg)
    # A checkpoint of detectron2 alone notes nothing; the config beside it does.
    saved = torch.load(cfg.DISTILL.TEACHER, weights_only=True)
    torch.save({"model": dict(saved["model"])}, cfg.DISTILL.TEACHER)
    cfg.MODEL.BACKBONE.FREEZE_AT = 2  # FrozenBN counts no batches
    check_teacher(cfg)
    older = {**saved["model"], "pixel_mean": torch.zeros(3, 1, 1), "pixel_std": torch.ones(3, 1, 1)}
    torch.save({"model": older}, cfg.DISTILL.TEACHER)
    with pytest.raises(lth.TicketError, match="the teacher was trained on some input with mean"):
        check_teacher(cfg)
    torch.save({"model": dict(saved["model"])}, cfg.DISTILL.TEACHER)
    beside = cfg.clone()
    beside.INPUT.FORMAT = "BGR"
    Path(cfg.DISTILL.TEACHER).with_name("config.yaml").write_text(beside.dump())
    with pytest.raises(lth.TicketError, match="the teacher was trained on BGR input .* config has"):
        check_teacher(cfg)


def test_the_tool_refuses_before_anything_is_trained(
    train_det: ModuleType, command: Command, trained: tuple[CfgNode, Path], tmp_path: Path
) -> None:
    teacher, junk = str(trained[1] / "model_final.pth"), tmp_path / "junk.pth"
    junk.write_text("no checkpoint")
    out, options = tmp_path / "out", {"DATASETS.TEST": (), "SOLVER.MAX_ITER": 1}
    for flags, given, error, message in (
        (["--teacher", tmp_path / "none.pth"], {}, lth.TicketError, "none.pth, found no such file"),
        (["--teacher", junk], {}, lth.TicketError, "a file that cannot be read"),
        (["--teacher", teacher], {"MODEL.FPN.OUT_CHANNELS": 128}, lth.TicketError, "none that fit"),
    ):
        with pytest.raises(error, match=message):
            train_det.main(command("fpn", *map(str, flags), options=options | given))
        assert {path.name for path in out.iterdir()} <= {"log.txt", ".lock"}
    train_det.main(command("fpn", "--teacher", teacher, options=options))
    written = yaml.safe_load((out / "config.yaml").read_text())
    assert written["DISTILL"]["TEACHER"] == teacher
    before = {path: path.stat().st_mtime_ns for path in out.glob("*.pth")}
    other = tmp_path / "other.pth"
    torch.save({"model": torch.load(teacher, weights_only=True)["model"]}, other)
    options["SOLVER.MAX_ITER"] = 2
    for flags, message in (
        ([], "expected to resume with teacher .*, as the run started, found no teacher"),
        (["--teacher", str(other)], "expected to resume with teacher .* found teacher"),
    ):
        with pytest.raises(lth.RunError, match=message):
            train_det.main(command("fpn", "--resume", *flags, options=options))
    assert {path: path.stat().st_mtime_ns for path in out.glob("*.pth")} == before
    train_det.main(command("fpn", "--resume", "--teacher", teacher, options=options))
    # An evaluation by the config of the run needs no teacher.
    beside = {"MODEL.WEIGHTS": out / "model_final.pth", "DISTILL.TEACHER": tmp_path / "gone.pth"}
    assert (
        train_det.read_config(command("fpn", "--eval-only", options=beside)).DISTILL.TEACHER == ""
    )


def test_each_run_of_a_search_has_the_teacher(
    train_det: ModuleType,
    command: Command,
    trained: tuple[CfgNode, Path],
    r18_dense: Path,
    tmp_path: Path,
) -> None:
    teacher, other = trained[1] / "model_final.pth", tmp_path / "other.pth"
    options = {"DATASETS.TEST": (), "SOLVER.MAX_ITER": 1, "MODEL.TICKET.PATH": r18_dense}

    def search(path: Path) -> None:
        flags = ["--teacher", str(path), "--imp-rounds", "1"]
        train_det.main(command("fpn", *flags, options=options))

    search(teacher)
    out = tmp_path / "out"
    for k in (0, 1):
        lines = (out / f"train_{k:02d}" / "metrics.json").read_text().splitlines()
        assert all(json.loads(lines[-1])[name] > 0 for name in LOSSES + CLASSES)
    recipe = json.loads((out / "recipe.json").read_text())["config"]["DISTILL"]
    assert recipe["TEACHER"] == hashlib.sha256(teacher.read_bytes()).hexdigest()
    torch.save({"model": torch.load(teacher, weights_only=True)["model"]}, other)
    with pytest.raises(lth.RunError, match=r"another recipe: config.DISTILL.TEACHER is"):
        search(other)
