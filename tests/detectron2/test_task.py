"""Task-specific tickets: each round is a run of detectron2's trainer, from the same full state."""

import shutil
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer
from torch import Tensor

from lth_plugins import Ticket, TicketError, prune
from lth_plugins.detectron2 import TicketHook, task_search
from lth_plugins.ticket import locate

MakeCfg = Callable[..., CfgNode]


class Spy(DefaultTrainer):
    """Keeps what each run starts from, as start.pth."""

    def build_hooks(self) -> list[Any]:
        final = Path(self.cfg.OUTPUT_DIR) / "final.ticket"
        return [TicketHook(self.cfg.SOLVER.CHECKPOINT_PERIOD, final), *super().build_hooks()]

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


@pytest.fixture(scope="module")
def found(search_cfg: MakeCfg, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a whole search of two rounds."""
    folder = tmp_path_factory.mktemp("search") / "out"
    task_search(search_cfg(folder), Spy).run()
    return folder


def test_round_k_keeps_four_fifths_to_the_power_of_k(found: Path, r18_dense: Path) -> None:
    dense = Ticket.load(r18_dense)
    assert [t.density for t in tickets(found)] == pytest.approx([1, 0.8, 0.64], abs=1e-6)
    assert [t.meta.source for t in tickets(found)] == ["tiny_scenes_train"] * 3
    for ticket in tickets(found):
        for name, value in dense.with_masks(ticket.masks, {}).sparse_weights().items():
            assert torch.equal(ticket.weights[name], value), name


def test_each_round_starts_from_the_same_whole_state_and_prunes_what_it_trained(
    found: Path,
) -> None:
    initial = state(found / "initial.pth")
    names = {key: name for name, key in locate(initial).keys.items()}
    for k, ticket in enumerate(tickets(found)):
        start = state(found / f"train_{k:02d}/start.pth")
        assert start.keys() == initial.keys()
        for key, value in initial.items():
            mask = ticket.masks.get(names.get(key, ""))
            expected = value if mask is None else value.masked_fill(~mask, 0)
            assert torch.equal(start[key], expected), key
        if k < 2:
            trained = state(found / f"train_{k:02d}/model_final.pth")
            assert tickets(found)[k + 1].masks == prune(trained, 0.2, ticket.masks)
    moved = state(found / "train_02/model_final.pth")["roi_heads.box_predictor.cls_score.weight"]
    assert not torch.equal(moved, initial["roi_heads.box_predictor.cls_score.weight"])


@pytest.mark.parametrize("period", [2, 1])
def test_a_killed_search_goes_on(
    period: int, found: Path, search_cfg: MakeCfg, tmp_path: Path
) -> None:
    """From the run's latest checkpoint; to the same tickets where it had none in that round.

    detectron2 begins its stream of data again when it resumes, so the steps are others then.
    """
    folder = tmp_path / "out"
    shutil.copytree(found, folder)
    shutil.rmtree(folder / "train_01")
    (folder / "round_02.ticket").unlink()
    cfg = search_cfg(folder, {"SOLVER.CHECKPOINT_PERIOD": period})
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
    same = [path.read_bytes() == (found / path.name).read_bytes() for path in paths]
    assert same == [True, True, period == 2]
    assert tickets(folder)[2].density == pytest.approx(0.64, abs=1e-6)


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
        ({"MODEL.TICKET.IMP.FRACTION": 0.3}, r"imp\.fraction is 0\.2 there, 0\.3"),
        ({"MODEL.TICKET.IMP.REWIND": "init"}, r"imp\.rewind is pretrained there, init"),
        ({"SOLVER.MAX_ITER": 3}, r"config\.SOLVER\.MAX_ITER is 2 there, 3"),
        ({"SEED": 2}, r"config\.SEED is 1 there, 2"),
    ],
)
def test_the_folder_of_another_recipe_is_refused_and_kept(
    change: dict[str, Any], message: str, found: Path, search_cfg: MakeCfg
) -> None:
    before = {path: path.stat().st_mtime_ns for path in sorted(found.rglob("*"))}
    with pytest.raises(TicketError, match=message):
        task_search(search_cfg(found, change), Spy)
    assert {path: path.stat().st_mtime_ns for path in sorted(found.rglob("*"))} == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"MODEL.TICKET.IMP.ROUNDS": 0}, "expected rounds of 1 or more, found 0"),
        ({"MODEL.TICKET.IMP.CRITERION": "size"}, "unknown criterion 'size'"),
        ({"MODEL.TICKET.IMP.ALLOCATION": "even"}, "unknown scope 'even'"),
        ({"MODEL.TICKET.IMP.EARLY_ITER": 1}, "none with another, found rewind 'pretrained'"),
        ({"MODEL.TICKET.RANDOM": True}, "found REVERSE, RANDOM or LOAD_WEIGHTS False"),
        ({"MODEL.RESNETS.NORM": "FrozenBN"}, "FrozenBN keeps the BN statistics"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_written(
    change: dict[str, Any], message: str, search_cfg: MakeCfg, tmp_path: Path
) -> None:
    with pytest.raises(TicketError, match=message):
        task_search(search_cfg(tmp_path / "out", change), Spy)
    assert not (tmp_path / "out").exists()


def once(search_cfg: MakeCfg, folder: Path, rewind: str, **options: Any) -> Path:
    """A search of one round with this rewind."""
    change = {
        "MODEL.TICKET.IMP.ROUNDS": 1,
        "MODEL.TICKET.IMP.REWIND": rewind,
        "SOLVER.CHECKPOINT_PERIOD": 2,
    }
    task_search(search_cfg(folder / "out", {**change, **options}), Spy).run()
    return folder / "out"


def assert_masked_start(start: dict[str, Tensor], whole: dict[str, Tensor], ticket: Ticket) -> None:
    """A run started from this whole model, under the ticket's masks."""
    names = {key: name for name, key in locate(whole).keys.items()}
    for key, value in whole.items():
        mask = ticket.masks.get(names.get(key, ""))
        expected = value if mask is None else value.masked_fill(~mask, 0)
        assert torch.equal(start[key], expected), key


def test_rewinding_to_the_initialisation(
    search_cfg: MakeCfg, r18_dense: Path, tmp_path: Path
) -> None:
    folder = once(search_cfg, tmp_path, "init")
    initial = state(folder / "initial.pth")
    zero, one = tickets(folder)
    pretrained = Ticket.load(r18_dense).weights["layer1.0.conv1.weight"]
    assert not torch.equal(zero.weights["layer1.0.conv1.weight"], pretrained)
    assert_masked_start(state(folder / "train_00/start.pth"), initial, zero)
    assert_masked_start(state(folder / "train_01/start.pth"), initial, one)
    assert one.meta.recipe["rewind"] == "init"


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


@pytest.mark.parametrize("rewind", ["learning_rate", "none"])
def test_weights_that_stay_as_trained(rewind: str, search_cfg: MakeCfg, tmp_path: Path) -> None:
    schedule = {"SOLVER.STEPS": (1,), "SOLVER.GAMMA": 0.1}
    folder = once(search_cfg, tmp_path, rewind, **schedule)
    trained = state(folder / "train_00/model_final.pth")
    _, one = tickets(folder)
    assert_masked_start(state(folder / "train_01/start.pth"), trained, one)
    assert torch.equal(one.weights["conv1.weight"], trained["backbone.bottom_up.stem.conv1.weight"])
    optimizer = torch.load(folder / "train_01/model_final.pth", weights_only=True)["trainer"]
    group = optimizer["_trainer"]["optimizer"]["param_groups"][0]
    # The whole schedule again, or its last value throughout.
    expected = (0.01, 0.001) if rewind == "learning_rate" else (0.001, 0.001)
    assert (group["initial_lr"], group["lr"]) == pytest.approx(expected)
