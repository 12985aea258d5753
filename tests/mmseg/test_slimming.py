"""Slimming whole segmentors by mmengine's own Runner."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import lth_plugins as lth

pytestmark = pytest.mark.mmseg

HEADS: dict[str, dict[str, Any]] = {
    "FCNHead": {"in_channels": 512, "in_index": 3, "num_convs": 2},
    "PSPHead": {"in_channels": 512, "in_index": 3, "pool_scales": (1, 2)},
    "DepthwiseSeparableASPPHead": {
        "in_channels": 512,
        "in_index": 3,
        "dilations": (1, 2),
        "c1_in_channels": 64,
        "c1_channels": 12,
    },
    "UPerHead": {"in_channels": [64, 128, 256, 512], "in_index": [0, 1, 2, 3]},
}


@pytest.mark.parametrize("kind", HEADS)
def test_channels_of_trunk_and_heads_are_removed(kind: str, quiet: None) -> None:
    from mmseg.registry import MODELS

    from lth_plugins.mmseg.slimming import examples_of
    from lth_plugins.slimming.tracing import trace

    torch.manual_seed(0)
    shared = {"channels": 32, "num_classes": 5, "norm_cfg": {"type": "BN"}}
    auxiliary = {"type": "FCNHead", "in_channels": 256, "in_index": 2, "num_convs": 1, **shared}
    model = MODELS.build(
        {
            "type": "EncoderDecoder",
            "data_preprocessor": {"type": "SegDataPreProcessor"},
            "backbone": {"type": "ResNetV1c", "depth": 18, "norm_cfg": {"type": "BN"}},
            "decode_head": {"type": kind, **HEADS[kind], **shared},
            "auxiliary_head": auxiliary,
            "test_cfg": {"mode": "whole"},
        }
    )
    forward, inference = examples_of((64, 64))
    network = trace(model, forward, inference=inference)
    assert set(network.held) == {"decode_head.conv_seg", "auxiliary_head.conv_seg"}
    assert not any(name.startswith("auxiliary_head") for name in network.layers)
    readers = {m.module for g in network.groups.values() for m in g.readers}
    assert "auxiliary_head.convs.0.conv" in readers
    small = lth.slim(model, None, flops=0.5, forward=forward)  # and checks that it is the same
    features = small.train().extract_feat(torch.randn(2, 3, 64, 64))
    assert small.decode_head(features).shape[1] == small.auxiliary_head(features).shape[1] == 5


def test_a_training_ends_with_a_narrower_segmentor_that_is_tested_and_trained_on(
    tiny_config: Callable[..., Any], tool: Callable[..., Any], tmp_path: Path
) -> None:
    cfg = tiny_config({"train_cfg.max_iters": 3, "default_hooks.checkpoint.interval": 1})
    file = tmp_path / "config.py"
    slim = {"type": "SlimHook", "flops": 0.9, "end": 2, "period": 1, "importance": "fisher"}
    cfg.custom_hooks = [*cfg.custom_hooks, slim]
    cfg.dump(file)
    train, run = tool("train_seg"), tmp_path / "run"
    arguments = [f"{file}", "--prune-flops", "0.5", "--work-dir"]
    assert train.main([*arguments, f"{run}"]) == 0
    straight = torch.load(run / "slim.pth", weights_only=True)["state_dict"]
    full = torch.load(run / "iter_3.pth", weights_only=False)["state_dict"]
    assert list(straight) == list(full)
    assert sum(v.numel() for v in straight.values()) < 0.8 * sum(v.numel() for v in full.values())

    for name in ("iter_3.pth", "iter_2.pth", "slim.pth"):  # stopped after the first
        (run / name).unlink()
    (run / "last_checkpoint").write_text(f"{run / 'iter_1.pth'}")
    assert train.main([*arguments, f"{run}", "--resume"]) == 0
    resumed = torch.load(run / "slim.pth", weights_only=True)["state_dict"]
    assert all(torch.equal(value, resumed[key]) for key, value in straight.items())
    (run / "slim.pth").unlink()  # killed after the last checkpoint
    assert train.main([*arguments, f"{run}", "--resume"]) == 0
    again = torch.load(run / "slim.pth", weights_only=True)["state_dict"]
    assert all(torch.equal(value, again[key]) for key, value in straight.items())

    cfg.custom_hooks = [hook for hook in cfg.custom_hooks if hook["type"] == "TicketHook"]
    cfg.load_from = f"{run / 'slim.pth'}"
    cfg.dump(file)
    assert tool("test_seg").main([f"{file}", f"{run / 'slim.pth'}", "--work-dir", f"{run}"]) == 0
    assert train.main([f"{file}", "--work-dir", f"{tmp_path / 'tuned'}"]) == 0
    tuned = torch.load(tmp_path / "tuned/iter_3.pth", weights_only=False)["state_dict"]
    assert {k: v.shape for k, v in tuned.items()} == {k: v.shape for k, v in straight.items()}


def test_what_cannot_be_slimmed_is_refused(
    tiny_config: Callable[..., Any], tool: Callable[..., Any], tmp_path: Path, capsys: Any
) -> None:
    cfg, train = tiny_config(), tool("train_seg")
    file = tmp_path / "config.py"
    cfg.dump(file)
    with pytest.raises(SystemExit):
        train.main([f"{file}", "--prune-flops", "0.5", "--imp-rounds", "2"])
    assert train.main([f"{file}", "--prune-flops", "1.5", "--work-dir", f"{tmp_path / 'w'}"]) == 2
    assert "in (0, 1)" in capsys.readouterr().err
    cfg.custom_hooks = [*cfg.custom_hooks, {"type": "EMAHook"}]
    cfg.dump(file)
    assert train.main([f"{file}", "--prune-flops", "0.5", "--work-dir", f"{tmp_path / 'w'}"]) == 2
    assert "without EMAHook" in capsys.readouterr().err
