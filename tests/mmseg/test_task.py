"""Task-specific tickets in mmsegmentation's configs and models.

What a search promises in every host is in tests/conformance/test_searches.py.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mmseg.models  # noqa: F401  # fills mmseg's registry
import pytest
from mmengine.registry import init_default_scope
from mmseg.registry import MODELS

from lth_plugins import LthError, Ticket
from lth_plugins.mmseg import task_search
from lth_plugins.mmseg.task import MmsegHost
from lth_plugins.pruning.search.modules import outside_trunk
from lth_plugins.ticket import Outside

MakeConfig = Callable[..., Any]
HEAD = "decode_head.convs.0.conv.weight"


@pytest.mark.parametrize(
    ("change", "imp", "message"),
    [
        ({}, dict(round=2), r"unknown key round in imp=dict\(…\); known are rounds"),
        ({}, dict(structure=dict(size=8)), "unknown key structure.size in imp"),
        ({}, dict(scope="backbone+neck"), "has decode_head.conv_seg, decode_head.convs there"),
        ({}, dict(scope="all", exclude=["neck"]), "by the name 'neck', found none among decode"),
        (
            {"custom_hooks": [dict(type="EMAHook")]},
            dict(rewind="early", early_iter=1),
            "expected no EMAHook",
        ),
        ({"train_cfg": dict(_delete_=True, max_epochs=1)}, {}, r"found no train_cfg\.max_iters"),
    ],
)
def test_invalid_settings_are_refused_before_anything_is_written(
    change: dict, imp: dict, message: str, search_config: MakeConfig, tmp_path: Path
) -> None:
    with pytest.raises(LthError, match=message):
        task_search(search_config(tmp_path / "run", change, **imp))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("outside", [False, True])
def test_a_search_starts_from_a_whole_models_ticket_or_from_its_backbone(
    outside: bool, dense18_file: Path, search_config: MakeConfig, tmp_path: Path
) -> None:
    whole = MODELS.build(search_config(tmp_path / "run").model).state_dict()
    ticket = replace(
        Ticket.load(dense18_file), outside=Outside.dense({HEAD: tuple(whole[HEAD].shape)}, whole)
    )
    change = {"model.backbone.init_cfg.checkpoint": str(ticket.save(tmp_path / "whole.ticket"))}
    change["model.backbone.init_cfg.rest"] = outside
    scope = "all" if outside else "backbone"
    dense = task_search(search_config(tmp_path / "run", change, scope=scope)).host.dense
    assert set(dense.outside.masks) == ({HEAD} if outside else set())


def test_the_neck_of_a_segmentor() -> None:
    init_default_scope("mmseg")
    model = MODELS.build(
        dict(
            type="EncoderDecoder",
            backbone=dict(type="ResNet", depth=18),
            neck=dict(type="FPN", in_channels=[64, 128, 256, 512], out_channels=16, num_outs=4),
            decode_head=dict(
                type="FPNHead",
                in_channels=[16] * 4,
                in_index=[0, 1, 2, 3],
                feature_strides=[4, 8, 16, 32],
                channels=16,
                num_classes=11,
            ),
        )
    )
    host = (MmsegHost.neck, MmsegHost.predictors)
    neck = outside_trunk(model, "backbone+neck", ["predictors"], *host)
    assert len(neck) == 8 and all(name.startswith("neck.") for name in neck)
    lateral = outside_trunk(model, "backbone+neck", ["*.fpn_convs"], *host)
    assert len(lateral) == 4 and all("lateral" in name for name in lateral)
    whole = outside_trunk(model, "all", ["predictors"], *host)
    assert whole.keys() > neck.keys() and "decode_head.conv_seg.weight" not in whole
    assert "decode_head.conv_seg.weight" in outside_trunk(model, "all", [], *host)
