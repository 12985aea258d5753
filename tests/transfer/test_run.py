"""A ticket is trained on a dataset, stays sparse, and the run repeats and resumes bit for bit."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from pytorch_lightning import Trainer
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.tuner import Tuner
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lth_plugins as lth
from lth_plugins.commands import cls
from lth_plugins.digits import DigitDataset
from lth_plugins.errors import LthError
from lth_plugins.resilience.exit_codes import EXIT_CODE
from lth_plugins.resilience.lock import LOCK
from lth_plugins.ticket.arch import STAGES, part_of
from lth_plugins.training.loader import TrainLoader
from lth_plugins.training.settings import Phase
from lth_plugins.transfer import TransferConfig, load_config
from lth_plugins.transfer import run as run_module
from lth_plugins.transfer.features import Extractor
from lth_plugins.transfer.run import Transfer, classify, evaluate, open_ticket, search
from lth_plugins.transfer.task import Classifier

Configure = Callable[..., TransferConfig]
TOOL = Path(__file__).parents[2] / "tools" / "train_cls.py"


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def contents(folder: Path) -> dict[str, bytes]:
    """All files but logs, by name; times are left out."""
    found = {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file() and p.name != LOCK}
    result = json.loads(found.pop("result.json"))
    return {**found, "result": json.dumps({**result, "seconds": 0}).encode(), "config.yaml": b""}


class Killed(Exception):
    pass


def die(*_: Any) -> None:
    raise Killed


def kill_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Make training die in this step, counted from 0."""
    train = Classifier.training_step

    def training_step(self: Classifier, batch: Any, batch_idx: int) -> Any:
        if self.global_step == step:
            raise Killed
        return train(self, batch, batch_idx)

    monkeypatch.setattr(Classifier, "training_step", training_step)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, tiny: Path, ticket18_file: Path) -> Path:
    """The folder of a run that was not disturbed."""
    folder = tmp_path_factory.mktemp("transfer") / "whole"
    classify(load_config(tiny, [f"ticket={ticket18_file}", f"out={folder}"]))
    return folder


def test_fine_tuning_changes_what_is_kept_and_nothing_else(
    whole: Path, ticket18: lth.Ticket
) -> None:
    result = json.loads((whole / "result.json").read_text())
    assert result["ticket"] == ticket18.digest
    assert result["sparsity"] == pytest.approx(ticket18.sparsity)
    assert result["top1"] == lines(whole)[-1]["val_top1"]
    assert [line["epoch"] for line in lines(whole)] == [1, 2]

    final = lth.Ticket.load(whole / "final.ticket")
    assert final.masks == ticket18.masks
    assert final.meta.parent == ticket18.digest
    trained = torchvision.models.resnet18(num_classes=10)
    trained.load_state_dict(load_file(whole / "model.safetensors"))  # stock names, all of them
    for name, mask in ticket18.masks.items():
        weight = trained.get_parameter(name)
        assert not weight[~mask].any()
        assert not torch.equal(weight, ticket18.sparse_weights()[name])
        assert torch.equal(weight, final.weights[name])
    assert not (whole / "checkpoints").exists()


def test_a_finished_run_is_not_run_again(
    whole: Path, configure: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    kill_at(monkeypatch, 0)
    files = [path for path in whole.rglob("*") if path.name != LOCK]
    before = {path: path.stat().st_mtime_ns for path in files}

    result = classify(configure(f"out={whole}"))

    assert result == json.loads((whole / "result.json").read_text())
    assert {path: path.stat().st_mtime_ns for path in files} == before


def test_a_run_killed_again_and_again_resumes_bit_for_bit(
    whole: Path, configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configure("checkpoint_steps=1")
    for step in (2, 3):  # between two epochs, and inside one
        with monkeypatch.context() as patch, pytest.raises(Killed):
            kill_at(patch, step)
            classify(config)
    assert not (tmp_path / "run" / "result.json").exists()
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Transfer, "_result", die)  # after training, before anything is stored
        classify(config)
    classify(config)

    assert contents(tmp_path / "run") == contents(whole)


def test_the_small_stem_is_not_the_tickets(
    configure: Configure, ticket18: lth.Ticket, cifar10: Path, tmp_path: Path
) -> None:
    config = configure("data.name=cifar10", f"data.root={cifar10}", "data.size=8", "stem=small")

    transfer = Transfer(config, open_ticket(config))

    trunk = transfer.model.trunk
    assert (trunk.conv1.kernel_size, trunk.conv1.stride) == ((3, 3), (1, 1))
    assert isinstance(trunk.maxpool, nn.Identity)
    weights = ticket18.sparse_weights()
    for name, value in trunk.state_dict().items():
        if part_of(name) in STAGES:
            assert torch.equal(value, weights[name]), name

    transfer.run()

    folder = tmp_path / "run"
    assert not (folder / "final.ticket").exists()  # not a standard trunk
    trained = load_file(folder / "model.safetensors")
    assert trained["conv1.weight"].shape == (64, 3, 3, 3)
    assert all(not trained[name][~mask].any() for name, mask in ticket18.masks.items())


@pytest.mark.parametrize("precise_bn", [0, 1])
def test_a_linear_probe_computes_features_once_and_leaves_the_trunk(
    configure: Configure,
    ticket18: lth.Ticket,
    precise_bn: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[int] = []
    draw = DigitDataset.__getitem__
    monkeypatch.setattr(DigitDataset, "__getitem__", lambda s, i: seen.append(i) or draw(s, i))
    settings = ["mode=linear", "optimizer.weight_decay=0.1", f"precise_bn={precise_bn}"]

    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(patch, 3)
        classify(configure(*settings))
    classify(configure(*settings))

    # Two splits of 32, whatever the number of epochs and attempts, and the batch for BatchNorm.
    assert len(seen) == 64 + 16 * precise_bn
    found = load_file(tmp_path / "run" / "model.safetensors")
    for name, weight in ticket18.sparse_weights().items():
        statistic = "running" in name or "num_batches" in name
        assert torch.equal(found[name], weight) or (precise_bn and statistic), name
    changed = not torch.equal(found["bn1.running_var"], ticket18.weights["bn1.running_var"])
    assert changed == bool(precise_bn)
    assert "fc.weight" in found
    assert not (tmp_path / "run" / "final.ticket").exists()
    assert not (tmp_path / "run" / "features.safetensors").exists()


@pytest.mark.parametrize("signalled_in", [0, 1], ids=["a batch", "the last batch"])
def test_sigterm_stops_a_probe_that_computes_features(
    configure: Configure, signalled_in: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, done = Extractor.predict_step, []

    def predict_step(self: Extractor, batch: Any, batch_idx: int) -> Any:
        found = step(self, batch, batch_idx)
        done.append(batch_idx)
        if batch_idx == signalled_in:
            os.kill(os.getpid(), signal.SIGTERM)
        return found

    monkeypatch.setattr(Extractor, "predict_step", predict_step)
    with pytest.raises(SystemExit) as ended:
        classify(configure("mode=linear", "precise_bn=0"))
    assert ended.value.code == EXIT_CODE
    assert done == list(range(signalled_in + 1))
    assert not (tmp_path / "run" / "features.safetensors").exists()


def test_a_probe_trains_on_the_features_of_the_sub_network(configure: Configure) -> None:
    config = configure("mode=linear", "precise_bn=1", "training.lr=0")
    transfer = Transfer(config, open_ticket(config))
    top1 = transfer.run()["top1"]

    network = nn.Sequential(transfer.model.trunk, transfer.model.fc).eval()
    with torch.no_grad():
        hits = [network(x[None]).argmax().item() == y for x, y in transfer.images.val]
    assert top1 == sum(hits) / len(hits)


class Leak(Callback):
    """Writes to pruned weights after an optimizer step, as nothing may."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: Trainer, module: Classifier, *_: Any) -> None:
        if trainer.global_step == self.step:
            module.trunk.layer2[0].conv1.weight.data.fill_(1)


@pytest.mark.parametrize("step", [3, 4], ids=["inside an epoch", "at its end"])
def test_a_leak_stops_the_run_before_it_is_saved(
    step: int, configure: Configure, tmp_path: Path
) -> None:
    config = configure("checkpoint_steps=1")
    with pytest.raises(lth.TicketError, match=r"layer2\.0\.conv1\.weight to be zero, found \d+"):
        Transfer(config, open_ticket(config)).run([Leak(step)])

    (saved,) = (tmp_path / "run").rglob("*.ckpt")
    assert torch.load(saved, weights_only=False)["global_step"] == step - 1
    assert not (tmp_path / "run" / "result.json").exists()


def test_a_learning_rate_finder_beforehand_changes_nothing(
    whole: Path, configure: Configure, tmp_path: Path
) -> None:
    config = configure()
    run = Transfer(config, open_ticket(config))
    run.start_folder()
    loader = TrainLoader(run.images.train, config.batch_size, run.model.stream)
    run.model.batches = len(loader)
    trainer = Trainer(accelerator="cpu", logger=False, default_root_dir=tmp_path / "finder")

    finder = Tuner(trainer).lr_find(
        run.model, loader, num_training=5, update_attr=False, early_stop_threshold=None
    )

    assert len(finder.results["loss"]) == 5
    run.handle.verify()
    run.run()
    assert contents(tmp_path / "run") == contents(whole)


def test_baselines(configure: Configure, ticket18: lth.Ticket, tmp_path: Path) -> None:
    dense = lth.Ticket.dense(ticket18.weights, source="test").save(tmp_path / "round_00.ticket")

    shuffled = open_ticket(configure("random=true", "seed=3", f"weights={dense}"))
    turned = open_ticket(configure("reverse=true", f"weights={dense}"))

    assert shuffled.masks == ticket18.masks.shuffled(3)
    assert turned.masks == ~ticket18.masks
    config = configure("load_weights=false")
    fresh = Transfer(config, open_ticket(config))
    weight = fresh.model.trunk.layer1[0].conv1.weight
    mask = ticket18.masks["layer1.0.conv1.weight"]
    assert not weight[~mask].any()
    assert not torch.equal(weight[mask], ticket18.weights["layer1.0.conv1.weight"][mask])


def test_a_ticket_of_the_task_is_pruned_by_what_the_task_trained(
    configure: Configure, ticket18: lth.Ticket, tmp_path: Path
) -> None:
    dense = lth.Ticket.dense(ticket18.weights, source="test").save(tmp_path / "dense.ticket")
    settings = [f"ticket={dense}", "rounds=1", "stem=small", "data.size=8"]
    settings += ["training.epochs=1", "data.subset=16"]

    paths = search(configure(*settings))

    folder = tmp_path / "run"
    assert paths == [folder / "round_00.ticket", folder / "round_01.ticket"]
    found = lth.Ticket.load(paths[1])
    trained = load_file(folder / "train_00" / "model.safetensors")
    stages = {n: v for n, v in trained.items() if part_of(n) in STAGES}
    assert found.masks == lth.prune({**ticket18.weights, **stages}, 0.2)
    assert found.meta.source == "digits"
    assert torch.equal(found.weights["bn1.weight"], ticket18.weights["bn1.weight"])  # rewound
    results = [json.loads((folder / f"train_0{k}" / "result.json").read_text()) for k in (0, 1)]
    assert [round(result["sparsity"], 3) for result in results] == [0, 0.2]
    # Each round is an ordinary run: its own configuration repeats it.
    again = load_config(folder / "train_01" / "config.yaml", ["out=" + str(tmp_path / "again")])
    assert classify(again)["digest"] == results[1]["digest"]
    assert search(configure(*settings)) == paths
    with pytest.raises(LthError, match=r"structure\.kind is the default there, channel"):
        search(configure(*settings, "structure.kind=channel"))
    with pytest.raises(LthError, match="searches is True there"):
        classify(configure(f"ticket={dense}", *settings[2:]))


@pytest.mark.parametrize("rewind", ["init", "none"])
def test_a_round_of_the_task_starts_from_what_it_is_rewound_to(
    rewind: str,
    configure: Configure,
    ticket18: lth.Ticket,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    starts: list[tuple[dict[str, Tensor], Phase]] = []
    fit = run_module.fit

    def watched(task: Classifier, *arguments: Any) -> dict[str, float]:
        state = {n.removeprefix("trunk."): v.clone() for n, v in task.state_dict().items()}
        starts.append((state, task.phase))
        return fit(task, *arguments)

    monkeypatch.setattr(run_module, "fit", watched)
    dense = lth.Ticket.dense(ticket18.weights, source="test").save(tmp_path / "dense.ticket")
    settings = [f"ticket={dense}", "rounds=1", f"rewind={rewind}"]
    settings += ["stem=small", "data.size=8", "training.epochs=2", "training.milestones=[1]"]

    paths = search(configure(*settings))

    found = lth.Ticket.load(paths[1])
    folder = tmp_path / "run"
    trained = load_file(folder / "train_00" / "model.safetensors")
    (first, _), (second, phase) = starts
    origin = trained
    if rewind == "init":
        origin = first
        name = "layer1.0.conv1.weight"
        assert not torch.equal(first[name], ticket18.weights[name])
    for name, value in origin.items():  # the small stem and the head, too
        mask = found.masks.get(name, torch.ones((), dtype=torch.bool))
        assert torch.equal(second[name], value * mask), name
    stages = {n: v for n, v in trained.items() if part_of(n) in STAGES}
    assert found.masks == lth.prune({**ticket18.weights, **stages}, 0.2)
    assert found.meta.recipe["rewind"] == rewind
    tuning = rewind == "none"  # at the rate after the last milestone
    assert phase.lr == pytest.approx(0.002 if tuning else 0.02)
    assert (phase.milestones, phase.warmup_epochs) == (([], 0) if tuning else ([1], 1))
    starts.clear()
    assert search(configure(*settings)) == paths and not starts  # nothing is trained again


def test_a_start_of_another_model_is_refused(whole: Path, configure: Configure) -> None:
    start = f"start={whole / 'model.safetensors'}"
    with pytest.raises(LthError, match=r"arch=resnet18, stem=small .* found conv1.weight of"):
        classify(configure(start, "stem=small"))
    with pytest.raises(LthError, match=r"file of weights at start=nowhere, found no such"):
        classify(configure("start=nowhere"))


class TestBadInput:
    """Each is refused before any training, and nothing is written."""

    @pytest.fixture(autouse=True)
    def nothing_happens(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
        monkeypatch.setattr(Classifier, "training_step", None)
        yield
        assert not (tmp_path / "run").exists()

    @pytest.mark.parametrize(
        ("override", "message"),
        [
            ("arch=resnet50", r"arch=resnet50, found one for resnet18"),
            ("ticket=nowhere.ticket", r"nowhere\.ticket"),
            ("ticket_digest=abc", r"expected ticket_digest=abc, found"),
            ("random=true", r"random keeps weights that .* does not hold"),
            ("batch_size=64", r"at least one batch of 64 .* found 32"),
        ],
    )
    def test_a_setting(self, configure: Configure, override: str, message: str) -> None:
        with pytest.raises(LthError, match=message):
            classify(configure(override))

    def test_missing_data(self, configure: Configure, tmp_path: Path) -> None:
        with pytest.raises(LthError, match=f"CIFAR-10 in data.root={tmp_path}/none"):
            classify(configure("data.name=cifar10", f"data.root={tmp_path}/none"))

    def test_a_sparse_ticket_to_search_from(self, configure: Configure) -> None:
        with pytest.raises(LthError, match=r"rounds=1 starts from a dense ticket, found Ticket"):
            search(configure("rounds=1"))


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("training.lr=0.5", "training.lr"),
        ("seed=1", "seed"),
        ("stem=small", "stem"),
        ("ticket={dense}", "ticket_digest"),
    ],
)
def test_a_folder_of_another_recipe_is_refused(
    configure: Configure, ticket18: lth.Ticket, override: str, key: str, tmp_path: Path
) -> None:
    dense = lth.Ticket.dense(ticket18.weights).save(tmp_path / "dense.ticket")
    config = configure()
    Transfer(config, open_ticket(config)).start_folder()
    before = {path: path.read_bytes() for path in (tmp_path / "run").iterdir()}

    with pytest.raises(LthError, match=f"made by another recipe: {key} is .* there"):
        classify(configure(override.format(dense=dense)))

    assert {path: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("config.yaml", "task: supervised\n", "not a folder of this kind of run"),
        ("result.json", "{}", "has a result.json but no config.yaml"),
    ],
)
def test_a_folder_of_something_else_is_refused(
    configure: Configure, name: str, text: str, message: str, tmp_path: Path
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).write_text(text)

    with pytest.raises(LthError, match=message):
        classify(configure())

    assert (tmp_path / "run" / name).read_text() == text


def test_the_command(
    tiny: Path, ticket18_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main, out = cls.main, tmp_path / "run"
    command = [str(tiny), f"out={out}", "--ticket", str(ticket18_file)]
    assert main([*command, "training.epochs=1"]) == 0
    top1 = json.loads((out / "result.json").read_text())["top1"]
    said = capsys.readouterr().out.splitlines()[-1]
    assert said == f"top1 {100 * top1:.2f} %, {out}/result.json"

    assert main([*command, "training.epochs=2"]) == 2
    error = "lth cls: error: .*training.epochs is 1 there, 2 was asked for"
    assert re.match(error, capsys.readouterr().err)


def test_runs_of_one_seed_are_pairs(
    configure: Configure, ticket18: lth.Ticket, tmp_path: Path
) -> None:
    """Whatever the ticket, they share the order of images, the augmentations and the head."""
    dense = lth.Ticket.dense(ticket18.weights, source="test").save(tmp_path / "dense.ticket")
    weights = {name: value * 1.5 for name, value in ticket18.weights.items()}
    other = lth.Ticket.dense(weights, source="other").save(tmp_path / "other.ticket")

    class Seen(Callback):
        def __init__(self) -> None:
            self.images: list[Tensor] = []

        def on_train_batch_start(self, trainer: Any, task: Any, batch: Any, index: int) -> None:
            self.images.append(batch[0].clone())

    def start(*changes: str) -> tuple[Tensor, Tensor]:
        config = configure("training.epochs=1", "training.lr=1e-9", "seed=3", *changes)
        transfer, seen = Transfer(config, open_ticket(config)), Seen()
        head = transfer.model.fc.weight.detach().clone()
        transfer.run([seen])
        return head, torch.cat(seen.images)

    head, images = start(f"out={tmp_path}/0")
    for k, changes in enumerate(
        (
            [f"ticket={dense}"],
            [f"ticket={other}"],
            ["random=true", f"weights={dense}"],
            ["load_weights=false"],
        ),
        start=1,
    ):
        own_head, own_images = start(f"out={tmp_path}/{k}", *changes)
        assert torch.equal(own_head, head) and torch.equal(own_images, images), changes
    own_head, own_images = start(f"out={tmp_path}/9", "seed=4")
    assert not torch.equal(own_head, head) and not torch.equal(own_images, images)


def test_a_model_is_evaluated_without_training(
    whole: Path, configure: Configure, tmp_path: Path
) -> None:
    before = (whole / "result.json").read_text()
    config = configure(f"out={tmp_path}/evaluated", f"start={whole}/model.safetensors")
    result = evaluate(config)
    assert result["top1"] == json.loads(before)["top1"]
    assert json.loads((tmp_path / "evaluated/evaluation.json").read_text()) == result
    assert (whole / "result.json").read_text() == before
    with pytest.raises(lth.RunError):  # not into the folder of a training
        evaluate(configure(f"out={whole}", f"start={whole}/model.safetensors"))


def test_a_ticket_learns_from_a_dense_runs_model_and_resumes_bit_for_bit(
    whole: Path, configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = shutil.copy(whole / "model.safetensors", tmp_path / "teacher.safetensors")
    taught = [f"teacher={teacher}", "distill.temperature=2", "checkpoint_steps=1"]
    classify(configure(*taught, f"out={tmp_path}/taught"))
    assert all(line["train_distill"] > 0 for line in lines(tmp_path / "taught"))
    final = lth.Ticket.load(tmp_path / "taught/final.ticket")
    assert len(final.meta.recipe["transfer"]["teacher"]) == 64
    assert str(tmp_path) not in json.dumps(final.meta.to_dict())
    assert not any("train_distill" in line for line in lines(whole))

    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(patch, 3)
        classify(configure(*taught))
    other = [f"teacher={tmp_path}/other.safetensors", *taught[1:]]
    save_file({**load_file(teacher), "fc.bias": torch.ones(10)}, tmp_path / "other.safetensors")
    for options in (other, ["checkpoint_steps=1"]):
        with pytest.raises(lth.RunError, match="made by another recipe"):
            classify(configure(*options))
    classify(configure(*taught))
    assert contents(tmp_path / "run") == contents(tmp_path / "taught")


def test_each_run_of_a_search_has_the_teacher(
    whole: Path, configure: Configure, dense18_file: Path, tmp_path: Path
) -> None:
    options = [f"ticket={dense18_file}", f"teacher={whole}/model.safetensors", "rounds=1"]
    search(configure(*options, "training.epochs=1", "training.warmup_epochs=0"))
    for k in (0, 1):
        assert lines(tmp_path / f"run/train_{k:02d}")[0]["train_distill"] > 0
    assert len(lth.Ticket.load(tmp_path / "run/round_01.ticket").meta.recipe["teacher"]) == 64


def test_a_teacher_of_another_network_is_refused(
    whole: Path, configure: Configure, tmp_path: Path
) -> None:
    state = load_file(whole / "model.safetensors")
    head = {"fc.weight": state["fc.weight"][:4], "fc.bias": state["fc.bias"][:4]}
    trunk = {name: value for name, value in state.items() if not name.startswith("fc.")}
    changed = (tmp_path / "changed").with_suffix(".safetensors")
    for given, found in (
        ({**trunk, **head}, r"found fc\.bias of shape \(4,\)"),
        (trunk, r"found no fc\.bias"),
        ({**state, "layer1.2.conv1.weight": torch.zeros(1)}, "found layer1.2.conv1.weight of sh"),
    ):
        save_file(given, changed)
        with pytest.raises(lth.ConfigError, match=f"and 10 classes at teacher={changed}, {found}"):
            classify(configure(f"teacher={changed}"))
    with pytest.raises(lth.RunError, match="teacher=none.safetensors, found no such file"):
        classify(configure("teacher=none.safetensors"))
    with pytest.raises(lth.ConfigError, match="mode=linear trains a head on features that were"):
        configure("mode=linear", f"teacher={changed}")
    with pytest.raises(lth.ConfigError, match="expected a teacher with distill.weight"):
        configure("distill.weight=2")
    save_file(state, changed)
    ticket = lth.Ticket.load(whole / "final.ticket")
    bgr = replace(ticket, meta=replace(ticket.meta, input=lth.InputSpec("BGR")))
    bgr.save(tmp_path / "final.ticket")
    with pytest.raises(lth.TicketError, match="trained on the input of the student.*found one"):
        classify(configure(f"teacher={changed}"))
    assert not (tmp_path / "run").exists()
