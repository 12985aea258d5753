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
        {},
        {"optim_wrapper.optimizer": SGD},
        {
            "optim_wrapper.optimizer": SGD,
            "optim_wrapper.accumulative_counts": 2,
            "optim_wrapper.clip_grad": dict(max_norm=1.0),
        },
        {"model.backbone.frozen_stages": 1},
        {"custom_hooks": [dict(type="EMAHook", momentum=0.1), dict(type="TicketHook")]},
        {"optim_wrapper.type": "Bfloat16OptimWrapper"},
        {"custom_hooks": []},
    ],
    ids=["AdamW", "SGD", "accumulate, clip", "frozen", "EMA", "bfloat16", "no hook of ours"],
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


def test_a_resumed_run_goes_on_and_stays_masked(tiny_config, ticket18) -> None:
    train(tiny_config({"train_cfg.max_iters": 1}))
    cfg = tiny_config({"resume": True})
    runner = train(cfg)
    assert runner.iter == 2
    lth.attached(runner.model).verify()
    assert_zeros(saved(cfg, 2)["state_dict"], ticket18)
    states = runner.optim_wrapper.optimizer.state.values()
    assert states and all(state["step"] == 2 for state in states)


def test_a_dense_checkpoint_is_masked_where_allowed(tiny_config, ticket18, tmp_path) -> None:
    cfg = tiny_config()
    dense = Runner.from_cfg(cfg).model
    file = tmp_path / "dense.pth"
    torch.save({"state_dict": dense.state_dict(), "meta": {}}, file)
    options = {"load_from": str(file), "train_cfg.max_iters": 1}
    with pytest.raises(TicketError, match=r"masks that it says nothing about: .* zero [1-9]"):
        train(tiny_config(options))
    allowed = {"model.backbone.init_cfg.allow_other_checkpoint": True}
    runner = train(tiny_config(options | allowed))
    assert_zeros(runner.model.state_dict(), ticket18)


def test_the_fine_tuned_ticket_is_written_at_the_end(tiny_config, ticket18, tmp_path) -> None:
    cfg = tiny_config({"train_cfg.max_iters": 1})
    train(cfg)
    final = lth.Ticket.load(Path(cfg.work_dir) / "final.ticket")
    assert final.masks == ticket18.masks
    assert final.meta.source == "fcn_r18_ticket"
    state = saved(cfg, 1)["state_dict"]
    for name, value in final.weights.items():
        assert torch.equal(value, state[f"backbone.{name}"]), name


def test_a_leak_stops_the_run_before_it_is_saved(tiny_config, ticket18) -> None:
    class Leak(Hook):
        """What no optimizer step heals: a write after it, before the checkpoint."""

        def after_train_iter(self, runner: Runner, batch_idx: int, **_: Any) -> None:
            if batch_idx == 1:
                with torch.no_grad():
                    runner.model.backbone.layer2[0].conv1.weight.fill_(1.0)

    cfg = tiny_config()
    runner = Runner.from_cfg(cfg)
    runner.register_hook(Leak())
    with pytest.raises(TicketError, match="layer2.0.conv1.weight"):
        runner.train()
    assert sorted(path.name for path in Path(cfg.work_dir).glob("*.pth")) == ["iter_1.pth"]
    assert not (Path(cfg.work_dir) / "final.ticket").exists()


def test_the_hook_refuses_a_model_without_a_ticket(tiny_config) -> None:
    cfg = tiny_config()
    cfg.model.backbone.update(type="ResNet", init_cfg=None)
    with pytest.raises(TicketError, match="TicketHook found no ticket"):
        train(cfg)


def test_a_run_is_not_resumed_with_other_masks(tiny_config, ticket18, tmp_path) -> None:
    train(tiny_config({"train_cfg.max_iters": 1}))
    other = ticket18.shuffled(1).save(tmp_path / "other.ticket")
    overrides = {"resume": True, "model.backbone.init_cfg.checkpoint": str(other)}
    with pytest.raises(TicketError, match=r"trained with masks .* zero [1-9][\d,]* of its"):
        train(tiny_config(overrides))


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


def test_a_gradually_pruned_run_ends_at_the_target_also_when_it_was_resumed(
    tiny_config, ticket18
) -> None:
    exact = {
        "model.decode_head.dropout_ratio": 0.0,
        "custom_hooks": [PRUNING, dict(type="TicketHook")],
        "train_cfg.max_iters": 4,
        "default_hooks.checkpoint.interval": 2,
    }

    def final(name: str) -> lth.Ticket:
        return lth.Ticket.load(Path(tiny_config().work_dir).with_name(name) / "final.ticket")

    folder = Path(tiny_config().work_dir)
    train(tiny_config({**exact, "work_dir": str(folder.with_name("whole"))}))
    train(tiny_config(exact | {"train_cfg.max_iters": 3}))
    (folder / "last_checkpoint").write_text(str(folder / "iter_2.pth"))  # as if it was killed then
    train(tiny_config({**exact, "resume": True}))

    masks = final("whole").masks
    assert masks.kept == masks.numel - round(0.9 * masks.numel)
    assert masks.issubset(ticket18.masks)
    assert final("run") == final("whole")
    # It trains on with the ticket that it ended with, not with the one that the run started from.
    start = {
        "load_from": str(folder / "iter_4.pth"),
        "train_cfg.max_iters": 1,
        "work_dir": str(folder.with_name("next")),
    }
    with pytest.raises(lth.TicketError, match="what was pruned would train again"):
        train(tiny_config(start))
    train(
        tiny_config({**start, "model.backbone.init_cfg.checkpoint": str(folder / "final.ticket")})
    )
    assert_zeros(saved(tiny_config(), 4)["state_dict"], final("run"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"end": 0}, "found begin 0 and end 0"),
        ({"end": 9}, "within the training's 2 iterations"),
        ({"end": 2, "target": 0.5}, "the ticket's 0.6723 or more, found 0.5"),
    ],
)
def test_pruning_that_does_not_fit_the_run_is_refused(changes, message, tiny_config) -> None:
    hooks = [{**PRUNING, **changes}, dict(type="TicketHook")]
    with pytest.raises(ConfigError, match=message):
        train(tiny_config({"custom_hooks": hooks}))


def test_averages_of_what_is_pruned_meanwhile_are_refused(tiny_config) -> None:
    hooks = [{**PRUNING, "end": 2}, dict(type="EMAHook"), dict(type="TicketHook")]
    with pytest.raises(ConfigError, match="without EMAHook"):
        train(tiny_config({"custom_hooks": hooks}))


class StopInAValidation(Hook):
    def after_val_iter(self, *_: Any, **__: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)


def test_told_to_stop_in_a_validation_averages_are_saved_as_such(tiny_config) -> None:
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


class StopAfterTheLastPicture(Hook):
    """Between the last evaluated picture and the end of the run."""

    def after_val_epoch(self, *_: Any, **__: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)


def test_told_to_stop_after_the_last_picture_the_program_ends_with_the_run(tiny_config) -> None:
    hooks = [dict(type="TicketHook"), dict(type="ResumeHook")]
    cfg = tiny_config(
        {"custom_hooks": hooks, "train_cfg.max_iters": 1, "train_cfg.val_interval": 1}
    )
    before = signal.getsignal(signal.SIGTERM)
    runner = Runner.from_cfg(cfg)
    runner.register_hook(StopAfterTheLastPicture())
    with pytest.raises(SystemExit) as ended:
        runner.train()
    assert ended.value.code == 143
    assert signal.getsignal(signal.SIGTERM) is before
    assert (Path(cfg.work_dir) / "final.ticket").exists()
