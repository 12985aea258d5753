"""Task-specific tickets: each round is a run of mmengine's Runner, from the same full state."""

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from mmengine.hooks import Hook
from mmengine.registry import HOOKS, init_default_scope
from mmengine.runner import Runner
from mmseg.registry import MODELS
from torch import Tensor

from lth_plugins import Ticket, TicketError, prune
from lth_plugins.errors import LthError
from lth_plugins.mmseg import task_search
from lth_plugins.mmseg.task import MmsegHost
from lth_plugins.pruning.search.modules import outside_trunk

MakeConfig = Callable[..., Any]


@HOOKS.register_module()
class SpyHook(Hook):
    """Keeps what each run starts from, and stops the run it is told to, as Ctrl-C does."""

    priority = "VERY_LOW"  # after TicketHook
    stop_in: ClassVar[str] = ""

    def before_train(self, runner: Runner) -> None:
        torch.save(runner.model.state_dict(), Path(runner.work_dir) / "start.pth")

    def before_train_iter(self, runner: Runner, batch_idx: int, **_: Any) -> None:
        if batch_idx == 1 and Path(runner.work_dir).name == self.stop_in:
            raise KeyboardInterrupt


SPY = {"custom_hooks": [dict(type="TicketHook"), dict(type="SpyHook")]}


@pytest.fixture
def stop_in() -> Iterator[Callable[[str], None]]:
    yield lambda name: setattr(SpyHook, "stop_in", name)
    SpyHook.stop_in = ""


def state(path: Path) -> dict[str, Tensor]:
    loaded = torch.load(path, map_location="cpu", weights_only=False)
    return loaded.get("state_dict", loaded)


def tickets(folder: Path) -> list[Ticket]:
    return [Ticket.load(path) for path in sorted(folder.glob("round_*.ticket"))]


@pytest.fixture(scope="module")
def found(search_config: MakeConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a whole search of two rounds."""
    folder = tmp_path_factory.mktemp("search") / "run"
    task_search(search_config(folder, {**SPY, "default_hooks.checkpoint.interval": 2})).run()
    return folder


def test_round_k_keeps_four_fifths_to_the_power_of_k(found: Path, dense18_file: Path) -> None:
    dense = Ticket.load(dense18_file)
    assert [t.density for t in tickets(found)] == pytest.approx([1, 0.8, 0.64], abs=1e-6)
    assert [t.meta.source for t in tickets(found)] == ["fcn_r18_ticket"] * 3
    for ticket in tickets(found):
        for name, value in dense.with_masks(ticket.masks, {}).sparse_weights().items():
            assert torch.equal(ticket.weights[name], value), name


def test_each_round_starts_from_the_same_whole_state_and_prunes_what_it_trained(
    found: Path,
) -> None:
    initial = state(found / "initial.pth")
    for k, ticket in enumerate(tickets(found)):
        start = state(found / f"train_{k:02d}/start.pth")
        assert start.keys() == initial.keys()
        for name, value in initial.items():
            mask = ticket.masks.get(name.removeprefix("backbone."))
            expected = value if mask is None else value.masked_fill(~mask, 0)
            assert torch.equal(start[name], expected), name
        if k < 2:
            trained = state(found / f"train_{k:02d}/iter_2.pth")
            assert tickets(found)[k + 1].masks == prune(trained, 0.2, ticket.masks)
    moved = state(found / "train_02/iter_2.pth")["decode_head.conv_seg.weight"]
    assert not torch.equal(moved, initial["decode_head.conv_seg.weight"])


@pytest.mark.skipif(sys.platform != "linux", reason="open files are read from /proc")
def test_no_run_of_a_search_leaves_a_file_open(found: Path) -> None:
    opened = [os.readlink(entry) for entry in Path("/proc/self/fd").iterdir() if entry.is_symlink()]
    assert not [name for name in opened if name.startswith(str(found))]


def test_a_killed_search_goes_on_from_the_runs_checkpoint_to_the_same_tickets(
    found: Path, search_config: MakeConfig, stop_in: Callable[[str], None], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(found, folder, copy_function=os.link)  # what is written anew is replaced
    shutil.rmtree(folder / "train_01")
    (folder / "round_02.ticket").unlink()
    stop_in("train_01")
    with pytest.raises(KeyboardInterrupt):
        task_search(search_config(folder, SPY)).run()
    assert [path.name for path in (folder / "train_01").glob("iter_*")] == ["iter_1.pth"]
    assert not (folder / "round_02.ticket").exists()

    stop_in("")
    paths = task_search(search_config(folder, SPY)).run()
    for path in paths:
        assert path.read_bytes() == (found / path.name).read_bytes(), path.name
    assert len(list((folder / "train_01").glob("*/*.log"))) == 2  # one for each part of the run


@pytest.mark.parametrize(
    ("change", "imp", "message"),
    [
        ({}, dict(fraction=0.3), r"fraction is the default there, 0\.3"),
        ({}, dict(structure=dict(kind="channel")), r"structure\.kind is the default there"),
        ({"train_cfg.max_iters": 3}, {}, r"config\.train_cfg\.max_iters is 2 there, 3"),
        ({"randomness.seed": 1}, {}, r"config\.randomness\.seed is 0 there, 1"),
    ],
)
def test_the_folder_of_another_recipe_is_refused_and_kept(
    change: dict, imp: dict, message: str, found: Path, search_config: MakeConfig
) -> None:
    before = {path: path.stat().st_mtime_ns for path in sorted(found.rglob("*"))}
    with pytest.raises(LthError, match=message):
        task_search(search_config(found, {**SPY, **change}, **imp))
    assert {path: path.stat().st_mtime_ns for path in sorted(found.rglob("*"))} == before


@pytest.mark.parametrize(
    ("change", "imp", "message"),
    [
        ({}, dict(rounds=0), "expected rounds of 1 or more, found 0"),
        ({}, dict(criterion="snip"), "loss"),
        ({}, dict(rewind="early"), "early iteration of 1 or more"),
        ({}, dict(rewind="early", early_iter=2), "early iteration below the run's 2, found 2"),
        ({}, dict(round=2), r"unknown key round in imp=dict\(…\); known are rounds"),
        ({}, dict(structure=dict(kind="rows")), "unknown structure 'rows'"),
        ({}, dict(structure=dict(size=8)), "unknown key structure.size in imp"),
        ({"model.backbone.init_cfg.random": True}, {}, "found random True"),
        ({"model.backbone.norm_eval": True}, {}, "norm_eval=False"),
        ({}, dict(scope="heads"), "unknown scope 'heads'"),
        ({}, dict(scope="backbone+neck"), "has decode_head.conv_seg, decode_head.convs there"),
        ({}, dict(scope="all", exclude=["neck"]), "by the name 'neck', found none among decode"),
        ({}, dict(exclude=["decode_head.convs"]), "by the name 'decode_head.convs', found none"),
        ({"custom_hooks": [dict(type="GradualPruningHook")]}, {}, "found both imp"),
        (
            {"custom_hooks": [dict(type="EMAHook")]},
            dict(rewind="early", early_iter=1),
            "expected no EMAHook",
        ),
    ],
)
def test_bad_settings_are_refused_before_anything_is_written(
    change: dict, imp: dict, message: str, search_config: MakeConfig, tmp_path: Path
) -> None:
    with pytest.raises(LthError, match=message):
        task_search(search_config(tmp_path / "run", change, **imp))
    assert not (tmp_path / "run").exists()


def test_a_sparse_ticket_is_refused(
    search_config: MakeConfig, ticket18_file: Path, tmp_path: Path
) -> None:
    change = {"model.backbone.init_cfg.checkpoint": str(ticket18_file)}
    with pytest.raises(TicketError, match="starts from a dense ticket, .* round_00.ticket"):
        task_search(search_config(tmp_path / "run", change))
    assert not (tmp_path / "run").exists()


def assert_masked_start(start: dict[str, Tensor], whole: dict[str, Tensor], ticket: Ticket) -> None:
    """A run started from this whole model, under the ticket's masks."""
    for key, value in whole.items():
        mask = ticket.masks.get(key.removeprefix("backbone."))
        expected = value if mask is None else value.masked_fill(~mask, 0)
        assert torch.equal(start[key], expected), key


def test_rewinding_to_the_initialisation_starts_from_mmsegs(
    search_config: MakeConfig, dense18_file: Path, tmp_path: Path
) -> None:
    search = task_search(search_config(tmp_path / "run", SPY, rounds=1, rewind="init"))
    weight = search.host.build().get_parameter("backbone.layer1.0.conv1.weight")
    pretrained = Ticket.load(dense18_file).weights["layer1.0.conv1.weight"]
    assert weight.any() and not torch.equal(weight.cpu(), pretrained)


def test_rewinding_to_an_early_iteration(search_config: MakeConfig, tmp_path: Path) -> None:
    """Rounds go on from mmengine's checkpoint of it: optimizer, schedule and all."""
    overrides = {**SPY, "default_hooks.checkpoint.interval": 2}
    imp = dict(rounds=1, rewind="early", early_iter=1)
    task_search(search_config(tmp_path / "run", overrides, **imp)).run()
    early = torch.load(tmp_path / "run/train_00/early.pth", weights_only=False)
    assert early["meta"]["iter"] == 1
    zero, one = tickets(tmp_path / "run")
    assert torch.equal(zero.weights["conv1.weight"], early["state_dict"]["backbone.conv1.weight"])
    assert_masked_start(state(tmp_path / "run/train_01/start.pth"), early["state_dict"], one)
    final = torch.load(tmp_path / "run/train_01/iter_2.pth", weights_only=False)
    assert {s["step"].item() for s in final["optimizer"]["state"].values()} == {2}


def test_fine_tuning_at_the_last_learning_rate(search_config: MakeConfig, tmp_path: Path) -> None:
    steps = dict(type="MultiStepLR", milestones=[1], gamma=0.1, by_epoch=False)
    overrides = {**SPY, "default_hooks.checkpoint.interval": 2, "param_scheduler": [steps]}
    task_search(search_config(tmp_path / "run", overrides, rounds=1, rewind="none")).run()
    first, second = (
        torch.load(tmp_path / f"run/train_0{k}/iter_2.pth", weights_only=False) for k in (0, 1)
    )
    _, one = tickets(tmp_path / "run")
    assert_masked_start(state(tmp_path / "run/train_01/start.pth"), first["state_dict"], one)
    groups = first["optimizer"]["param_groups"]
    last = [0.1 * group["initial_lr"] for group in groups]
    assert [group["lr"] for group in groups] == pytest.approx(last)
    assert [g["lr"] for g in second["optimizer"]["param_groups"]] == pytest.approx(last)


HEAD = "decode_head.convs.0.conv.weight"


@pytest.fixture(scope="module")
def heads_too(search_config: MakeConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a search of one round that prunes the head, too."""
    folder = tmp_path_factory.mktemp("heads") / "run"
    overrides = {**SPY, "default_hooks.checkpoint.interval": 2}
    task_search(search_config(folder, overrides, rounds=1, scope="all")).run()
    return folder


def test_the_head_is_pruned_and_its_last_layer_is_not(heads_too: Path) -> None:
    zero, one = tickets(heads_too)
    assert set(one.outside.masks) == {HEAD}
    assert one.all_masks.density == pytest.approx(0.8, abs=1e-6)
    trained = state(heads_too / "train_00/iter_2.pth")
    assert one.all_masks == prune(trained, 0.2, zero.all_masks)
    mask = one.outside.masks[HEAD]
    initial = state(heads_too / "initial.pth")
    assert torch.equal(state(heads_too / "train_01/start.pth")[HEAD], initial[HEAD] * mask)
    final = state(heads_too / "train_01/iter_2.pth")[HEAD]
    assert not final[~mask].any() and final[mask].any()
    ticket = Ticket.load(heads_too / "train_01/final.ticket")
    assert ticket.all_masks == one.all_masks and torch.equal(ticket.outside.weights[HEAD], final)


@pytest.mark.parametrize("outside", [False, True])
def test_a_search_starts_from_a_whole_models_ticket_or_from_its_backbone(
    outside: bool, heads_too: Path, search_config: MakeConfig, tmp_path: Path
) -> None:
    ticket = {"model.backbone.init_cfg.checkpoint": str(heads_too / "round_00.ticket")}
    change = {**ticket, "model.backbone.init_cfg.rest": outside}
    dense = task_search(search_config(tmp_path / "run", change)).host.dense
    assert set(dense.outside.masks) == ({HEAD} if outside else set())


@pytest.mark.parametrize("loaded", [False, True], ids=["fresh", "a checkpoint is loaded"])
def test_a_ticket_of_a_whole_model_in_a_run_of_its_own(
    loaded: bool, heads_too: Path, tiny_config: Callable[..., Any]
) -> None:
    """The head is initialised after the backbone, and has the ticket's weights all the same."""
    one = tickets(heads_too)[1]
    initial = heads_too / "initial.pth"
    overrides = {
        **SPY,
        "model.backbone.init_cfg.checkpoint": str(heads_too / "round_01.ticket"),
        "model.backbone.init_cfg.allow_other_checkpoint": loaded,  # it is of the round before
        "train_cfg.max_iters": 1,
        "load_from": str(heads_too / "train_00/iter_2.pth") if loaded else None,
    }
    cfg = tiny_config(overrides)
    Runner.from_cfg(cfg).train()
    start = state(Path(cfg.work_dir) / "start.pth")[HEAD]
    source = heads_too / "train_00/iter_2.pth" if loaded else initial
    assert torch.equal(start, state(source)[HEAD] * one.outside.masks[HEAD])
    assert not state(Path(cfg.work_dir) / "iter_1.pth")[HEAD][~one.outside.masks[HEAD]].any()


def test_heads_that_would_train_dense_are_an_error(
    heads_too: Path, tiny_config: Callable[..., Any]
) -> None:
    ticket = {"model.backbone.init_cfg.checkpoint": str(heads_too / "round_01.ticket")}
    with pytest.raises(TicketError, match="rest=False"):
        Runner.from_cfg(tiny_config({**ticket, "custom_hooks": []})).train()
    trunk = {**ticket, "custom_hooks": [], "model.backbone.init_cfg.rest": False}
    Runner.from_cfg(tiny_config({**trunk, "train_cfg.max_iters": 1})).train()


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
