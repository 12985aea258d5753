"""A ticket keeps its promises (C3) in detectron2's own trainer, with and without our hook."""

import json
import os
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml
from detectron2.config import CfgNode
from detectron2.data.detection_utils import read_image
from detectron2.engine import DefaultTrainer, HookBase
from detectron2.modeling import BACKBONE_REGISTRY, build_model
from detectron2.modeling.backbone.fpn import build_resnet_fpn_backbone
from PIL import ExifTags, Image
from torch import Tensor

import lth_plugins as lth
import lth_plugins.detectron2 as plugin
from lth_plugins.detectron2.evaluation import evaluators_of
from lth_plugins.detectron2.resume import is_wide
from lth_plugins.resilience.lock import LOCK, output_folder
from lth_plugins.ticket import locate

MakeCfg = Callable[..., CfgNode]
Command = Callable[..., Namespace]


def saved_model(out: Path, name: str = "model_final.pth") -> dict[str, Tensor]:
    return torch.load(out / name, weights_only=True)["model"]


def assert_masked(state: dict[str, Tensor], ticket: lth.Ticket) -> None:
    """Pruned weights are exactly zero in a checkpoint, and surviving ones are not."""
    keys = locate(state).keys
    for name, mask in ticket.masks.items():
        assert not state[keys[name]][~mask].any(), name
        assert state[keys[name]][mask].any(), name


def logged(out: Path, name: str) -> list[tuple[int, float]]:
    """(iteration, value) of everything detectron2 logged under a name."""
    lines = [json.loads(line) for line in (out / "metrics.json").read_text().splitlines()]
    return [(line["iteration"], line[name]) for line in lines if name in line]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="detectron2's AMP trainer needs CUDA")
def test_pruned_weights_stay_zero_under_amp(tiny_cfg: MakeCfg, r18: Path, tmp_path: Path) -> None:
    options = {"SOLVER.AMP.ENABLED": True, "MODEL.DEVICE": "cuda", "DATASETS.TEST": ()}
    cfg = tiny_cfg("fpn", options)
    plugin.apply_ticket_input(cfg)
    Path(cfg.OUTPUT_DIR).mkdir()
    DefaultTrainer(cfg).train()
    assert_masked(saved_model(tmp_path / "out"), lth.Ticket.load(r18))


USERS_SCRIPT = """
from detectron2.config import get_cfg
from detectron2.engine import DefaultTrainer, default_argument_parser, default_setup

from lth_plugins.detectron2 import add_ticket_config
from lth_plugins.detectron2.datasets import register_digit_scenes


def main(args):
    cfg = get_cfg()
    add_ticket_config(cfg)
    cfg.merge_from_file(args.config_file)
    cfg.merge_from_list(args.opts)
    cfg.freeze()
    register_digit_scenes(cfg.DATASETS.TRAIN)  # a script registers the datasets that it trains on
    default_setup(cfg, args)
    trainer = DefaultTrainer(cfg)
    trainer.resume_or_load(resume=args.resume)
    trainer.train()


if __name__ == "__main__":
    main(default_argument_parser().parse_args())
"""

STOCK_SCRIPT = """
import sys


class NoPlugins:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "lth_plugins":
            raise ImportError(name)


sys.meta_path.insert(0, NoPlugins())
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import get_cfg
from detectron2.modeling import BACKBONE_REGISTRY, build_model
from detectron2.modeling.backbone.fpn import build_resnet_fpn_backbone

config, checkpoint, output = sys.argv[1:]
cfg = get_cfg()
cfg.merge_from_file(config)
model = build_model(cfg).eval()
DetectionCheckpointer(model).load(checkpoint)
saved, loaded = torch.load(checkpoint, weights_only=True)["model"], model.state_dict()
assert list(saved) == list(loaded)
assert all(torch.equal(saved[name], loaded[name]) for name in saved)
image = torch.arange(3 * 64 * 64).reshape(3, 64, 64) % 256
with torch.no_grad():
    found = model([{"image": image}])[0]["instances"]
torch.save({"boxes": found.pred_boxes.tensor, "scores": found.scores}, output)
assert not any(name.startswith("lth_plugins") for name in sys.modules)
"""


def run_script(folder: Path, text: str, *arguments: object) -> None:
    script = folder / "script.py"
    script.write_text(text)
    command = [sys.executable, str(script), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_users_own_script_and_stock_code_after_it(
    tiny_cfg: MakeCfg, r18: Path, scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An import and one line in a script; what it saves needs neither."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(scenes.parent))
    cfg = tiny_cfg("fpn", {"DATASETS.TRAIN": ("digit_scenes_train",), "DATASETS.TEST": ()})
    plugin.apply_ticket_input(cfg)
    (tmp_path / "config.yaml").write_text(cfg.dump())
    run_script(tmp_path, USERS_SCRIPT, "--config-file", "config.yaml", "SOLVER.MAX_ITER", 2)
    out = tmp_path / "out"
    assert_masked(saved_model(out), lth.Ticket.load(r18))
    run_script(tmp_path, USERS_SCRIPT, "--config-file", "config.yaml", "--resume")
    assert [iteration for iteration, _ in logged(out, "total_loss")] == [1, 2]
    state = saved_model(out)
    assert_masked(state, lth.Ticket.load(r18))

    settings = yaml.safe_load(cfg.dump())
    del settings["MODEL"]["TICKET"]
    settings["MODEL"]["BACKBONE"]["NAME"] = "build_resnet_fpn_backbone"
    (tmp_path / "stock.yaml").write_text(yaml.safe_dump(settings))
    arguments = (tmp_path / "stock.yaml", out / "model_final.pth", tmp_path / "found.pt")
    run_script(tmp_path, STOCK_SCRIPT, *arguments)
    model = build_model(cfg).eval()
    model.load_state_dict(state)
    with torch.no_grad():
        ours = model([{"image": torch.arange(3 * 64 * 64).reshape(3, 64, 64) % 256}])[0][
            "instances"
        ]
    theirs = torch.load(tmp_path / "found.pt", weights_only=True)
    assert len(ours)
    assert torch.equal(ours.pred_boxes.tensor, theirs["boxes"])
    assert torch.equal(ours.scores, theirs["scores"])


def test_train_det_trains_evaluates_and_resumes(
    train_det: ModuleType,
    command: Command,
    r18: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("lth_plugins.progress.QUIET_SECONDS", 0.0)
    train_det.main(command("fpn"))
    out = tmp_path / "out"
    said = (out / "log.txt").read_text()
    assert (
        "GeneralizedRCNN on tiny_scenes_train (evaluates on tiny_scenes_test): 8 images, " in said
    )
    assert "step 3 of 3, about 0 s left" in said
    ticket = lth.Ticket.load(r18)
    assert_masked(saved_model(out), ticket)

    final = lth.Ticket.load(out / "final.ticket")
    assert final.masks == ticket.masks
    assert final.meta.source == "tiny_scenes_train"
    keys = locate(saved_model(out)).keys
    assert all(torch.equal(final.weights[n], saved_model(out)[k]) for n, k in keys.items())
    assert logged(out, "ticket_density") == [(2, pytest.approx(ticket.density))]

    predictions = out / "inference/coco_instances_results.json"
    before = predictions.read_bytes()
    assert json.loads(before)
    predictions.unlink()
    weights = {"MODEL.WEIGHTS": out / "model_final.pth"}
    evaluated = train_det.main(command("fpn", "--eval-only", options=weights))
    assert logged(out, "bbox/AP50") == [(3, evaluated["bbox"]["AP50"])]
    assert predictions.read_bytes() == before

    train_det.main(command("fpn", "--resume", options={"SOLVER.MAX_ITER": 5}))
    assert [iteration for iteration, _ in logged(out, "total_loss")] == [2, 4]
    assert_masked(saved_model(out), ticket)


def test_train_det_says_when_there_is_no_ticket(train_det: ModuleType, command: Command) -> None:
    with pytest.raises(lth.TicketError, match=r"set MODEL\.TICKET\.PATH"):
        train_det.main(command("fpn", options={"MODEL.TICKET.PATH": ""}))


@pytest.mark.parametrize(
    "hook", [plugin.TicketHook(1), plugin.GradualPruningHook(0.9, 0, 3, 1)], ids=["save", "prune"]
)
def test_a_hook_refuses_to_come_after_the_checkpointer(hook: HookBase, tiny_cfg: MakeCfg) -> None:
    cfg = tiny_cfg("fpn", {"DATASETS.TEST": (), "SOLVER.CHECKPOINT_PERIOD": 1})
    plugin.apply_ticket_input(cfg)
    Path(cfg.OUTPUT_DIR).mkdir()
    trainer = DefaultTrainer(cfg)
    trainer.register_hooks([hook])
    with pytest.raises(lth.TicketError, match=f"{type(hook).__name__} before PeriodicCheckpointer"):
        trainer.train()


@pytest.mark.parametrize(
    ("dataset", "evaluator"),
    [
        ("tiny_scenes_test", "COCOEvaluator"),
        ("voc_2007_test", "PascalVOCDetectionEvaluator"),
        ("cityscapes_fine_instance_seg_val", "CityscapesInstanceEvaluator"),
    ],
)
def test_train_det_evaluates_as_the_dataset_asks(
    dataset: str, evaluator: str, tmp_path: Path
) -> None:
    made = evaluators_of(dataset)(dataset, str(tmp_path))
    assert [type(one).__name__ for one in made] == [evaluator]


def test_a_dataset_that_nothing_evaluates_is_refused_before_the_training(
    train_det: ModuleType, command: Command, tmp_path: Path
) -> None:
    options = {"DATASETS.TEST": ("cityscapes_fine_panoptic_val",)}
    with pytest.raises(lth.ConfigError, match="fine_panoptic_val, of type cityscapes_panoptic_seg"):
        train_det.main(command("fpn", options=options))
    assert not list((tmp_path / "out").glob("*.pth"))


def test_a_config_whose_own_builder_ignores_its_ticket_is_refused(
    train_det: ModuleType, command: Command, tiny_cfg: MakeCfg, tmp_path: Path
) -> None:
    if "build_my_fpn" not in BACKBONE_REGISTRY:

        @BACKBONE_REGISTRY.register()
        def build_my_fpn(cfg: CfgNode, input_shape: Any) -> Any:
            return build_resnet_fpn_backbone(cfg, input_shape)

    options = {"MODEL.BACKBONE.NAME": "build_my_fpn", "DATASETS.TEST": ()}
    with pytest.raises(lth.TicketError, match=r"MODEL\.TICKET would do nothing"):
        train_det.main(command("fpn", options=options))

    class Hooked(DefaultTrainer):
        def build_hooks(self) -> list[Any]:
            return [plugin.TicketHook(1), *super().build_hooks()]

    cfg = tiny_cfg("fpn", options)
    plugin.apply_ticket_input(cfg)
    with pytest.raises(lth.TicketError, match="build_ticket_resnet_backbone where it calls"):
        Hooked(cfg).train()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--compact"], "add --eval-only"),
        (["--onnx"], "add --eval-only"),
        (["--eval-only", "--imp-rounds", "2"], "give one of the two"),
        (["--eval-only", "--teacher", "teacher.pth"], "give one of the two"),
    ],
)
def test_train_det_refuses_options_that_would_do_nothing(
    flags: list[str], message: str, command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        command("fpn", *flags)
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_on_a_busy_folder_no_process_of_several_writes(
    tiny_options: Callable[..., list[str]], tmp_path: Path
) -> None:
    root, out = Path(__file__).parents[2], tmp_path / "out"
    config = root / "configs/detectron2/digits/faster_rcnn_R_18_FPN_ticket.yaml"
    launch = ["--num-gpus", "2", "--dist-url", "auto", "--config-file", config]
    command = [sys.executable, root / "tools/train_det.py", *launch, *tiny_options("fpn")]
    with output_folder(out):
        ran = subprocess.run(
            command, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True
        )
    assert ran.returncode != 0 and "still works there" in ran.stderr
    assert [path.name for path in out.iterdir()] == [LOCK]


@pytest.mark.slow
def test_a_detector_learns_on_a_ticket(
    train_det: ModuleType, command: Command, tmp_path: Path
) -> None:
    options = {
        "DATASETS.TEST": ("tiny_scenes_train",),
        "SOLVER.IMS_PER_BATCH": 4,
        "SOLVER.MAX_ITER": 60,
        "SOLVER.BASE_LR": 0.02,
        "SOLVER.WARMUP_ITERS": 20,
        "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 32,
    }
    train_det.main(command("fpn", options=options))
    (_, ap50), *_ = logged(tmp_path / "out", "bbox/AP50")
    assert ap50 > 10


@pytest.mark.parametrize(
    ("orientation", "wide"), [(None, 1), (3, 1), (6, 0)], ids=["plain", "upside down", "turned"]
)
def test_an_image_tells_its_group_where_the_dataset_does_not(
    orientation: int | None, wide: int, tmp_path: Path
) -> None:
    exif = Image.Exif()
    if orientation is not None:
        exif[ExifTags.Base.Orientation] = orientation
    path = tmp_path / "image.jpg"
    Image.new("RGB", (40, 20)).save(path, exif=exif)
    height, width, _ = read_image(str(path)).shape
    assert int(width > height) == wide
    assert is_wide({"file_name": str(path)}) == wide
    assert is_wide({"file_name": str(path), "width": 20, "height": 40}) == 0


def test_a_model_with_a_part_of_the_trunk_trains_and_has_no_fine_tuned_ticket(
    train_det: ModuleType, command: Command, tmp_path: Path
) -> None:
    options = {"MODEL.META_ARCHITECTURE": "ProposalNetwork", "SOLVER.MAX_ITER": 1}
    train_det.main(command("c4", options={**options, "DATASETS.TEST": ()}))
    assert saved_model(tmp_path / "out")
    assert not (tmp_path / "out/final.ticket").exists()
