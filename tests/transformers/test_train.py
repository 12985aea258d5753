"""A ticket in transformers' Trainer: saved, stopped, resumed, pruned, and searched for."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import TrainerCallback, set_seed

import lth_plugins as lth
import lth_plugins.transformers as lt
from lth_plugins.resilience.exit_codes import EXIT_CODE
from lth_plugins.resilience.sigterm import Stopped
from lth_plugins.slimming.widths import adopt_widths
from lth_plugins.ticket import locate
from lth_plugins.transformers.names import own_names
from tests.transformers.models import arguments, processor_for, small, trainer

DETR, STEPS, LEAK = "DetrForObjectDetection", 3, "layer2.0.conv1.weight"
Act = Callable[[nn.Module], object]


class At(TrainerCallback):
    """Does something with the model after some steps, before our callbacks."""

    def __init__(self, acts: dict[int, Act]) -> None:
        self.acts = acts

    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        self.acts.get(state.global_step, id)(given["model"])


def train(
    folder: Path,
    ticket: Any,
    acts: dict[int, Act] | None = None,
    resume: bool = False,
    callbacks: tuple[Any, ...] = (),
    kind: str = DETR,
    **options: Any,
) -> Any:
    """Train as a script does that has the import and one line, and our callbacks."""
    set_seed(1)
    model, processor = small(kind), processor_for(kind)
    lt.attach_ticket(model, processor, ticket)
    args = arguments(folder, options.pop("steps", STEPS), **options)
    ours = [At(acts or {}), lt.StopCallback(), lt.TicketCallback(), *callbacks]
    trainer(model, args, processor, ours).train(resume_from_checkpoint=resume or None)
    return model


def stop(_: nn.Module) -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def leak(model: nn.Module) -> None:
    with torch.no_grad():
        model.get_parameter(locate(model).keys[LEAK]).fill_(1.0)


def assert_same_run(one: Path, other: Path) -> None:
    """Two runs ended in the same weights, optimizer states and ticket."""
    final = [lth.Ticket.load(folder / "final.ticket") for folder in (one, other)]
    assert final[0] == final[1]
    last = f"checkpoint-{STEPS}"
    for name in ("model.safetensors", "scheduler.pt"):
        assert (one / last / name).read_bytes() == (other / last / name).read_bytes()
    states = [torch.load(folder / last / "optimizer.pt")["state"] for folder in (one, other)]
    for key, values in states[0].items():
        for name, value in values.items():
            assert torch.equal(states[1][key][name], value), name


@pytest.fixture(scope="module")
def whole(ticket18: lth.Ticket, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("transformers") / "whole"
    train(folder, ticket18)
    return folder


def test_a_run_ends_in_a_ticket_and_its_checkpoints_note_the_masks(
    whole: Path, ticket18: lth.Ticket
) -> None:
    final = lth.Ticket.load(whole / "final.ticket")
    assert final.masks == ticket18.masks and final.meta.source == DETR
    state = json.loads((whole / "checkpoint-1/trainer_state.json").read_text())
    noted = state["stateful_callbacks"]["TicketCallback"]["attributes"]["masks"]
    assert noted == [ticket18.masks.digest]


def test_a_run_that_is_stopped_resumes_bit_for_bit(
    whole: Path, ticket18: lth.Ticket, tmp_path: Path
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Stopped) as ended:
        train(tmp_path, ticket18, {2: stop}, save_strategy="no")
    assert ended.value.code == EXIT_CODE and signal.getsignal(signal.SIGTERM) is before
    assert ended.value.saved == tmp_path / "checkpoint-2"
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]
    train(tmp_path, ticket18, resume=True)
    assert_same_run(whole, tmp_path)


def test_a_leak_stops_the_run_before_it_is_saved(ticket18: lth.Ticket, tmp_path: Path) -> None:
    with pytest.raises(lth.TicketError, match=LEAK):
        train(tmp_path, ticket18, {2: leak})
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]


def test_a_run_is_not_resumed_with_another_ticket(
    whole: Path, ticket18: lth.Ticket, tmp_path: Path
) -> None:
    shutil.copytree(whole / f"checkpoint-{STEPS}", tmp_path / f"checkpoint-{STEPS}")
    dense = lth.Ticket.dense(ticket18.weights)
    for other, found in ((ticket18.shuffled(3), "zero [1-9]"), (dense, "found one that was tr")):
        with pytest.raises(lth.TicketError, match=found) as caught:
            train(tmp_path, other, resume=True, steps=STEPS + 1)
        assert "allow_other_checkpoint=True in attach_ticket" in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == [f"checkpoint-{STEPS}"]


def test_a_model_without_a_ticket_is_not_trained(tmp_path: Path) -> None:
    model, processor = small(DETR), processor_for(DETR)
    with pytest.raises(lth.TicketError, match=r"found none: call lt\.attach_ticket"):
        trainer(model, arguments(tmp_path, 1), processor, [lt.TicketCallback()]).train()


def test_what_cannot_be_written_is_refused_before_training(
    ticket18: lth.Ticket, tmp_path: Path
) -> None:
    model, processor = small(DETR), processor_for(DETR)
    lt.attach_ticket(model, processor, ticket18)
    with pytest.raises(lth.TicketError, match="expected source .* to be text"):
        trainer(model, arguments(tmp_path, 1), processor, [lt.TicketCallback(source=3)]).train()
    assert not list(tmp_path.iterdir())


def test_sparse_training_resumes_with_its_masks(ticket18: lth.Ticket, tmp_path: Path) -> None:
    def run(name: str, **options: Any) -> None:
        sparse = lt.SparseTrainingCallback("rigl", delta_t=1, t_end=1.0)
        train(tmp_path / name, ticket18, callbacks=(sparse,), **options)

    run("whole")
    with pytest.raises(Stopped):
        run("stopped", acts={2: stop})
    with pytest.raises(lth.TicketError, match="Name the ticket that it was trained with"):
        train(tmp_path / "stopped", ticket18, resume=True)
    run("stopped", resume=True, restore_callback_states_from_checkpoint=True)
    assert_same_run(tmp_path / "whole", tmp_path / "stopped")
    masks = lth.Ticket.load(tmp_path / "whole/final.ticket").masks
    assert masks != ticket18.masks and masks.densities() == ticket18.masks.densities()
    gradual = lt.GradualPruningCallback(target=0.9, begin=0, end=STEPS, period=1)
    again = lt.GradualPruningCallback(**gradual.state()["args"])
    assert again.training.recipe == gradual.training.recipe


def slimming(**settings: Any) -> lt.SlimmingCallback:
    images = torch.rand(1, 3, 64, 64)
    return lt.SlimmingCallback(lambda m: m(pixel_values=images), flops=0.6, period=1, **settings)


def test_a_detector_is_slimmed_and_a_run_that_resumes_ends_with_the_same(
    ticket18: lth.Ticket, tmp_path: Path
) -> None:
    def run(name: str, **options: Any) -> Any:
        train(tmp_path / name, ticket18, callbacks=(slimming(end=2),), **options)
        return torch.load(tmp_path / name / "slim.pth")

    found = [run("whole")]
    shutil.copytree(tmp_path / "whole/checkpoint-1", tmp_path / "resumed/checkpoint-1")
    found.append(run("resumed", resume=True))
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())
    model = small(DETR)
    adopt_widths(model, found[0])
    model.load_state_dict(found[0])
    sizes = [sum(v.numel() for v in one.values()) for one in (found[0], small(DETR).state_dict())]
    assert sizes[0] < 0.8 * sizes[1]
    assert lth.Ticket.load(tmp_path / "resumed/slim.ticket").sparsity > 0.5


def test_slimming_refuses_what_it_does_not_fit(tmp_path: Path) -> None:
    for option in ("load_best_model_at_end", "restore_callback_states_from_checkpoint"):
        model, processor = small(DETR), processor_for(DETR)
        args = arguments(tmp_path, 2, save_strategy="no", **{option: True})
        with pytest.raises(lth.ConfigError, match=f"without {option}, found both"):
            trainer(model, args, processor, [slimming()])


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("UperNetForSemanticSegmentation", {"torch_compile": True}),
        ("Mask2FormerForUniversalSegmentation", {"bf16": True, "gradient_accumulation_steps": 2}),
    ],
)
def test_segmentors_train_as_the_official_scripts_train_them(
    kind: str, options: dict[str, Any], ticket18: lth.Ticket, tmp_path: Path
) -> None:
    if "torch_compile" in options:
        options = {**options, "torch_compile_backend": "eager"}
    model = train(tmp_path, ticket18, kind=kind, steps=1, **options)
    lth.attached(model).verify()
    assert lth.Ticket.load(tmp_path / "final.ticket").masks == ticket18.masks


def searched(folder: Path, acts: dict[int, Act], ticket: Any, **settings: Any) -> Any:
    processor = processor_for(DETR)
    return lt.task_search(
        lambda model, args: trainer(model, args, processor, [At(acts)]),
        *(lambda: small(DETR), processor, ticket),
        arguments(folder, 2, lr_scheduler_type="constant"),
        **settings,
    )


def test_a_killed_search_resumes_inside_a_round(dense18_file: Path, tmp_path: Path) -> None:
    def run(acts: dict[int, Act]) -> list[Path]:
        return searched(tmp_path, acts, dense18_file, rounds=1, scope="all").run()

    def kill(model: nn.Module) -> None:
        if lth.attached(model).masks.density < 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run({2: kill})
    shutil.copytree(tmp_path / "train_01/checkpoint-1", tmp_path / "train_01/checkpoint-2")
    (tmp_path / "train_01/checkpoint-2/trainer_state.json").unlink()  # killed while it was saved
    zero, one = map(lth.Ticket.load, run({1: lambda _: pytest.fail("it began anew")}))
    assert (zero.all_masks.density, one.all_masks.density) == pytest.approx((1, 0.8), abs=1e-6)
    assert not any(re.search(r"class_labels|layers\.2", name) for name in one.outside.masks)
    final = lth.Ticket.load(tmp_path / "train_01/final.ticket")
    assert final.all_masks == one.all_masks
    names = own_names(small(DETR))
    trained = load_file(tmp_path / "train_00/checkpoint-2/model.safetensors")
    trained = {names.get(name, name): value for name, value in trained.items()}
    assert one.all_masks == lth.prune(trained, 0.2, zero.all_masks)


def test_a_search_rewinds_to_an_early_step(dense18_file: Path, tmp_path: Path) -> None:
    settings = {"rounds": 1, "rewind": "early", "early_iter": 1}
    searched(tmp_path, {}, dense18_file, **settings).run()
    one = lth.Ticket.load(tmp_path / "round_01.ticket")
    early = load_file(tmp_path / "train_00/checkpoint-1/model.safetensors")
    key = locate(early).keys["conv1.weight"]
    assert torch.equal(one.weights["conv1.weight"], early[key])
    state = json.loads((tmp_path / "train_01/checkpoint-2/trainer_state.json").read_text())
    assert state["global_step"] == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rounds": 0}, "expected rounds of 1 or more"),
        ({"rounds": 1, "round": 2}, "unknown key round in task_search"),
        ({"rounds": 1, "scope": "backbone+neck"}, "prunes nothing outside the backbone"),
    ],
)
def test_invalid_settings_are_refused_before_anything_is_written(
    settings: dict[str, Any], message: str, dense18_file: Path, tmp_path: Path
) -> None:
    with pytest.raises(lth.ConfigError, match=message):
        searched(tmp_path / "out", {}, dense18_file, **settings)
    assert not (tmp_path / "out").exists()
