"""lth ticket pool on what a search of real digits leaves."""

import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lth_plugins import Ticket
from lth_plugins.pretrain import load_config, pool
from lth_plugins.pretrain.find import find

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "pretrain"
SMALL = ["data.size=16", "data.subset=32", "batch_size=16", "trainer.accelerator=cpu"]
SMALL += ["pretrain.epochs=1", "training.epochs=1", "rounds=2", "keep=trained"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("pool") / "run"
    find(load_config(CONFIGS / "digits_supervised.yaml", [*SMALL, f"out={out}"]))
    return out


def trained(folder: Path, k: int) -> Path:
    return folder / f"round_{k:02d}.trained.ticket"


def test_a_pool_is_as_sparse_and_no_worse_and_says_what_it_cost(
    ticket_tool, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lth_plugins.pruning.pools.COEFFICIENTS", (0.1, 0.5))
    kept = {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()}
    out = run / "pooled.ticket"
    done = ticket_tool("pool", trained(run, 2), out, "--with", trained(run, 0), trained(run, 1))
    assert done.returncode == 0, done.stderr
    before, after = map(float, re.findall(r"([\d.]+) % before, ([\d.]+) % now", done.stdout)[0])
    assert after >= before and "5 evaluations" in done.stdout
    base, found = Ticket.load(trained(run, 2)), Ticket.load(out)
    assert found.masks.kept == base.masks.kept and found.meta.round == 2
    assert load_file(run / "pooled.head.safetensors").keys() == {"fc.weight", "fc.bias"}
    assert {name: (run / name).read_bytes() for name in kept} == kept
    # Measured again as it was written, it is as good.
    loaded = pool.Member(found, load_file(run / "pooled.head.safetensors"))
    validation = pool.Validation(run, found, [loaded.head])
    assert 100 * validation.metric_of(loaded) == pytest.approx(after, abs=0.01)


def test_statistics_are_re_estimated_on_training_images_without_a_change_of_weights(run) -> None:
    member = pool.Member(Ticket.load(trained(run, 1)), load_file(run / "round_01.head.safetensors"))
    own, metric = pool.Validation(run, member.ticket, [member.head]).measure(member)
    assert 0 <= metric <= 1 and own.ticket.masks == member.ticket.masks
    moved = {
        n
        for n, v in own.ticket.sparse_weights().items()
        if not torch.equal(v, member.ticket.sparse_weights()[n])
    }
    assert moved and {n.rpartition(".")[2] for n in moved} <= {
        *("running_mean", "running_var", "num_batches_tracked"),
    }


def test_what_a_pool_needs_is_named_and_nothing_is_written(
    ticket_tool, run: Path, tmp_path
) -> None:
    out, elsewhere = tmp_path / "out.ticket", tmp_path / "round_01.trained.ticket"
    shutil.copy(trained(run, 1), elsewhere)
    rewound = run / "round_01.ticket"
    for arguments, said in (
        ((trained(run, 2), out, "--with", rewound), "expected trained tickets, found"),
        ((trained(run, 2), out, "--with", elsewhere), "found no round_01.head.safetensors"),
        ((trained(run, 2), trained(run, 1), "--with", trained(run, 1)), "would be lost"),
    ):
        done = ticket_tool("pool", *arguments)
        assert done.returncode == 2 and said in done.stderr, done.stderr
    shutil.copy(run / "round_01.head.safetensors", tmp_path)
    done = ticket_tool("pool", elsewhere, out, "--with", trained(run, 2))
    assert done.returncode == 2 and "expected the folder of a search" in done.stderr
    assert not out.exists()
