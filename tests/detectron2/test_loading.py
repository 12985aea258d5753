"""What a model accepts from detectron2's checkpointers, with its ticket and without."""

import copy
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode, LazyCall, instantiate
from detectron2.engine import DefaultPredictor, DefaultTrainer
from detectron2.model_zoo import get_config
from detectron2.modeling import build_model
from torch import nn

import lth_plugins as lth
import lth_plugins.detectron2 as plugin
from lth_plugins.detectron2 import CompactCheckpointer, with_ticket
from lth_plugins.errors import ConfigError
from lth_plugins.pruning.structure import Channels, structured

MakeCfg = Callable[..., CfgNode]
Command = Callable[..., Namespace]
OTHER = r"trained with masks [0-9a-f]{12}: the ticket's masks \([0-9a-f]{12}\) zero [1-9][\d,]* of"
KINDS = ["fpn", "c4"]
IMAGE = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def other(r18: Path, r50: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tickets of other masks over the same weights, by kind of model."""
    folder = tmp_path_factory.mktemp("other")
    files = {}
    for name, file in (("r18", r18), ("r50", r50)):
        ticket = lth.Ticket.load(file)
        dense = lth.Ticket(ticket.masks, ticket.weights, ticket.meta)
        files[name] = dense.shuffled(3).save(folder / f"{name}.ticket")
    return {kind: files["r50" if kind == "c4" else "r18"] for kind in KINDS}


def built(tiny_cfg: MakeCfg, kind: str, **options: Any) -> tuple[nn.Module, CfgNode]:
    cfg = tiny_cfg(kind, {f"MODEL.TICKET.{key}": value for key, value in options.items()})
    plugin.apply_ticket_input(cfg)
    return build_model(cfg), cfg


def save(model: nn.Module, folder: Path, name: str = "saved") -> str:
    DetectionCheckpointer(model, str(folder)).save(name)
    return str(folder / f"{name}.pth")


@pytest.mark.parametrize("kind", ["c4"])
def test_a_checkpoint_of_another_ticket_is_refused_with_the_count(
    kind: str, other: dict[str, Path], tiny_cfg: MakeCfg, tmp_path: Path
) -> None:
    file = save(built(tiny_cfg, kind)[0], tmp_path)
    model, _ = built(tiny_cfg, kind, PATH=other[kind])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for checkpointer in (DetectionCheckpointer, CompactCheckpointer):
        with pytest.raises(lth.TicketError, match=OTHER) as caught:
            checkpointer(model).load(file)
    assert "MODEL.TICKET.ALLOW_OTHER_CHECKPOINT True" in str(caught.value)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    # The run's own ticket, and a copy of the model.
    own, _ = built(tiny_cfg, kind)
    DetectionCheckpointer(copy.deepcopy(own)).load(file)


def test_evaluating_on_another_ticket_is_refused(
    trained: tuple[CfgNode, Path], other: dict[str, Path], train_det: ModuleType, command: Command
) -> None:
    _, out = trained
    options = {"MODEL.TICKET.PATH": other["fpn"], "OUTPUT_DIR": out, "SOLVER.MAX_ITER": 2}
    before = {path.name for path in out.iterdir()}
    for flags in (["--eval-only"], ["--eval-only", "--resume"]):
        weights = {"MODEL.WEIGHTS": out / "model_final.pth"}
        with pytest.raises(lth.TicketError, match=OTHER):
            train_det.main(command("fpn", *flags, options=options | weights))
    assert {path.name for path in out.glob("*.pth")} <= before
    assert (out / "last_checkpoint").read_text() == "model_final.pth"


@pytest.mark.parametrize("path", ["gone.ticket", "", "a_catalog_name_of_another_process"])
def test_a_predictor_needs_no_ticket_file(path: str, trained: tuple[CfgNode, Path]) -> None:
    cfg, out = trained
    cfg = cfg.clone()
    cfg.merge_from_list(["MODEL.WEIGHTS", str(out / "model_final.pth")])
    expected = DefaultPredictor(cfg)(IMAGE)["instances"]
    cfg.MODEL.TICKET.PATH = path
    predictor = DefaultPredictor(cfg)
    found = predictor(IMAGE)["instances"]
    assert len(found) and torch.equal(found.pred_boxes.tensor, expected.pred_boxes.tensor)
    assert torch.equal(found.scores, expected.scores)
    images = [{"image": torch.zeros(3, 64, 64), "height": 64, "width": 64}]
    predictor.model.train()
    with pytest.raises(lth.TicketError, match="but it is not trained"):
        predictor.model(images)


def test_without_its_ticket_a_stock_trainer_does_not_take_a_step(
    trained: tuple[CfgNode, Path], tmp_path: Path
) -> None:
    cfg, out = trained
    cfg = cfg.clone()
    weights = str(out / "model_final.pth")
    cfg.merge_from_list(["MODEL.WEIGHTS", weights, "OUTPUT_DIR", str(tmp_path)])
    cfg.MODEL.TICKET.PATH = "gone.ticket"
    trainer = DefaultTrainer(cfg)
    trainer.resume_or_load(False)
    with pytest.raises(lth.TicketError, match=r"found nothing at gone\.ticket.* is not trained"):
        trainer.train()
    cfg.MODEL.WEIGHTS = ""
    with pytest.raises(lth.TicketError, match=r"found nothing at gone\.ticket"):
        build_model(cfg)


def test_without_its_ticket_a_c4_model_infers_from_a_checkpoint(
    tiny_cfg: MakeCfg, tmp_path: Path
) -> None:
    model, cfg = built(tiny_cfg, "c4")
    file = save(model, tmp_path)
    cfg.merge_from_list(["MODEL.WEIGHTS", file, "MODEL.TICKET.PATH", "gone.ticket"])
    found = DefaultPredictor(cfg).model.state_dict()
    assert all(torch.equal(value, found[name]) for name, value in model.state_dict().items())


def test_train_det_evaluates_without_the_ticket_on_the_input_it_was_trained_on(
    trained: tuple[CfgNode, Path], train_det: ModuleType, command: Command
) -> None:
    _, out = trained
    weights = {"MODEL.WEIGHTS": out / "model_final.pth"}
    expected = train_det.main(command("fpn", "--eval-only", options=weights))
    gone = {"MODEL.TICKET.PATH": "gone.ticket"}
    found = train_det.main(command("fpn", "--eval-only", options=weights | gone))
    assert np.array_equal(found["bbox"]["AP50"], expected["bbox"]["AP50"], equal_nan=True)
    assert train_det.setup(command("fpn", "--eval-only", options=weights | gone)).INPUT.FORMAT == (
        "RGB"
    )
    for flags in ([], ["--resume"]):
        with pytest.raises(lth.TicketError, match=r"found nothing at gone\.ticket"):
            train_det.main(command("fpn", *flags, options=weights | gone))


def test_a_model_that_is_fed_something_else_refuses_the_checkpoint(
    trained: tuple[CfgNode, Path], tiny_cfg: MakeCfg
) -> None:
    _, out = trained
    options = {"MODEL.WEIGHTS": out / "model_final.pth", "MODEL.TICKET.PATH": "gone.ticket"}
    with pytest.raises(lth.TicketError, match=r"trained on RGB .* but the model has BGR"):
        DefaultPredictor(tiny_cfg("fpn", options))


def test_a_lazy_config_checks_what_it_loads_and_infers_without_the_ticket(
    r18: Path, other: dict[str, Path], tmp_path: Path
) -> None:
    model = get_config("common/models/mask_rcnn_fpn.py").model
    model.backbone.bottom_up.stages.depth = 18
    model.backbone.bottom_up.stages.pop("stride_in_1x1")
    model.backbone.bottom_up.stem.norm = model.backbone.bottom_up.stages.norm = "BN"
    spec = lth.InputSpec()
    model.input_format = "RGB"
    model.pixel_mean, model.pixel_std = list(spec.mean_255), list(spec.std_255)

    def make(ticket: Any, **options: Any) -> nn.Module:
        return instantiate(LazyCall(with_ticket)(module=model, ticket=str(ticket), **options))

    file = save(make(r18), tmp_path)
    with pytest.raises(lth.TicketError, match=OTHER):
        DetectionCheckpointer(make(other["fpn"])).load(file)
    allowed = make(other["fpn"], allow_other_checkpoint=True)
    DetectionCheckpointer(allowed).load(file)
    lth.attached(allowed).verify()

    gone = make("gone.ticket").eval()
    images = [{"image": torch.zeros(3, 64, 64), "height": 64, "width": 64}]
    with pytest.raises(lth.TicketError, match="nor used before a checkpoint was loaded"):
        gone(images)
    DetectionCheckpointer(gone).load(file)
    with torch.no_grad():
        gone(images)
    model.backbone.bottom_up.stem.norm = model.backbone.bottom_up.stages.norm = "GN"
    with pytest.raises(lth.TicketError, match="expected BatchNorm in the backbone"):
        make(r18)


@pytest.fixture(scope="module")
def channels(r18_dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    ticket = structured(lth.Ticket.load(r18_dense), Channels(density=0.3, multiple=8))
    return ticket.save(tmp_path_factory.mktemp("channels") / "channels.ticket")


@pytest.mark.parametrize("ticket", [True, False], ids=["with the ticket", "without"])
def test_detectron2s_own_checkpointer_refuses_a_compacted_checkpoint(
    ticket: bool, channels: Path, tiny_cfg: MakeCfg, tmp_path: Path
) -> None:
    model, cfg = built(tiny_cfg, "fpn", PATH=channels)
    small = lth.compact(model)
    file = save(small, tmp_path, "compact")
    cfg.MODEL.WEIGHTS = file
    if not ticket:
        cfg.MODEL.TICKET.PATH = "gone.ticket"
    with pytest.raises(lth.TicketError, match=r"detectron2\.CompactCheckpointer"):
        DefaultPredictor(cfg)
    narrowed = build_model(cfg)
    CompactCheckpointer(narrowed).load(file)
    assert narrowed.backbone.bottom_up.res5[1].conv1.out_channels < 512
    # PyTorch's own loading shows the shapes, and the backbone takes them.
    by_torch = build_model(cfg)
    by_torch.load_state_dict(small.state_dict())
    state = by_torch.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in small.state_dict().items())


@pytest.mark.parametrize("flags", [[], ["--compact"], ["--onnx"], ["--compact", "--onnx"]])
def test_an_evaluation_without_trained_weights_is_refused(
    flags: list[str], train_det: ModuleType, command: Command, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="found an empty MODEL.WEIGHTS: the heads"):
        train_det.main(command("fpn", "--eval-only", *flags))
    missing = {"MODEL.WEIGHTS": tmp_path / "missing.pth"}
    with pytest.raises(lth.TicketError, match="expected a checkpoint, found nothing at .*missing"):
        train_det.main(command("fpn", "--eval-only", *flags, options=missing))
    assert not list((tmp_path / "out").glob("*.pth"))


def test_an_evaluation_of_a_checkpoint_without_the_head_is_refused(
    trained: tuple[CfgNode, Path], train_det: ModuleType, command: Command, tmp_path: Path
) -> None:
    state = torch.load(trained[1] / "model_final.pth", weights_only=True)["model"]
    head = "roi_heads.box_predictor.cls_score."
    for name, there in {
        "backbone": {k: v for k, v in state.items() if k.startswith("backbone")},
        "classes": {k: v[:3] if k.startswith(head) else v for k, v in state.items()},
    }.items():
        torch.save({"model": there}, tmp_path / f"{name}.pth")
        options = {"MODEL.WEIGHTS": tmp_path / f"{name}.pth"}
        with pytest.raises(lth.TicketError, match="found none that fit .*, which would be random"):
            train_det.main(command("fpn", "--eval-only", "--compact", options=options))
    assert not (tmp_path / "out/compact.pth").exists()


@pytest.mark.parametrize("path", [None, "gone.ticket"])
def test_a_checkpoint_that_cannot_be_read_is_named(
    path: str | None, train_det: ModuleType, command: Command, tmp_path: Path
) -> None:
    (tmp_path / "broken.pth").write_bytes(b"junk" * 10)
    options = {"MODEL.WEIGHTS": tmp_path / "broken.pth"}
    options |= {"MODEL.TICKET.PATH": path} if path else {}
    with pytest.raises(lth.TicketError, match=r"at .*broken\.pth, found a file that cannot be"):
        train_det.main(command("fpn", "--eval-only", options=options))
