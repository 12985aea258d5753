"""Slimming whole segmentors by mmengine's own Runner."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import lth_plugins as lth
from lth_plugins.deploy.onnx import export_onnx
from lth_plugins.slimming.widths import adopt_widths
from tests.processes import together

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


def test_a_training_ends_with_a_narrower_segmentor_that_is_tested(
    tiny_config: Callable[..., Any], tool: Callable[..., Any], tmp_path: Path
) -> None:
    cfg = tiny_config({"train_cfg.max_iters": 3, "default_hooks.checkpoint.interval": 1})
    file = tmp_path / "config.py"
    slim = {"type": "SlimHook", "flops": 0.9, "end": 2, "period": 1, "importance": "fisher"}
    cfg.custom_hooks = [*cfg.custom_hooks, slim]
    cfg.dump(file)
    train, run = tool("seg"), tmp_path / "run"
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

    ticket = lth.Ticket.load(run / "slim.ticket")
    assert ticket.meta.widths and ticket.sparsity > 0.2
    assert all((v == 0).any() for k, v in straight.items() if ".conv1.weight" in k and "layer" in k)
    assert tool("test_seg").main([f"{file}", f"{run / 'slim.pth'}", "--work-dir", f"{run}"]) == 0

    from mmseg.registry import MODELS

    model = MODELS.build({**cfg.model, "backbone": {**cfg.model.backbone, "init_cfg": None}})
    adopt_widths(model, straight)
    model.load_state_dict(straight)
    images = torch.randn(2, 3, 64, 64)
    assert export_onnx(model.eval(), images, tmp_path / "model.onnx") <= 1e-4


@pytest.fixture(scope="module")
def slim_files(
    search_config: Callable[..., Any], quiet: None, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A folder with the checkpoint of a slimmed segmentor and its dense ticket."""
    from mmseg.registry import MODELS

    from lth_plugins.mmseg.slimming import examples_of

    folder = tmp_path_factory.mktemp("slim")
    model = MODELS.build(search_config(folder).model)
    model.init_weights()
    model.state_dict()  # as in a training, whose checkpoints note its masks
    small = lth.slim(model, None, flops=0.5, forward=examples_of((64, 64))[0])
    torch.save({"state_dict": small.state_dict()}, folder / "slim.pth")
    lth.attached(small).ticket().save(folder / "slim.ticket")
    return folder


@pytest.fixture
def slimmed(tiny_config: Callable[..., Any], slim_files: Path) -> Any:
    """A config that trains the slimmed segmentor on, on its ticket."""
    cfg = tiny_config({"train_cfg.max_iters": 3, "default_hooks.checkpoint.interval": 1})
    cfg.model.backbone.init_cfg.checkpoint = f"{slim_files / 'slim.ticket'}"
    cfg.load_from = f"{slim_files / 'slim.pth'}"
    return cfg


def test_a_slimmed_segmentor_is_pruned_while_it_trains_and_resumes_bit_for_bit(
    slimmed: Any, tool: Callable[..., Any], tmp_path: Path
) -> None:
    pruning = {"type": "GradualPruningHook", "target": 0.9, "begin": 0, "end": 2, "period": 1}
    slimmed.custom_hooks = [*slimmed.custom_hooks, pruning]
    slimmed.dump(tmp_path / "config.py")
    command = [f"{tmp_path / 'config.py'}", "--work-dir", f"{tmp_path / 'run'}"]
    train, run = tool("seg"), tmp_path / "run"
    assert train.main(command) == 0
    whole = torch.load(run / "iter_3.pth", weights_only=False)["state_dict"]
    ticket = lth.Ticket.load(run / "final.ticket")
    assert ticket.sparsity == pytest.approx(0.9, abs=1e-4) and ticket.meta.widths
    for name in ("iter_3.pth", "iter_2.pth", "final.ticket"):  # stopped after the first
        (run / name).unlink()
    (run / "last_checkpoint").write_text(f"{run / 'iter_1.pth'}")
    slimmed.load_from = None
    slimmed.dump(tmp_path / "config.py")
    assert train.main([*command, "--resume"]) == 0
    again = torch.load(run / "iter_3.pth", weights_only=False)["state_dict"]
    assert all(torch.equal(value, again[key]) for key, value in whole.items())
    assert lth.Ticket.load(run / "final.ticket") == ticket
    there = [f"{run / 'iter_3.pth'}", "--work-dir", f"{run}"]
    assert tool("test_seg").main([command[0], *there]) == 0


def test_tickets_of_a_slimmed_segmentor_are_found(
    slimmed: Any, slim_files: Path, tool: Callable[..., Any], tmp_path: Path
) -> None:
    slimmed.train_cfg.max_iters = 1
    slimmed.imp = {"scope": "all"}
    slimmed.dump(tmp_path / "config.py")
    command = [f"{tmp_path / 'config.py'}", "--work-dir", f"{tmp_path / 'run'}"]
    assert tool("seg").main([*command, "--imp-rounds", "1"]) == 0
    found = lth.Ticket.load(tmp_path / "run/round_01.ticket")
    assert found.meta.widths == lth.Ticket.load(slim_files / "slim.ticket").meta.widths
    assert found.all_masks.density == pytest.approx(0.8, abs=1e-4) and found.outside


def test_a_slimmed_segmentor_has_no_other_ticket(
    slimmed: Any,
    slim_files: Path,
    tool: Callable[..., Any],
    ticket18_file: Path,
    dense18_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    slimmed.train_cfg.max_iters = 1
    slimmed.dump(tmp_path / "config.py")
    command = [f"{tmp_path / 'config.py'}", "--work-dir", f"{tmp_path / 'run'}", "--ticket"]
    assert tool("seg").main([*command, f"{ticket18_file}"]) == 2
    assert "the full width: name the slim.ticket" in " ".join(capsys.readouterr().err.split())
    assert tool("seg").main([*command, f"{dense18_file}"]) == 0  # trained without one
    tuned = torch.load(tmp_path / "run/iter_1.pth", weights_only=False)["state_dict"]
    state = torch.load(slim_files / "slim.pth", weights_only=True)["state_dict"]
    assert {k: v.shape for k, v in tuned.items()} == {k: v.shape for k, v in state.items()}


def _in_process(rank: int, cfg: Any) -> Any:
    import lth_plugins.mmseg  # noqa: F401
    from lth_plugins.mmseg.slimming import apply_slimmed, build_runner

    os.environ["LOCAL_RANK"] = f"{rank}"
    apply_slimmed(cfg)
    runner = build_runner(cfg)
    runner.train()
    return runner.model.module.state_dict()


def test_processes_train_a_slimmed_segmentor_together(slimmed: Any, slim_files: Path) -> None:
    slimmed.launcher = "pytorch"
    slimmed.train_cfg.max_iters = 2
    slimmed.model_wrapper_cfg = {"type": "MMDistributedDataParallel", "device_ids": None}
    first, second = together(_in_process, slimmed)
    state = torch.load(slim_files / "slim.pth", weights_only=True)["state_dict"]
    trained = [key for key in state if key.endswith(("conv1.weight", "conv_seg.weight"))]
    assert all(torch.equal(first[key], second[key]) for key in trained)
    assert not any(torch.equal(first[key], state[key]) for key in trained)


def test_what_cannot_be_slimmed_is_refused(
    tiny_config: Callable[..., Any], tool: Callable[..., Any], tmp_path: Path, capsys: Any
) -> None:
    cfg, train = tiny_config(), tool("seg")
    file = tmp_path / "config.py"
    cfg.dump(file)
    with pytest.raises(SystemExit):
        train.main([f"{file}", "--prune-flops", "0.5", "--imp-rounds", "2"])
    assert train.main([f"{file}", "--prune-flops", "1.5", "--work-dir", f"{tmp_path / 'w'}"]) == 2
    assert "in (0, 1)" in capsys.readouterr().err
    hooks = cfg.custom_hooks
    pruning = {"type": "GradualPruningHook", "target": 0.9, "begin": 0, "end": 1, "period": 1}
    cfg.custom_hooks = [*hooks, pruning]
    cfg.dump(file)
    assert train.main([f"{file}", "--prune-flops", "0.5", "--work-dir", f"{tmp_path / 'w'}"]) == 2
    assert "Slim first, then prune slim.ticket" in " ".join(capsys.readouterr().err.split())
    cfg.custom_hooks = [*hooks, {"type": "EMAHook"}]
    cfg.dump(file)
    assert train.main([f"{file}", "--prune-flops", "0.5", "--work-dir", f"{tmp_path / 'w'}"]) == 2
    assert "without EMAHook" in capsys.readouterr().err
