"""Task-specific tickets in detectron2's models, and by train_det.py.

What a search promises in every host is in tests/conformance/test_searches.py.
"""

from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from detectron2.config import CfgNode
from detectron2.modeling import build_model

from lth_plugins import LthError, Ticket
from lth_plugins.detectron2.task import Detectron2Host
from lth_plugins.pruning.search.modules import outside_trunk

MakeCfg = Callable[..., CfgNode]
INPUT = {"MODEL.TICKET.KEEP_INPUT": True}


@pytest.mark.parametrize(
    ("kind", "scope", "prunes"),
    [
        ("fpn", "backbone+neck", {"backbone"}),
        ("fpn", "all", {"backbone", "proposal_generator", "roi_heads"}),
        ("retinanet", "all", {"backbone", "head"}),
        ("c4", "all", {"proposal_generator"}),
    ],
)
def test_what_a_scope_prunes(kind: str, scope: str, prunes: set[str], tiny_cfg: MakeCfg) -> None:
    model = build_model(tiny_cfg(kind, INPUT))
    shapes = outside_trunk(
        model, scope, ["predictors"], Detectron2Host.neck, Detectron2Host.predictors
    )
    assert {name.split(".")[0] for name in shapes} == prunes
    assert not any("bottom_up" in name or "res5" in name for name in shapes)
    assert all(model.get_parameter(name).shape == shape for name, shape in shapes.items())
    final = ("cls_score", "bbox_pred", "objectness_logits", "anchor_deltas")
    assert not any(word in name for word in final for name in shapes)


def test_a_scope_that_makes_no_sense_is_refused(tiny_cfg: MakeCfg) -> None:
    model = build_model(tiny_cfg("c4", INPUT))
    host = (Detectron2Host.neck, Detectron2Host.predictors)
    with pytest.raises(LthError, match="has proposal_generator.rpn_head, .* or 'all'"):
        outside_trunk(model, "backbone+neck", ["predictors"], *host)
    with pytest.raises(LthError, match=r"by the name 'roi_heads\.box_head', found none among"):
        outside_trunk(model, "all", ["roi_heads.box_head"], *host)
    with pytest.raises(LthError, match="unknown scope 'heads'"):
        outside_trunk(model, "heads", [], *host)
    with pytest.raises(LthError, match="list less in exclude"):
        outside_trunk(model, "all", ["proposal_generator", "roi_heads"], *host)


def test_train_det_finds_tickets(
    train_det: ModuleType, command: Callable[..., Namespace], r18_dense: Path, tmp_path: Path
) -> None:
    options = {"MODEL.TICKET.PATH": r18_dense, "SOLVER.MAX_ITER": 1}
    train_det.main(command("fpn", "--imp-rounds", "1", options=options))
    out = tmp_path / "out"
    zero, one = (Ticket.load(out / f"round_{k:02d}.ticket") for k in (0, 1))
    assert (zero.density, one.density) == pytest.approx((1, 0.8), abs=1e-6)
    assert Ticket.load(out / "train_01/final.ticket").masks == one.masks
    for k in (0, 1):
        assert "bbox/AP50" in (out / f"train_{k:02d}/metrics.json").read_text()
