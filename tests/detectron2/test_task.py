"""Task-specific tickets: each round is a run of detectron2's trainer, from the same full state."""

import os
import shutil
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer
from detectron2.modeling import build_model
from torch import Tensor

import lth_plugins as lth
from lth_plugins import Ticket, TicketError, prune
from lth_plugins.detectron2 import (
    TicketHook,
    resumable,
    resumable_train_loader,
    task_search,
)
from lth_plugins.detectron2.task import Detectron2Host
from lth_plugins.errors import LthError
from lth_plugins.pruning.search.modules import outside_trunk
from lth_plugins.ticket import locate

MakeCfg = Callable[..., CfgNode]

HEADS_TOO = {"MODEL.TICKET.IMP.SCOPE": "all"}
INPUT = {"MODEL.TICKET.KEEP_INPUT": True}


class Spy(DefaultTrainer):
    """Keeps what each run starts from, as start.pth."""

    def build_hooks(self) -> list[Any]:
        final = Path(self.cfg.OUTPUT_DIR) / "final.ticket"
        hook = TicketHook(self.cfg.SOLVER.CHECKPOINT_PERIOD, final)
        return resumable([hook, *super().build_hooks()], self.cfg.SEED)

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> Any:
        return resumable_train_loader(cfg)

    def train(self) -> None:
        if self.start_iter == 0:
            torch.save(self.model.state_dict(), Path(self.cfg.OUTPUT_DIR) / "start.pth")
        super().train()


class Stopped(Spy):
    """Stops in its second iteration, as Ctrl-C does."""

    def run_step(self) -> None:
        if self.iter == 1:
            raise KeyboardInterrupt
        super().run_step()


def state(path: Path) -> dict[str, Tensor]:
    loaded = torch.load(path, weights_only=True)
    return loaded.get("model", loaded)


def tickets(folder: Path) -> list[Ticket]:
    return [Ticket.load(path) for path in sorted(folder.glob("round_*.ticket"))]


def assert_masked_start(start: dict[str, Tensor], whole: dict[str, Tensor], ticket: Ticket) -> None:
    """A run started from this whole model, under the ticket's masks."""
    names = {key: name for name, key in locate(whole).keys.items()}
    assert start.keys() == whole.keys()
    for key, value in whole.items():
        mask = ticket.all_masks.get(names.get(key, key))
        expected = value if mask is None else value.masked_fill(~mask, 0)
        assert torch.equal(start[key], expected), key


@pytest.fixture(scope="module")
def found(search_cfg: MakeCfg, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a whole search of two rounds, which prunes the heads, too."""
    folder = tmp_path_factory.mktemp("search") / "out"
    task_search(search_cfg(folder, HEADS_TOO), Spy).run()
    return folder


def test_round_k_keeps_four_fifths_to_the_power_of_k(found: Path, r18_dense: Path) -> None:
    dense = Ticket.load(r18_dense)
    densities = [ticket.all_masks.density for ticket in tickets(found)]
    assert densities == pytest.approx([1, 0.8, 0.64], abs=1e-6)
    assert [t.meta.source for t in tickets(found)] == ["tiny_scenes_train"] * 3
    for ticket in tickets(found):
        for name, value in dense.with_masks(ticket.masks, {}).sparse_weights().items():
            assert torch.equal(ticket.weights[name], value), name


def test_each_round_starts_from_the_same_whole_state_and_prunes_what_it_trained(
    found: Path,
) -> None:
    initial = state(found / "initial.pth")
    for k, ticket in enumerate(tickets(found)):
        assert_masked_start(state(found / f"train_{k:02d}/start.pth"), initial, ticket)
        if k < 2:
            trained = state(found / f"train_{k:02d}/model_final.pth")
            assert tickets(found)[k + 1].all_masks == prune(trained, 0.2, ticket.all_masks)
    moved = state(found / "train_02/model_final.pth")["roi_heads.box_predictor.cls_score.weight"]
    assert not torch.equal(moved, initial["roi_heads.box_predictor.cls_score.weight"])


def test_the_heads_are_pruned_and_the_predictors_are_not(found: Path) -> None:
    *_, last = tickets(found)
    names = set(last.outside.masks)
    assert {"backbone.fpn_output2.weight", "roi_heads.box_head.fc1.weight"} <= names
    assert not any("predictor" in name or "anchor_deltas" in name for name in names)
    trained = state(found / "train_02/model_final.pth")
    for name, mask in last.outside.masks.items():
        assert not trained[name][~mask].any() and trained[name][mask].any(), name
    final = Ticket.load(found / "train_02/final.ticket")
    assert final.all_masks == last.all_masks
    name = "roi_heads.box_head.fc1.weight"
    assert torch.equal(final.outside.weights[name], trained[name])


def test_a_ticket_of_a_whole_model_in_a_run_of_its_own(
    found: Path, train_det: ModuleType, command: Callable[..., Namespace], tmp_path: Path
) -> None:
    """Its heads' weights are the ticket's until a checkpoint is loaded, which is masked."""
    last = tickets(found)[-1]
    options = {"MODEL.TICKET.PATH": found / "round_02.ticket", "SOLVER.MAX_ITER": 1}
    options["MODEL.TICKET.ALLOW_OTHER_CHECKPOINT"] = True  # the dense one, in the end
    args = command("fpn", options={**options, "DATASETS.TEST": ()})
    model = train_det.Trainer.build_model(train_det.setup(args))
    name = "roi_heads.box_head.fc1.weight"
    assert torch.equal(model.get_parameter(name).cpu(), last.outside.weights[name])
    train_det.main(args)
    assert Ticket.load(tmp_path / "out/final.ticket").all_masks == last.all_masks
    DetectionCheckpointer(model).load(str(found / "initial.pth"))
    lth.attached(model).verify()


def test_heads_that_would_train_dense_are_an_error(found: Path, search_cfg: MakeCfg) -> None:
    options = {"MODEL.TICKET.PATH": found / "round_02.ticket", "MODEL.TICKET.IMP.ROUNDS": 0}
    with pytest.raises(TicketError, match="attach_rest"):
        Spy(search_cfg(found / "unused", options)).train()
    trunk = search_cfg(found / "unused", {**options, "MODEL.TICKET.REST": False})
    lth.attached(build_model(trunk)).verify()


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


@pytest.mark.parametrize("period", [2, 1])
def test_a_killed_search_goes_on_from_the_runs_checkpoint_to_the_same_tickets(
    period: int, found: Path, search_cfg: MakeCfg, tmp_path: Path
) -> None:
    folder = tmp_path / "out"
    shutil.copytree(found, folder, copy_function=os.link)  # what is written anew is replaced
    shutil.rmtree(folder / "train_01")
    (folder / "round_02.ticket").unlink()
    cfg = search_cfg(folder, {**HEADS_TOO, "SOLVER.CHECKPOINT_PERIOD": period})
    with pytest.raises(KeyboardInterrupt):
        task_search(cfg, Stopped).run()
    assert not (folder / "round_02.ticket").exists()

    class Resumed(Spy):
        started: int | None = None

        def train(self) -> None:
            Resumed.started = self.start_iter
            super().train()

    paths = task_search(cfg, Resumed).run()
    assert Resumed.started == 2 - period
    for path in paths:
        assert path.read_bytes() == (found / path.name).read_bytes(), path.name


def test_train_det_finds_tickets(
    train_det: ModuleType, command: Callable[..., Namespace], r18_dense: Path, tmp_path: Path
) -> None:
    options = {"MODEL.TICKET.PATH": r18_dense, "SOLVER.MAX_ITER": 1}
    train_det.main(command("fpn", "--imp-rounds", "1", options=options))
    out = tmp_path / "out"
    assert [ticket.density for ticket in tickets(out)] == pytest.approx([1, 0.8], abs=1e-6)
    final = Ticket.load(out / "train_01/final.ticket")
    assert final.masks == tickets(out)[1].masks
    for k in (0, 1):
        assert "bbox/AP50" in (out / f"train_{k:02d}/metrics.json").read_text()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"MODEL.TICKET.IMP.FRACTION": 0.3}, r"fraction is the default there, 0\.3"),
        ({"SOLVER.MAX_ITER": 3}, r"config\.SOLVER\.MAX_ITER is 2 there, 3"),
        ({"MODEL.TICKET.IMP.SCOPE": "backbone"}, r"scope is all there, the default"),
        ({"MODEL.TICKET.IMP.STRUCTURE.KIND": "channel"}, r"structure\.kind is the default there"),
    ],
)
def test_the_folder_of_another_recipe_is_refused_and_kept(
    change: dict[str, Any], message: str, found: Path, search_cfg: MakeCfg
) -> None:
    before = {path: path.stat().st_mtime_ns for path in sorted(found.rglob("*"))}
    with pytest.raises(LthError, match=message):
        task_search(search_cfg(found, {**HEADS_TOO, **change}), Spy)
    assert {path: path.stat().st_mtime_ns for path in sorted(found.rglob("*"))} == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"MODEL.TICKET.IMP.ROUNDS": 0}, "expected rounds of 1 or more, found 0"),
        ({"MODEL.TICKET.IMP.EARLY_ITER": 1}, "none with another, found rewind 'pretrained'"),
        ({"MODEL.TICKET.IMP.STRUCTURE.MULTIPLE": 8}, "structure.multiple needs structure.kind"),
        ({"MODEL.TICKET.RANDOM": True}, "found MODEL.TICKET.RANDOM True"),
        ({"MODEL.RESNETS.NORM": "FrozenBN"}, "FrozenBN keeps the BN statistics"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_written(
    change: dict[str, Any], message: str, search_cfg: MakeCfg, tmp_path: Path
) -> None:
    with pytest.raises(LthError, match=message):
        task_search(search_cfg(tmp_path / "out", change), Spy)
    assert not (tmp_path / "out").exists()


def test_rewinding_to_the_initialisation_starts_from_detectron2s(
    search_cfg: MakeCfg, r18_dense: Path, tmp_path: Path
) -> None:
    search = task_search(search_cfg(tmp_path / "out", {"MODEL.TICKET.IMP.REWIND": "init"}), Spy)
    weight = search.host.build().get_parameter("backbone.bottom_up.res2.0.conv1.weight")
    pretrained = Ticket.load(r18_dense).weights["layer1.0.conv1.weight"]
    assert weight.any() and not torch.equal(weight.cpu(), pretrained)


def test_rewinding_to_an_early_iteration(search_cfg: MakeCfg, tmp_path: Path) -> None:
    """Rounds go on from detectron2's checkpoint of it: optimizer, schedule and all."""

    class Early(Spy):
        def train(self) -> None:
            torch.save(self.model.state_dict(), Path(self.cfg.OUTPUT_DIR) / "start.pth")
            started.append((self.start_iter, len(self.optimizer.state)))
            super(Spy, self).train()

    started: list[tuple[int, int]] = []
    change = {
        "MODEL.TICKET.IMP.ROUNDS": 1,
        "MODEL.TICKET.IMP.REWIND": "early",
        "MODEL.TICKET.IMP.EARLY_ITER": 1,
    }
    cfg = search_cfg(tmp_path / "out", change)
    task_search(cfg, Early).run()
    folder = tmp_path / "out"
    (first, _), (second, with_state) = started
    assert (first, second) == (0, 1) and with_state > 0
    early = state(folder / "train_00/early.pth")
    assert not torch.equal(
        early["roi_heads.box_head.fc1.weight"],
        state(folder / "initial.pth")["roi_heads.box_head.fc1.weight"],
    )
    zero, one = tickets(folder)
    assert_masked_start(early, early, zero)
    assert_masked_start(state(folder / "train_01/start.pth"), early, one)
    assert torch.equal(zero.weights["conv1.weight"], early["backbone.bottom_up.stem.conv1.weight"])


def test_fine_tuning_at_the_last_learning_rate(search_cfg: MakeCfg, tmp_path: Path) -> None:
    schedule = {"SOLVER.STEPS": (1,), "SOLVER.GAMMA": 0.1}
    change = {"MODEL.TICKET.IMP.ROUNDS": 1, "MODEL.TICKET.IMP.REWIND": "none"}
    folder = tmp_path / "out"
    task_search(
        search_cfg(folder, {**change, "SOLVER.CHECKPOINT_PERIOD": 2, **schedule}), Spy
    ).run()
    trained = state(folder / "train_00/model_final.pth")
    _, one = tickets(folder)
    assert_masked_start(state(folder / "train_01/start.pth"), trained, one)
    assert torch.equal(one.weights["conv1.weight"], trained["backbone.bottom_up.stem.conv1.weight"])
    optimizer = torch.load(folder / "train_01/model_final.pth", weights_only=True)["trainer"]
    group = optimizer["_trainer"]["optimizer"]["param_groups"][0]
    assert (group["initial_lr"], group["lr"]) == pytest.approx((0.001, 0.001))
