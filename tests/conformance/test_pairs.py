"""Runs of one seed are pairs: whatever the ticket, they share their images and their heads."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lth_plugins as lth
from lth_plugins.ticket import locate
from tests.conformance.hosts import marked
from tests.conformance.trainers import TRAINERS, Training, TrainingHost, at

ITERATIONS = 3


def images_in(given: Any) -> Iterator[Tensor]:
    """The images among the arguments of a model's forward pass."""
    if isinstance(given, Tensor) and given.dim() in (3, 4) and given.dtype != torch.long:
        yield given
    elif isinstance(given, Mapping):
        yield from images_in(given.get("image", list(given.values())))
    elif isinstance(given, list | tuple):
        for part in given:
            yield from images_in(part)


def shared(
    host: TrainingHost,
    scenes: Path,
    folder: Path,
    ticket: Path,
    seed: int,
    choice: Mapping[str, Any],
) -> tuple[list[str], dict[str, Tensor], dict[str, Tensor]]:
    """The digests of the images after the first step, and the parameters that training starts with:
    those of the heads, and those of the trunk."""
    seen: list[str] = []
    start: dict[str, Tensor] = {}
    trunk: set[str] = set()

    def watch(model: nn.Module) -> None:
        trunk.update(locate(model.state_dict()).keys.values())
        start.update(copy.deepcopy(dict(model.named_parameters())))

        def note(_: nn.Module, args: Any, kwargs: Any) -> None:
            for image in images_in([args, kwargs]):
                seen.append(hashlib.sha256(image.contiguous().numpy().tobytes()).hexdigest())

        model.register_forward_pre_hook(note, with_kwargs=True)

    host.train(
        Training(
            *(scenes, folder, ticket, ITERATIONS, at({1: watch})),
            choice=choice,
            seed=seed,
            learns=False,
        )
    )
    heads = {name: value for name, value in start.items() if name not in trunk}
    return seen, heads, {name: value for name, value in start.items() if name in trunk}


@pytest.mark.parametrize("framework", marked(TRAINERS))
def test_runs_of_one_seed_share_images_and_heads_whatever_is_trained(
    framework: str, scenes: Path, dense18_file: Path, ticket18_file: Path, tmp_path: Path
) -> None:
    host = TRAINERS[framework]
    other = lth.Ticket.load(dense18_file)
    weights = {name: value * 1.5 for name, value in other.weights.items()}
    source = lth.Ticket.dense(weights, source="other").save(tmp_path / "other.ticket")
    images, heads, dense = shared(host, scenes, tmp_path / "dense", dense18_file, 5, {})
    assert len(images) >= ITERATIONS - 1 and len(set(images)) > 1 and len(heads) > 3
    trunks = []
    for name, ticket, choice in (
        ("ticket", ticket18_file, {}),
        ("source", source, {}),
        ("random", ticket18_file, {"random": True, "seed": 5, "weights": dense18_file}),
        ("reinit", ticket18_file, {"load_weights": False}),
    ):
        own, other_heads, trunk = shared(host, scenes, tmp_path / name, ticket, 5, choice)
        assert own == images, name
        assert other_heads.keys() == heads.keys()
        wrong = [key for key, value in heads.items() if not torch.equal(other_heads[key], value)]
        assert not wrong, (name, wrong)
        trunks.append(trunk)
    for one, another in zip([dense, *trunks], [*trunks, dense], strict=True):  # and differ there
        assert any(not torch.equal(one[key], another[key]) for key in one)
    images_6, heads_6, reinit_6 = shared(
        host, scenes, tmp_path / "six", ticket18_file, 6, {"load_weights": False}
    )
    assert images_6 != images
    assert any(not torch.equal(heads_6[key], value) for key, value in heads.items())
    assert any(not torch.equal(reinit_6[key], value) for key, value in trunks[-1].items())
