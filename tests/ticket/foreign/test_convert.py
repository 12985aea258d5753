"""Tickets to and from other frameworks' checkpoints, and the tool that does it."""

import os

import pytest
import torch
import torchvision
from torch.nn.utils import prune as torch_prune

from lth_plugins import ConfigError, Ticket, TicketError
from lth_plugins.ticket.foreign.convert import from_checkpoint
from lth_plugins.ticket.foreign.formats import FORMATS, to_checkpoint
from tests.ticket.states import save


@pytest.mark.parametrize("format", FORMATS)
def test_every_format_reads_back(ticket18, tmp_path, format: str) -> None:
    path = tmp_path / ("out.pkl" if format == "detectron2" else "out.pth")
    to_checkpoint(ticket18, path, format)
    back = from_checkpoint(path, "test", ticket18.meta.input)
    counters = {n for n in back.weights if n.endswith("num_batches_tracked")}
    for name, value in ticket18.sparse_weights().items():
        if name not in counters:
            assert torch.equal(back.sparse_weights()[name], value), name
    assert back.masks == ticket18.masks if format == "torch-prune" else back.density == 1


def test_a_ticket_loads_into_a_model_pruned_with_torch(ticket18, tmp_path) -> None:
    to_checkpoint(ticket18, tmp_path / "a.pth", "torch-prune")
    model = torchvision.models.resnet18()
    for name in ticket18.masks:
        torch_prune.identity(model.get_submodule(name.removesuffix(".weight")), "weight")
    missing, unexpected = model.load_state_dict(
        torch.load(tmp_path / "a.pth", weights_only=True)["state_dict"], strict=False
    )
    assert set(missing) == {"fc.weight", "fc.bias"} and not unexpected
    model.eval()(torch.zeros(1, 3, 32, 32))
    expected = ticket18.sparse_weights()["layer4.1.conv2.weight"]
    assert torch.equal(model.layer4[1].conv2.weight, expected)


def test_a_mask_of_half_the_layers_keeps_the_others_whole(resnet18_state, tmp_path) -> None:
    name = "layer1.0.conv1.weight"
    resnet18_state[f"{name}_orig"] = resnet18_state.pop(name)
    resnet18_state[f"{name}_mask"] = torch.zeros(64, 64, 3, 3)
    densities = from_checkpoint(save(resnet18_state, tmp_path / "a.pth")).masks.densities()
    assert densities.pop(name) == 0 and set(densities.values()) == {1.0}


def test_what_is_not_a_resnet_is_refused_with_the_file_named(tmp_path) -> None:
    other = save({"a": torch.zeros(1)}, tmp_path / "a.pth")
    with pytest.raises(TicketError, match=r"a\.pth cannot be made a ticket: .*Is it a ResNet"):
        from_checkpoint(other)
    with pytest.raises(TicketError, match="expected a state dict"):
        from_checkpoint(save([1, 2], tmp_path / "b.pth"))
    with pytest.raises(TicketError, match="found nothing at"):
        from_checkpoint(tmp_path / "c.pth")


def test_show_prints_what_is_pruned_outside_the_trunk(ticket_tool, whole18, tmp_path) -> None:
    shown = ticket_tool("show", whole18.save(tmp_path / "a.ticket")).stdout
    outside = whole18.outside.masks
    assert f"{100 * outside.sparsity:.2f} % of 512,000 prunable weights" in shown
    assert f"{100 * whole18.sparsity:.2f} % of {whole18.masks.numel:,} prunable" in shown
    assert "fc.weight" in shown and "all outside the trunk" in shown


def test_diff_compares(ticket_tool, ticket18, ticket18_file, tmp_path) -> None:
    assert "the same" in ticket_tool("diff", ticket18_file, ticket18_file).stdout
    other = ticket18.reversed().save(tmp_path / "reversed.ticket")
    shown = ticket_tool("diff", ticket18_file, other)
    assert (
        shown.returncode == 0 and "0.0000" in shown.stdout and "differ in 0 entries" in shown.stdout
    )


def test_a_file_of_the_wrong_ending_is_refused(ticket18, tmp_path) -> None:
    for format, name, message in (
        ("detectron2", "out.pth", "expected a name that ends in .pkl"),
        ("torchvision", "out.pkl", "expected another end than .pkl"),
    ):
        with pytest.raises(ConfigError, match=message):
            to_checkpoint(ticket18, f"{tmp_path}/{name}", format)
    assert not os.listdir(tmp_path)


def test_convert_there_and_back(ticket_tool, ticket18, ticket18_file, tmp_path) -> None:
    for command in (
        ("convert", ticket18_file, tmp_path / "a.pth", "--to", "torch-prune"),
        ("convert", tmp_path / "a.pth", tmp_path / "b.ticket", "--source", "moco"),
    ):
        done = ticket_tool(*command)
        assert done.returncode == 0, done.stderr
    back = Ticket.load(tmp_path / "b.ticket")
    assert back.masks == ticket18.masks and back.meta.source == "moco"


@pytest.mark.parametrize(
    "command",
    [
        ("show", "nowhere.ticket"),
        ("show", "unknown-name"),
        ("convert", "nowhere.ticket", "out.pth", "--to", "mmseg"),
        ("convert", "nowhere.pth", "out.ticket"),
        ("prune", "nowhere.pth", "out.ticket", "--sparsity", "0.5"),
        ("convert", "a.pth", "b.pth"),
    ],
)
def test_bad_input_is_one_sentence_and_writes_nothing(
    ticket_tool, tmp_path, monkeypatch, command
) -> None:
    monkeypatch.chdir(tmp_path)
    done = ticket_tool(*command)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("ticket.py: error: expected") and done.stderr.count("\n") == 1
    assert not os.listdir(tmp_path)
