"""Early-bird tickets: when a mask counts as found, and what is left of a round's training then."""

import json
from pathlib import Path

import pytest
import torch

from lth_plugins.pretrain import find as find_module
from lth_plugins.pretrain import load_config
from lth_plugins.pretrain.config import EARLY_BIRD_MEMORY
from lth_plugins.pretrain.early_bird import EarlyBird
from lth_plugins.pretrain.find import find
from lth_plugins.ticket import Masks, Ticket

CONFIG = Path(__file__).resolve().parents[2] / "configs/pretrain/digits_simclr.yaml"

TRAINED = Masks({"w": torch.arange(200) < 100})  # half of the weights are pruned already


def draw(state: dict[str, torch.Tensor]) -> Masks:
    """Keeps what is positive of the weights in training."""
    return Masks({"w": (state["w"] > 0) & TRAINED["w"]})


def weights(negative: int) -> dict[str, torch.Tensor]:
    """So many of the weights in training would be pruned; of the others all."""
    signs = torch.ones(200)
    signs[:negative] = -1
    signs[100:] = -1
    return {"w": signs}


def seen(*negative: int) -> EarlyBird:
    bird = EarlyBird(TRAINED, draw)
    for count in negative:
        bird.see(weights(count))
    return bird


def test_a_mask_is_found_when_it_is_near_to_those_of_all_five_epochs_before() -> None:
    assert not seen(20, 20, 20, 20, 20).found  # there are only four before
    assert seen(20, 20, 20, 20, 20, 20).found
    assert seen(20, 22, 24, 26, 28, 29).found
    assert not seen(20, 20, 20, 20, 20, 30).found  # a tenth of those in training
    assert not seen(30, 20, 20, 20, 20, 20).found
    assert seen(30, 20, 20, 20, 20, 20, 20).found  # the first is forgotten


def test_the_distance_is_that_among_the_weights_in_training() -> None:
    assert seen(20, 25).distances == [torch.tensor(0.05).item()]


def test_a_resumed_training_remembers_the_masks() -> None:
    bird = EarlyBird(TRAINED, draw)
    bird.load_state_dict(seen(40, 20, 20, 20, 20, 21).state_dict())
    assert bird.epochs == EARLY_BIRD_MEMORY + 1 and not bird.found
    bird.see(weights(20))
    assert bird.found


def test_a_round_ends_and_is_validated_with_its_mask_also_if_it_is_stopped_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit = find_module.fit

    def twice(task, images, name, folder, callbacks):
        """Stopped after the last checkpoint, before the result is stored, and started again."""
        before = {name: value.clone() for name, value in task.state_dict().items()}
        fit(task, images, name, folder, callbacks)
        task.load_state_dict(before)
        callbacks[:] = [EarlyBird(bird.masks, bird.draw) for bird in callbacks]
        metrics = fit(task, images, name, folder, callbacks)
        assert [bird.epochs for bird in callbacks] == [EARLY_BIRD_MEMORY + 1] * len(callbacks)
        return metrics

    monkeypatch.setattr(find_module, "fit", twice)
    # The learning rate is too low to move a mask: it is found as soon as there are five before it.
    settings = ["data.size=16", "data.subset=32", "batch_size=16", "rounds=1", f"out={tmp_path}"]
    settings += ["early_bird=true", "training.epochs=8", "training.lr=1e-6", "pretrain.epochs=1"]
    find(load_config(CONFIG, [*settings, "trainer.accelerator=cpu"]))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert "saved" not in lines[0] and lines[1]["saved"] == 0.25
    # Neighbours are looked up in the last epoch only, which it does not have.
    assert {"train_loss", "val_knn_top1"} <= set(lines[1])
    assert Ticket.load(tmp_path / "round_01.ticket").meta.recipe["early_bird"] is True
