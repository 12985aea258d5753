"""Early-bird tickets: when a mask counts as found."""

import torch

from lth_plugins.pretrain.early_bird import MEMORY, EarlyBird
from lth_plugins.ticket import Masks

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


def test_a_training_that_goes_on_remembers_the_masks() -> None:
    bird = EarlyBird(TRAINED, draw)
    bird.load_state_dict(seen(40, 20, 20, 20, 20, 21).state_dict())
    assert bird.epochs == MEMORY + 1 and not bird.found
    bird.see(weights(20))
    assert bird.found
