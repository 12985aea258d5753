"""simCLR and MoCo: what is contrasted, masked and rewound. Real digits, few and small."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torchvision

from lth_plugins import Ticket, TicketError, attached, prune
from lth_plugins.errors import ConfigError
from lth_plugins.pretrain import load_config
from lth_plugins.pretrain.config import FindConfig
from lth_plugins.pretrain.contrastive import first_is_best
from lth_plugins.pretrain.data import open_images
from lth_plugins.pretrain.find import Pretraining
from lth_plugins.pretrain.moco import MoCo
from lth_plugins.pretrain.simclr import SimCLR, _accuracy
from lth_plugins.ticket import IMAGENET
from lth_plugins.training.fit import delete_checkpoints, fit
from lth_plugins.training.loader import Splits

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "pretrain"
SMALL = ["data.size=16", "data.subset=48", "batch_size=16", "checkpoint_steps=1"]
SMALL += ["training.epochs=1", "training.warmup_epochs=0"]


def config(task: str, *overrides: str) -> FindConfig:
    queue = ["contrastive.queue=32"] if task == "moco" else []
    return load_config(CONFIGS / f"digits_{task}.yaml", [*SMALL, *queue, *overrides])


def make(kind: type, settings: FindConfig, stream: int = 1):
    return kind(settings, settings.training, classes=10, stream=stream)


def images(kind: type, settings: FindConfig) -> Splits:
    return open_images(settings.data, kind.views(settings, IMAGENET))


def sparse_ticket(task) -> Ticket:
    dense = Ticket.dense(task.trunk)
    return dense.with_masks(prune(dense.weights, 0.5), {})


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[MoCo, Ticket, dict[str, float]]:
    """A MoCo of which one epoch was trained, from a ticket."""
    settings = config("moco")
    task = make(MoCo, settings)
    ticket = sparse_ticket(task)
    task.rewind(task.state_dict(), ticket)
    folder = tmp_path_factory.mktemp("moco")
    return task, ticket, fit(task, images(MoCo, settings), "round_01", folder)


def test_both_encoders_of_moco_carry_the_query_encoders_mask(trained) -> None:
    task, ticket, _ = trained
    for trunk in (task.trunk, task.key_trunk):
        handle = attached(trunk)
        assert handle is not None and handle.masks == ticket.masks
        handle.verify()


def test_the_key_encoder_follows_the_query_encoder_and_receives_no_gradient(trained) -> None:
    task, _, _ = trained
    keys = [*task.key_trunk.parameters(), *task.key_projection.parameters()]
    assert all(p.grad is None and not p.requires_grad for p in keys)
    assert not {id(p) for p in keys} & {id(p) for p in task.trained()}
    start = make(MoCo, config("moco"))
    moved = [
        (task.get_parameter(name) - start.get_parameter(name)).norm().item()
        for name in ("projection.layers.2.weight", "key_projection.layers.2.weight")
    ]
    assert 0 < moved[1] < moved[0]


def test_the_queue_starts_afresh_in_each_training_and_is_no_weight(trained) -> None:
    task, _, _ = trained
    fresh = [make(MoCo, config("moco")).queue for _ in range(2)]
    assert torch.equal(*fresh)
    assert not torch.equal(task.queue, fresh[0])
    assert torch.allclose(task.queue.norm(dim=1), torch.ones(32))
    assert not any("bank" in name for name in task.state_dict())


def test_heads_and_key_encoder_are_rewound_with_the_trunk(trained) -> None:
    task, ticket, _ = trained
    pretrained = {k: v.clone() for k, v in make(MoCo, config("moco"), 7).state_dict().items()}
    pretrained["key_trunk.bn1.running_mean"] += 1
    pretrained["key_trunk.layer1.0.conv1.weight"] += 1
    again = make(MoCo, config("moco"))
    again.load_state_dict(task.state_dict())
    again.rewind(pretrained, ticket)
    state = again.state_dict()
    for name, value in pretrained.items():
        mask = ticket.masks.get(name.split("trunk.")[-1]) if "trunk." in name else None
        assert torch.equal(state[name], value if mask is None else value * mask), name


@pytest.mark.parametrize("kind", [MoCo, SimCLR])
def test_a_round_is_measured_by_its_loss_its_contrast_and_its_neighbours(
    kind: type, trained, tmp_path: Path
) -> None:
    if kind is MoCo:
        metrics = trained[2]
    else:
        settings = config("simclr")
        metrics = fit(make(SimCLR, settings), images(SimCLR, settings), "pretrain", tmp_path)
    assert set(metrics) == {"train_loss", "train_top1", "val_knn_top1", "seconds"}
    assert 0 <= metrics["train_top1"] <= 1
    assert metrics["val_knn_top1"] > 0.2, "neighbours among 48 images of 10 digits, by chance 0.1"


class StopsInTheEpoch:
    """Mixed into a task: killed in its third step, after the checkpoint of the second."""

    def training_step(self, batch, batch_idx):
        if batch_idx == 2:
            raise ConnectionError("pulled the plug")
        return super().training_step(batch, batch_idx)


def test_a_killed_training_resumes_inside_an_epoch_bit_for_bit(trained, tmp_path: Path) -> None:
    whole, ticket, metrics = trained
    settings = config("moco")
    pretrained = make(MoCo, settings).state_dict()

    def train(kind: type):
        task = make(kind, settings)
        task.rewind(pretrained, ticket)
        return task, fit(task, images(MoCo, settings), "round_01", tmp_path)

    with pytest.raises(ConnectionError):
        train(type("Killed", (StopsInTheEpoch, MoCo), {}))
    task, resumed = train(MoCo)
    for name, value in whole.state_dict().items():
        assert torch.equal(task.state_dict()[name], value), name
    assert torch.equal(task.queue, whole.queue)
    assert {**resumed, "seconds": 0} == {**metrics, "seconds": 0}
    delete_checkpoints("round_01", tmp_path)
    assert not (tmp_path / "checkpoints").exists()


def test_two_views_of_a_digit_are_different_images_of_it() -> None:
    settings = config("simclr")
    data = images(SimCLR, settings)
    (one, other), label = data.train[0]
    assert one.shape == other.shape == (3, 16, 16)
    assert not torch.equal(one, other)
    assert label == data.bank[0][1]
    assert data.bank[0][0].shape == data.val[0][0].shape == (3, 16, 16)


def test_contrastive_accuracy_counts_partners_that_are_nearest() -> None:
    assert first_is_best(torch.tensor([[0.9, 0.1], [0.2, 0.3]])) == 0.5
    one = torch.eye(3)
    assert _accuracy(one, one) == 1
    assert _accuracy(one, one.roll(1, 0)) == 0
    # Its partner loses to another image's same view.
    near = torch.tensor([[1.0, 0.0], [1.0, 0.1]])
    assert _accuracy(near, torch.tensor([[1.0, 1.0], [-1.0, 1.0]])) == 0


def test_a_queue_that_batches_do_not_fill_is_refused_before_training(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(ConfigError, match=r"queue to be a multiple of batch_size=16, found 40"):
        Pretraining(replace(config("moco", "contrastive.queue=40"), out=str(out)))
    assert not out.exists()


def mocos_own_checkpoint(dimensions: int) -> dict:
    """As facebookresearch/moco writes it: both encoders, DistributedDataParallel's prefix."""
    state = {}
    for encoder in ("encoder_q", "encoder_k"):
        model = torchvision.models.resnet18()
        model.fc = torch.nn.Sequential(
            torch.nn.Linear(512, 512), torch.nn.ReLU(), torch.nn.Linear(512, dimensions)
        )
        state |= {f"module.{encoder}.{k}": v for k, v in model.state_dict().items()}
    return state


def test_moco_starts_from_its_own_checkpoint_with_its_head() -> None:
    state = mocos_own_checkpoint(128)
    task = make(MoCo, config("moco"))
    assert task.take(state)
    for head in (task.projection, task.key_projection):
        assert torch.equal(head.layers[2].weight, state["module.encoder_q.fc.2.weight"])
    for trunk in (task.trunk, task.key_trunk):
        assert torch.equal(trunk.conv1.weight, state["module.encoder_q.conv1.weight"])
    with pytest.raises(
        TicketError, match=r"fc\.2\.weight of shape \(128, 512\), found \(64, 512\)"
    ):
        task.take(mocos_own_checkpoint(64))


@pytest.mark.parametrize("kind", [MoCo, SimCLR])
def test_a_checkpoint_of_lightly_brings_its_head(kind: type) -> None:
    """As lightly's examples save it: the trunk's children in a sequence, the head beside it."""
    theirs = make(kind, config(kind.__name__.lower(), "seed=1"))
    trunk = torch.nn.Sequential(*list(theirs.trunk.children())[:-1])
    state = {f"backbone.{k}": v for k, v in trunk.state_dict().items()}
    state |= {f"projection_head.{k}": v for k, v in theirs.projection.state_dict().items()}
    momentum = theirs.projection.state_dict().items()
    state |= {f"projection_head_momentum.{k}": v + 1 for k, v in momentum}
    task = make(kind, config(kind.__name__.lower()))
    assert task.take(state)
    for name, value in theirs.projection.state_dict().items():
        assert torch.equal(task.projection.state_dict()[name], value), name
    with pytest.raises(TicketError, match=r"with projection_head\.layers\..* found \(128, 512\)"):
        make(kind, config(kind.__name__.lower(), "contrastive.projection=64")).take(state)
