"""keep=trained: beside each round's ticket (m, θ_p), what training it ended in. Real digits."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lth_plugins import Ticket
from lth_plugins.pretrain import find as find_module
from lth_plugins.pretrain.find import head_beside
from lth_plugins.pruning.search.imp import round_path, trained_path
from tests.pretrain.searches import State, small_search

search = partial(small_search, settings=["pretrain.epochs=1", "training.epochs=1", "rounds=1"])


@pytest.fixture
def ends(monkeypatch: pytest.MonkeyPatch) -> dict[str, State]:
    """The whole state after each training, by its name."""
    found: dict[str, State] = {}
    fit = find_module.fit

    def watched(task, images, name, folder, *more):
        metrics = fit(task, images, name, folder, *more)
        found[name] = {name: value.clone() for name, value in task.state_dict().items()}
        return metrics

    monkeypatch.setattr(find_module, "fit", watched)
    return found


def artefacts(out: Path) -> dict[str, bytes]:
    """What is the same in each run: tickets and states."""
    return {
        p.name: p.read_bytes() for p in out.iterdir() if p.suffix in (".ticket", ".safetensors")
    }


@pytest.mark.parametrize("task", ["supervised", "simclr", "moco"])
def test_a_round_is_kept_as_trained_with_its_head_beside_it(
    task: str, ends: dict[str, State], tmp_path: Path
) -> None:
    search(tmp_path, "keep=trained", task=task).run()
    dense = Ticket.load(round_path(tmp_path, 0))
    for k, name in enumerate(("pretrain", "round_01")):
        rewound, trained = (Ticket.load(p(tmp_path, k)) for p in (round_path, trained_path))
        assert trained.masks == rewound.masks and trained.meta.parent == rewound.digest
        assert trained.meta.round == k
        assert trained.meta.recipe == {**rewound.meta.recipe, "trained_from": dense.digest}
        whole = ends[name]
        for entry, value in trained.sparse_weights().items():
            assert torch.equal(value, whole[f"trunk.{entry}"]), entry
        head = load_file(head_beside(trained_path(tmp_path, k)))
        assert head.keys() == {n for n in whole if "trunk." not in n} != set()
        assert all(torch.equal(value, whole[entry]) for entry, value in head.items())


def test_a_folder_that_was_begun_without_is_completed_and_one_that_was_killed_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, kept, killed = (tmp_path / name for name in ("plain", "kept", "killed"))
    search(plain).run()
    shutil.copytree(plain, kept)
    search(kept, "keep=trained").run()
    before, after = artefacts(plain), artefacts(kept)
    assert after.keys() == before.keys() | {
        f"round_{k:02d}.{name}" for k in (0, 1) for name in ("trained.ticket", "head.safetensors")
    }
    assert all(after[name] == before[name] for name in before)

    save = Ticket.save

    def save_no_trained(ticket: Ticket, path: Path) -> Path:
        if path == trained_path(killed, 1):
            raise KeyboardInterrupt
        return save(ticket, path)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Ticket, "save", save_no_trained)
        search(killed, "keep=trained").run()
    assert trained_path(killed, 0).exists() and not trained_path(killed, 1).exists()
    search(killed, "keep=trained").run()
    assert artefacts(killed) == after
