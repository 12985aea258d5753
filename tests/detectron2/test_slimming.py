"""Slimming whole detectors in detectron2's own trainer."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from detectron2.modeling import build_model

import lth_plugins as lth
import lth_plugins.detectron2 as plugin
from lth_plugins.detectron2.checkpoint import state_in
from lth_plugins.slimming.cost import Flops
from lth_plugins.slimming.network import Network
from lth_plugins.slimming.tracing import trace
from lth_plugins.ticket.keys import is_slimmed

pytestmark = pytest.mark.detectron2

SLIM = {
    "SLIM.FLOPS": 0.5,
    "SLIM.IMPORTANCE": "fisher",
    "SLIM.END": 2,
    "SLIM.PERIOD": 1,
    "SLIM.SIZE": 64,
}
MADE_OF = {  # groups that each kind of detector has, beyond those inside blocks
    "fpn": ("backbone.fpn_lateral2", "backbone.fpn_output2", "proposal_generator.rpn_head.conv"),
    "c4": ("backbone.res4.0.conv3", "roi_heads.res5.0.conv3", "proposal_generator.rpn_head.conv"),
    "mask_rcnn": ("roi_heads.mask_head.mask_fcn1", "roi_heads.box_head.fc1"),
    "retinanet": ("head.cls_subnet.0", "head.bbox_subnet.2", "backbone.fpn_output3"),
}


def share_of(model: Any, cfg: Any) -> float:
    def counted(detector: Any) -> float:
        network = trace(detector, plugin.example_of(cfg))
        return Flops()(network, network.all_kept())

    return counted(model) / counted(build_model(cfg))


@pytest.mark.parametrize("kind", MADE_OF)
def test_channels_of_trunk_neck_and_heads_are_removed_and_predictors_stay(
    kind: str, tiny_cfg: Callable[..., Any], r50: Path
) -> None:
    # An untrained FrozenBN of detectron2 is a normalisation, too.
    norm = {"MODEL.RESNETS.NORM": "FrozenBN", "MODEL.TICKET.ALLOW_FROZEN_NORM": True}
    cfg = tiny_cfg(kind, norm if kind != "c4" else {})
    plugin.add_slim_config(cfg)
    cfg.SLIM.SIZE = 64
    plugin.apply_ticket_input(cfg)
    model, forward = build_model(cfg), plugin.example_of(cfg)
    network: Network = trace(model, forward)
    names = {m.module for g in network.groups.values() for m in g.writers}
    assert names.issuperset(MADE_OF[kind])
    outputs = {"cls_score", "bbox_pred", "objectness_logits", "anchor_deltas", "predictor"}
    assert {name.split(".")[-1] for name in network.held} <= outputs
    small = lth.slim(model, None, flops=0.5, forward=forward)  # and checks that it is the same
    assert 0.4 < share_of(small, cfg) <= 0.5


def test_a_training_ends_with_a_narrower_detector_that_evaluates_the_same(
    train_det: ModuleType, command: Callable[..., Any], tmp_path: Path
) -> None:
    """--prune-flops of a sparse ticket, stopped and resumed bit for bit; slim.pth evaluated."""
    whole = command("fpn", "--prune-flops", "0.5", options={**SLIM, "SLIM.FLOPS": 0.9})
    train_det.main(whole)
    straight = torch.load(tmp_path / "out/slim.pth", weights_only=True)["model"]
    period = {"SOLVER.CHECKPOINT_PERIOD": 1, "OUTPUT_DIR": tmp_path / "stopped"}
    train_det.main(command("fpn", "--prune-flops", "0.5", options={**SLIM, **period}))
    for file in ("model_final.pth", "model_0000001.pth", "slim.pth"):
        (tmp_path / "stopped" / file).unlink()
    (tmp_path / "stopped/last_checkpoint").write_text("model_0000000.pth")
    train_det.main(command("fpn", "--prune-flops", "0.5", "--resume", options={**SLIM, **period}))
    resumed = torch.load(tmp_path / "stopped/slim.pth", weights_only=True)["model"]
    assert all(torch.equal(value, resumed[key]) for key, value in straight.items())
    assert straight["backbone.fpn_output2.weight"].shape[0] < 256

    there = {"OUTPUT_DIR": tmp_path / "eval"}
    ticket = lth.Ticket.load(tmp_path / "out/slim.ticket")
    assert ticket == lth.Ticket.load(tmp_path / "stopped/slim.ticket")
    assert ticket.meta.widths and ticket.sparsity > 0.5
    assert all((v == 0).any() for k, v in straight.items() if ".conv1.weight" in k and "res" in k)
    found = []
    for name in ("model_final.pth", "slim.pth"):
        there["MODEL.WEIGHTS"] = tmp_path / "out" / name
        found.append(train_det.main(command("fpn", "--eval-only", options=there))["bbox"])
    # Without the ticket the input is the one that the checkpoint notes.
    there["MODEL.TICKET.PATH"] = ""
    found.append(train_det.main(command("fpn", "--eval-only", "--onnx", options=there))["bbox"])
    # It is there if onnxruntime found the same as PyTorch, to 1e-4.
    exported = (tmp_path / "eval/model.onnx").stat().st_size
    assert exported < 1.1 * 4 * sum(value.numel() for value in straight.values())
    assert found[1] == pytest.approx(found[0], nan_ok=True)
    assert found[2] == pytest.approx(found[0], nan_ok=True)

    with pytest.raises(lth.TicketError, match="slimmed by"):
        other = {**SLIM, **period, "SOLVER.MAX_ITER": 5}
        train_det.main(command("fpn", "--prune-flops", "0.7", "--resume", options=other))


def test_a_slimmed_detector_is_pruned_while_it_trains_and_resumes_bit_for_bit(
    train_det: ModuleType, command: Callable[..., Any], slimmed: dict[str, Any], tmp_path: Path
) -> None:
    pruned = {"TARGET": 0.9, "BEGIN": 0, "END": 2, "PERIOD": 1}
    node = "MODEL.TICKET.METHOD_OPTIONS"
    options = slimmed | {f"{node}.{key}": value for key, value in pruned.items()}
    options["MODEL.TICKET.METHOD"] = "gradual"
    options |= {"SOLVER.CHECKPOINT_PERIOD": 1, "DATASETS.TEST": ()}
    train_det.main(command("retinanet", options=options))
    out = tmp_path / "out"
    whole = torch.load(out / "model_final.pth", weights_only=True)["model"]
    ticket = lth.Ticket.load(out / "final.ticket")
    assert ticket.sparsity == pytest.approx(0.9, abs=1e-4)
    assert ticket.meta.widths == lth.Ticket.load(slimmed["MODEL.TICKET.PATH"]).meta.widths
    shapes = torch.load(slimmed["MODEL.WEIGHTS"], weights_only=True)["model"]
    assert {k: v.shape for k, v in whole.items()} == {k: v.shape for k, v in shapes.items()}
    for file in ("model_final.pth", "model_0000001.pth", "final.ticket"):
        (out / file).unlink()
    (out / "last_checkpoint").write_text("model_0000000.pth")
    train_det.main(command("retinanet", "--resume", options=options))
    again = torch.load(out / "model_final.pth", weights_only=True)["model"]
    assert all(torch.equal(value, again[key]) for key, value in whole.items())
    assert lth.Ticket.load(out / "final.ticket") == ticket
    # A checkpoint of other masks is refused on the slimmed trunk, too.
    other = {**slimmed, "MODEL.WEIGHTS": out / "model_final.pth", "OUTPUT_DIR": tmp_path / "other"}
    with pytest.raises(lth.TicketError, match="what was pruned would train again"):
        train_det.main(command("retinanet", options=other))


def test_tickets_of_a_slimmed_detector_are_found(
    train_det: ModuleType, command: Callable[..., Any], slimmed: dict[str, Any], tmp_path: Path
) -> None:
    options = {**slimmed, "MODEL.TICKET.IMP.SCOPE": "all", "SOLVER.MAX_ITER": 1}
    train_det.main(command("retinanet", "--imp-rounds", "1", options=options))
    found = lth.Ticket.load(tmp_path / "out/round_01.ticket")
    dense = lth.Ticket.load(slimmed["MODEL.TICKET.PATH"])
    assert found.meta.widths == dense.meta.widths
    assert found.all_masks.density == pytest.approx(0.8, abs=1e-4) and found.outside
    # Trained as a ticket of the slimmed checkpoint, with its zeros in neck and heads.
    options = {"MODEL.TICKET.PATH": tmp_path / "out/round_01.ticket", "OUTPUT_DIR": tmp_path / "t"}
    allow = {"MODEL.TICKET.ALLOW_OTHER_CHECKPOINT": True, "SOLVER.MAX_ITER": 1}
    train_det.main(command("retinanet", options={**slimmed, **options, **allow}))
    trained = lth.Ticket.load(tmp_path / "t/final.ticket")
    assert trained.all_masks == found.all_masks


def test_a_slimmed_detector_has_no_other_ticket(
    train_det: ModuleType,
    command: Callable[..., Any],
    slimmed: dict[str, Any],
    r18: Path,
    r18_dense: Path,
) -> None:
    options = {**slimmed, "SOLVER.MAX_ITER": 1, "DATASETS.TEST": ()}
    with pytest.raises(lth.TicketError, match="the full width: name the slim.ticket"):
        train_det.main(command("retinanet", options={**options, "MODEL.TICKET.PATH": r18}))
    dense = {**options, "MODEL.TICKET.PATH": r18_dense}
    with pytest.raises(lth.TicketError, match="name the slim.ticket"):
        train_det.main(command("retinanet", "--imp-rounds", "1", options=dense))
    train_det.main(command("retinanet", options=dense))  # without one


@pytest.mark.parametrize(
    ("flags", "match"),
    [
        (["--prune-flops", "0.5", "--imp-rounds", "2"], "leave out --imp-rounds"),
        (["--prune-flops", "0.5", "--eval-only"], "leave out --eval-only"),
    ],
)
def test_slimming_beside_a_search_or_an_evaluation_is_refused(
    flags: list[str],
    match: str,
    command: Callable[..., Any],
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        command("fpn", *flags)
    assert match in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"SLIM.FLOPS": 1.5}, r"in \(0, 1\)"),
        ({"SLIM.IMPORTANCE": "fischer"}, "unknown importance"),
        ({"SLIM.END": 30}, "within the training's 3 iterations"),
        ({"SLIM.FLOPS": 0.001}, "at the least"),
        ({"MODEL.TICKET.METHOD": "rigl"}, "Slim first, then prune slim.ticket"),
        ({"MODEL.TICKET.IMP.ROUNDS": 1}, "choose one"),
        ({"SLIM.KEEP": ["backbone.bottom"]}, "none named 'backbone.bottom'"),
    ],
)
def test_a_slimming_that_cannot_be_is_refused_before_the_first_step(
    options: dict[str, Any],
    match: str,
    train_det: ModuleType,
    command: Callable[..., Any],
    tmp_path: Path,
) -> None:
    with pytest.raises(lth.LthError, match=match):
        train_det.main(command("fpn", options={**SLIM, **options}))
    assert not list((tmp_path / "out").glob("*.pth"))


def test_a_detector_is_slimmed_while_a_dense_teacher_teaches_it(
    train_det: ModuleType, command: Callable[..., Any], tmp_path: Path, r18_dense: Path
) -> None:
    dense = {"MODEL.TICKET.PATH": r18_dense, "SOLVER.MAX_ITER": 1, "OUTPUT_DIR": tmp_path / "dense"}
    train_det.main(command("retinanet", options=dense))
    taught = {**SLIM, "MODEL.TICKET.PATH": r18_dense, "SLIM.IMPORTANCE": "taylor"}
    teacher = ("--teacher", f"{tmp_path / 'dense/model_final.pth'}")
    train_det.main(command("retinanet", "--prune-flops", "0.5", *teacher, options=taught))
    state = torch.load(tmp_path / "out/slim.pth", weights_only=True)["model"]
    full = torch.load(tmp_path / "dense/model_final.pth", weights_only=True)["model"]
    assert state.keys() == full.keys()
    assert state["head.cls_subnet.0.weight"].shape[0] < 256
    assert "loss_distill_foreground" in (tmp_path / "out/metrics.json").read_text()
    # The teacher was loaded once, to check it before anything was written.
    assert f"Loading from {teacher[1]}" not in (tmp_path / "out/log.txt").read_text()


def test_deformable_convolutions_are_refused_by_their_names(tiny_cfg: Callable[..., Any]) -> None:
    stock = {"MODEL.BACKBONE.NAME": "build_resnet_backbone", "MODEL.ROI_HEADS.NAME": "Res5ROIHeads"}
    deformable = {"MODEL.RESNETS.DEFORM_ON_PER_STAGE": [False, True, False, False]}
    cfg = tiny_cfg("c4", {**stock, **deformable})
    plugin.add_slim_config(cfg)
    with pytest.raises(lth.TicketError, match="backbone.res3.0.conv2, a DeformConv"):
        trace(build_model(cfg), plugin.example_of(cfg))


@pytest.mark.parametrize("path", ["https://host/model.pth", "model.pkl", "", "absent.pth"])
def test_only_files_that_are_there_are_asked_whether_they_are_slimmed(path: str) -> None:
    assert state_in(path) is None and not is_slimmed(state_in(path))
