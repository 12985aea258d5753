"""C3 under mmengine's own Runner: real steps of an FCN, and nothing leaks."""

import copy
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mmseg.models  # noqa: F401  # fills mmseg's registry
import pytest
import torch
from mmengine.hooks import EMAHook, Hook
from mmengine.optim import OptimWrapper
from mmengine.registry import OPTIM_WRAPPERS
from mmengine.runner import Runner
from mmseg.registry import MODELS
from torch import nn

import lth_plugins as lth
from lth_plugins import TicketError
from lth_plugins.errors import ConfigError

SGD = dict(type="SGD", lr=0.01, momentum=0.9, weight_decay=1e-2, _delete_=True)


@OPTIM_WRAPPERS.register_module()
class Bfloat16OptimWrapper(OptimWrapper):
    """Mixed precision on a CPU, for which mmengine's AmpOptimWrapper is not made."""

    @contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        with super().optim_context(model), torch.autocast("cpu", torch.bfloat16):
            yield


def train(cfg: Any) -> Runner:
    runner = Runner.from_cfg(cfg)
    runner.train()
    return runner


def saved(cfg: Any, iteration: int) -> dict[str, Any]:
    file = Path(cfg.work_dir) / f"iter_{iteration}.pth"
    return torch.load(file, map_location="cpu", weights_only=False)


def assert_zeros(state: dict[str, torch.Tensor], ticket: lth.Ticket) -> None:
    for name, mask in ticket.masks.items():
        assert not state[f"backbone.{name}"][~mask].count_nonzero(), name


@pytest.mark.parametrize(
    "overrides",
    [
        {
            "optim_wrapper.optimizer": SGD,
            "optim_wrapper.accumulative_counts": 2,
            "optim_wrapper.clip_grad": dict(max_norm=1.0),
        },
        {"custom_hooks": [dict(type="EMAHook", momentum=0.1), dict(type="TicketHook")]},
        {"optim_wrapper.type": "Bfloat16OptimWrapper", "custom_hooks": []},
    ],
    ids=["accumulate, clip", "EMA", "bfloat16"],
)
def test_pruned_weights_stay_exactly_zero(overrides, tiny_config, ticket18) -> None:
    cfg = tiny_config(overrides)
    stock = copy.deepcopy(cfg.model)
    stock.backbone.update(type="ResNet", init_cfg=None)
    runner = train(cfg)

    state = runner.model.state_dict()
    assert_zeros(state, ticket18)
    checkpoint = saved(cfg, 2)
    assert_zeros(checkpoint["state_dict"], ticket18)
    assert list(checkpoint["state_dict"]) == list(MODELS.build(stock).state_dict())
    moved = state["backbone.layer4.0.conv2.weight"].cpu()
    assert not torch.equal(moved, ticket18.sparse_weights()["layer4.0.conv2.weight"])
    if "ema_state_dict" in checkpoint:
        ema = checkpoint["ema_state_dict"]
        assert_zeros({k.removeprefix("module."): v for k, v in ema.items()}, ticket18)
        assert not torch.equal(
            checkpoint["state_dict"]["decode_head.conv_seg.weight"],
            state["decode_head.conv_seg.weight"],
        )


def test_the_hook_refuses_a_model_without_a_ticket(tiny_config) -> None:
    cfg = tiny_config()
    cfg.model.backbone.update(type="ResNet", init_cfg=None)
    with pytest.raises(TicketError, match="TicketHook found no ticket"):
        train(cfg)


def test_a_checkpoint_is_not_tested_on_another_input(tiny_config) -> None:
    cfg = tiny_config({"train_cfg.max_iters": 1})
    train(cfg)
    file = str(Path(cfg.work_dir) / "iter_1.pth")
    other = tiny_config({"load_from": file, "model.data_preprocessor.bgr_to_rgb": False})
    with pytest.raises(TicketError, match="bgr_to_rgb=True"):
        Runner.from_cfg(other).test()
    metrics = Runner.from_cfg(tiny_config({"load_from": file})).test()
    assert 0 <= metrics["mIoU"] <= 100


PRUNING = dict(type="GradualPruningHook", target=0.9, begin=0, end=3, period=1)


def test_averages_of_what_is_pruned_meanwhile_are_refused(tiny_config) -> None:
    hooks = [{**PRUNING, "end": 2}, dict(type="EMAHook"), dict(type="TicketHook")]
    with pytest.raises(ConfigError, match="without EMAHook"):
        train(tiny_config({"custom_hooks": hooks}))


class StopInAValidation(Hook):
    def after_val_iter(self, *_: Any, **__: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)


def test_on_sigterm_in_a_validation_averages_are_saved_as_such(tiny_config) -> None:
    hooks = [dict(type="EMAHook", momentum=0.5), dict(type="TicketHook"), dict(type="ResumeHook")]
    # No checkpoint is due before the validation.
    settings = {"train_cfg.max_iters": 4, "train_cfg.val_interval": 3}
    cfg = tiny_config({"custom_hooks": hooks, **settings, "default_hooks.checkpoint.interval": 4})
    runner = Runner.from_cfg(cfg)
    runner.register_hook(StopInAValidation())
    with pytest.raises(SystemExit):
        runner.train()
    (averages,) = (hook.ema_model for hook in runner.hooks if isinstance(hook, EMAHook))
    name, checkpoint = "decode_head.conv_seg.weight", saved(cfg, 3)
    trained, average = runner.model.get_parameter(name), averages.module.get_parameter(name)
    assert not torch.equal(trained, average)
    assert torch.equal(checkpoint["state_dict"][name], average)  # what is tested and deployed
    assert torch.equal(checkpoint["ema_state_dict"][f"module.{name}"], trained)


class StopAfterTheLastImage(Hook):
    """Between the last evaluated image and the end of the run."""

    def after_val_epoch(self, *_: Any, **__: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)


def test_on_sigterm_after_the_last_image_the_program_ends_with_the_run(tiny_config) -> None:
    hooks = [dict(type="TicketHook"), dict(type="ResumeHook")]
    cfg = tiny_config(
        {"custom_hooks": hooks, "train_cfg.max_iters": 1, "train_cfg.val_interval": 1}
    )
    before = signal.getsignal(signal.SIGTERM)
    runner = Runner.from_cfg(cfg)
    runner.register_hook(StopAfterTheLastImage())
    with pytest.raises(SystemExit) as ended:
        runner.train()
    assert ended.value.code == 143
    assert signal.getsignal(signal.SIGTERM) is before
    assert (Path(cfg.work_dir) / "final.ticket").exists()
