"""What the detectron2 tests share: real digit scenes, tickets, configs small enough to train."""

from argparse import Namespace
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any

import pytest
import torch
import torchvision
from detectron2.config import CfgNode, get_cfg
from detectron2.data.datasets import register_coco_instances
from detectron2.engine import DefaultTrainer
from detectron2.modeling import build_model

import lth_plugins as lth
import lth_plugins.detectron2 as plugin
from lth_plugins.commands import det
from lth_plugins.commands import scenes as scenes_tool
from lth_plugins.commands.det import run

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs/detectron2"
R18 = {"MODEL.RESNETS.DEPTH": 18, "MODEL.RESNETS.RES2_OUT_CHANNELS": 64}
# Of each way to hold a trunk: a config of ours, and what makes it a small one.
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "fpn": ("digits/faster_rcnn_R_18_FPN_ticket.yaml", {}),
    "c4": ("PascalVOC-Detection/faster_rcnn_R_50_C4_ticket.yaml", {}),
    "mask_rcnn": ("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x_ticket.yaml", R18),
    "retinanet": ("COCO-Detection/retinanet_R_50_FPN_1x_ticket.yaml", R18),
}

# Over any config: one that trains in seconds on the tiny scenes, on the CPU.
TINY: dict[str, Any] = {
    "MODEL.DEVICE": "cpu",
    "MODEL.RESNETS.NORM": "BN",
    "MODEL.RPN.BATCH_SIZE_PER_IMAGE": 16,
    "MODEL.RPN.PRE_NMS_TOPK_TRAIN": 32,
    "MODEL.RPN.POST_NMS_TOPK_TRAIN": 16,
    "MODEL.RPN.PRE_NMS_TOPK_TEST": 16,
    "MODEL.RPN.POST_NMS_TOPK_TEST": 8,
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 8,
    "MODEL.ROI_HEADS.NUM_CLASSES": 10,
    # Every box is a prediction, so that there are some after three steps.
    "MODEL.ROI_HEADS.SCORE_THRESH_TEST": 0.0,
    "MODEL.RETINANET.NUM_CLASSES": 10,
    "MODEL.RETINANET.SCORE_THRESH_TEST": 0.0,
    "MODEL.RETINANET.TOPK_CANDIDATES_TEST": 8,
    "DATASETS.TRAIN": ("tiny_scenes_train",),
    "DATASETS.TEST": ("tiny_scenes_test",),
    "DATALOADER.NUM_WORKERS": 0,
    "INPUT.MIN_SIZE_TRAIN": (64,),
    "INPUT.MIN_SIZE_TEST": 64,
    "SOLVER.IMS_PER_BATCH": 2,
    "SOLVER.MAX_ITER": 3,
    "SOLVER.STEPS": (),
    "SOLVER.BASE_LR": 0.01,
    "SOLVER.WARMUP_ITERS": 0,
    "SEED": 1,
}


@pytest.fixture(scope="session")
def train_det() -> ModuleType:
    return run


@pytest.fixture(scope="session", autouse=True)
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight training and four test scenes of 64 px, registered as tiny_scenes_{train,test}."""
    folder = tmp_path_factory.mktemp("data") / "digit_scenes"
    arguments = f"--out {folder} --train 8 --test 4 --min-size 64 --max-size 64".split()
    assert scenes_tool.main(arguments) == 0
    for split in ("train", "test"):
        annotations = folder / f"annotations/instances_{split}.json"
        images = folder / "images" / split
        register_coco_instances(f"tiny_scenes_{split}", {}, str(annotations), str(images))
    return folder


def make_ticket(arch: str, fraction: float) -> lth.Ticket:
    """A ticket of a torchvision ResNet whose BN statistics are not those of a new one."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    model = torchvision.models.get_model(arch)
    for name, value in model.state_dict().items():
        if name.endswith("running_mean"):
            value.normal_(0, 0.1, generator=generator)
        elif name.endswith("running_var"):
            value.uniform_(0.8, 1.2, generator=generator)
    dense = lth.Ticket.dense(model, source="test")
    masks = lth.prune(dense.weights, fraction)
    return lth.Ticket(masks, dense.weights, replace(dense.meta, round=8))


@pytest.fixture(scope="session")
def r18(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ticket file of a ResNet-18, 80 % sparse."""
    return make_ticket("resnet18", 0.8).save(tmp_path_factory.mktemp("r18") / "r18.ticket")


@pytest.fixture(scope="session")
def r18_dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The round-0 ticket that `r18` was pruned from."""
    return make_ticket("resnet18", 0.0).save(tmp_path_factory.mktemp("r18") / "dense.ticket")


@pytest.fixture(scope="session")
def r50(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ticket file of a ResNet-50, 80 % sparse."""
    return make_ticket("resnet50", 0.8).save(tmp_path_factory.mktemp("r50") / "r50.ticket")


@pytest.fixture
def ticket_of(r18: Path, r50: Path) -> Callable[[str], Path]:
    """The ticket that fits a kind of model."""
    return lambda kind: r50 if kind == "c4" else r18


@pytest.fixture
def tiny_options(tmp_path: Path, ticket_of: Callable[[str], Path]) -> Callable[..., list[str]]:
    def make(kind: str, options: Mapping[str, Any] = MappingProxyType({})) -> list[str]:
        """What makes the config of a kind small, as keys and values in turn."""
        given = {"MODEL.TICKET.PATH": ticket_of(kind), "OUTPUT_DIR": tmp_path / "out"}
        return as_options({**TINY, **KINDS[kind][1], **given, **options})

    return make


def as_options(settings: Mapping[str, Any]) -> list[str]:
    """Settings as they are written at the end of a command line."""
    return [str(item) for pair in settings.items() for item in pair]


def load_cfg(kind: str, options: list[str]) -> CfgNode:
    """A config of ours with these options; not frozen, and without the ticket's input yet."""
    cfg = get_cfg()
    plugin.add_ticket_config(cfg)
    cfg.merge_from_file(str(CONFIGS / KINDS[kind][0]))
    cfg.merge_from_list(options)
    return cfg


@pytest.fixture
def tiny_cfg(tiny_options: Callable[..., list[str]]) -> Callable[..., CfgNode]:
    def make(kind: str, options: Mapping[str, Any] = MappingProxyType({})) -> CfgNode:
        """A config of ours, made small; not frozen, and without the ticket's input yet."""
        return load_cfg(kind, tiny_options(kind, options))

    return make


@pytest.fixture
def command(
    train_det: ModuleType, tiny_options: Callable[..., list[str]]
) -> Callable[..., Namespace]:
    def make(
        kind: str, *flags: str, options: Mapping[str, Any] = MappingProxyType({})
    ) -> Namespace:
        """The parsed command line of `lth det`, made small."""
        file = str(CONFIGS / KINDS[kind][0])
        arguments = ["--config-file", file, *flags, *tiny_options(kind, options)]
        return det.parse_args(arguments, "lth det")

    return make


@pytest.fixture(scope="session")
def trained(
    r18: Path, scenes: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[CfgNode, Path]:
    """A run of one iteration by detectron2's own trainer: its config, and its folder."""
    out = tmp_path_factory.mktemp("trained")
    given = {"MODEL.TICKET.PATH": r18, "OUTPUT_DIR": out, "SOLVER.MAX_ITER": 1}
    cfg = load_cfg("fpn", as_options({**TINY, **given, "DATASETS.TEST": ()}))
    plugin.apply_ticket_input(cfg)
    DefaultTrainer(cfg).train()
    return cfg, out


@pytest.fixture(scope="session")
def slimmed(r18_dense: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The settings that name a slimmed RetinaNet, and its dense ticket."""
    given = {"MODEL.TICKET.PATH": r18_dense}
    cfg = load_cfg("retinanet", as_options({**TINY, **KINDS["retinanet"][1], **given}))
    plugin.add_slim_config(cfg)
    plugin.apply_ticket_input(cfg)
    model = build_model(cfg)
    model.state_dict()  # as in a training, whose checkpoints note its masks
    small = lth.slim(model, None, flops=0.5, forward=plugin.example_of(cfg))
    folder = tmp_path_factory.mktemp("slim")
    torch.save({"model": small.state_dict()}, folder / "slim.pth")
    ticket = lth.attached(small).ticket().save(folder / "slim.ticket")
    return {"MODEL.WEIGHTS": folder / "slim.pth", "MODEL.TICKET.PATH": ticket}
