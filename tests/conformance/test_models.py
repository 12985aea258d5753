"""What a ticket promises on the model of every host, and on one without any (C3, C5, C8)."""

from __future__ import annotations

import copy
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import lth_plugins as lth
from lth_plugins.masking.narrowing import narrow_to
from lth_plugins.ticket import UNIT_RANGE, Outside, locate
from tests.conformance.hosts import ALL, Host, marked

LEAK = "layer2.0.conv1.weight"
CONFIGURE = {name: host for name, host in ALL.items() if host.configures}
IN_PIECES = {name: host for name, host in CONFIGURE.items() if host.trunk_only}


@pytest.fixture(params=marked(ALL))
def host(request: pytest.FixtureRequest) -> Host:
    return ALL[request.param]


def steps(host: Host, model: nn.Module, count: int = 2) -> None:
    """Train with momentum and weight decay, which would bring weights back."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, 0.01, momentum=0.9, weight_decay=0.1)
    for step in range(count):
        torch.manual_seed(step)
        optimizer.zero_grad()
        host.loss(model.train()).backward()
        optimizer.step()


def test_pruned_weights_stay_zero_under_the_stock_keys_and_stock_code_loads_them(
    host: Host, ticket18: lth.Ticket, ticket18_file: Path
) -> None:
    model, stock = host.build(str(ticket18_file)), host.build(None)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    steps(host, model)
    state = model.state_dict()
    keys = locate(state).keys
    for name, mask in ticket18.masks.items():
        value = state[keys[name]]
        assert not value[~mask].any(), f"{name} leaks"
        assert not torch.equal(value, before[keys[name]]), f"{name} does not train"
    assert list(state) == list(stock.state_dict())
    stock.load_state_dict(state)
    torch.manual_seed(0)
    ours = host.loss(model.train())
    torch.manual_seed(0)
    assert torch.equal(ours, host.loss(stock.train()))


def test_a_leak_is_refused_when_it_is_saved(host: Host, ticket18_file: Path) -> None:
    model = host.build(str(ticket18_file))
    key = locate(model).keys[LEAK]
    with torch.no_grad():
        model.get_parameter(key).fill_(1.0)
    with pytest.raises(lth.TicketError, match=LEAK):
        model.state_dict()
    with pytest.raises(lth.TicketError, match=LEAK):
        lth.attached(model).verify()


def test_a_copy_is_masked_and_a_detached_model_is_not(
    host: Host, ticket18: lth.Ticket, ticket18_file: Path
) -> None:
    model = host.build(str(ticket18_file))
    copied = copy.deepcopy(model)
    assert lth.attached(copied).masks == ticket18.masks
    lth.attached(model).detach()
    steps(host, model, 1)
    steps(host, copied, 1)
    keys, mask = locate(copied).keys, ~ticket18.masks[LEAK]
    assert model.state_dict()[keys[LEAK]][mask].any()
    assert not copied.state_dict()[keys[LEAK]][mask].any()


@pytest.mark.parametrize("name", marked(CONFIGURE))
def test_a_contradicting_input_is_refused(name: str, ticket18: lth.Ticket, tmp_path: Path) -> None:
    dense = lth.Ticket.dense(ticket18.weights, input=UNIT_RANGE)
    file = str(dense.save(tmp_path / "unit.ticket"))
    with pytest.raises(lth.TicketError, match=r"trained on RGB input .*, but .* std \[10\.0"):
        ALL[name].build(file, "input")
    lth.attached(ALL[name].build(file)).verify()  # a default becomes the ticket's


def test_a_ticket_of_other_channels_makes_a_model_of_them_or_is_refused(
    host: Host, bands18_file: Path
) -> None:
    try:
        model = host.build(str(bands18_file))
    except lth.TicketError as error:
        assert re.search(
            r"reads images of 13 channels .*(in_channels=13|num_channels=13)|give models RGB",
            str(error),
        )
    else:
        assert locate(model).arch.channels == 13
        lth.attached(model).verify()


@pytest.mark.parametrize("name", marked(CONFIGURE))
def test_a_configuration_changes_the_masks_and_the_weights(
    name: str, ticket18: lth.Ticket, ticket18_file: Path, dense18_file: Path
) -> None:
    host, file, masks = ALL[name], str(ticket18_file), ticket18.masks
    for expected, options in (
        (masks, {}),
        (~masks, {"reverse": True}),
        (masks.shuffled(3), {"random": True, "seed": 3}),
    ):
        model = host.build(file, weights=str(dense18_file), **options)
        built = lth.attached(model).ticket()
        assert built.masks == expected
        weights = ticket18.with_masks(expected, {}).sparse_weights()
        assert all(torch.equal(built.weights[n], value) for n, value in weights.items())
    own = lth.attached(host.build(file, load_weights=False)).ticket()
    assert own.masks == masks
    assert not torch.equal(own.weights["conv1.weight"], ticket18.weights["conv1.weight"])


@pytest.mark.parametrize("name", marked(IN_PIECES))
def test_what_a_ticket_prunes_outside_the_trunk_waits_for_the_whole_model(
    name: str, ticket18: lth.Ticket, tmp_path: Path
) -> None:
    host, trunk = ALL[name], str(ticket18.save(tmp_path / "trunk.ticket"))
    state = host.build(trunk).state_dict()
    keys = set(locate(state).keys.values())
    head = next(n for n, v in state.items() if v.dim() > 1 and n not in keys)
    outside = Outside.dense({head: tuple(state[head].shape)}, state)
    file = str(replace(ticket18, outside=outside).save(tmp_path / "whole.ticket"))
    model = host.build(file)
    with pytest.raises(lth.TicketError, match="neck and heads would train dense") as caught:
        lth.attached(model).verify()
    assert "attach_rest" in str(caught.value) or "TicketHook" in str(caught.value)
    assert host.trunk_only in str(caught.value)
    lth.attach_rest(model)
    lth.attached(model).verify()
    assert set(lth.attached(model).all_masks) == {*ticket18.masks, head}
    alone = lth.attached(host.build(file, outside=False))
    alone.verify()
    assert alone.all_masks == ticket18.masks


def test_compaction_keeps_what_is_computed_and_loads_into_a_stock_model(
    host: Host, channels18_file: Path
) -> None:
    model = host.build(str(channels18_file))
    small = lth.compact(model)
    state: dict[str, Tensor] = small.state_dict()
    assert list(state) == list(model.state_dict()) and lth.attached(small) is None
    assert sum(v.numel() for v in state.values()) < sum(v.numel() for v in model.parameters())
    stock = host.build(None)
    narrow_to(stock, state)
    stock.load_state_dict(state)
    losses = []
    for one in (model, small, stock):
        # In training BatchNorm would give a dead channel its bias.
        for module in one.train().modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        torch.manual_seed(0)
        losses.append(float(host.loss(one).detach()))
    assert losses[1] == pytest.approx(losses[0], rel=1e-4) and losses[2] == losses[1]
