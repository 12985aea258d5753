"""What a config may say about a ticket, and what happens when it contradicts it (C5)."""

import argparse
import importlib
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
from detectron2.config import CfgNode, get_cfg
from detectron2.data import MetadataCatalog
from detectron2.engine import default_argument_parser
from detectron2.modeling import build_model

import lth_plugins as lth
import lth_plugins.detectron2 as plugin
from lth_plugins.commands.det import make_parser
from lth_plugins.ticket import UNIT_RANGE

MakeCfg = Callable[..., CfgNode]
Command = Callable[..., Namespace]


def test_the_node_adds_nothing_but_model_ticket() -> None:
    stock, cfg = get_cfg(), get_cfg()
    plugin.add_ticket_config(cfg)
    del cfg.MODEL["TICKET"]
    assert cfg == stock


def test_the_input_of_the_ticket_replaces_detectron2s_defaults(tiny_cfg: MakeCfg) -> None:
    cfg = tiny_cfg("fpn")
    assert cfg.INPUT.FORMAT == "BGR"
    plugin.apply_ticket_input(cfg)
    assert cfg.INPUT.FORMAT == "RGB"
    assert cfg.MODEL.PIXEL_MEAN == [123.675, 116.28, 103.53]
    assert cfg.MODEL.PIXEL_STD == [58.395, 57.12, 57.375]
    model = build_model(cfg)
    assert model.pixel_mean.flatten().tolist() == pytest.approx([123.675, 116.28, 103.53])
    assert model.input_format == "RGB"


def test_a_ticket_in_the_unit_range_is_fed_so(tiny_cfg: MakeCfg, r18: Path, tmp_path: Path) -> None:
    simclr = as_input(r18, UNIT_RANGE).save(tmp_path / "simclr.ticket")
    cfg = tiny_cfg("fpn", {"MODEL.TICKET.PATH": simclr})
    plugin.apply_ticket_input(cfg)
    assert cfg.MODEL.PIXEL_MEAN == [0, 0, 0]
    assert cfg.MODEL.PIXEL_STD == [255, 255, 255]


def test_the_order_of_mean_and_std_follows_the_format(
    tiny_cfg: MakeCfg, r18: Path, tmp_path: Path
) -> None:
    mean, std = lth.InputSpec().mean, lth.InputSpec().std
    bgr = as_input(r18, lth.InputSpec("BGR", mean[::-1], std[::-1])).save(tmp_path / "bgr.ticket")
    cfg = tiny_cfg("fpn", {"MODEL.TICKET.PATH": bgr})
    plugin.apply_ticket_input(cfg)
    assert cfg.INPUT.FORMAT == "BGR"
    assert cfg.MODEL.PIXEL_MEAN == [103.53, 116.28, 123.675]


def test_the_bands_of_a_ticket_become_the_models(tiny_cfg: MakeCfg, bands18_file: Path) -> None:
    """Images of bands need a mapper of the user's own, so that INPUT.FORMAT stays."""
    cfg = tiny_cfg("fpn", {"MODEL.TICKET.PATH": bands18_file})
    kept = cfg.clone()
    plugin.apply_ticket_input(cfg)
    assert cfg.MODEL.PIXEL_MEAN == [0] * 13 and cfg.MODEL.PIXEL_STD == [10000] * 13
    assert cfg.INPUT.FORMAT == kept.INPUT.FORMAT
    model = build_model(cfg).eval()
    assert lth.attached(model).masks == lth.Ticket.load(bands18_file).masks
    assert len(model([{"image": torch.full((13, 64, 64), 5000.0)}])) == 1
    kept.MODEL.TICKET.KEEP_INPUT = True
    with pytest.raises(lth.TicketError, match="stem reads 3: .*PIXEL_MEAN and PIXEL_STD of 13"):
        build_model(kept)
    kept.MODEL.TICKET.KEEP_INPUT = False
    with pytest.raises(lth.TicketError, match=r"(?s)13-channel input.*PIXEL_MEAN: \[0\.0, 0\.0"):
        build_model(kept)


def as_input(file: Path, spec: lth.InputSpec) -> lth.Ticket:
    ticket = lth.Ticket.load(file)
    meta = lth.TicketMeta(arch=ticket.meta.arch, input=spec)
    return lth.Ticket(ticket.masks, ticket.weights, meta)


@pytest.mark.parametrize(
    "chosen",
    [
        {"MODEL.PIXEL_MEAN": [0.0, 0.0, 0.0]},
        {"MODEL.PIXEL_STD": [57.375, 57.12, 58.395]},
        {"INPUT.FORMAT": "L"},
    ],
)
def test_an_input_that_was_chosen_stays_and_is_an_error(
    tiny_cfg: MakeCfg, chosen: dict[str, Any]
) -> None:
    cfg = tiny_cfg("fpn", chosen)
    before = cfg.clone()
    with pytest.raises(lth.TicketError, match="the ticket was trained on RGB"):
        plugin.apply_ticket_input(cfg)
    assert cfg == before


def test_another_input_is_accepted_where_the_config_says_so(tiny_cfg: MakeCfg) -> None:
    cfg = tiny_cfg("fpn", {"MODEL.TICKET.KEEP_INPUT": True})
    plugin.apply_ticket_input(cfg)
    assert cfg.INPUT.FORMAT == "BGR"
    assert lth.attached(build_model(cfg)) is not None


def test_a_stock_config_is_told_every_line_it_needs(tiny_cfg: MakeCfg) -> None:
    """Pasting what the error prints into the config mends it."""
    cfg = tiny_cfg(
        "c4",
        {
            "MODEL.RESNETS.NORM": "FrozenBN",
            "MODEL.RESNETS.STRIDE_IN_1X1": True,
            "MODEL.WEIGHTS": "detectron2://ImageNetPretrained/MSRA/R-50.pkl",
            "MODEL.ROI_HEADS.NAME": "Res5ROIHeads",
        },
    )
    with pytest.raises(lth.TicketError) as caught:
        build_model(cfg)
    lines = yaml.safe_load(str(caught.value).split("Write in the config:\n")[1])
    assert lines == {
        "INPUT": {"FORMAT": "RGB"},
        "MODEL": {
            "PIXEL_MEAN": [123.675, 116.28, 103.53],
            "PIXEL_STD": [58.395, 57.12, 57.375],
            "RESNETS": {"NORM": "BN", "STRIDE_IN_1X1": False},
            "WEIGHTS": "",
            "ROI_HEADS": {"NAME": "TicketRes5ROIHeads"},
        },
    }
    cfg.merge_from_other_cfg(CfgNode(lines))
    assert lth.attached(build_model(cfg)) is not None


def test_ticket_heads_on_a_stock_backbone_are_an_error(tiny_cfg: MakeCfg) -> None:
    cfg = tiny_cfg("c4")
    plugin.apply_ticket_input(cfg)
    cfg.MODEL.BACKBONE.NAME = "build_resnet_backbone"
    with pytest.raises(lth.TicketError, match="NAME: build_ticket_resnet_backbone"):
        build_model(cfg)


def test_frozen_norm_is_accepted_where_the_config_says_so(tiny_cfg: MakeCfg) -> None:
    frozen = {"MODEL.RESNETS.NORM": "FrozenBN"}
    with pytest.raises(lth.TicketError, match="statistics of the dense network"):
        plugin.apply_ticket_input(tiny_cfg("fpn", frozen))
    cfg = tiny_cfg("fpn", frozen | {"MODEL.TICKET.ALLOW_FROZEN_NORM": True})
    plugin.apply_ticket_input(cfg)
    assert lth.attached(build_model(cfg)) is not None


def test_a_dense_ticket_may_keep_its_statistics(tiny_cfg: MakeCfg, r18_dense: Path) -> None:
    options = {"MODEL.RESNETS.NORM": "FrozenBN", "MODEL.TICKET.PATH": r18_dense}
    plugin.apply_ticket_input(tiny_cfg("fpn", options))


def test_frozen_stages_are_warned_of(tiny_cfg: MakeCfg, caplog: pytest.LogCaptureFixture) -> None:
    cfg = tiny_cfg("fpn", {"MODEL.BACKBONE.FREEZE_AT": 2})
    plugin.apply_ticket_input(cfg)
    build_model(cfg)
    assert "FREEZE_AT 2 freezes pruned stages" in caplog.text


BAD: list[tuple[str, dict[str, Any], str]] = [
    ("fpn", {"MODEL.TICKET.PATH": ""}, "found none: set MODEL.TICKET.PATH"),
    ("fpn", {"MODEL.TICKET.PATH": "no/such.ticket"}, "found nothing at no/such.ticket"),
    ("fpn", {"MODEL.TICKET.PATH": "unknown_name"}, "a catalog name, found 'unknown_name'"),
    ("fpn", {"MODEL.TICKET.PATH": __file__}, "is not a whole safetensors file"),
    ("fpn", {"MODEL.TICKET.RANDOM": True}, "name the dense ticket .* as MODEL.TICKET.WEIGHTS"),
    (
        "fpn",
        {"MODEL.TICKET.REVERSE": True},
        "name the dense ticket .* as MODEL.TICKET.WEIGHTS",
    ),
    ("fpn", {"MODEL.RESNETS.DEPTH": 34}, "ticket is for a resnet18 .* is a resnet34"),
    ("fpn", {"MODEL.RESNETS.NORM": "GN"}, "(?s)NORM GN builds a network without.*NORM: BN"),
    ("c4", {"MODEL.RESNETS.NORM": ""}, "NORM '' builds a network without"),
    ("retinanet", {"MODEL.RESNETS.NORM": "LN"}, "the config contradicts its ticket"),
    ("c4", {"MODEL.RESNETS.DEPTH": 101}, "ticket is for a resnet50 .* is a resnet101"),
]


@pytest.mark.parametrize(("kind", "options", "message"), BAD)
def test_a_ticket_that_does_not_fit_is_refused(
    tiny_cfg: MakeCfg, kind: str, options: dict[str, Any], message: str
) -> None:
    cfg = tiny_cfg(kind, {"MODEL.TICKET.KEEP_INPUT": True} | options)
    with pytest.raises(lth.TicketError, match=message):
        build_model(cfg)


def test_a_config_without_the_node_is_told_what_to_call(tiny_cfg: MakeCfg) -> None:
    cfg = tiny_cfg("fpn")
    del cfg.MODEL["TICKET"]
    with pytest.raises(lth.TicketError, match=r"add_ticket_config\(cfg\)"):
        build_model(cfg)


def test_without_detectron2_one_sentence_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "detectron2", None)
    monkeypatch.delitem(sys.modules, "lth_plugins.detectron2")
    with pytest.raises(ImportError, match=r"needs detectron2, .* build it from"):
        importlib.import_module("lth_plugins.detectron2")


def test_the_digit_scenes_are_registered_by_a_config_that_names_them(
    train_det: ModuleType, command: Command
) -> None:
    names = [f"digit_scenes_{split}" for split in ("train", "test")]
    code = "import lth_plugins.detectron2; from detectron2.data import DatasetCatalog as catalog; "
    code += "assert not [name for name in catalog.list() if 'digit' in name]"
    subprocess.run([sys.executable, "-c", code], check=True)
    options = {"DATASETS.TRAIN": f"('{names[0]}',)", "DATASETS.TEST": f"('{names[1]}',)"}
    train_det.read_config(command("fpn", options=options))
    for name, split in zip(names, ("train", "test"), strict=True):
        metadata = MetadataCatalog.get(name)
        assert metadata.thing_classes == list("0123456789")
        assert metadata.evaluator_type == "coco"
        assert metadata.image_root.endswith(f"digit_scenes/images/{split}")


def test_a_config_of_the_project_is_inherited_from_anywhere(tmp_path: Path) -> None:
    base = lth.config_path("detectron2/COCO-Detection/retinanet_R_50_FPN_1x_ticket.yaml")
    (tmp_path / "mine.yaml").write_text(f"_BASE_: {base}\nSOLVER: {{MAX_ITER: 7}}\n")
    cfg = get_cfg()
    plugin.add_ticket_config(cfg)
    cfg.merge_from_file(str(tmp_path / "mine.yaml"), allow_unsafe=True)
    assert cfg.SOLVER.MAX_ITER == 7
    assert cfg.MODEL.BACKBONE.NAME == "build_ticket_retinanet_resnet_fpn_backbone"


def test_lth_det_has_the_options_of_detectron2s_own_script() -> None:
    def options(parser: argparse.ArgumentParser) -> dict[str, tuple]:
        return {
            action.dest: (action.option_strings, action.default, action.nargs, action.type)
            for action in parser._actions
        }

    theirs, ours = options(default_argument_parser()), options(make_parser("lth det"))
    assert theirs.items() <= ours.items()
