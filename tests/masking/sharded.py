"""What processes do with a ticket on a sharded model; run by test_sharded.py, on gloo.

Each process is given the same images, so that what several train is what one trains, up to
rounding. A scenario may be of fewer processes than there are: the others wait.
"""

import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torchvision
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

import lth_plugins as lth
from lth_plugins.masking.hosting import check_zeros
from lth_plugins.masking.loading import watch_loading
from tests.masking.models import images

PROCESSES = 4


@dataclass
class Setup:
    """What a scenario is given: ``mesh`` is of the processes that it takes."""

    ticket: lth.Ticket
    folder: Path
    mesh: DeviceMesh | None = None

    def model(self) -> nn.Module:
        """In double precision: rounding differs between one process and several."""
        torch.manual_seed(1)
        return torchvision.models.resnet18(num_classes=4).double()

    def sharded(self, model: nn.Module, **options: Any) -> nn.Module:
        """Shard two stages by themselves, and the others with the whole."""
        options = {"mesh": self.mesh, **options}
        fully_shard(model.layer2, **options)
        fully_shard(model.layer3, **options)
        return fully_shard(model, **options)

    @cached_property
    def one_process(self) -> dict[str, Tensor]:
        """What two steps of the same training come to, not sharded."""
        model = self.model()
        lth.attach(model, self.ticket)
        train(model, self.ticket)
        return model.state_dict()

    def on_sharded(self, **options: Any) -> tuple[nn.Module, lth.Attachment]:
        model = self.model()
        handle = lth.attach(model, self.ticket)
        return self.sharded(model, **options), handle


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=0.1)


def train(
    model: nn.Module,
    ticket: lth.Ticket,
    steps: int = 2,
    optimizer: torch.optim.Optimizer | None = None,
) -> torch.optim.Optimizer:
    """Steps with clipped gradients; what is pruned is zero before and after each of them."""
    optimizer = optimizer or optimizer_of(model)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(images().double()).square().mean()
        loss.backward()
        parameters = dict(model.named_parameters())
        gradients = {name: parameters[name].grad for name in ticket.masks}
        assert not leaks({n: g for n, g in gradients.items() if g is not None}, ticket)
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        assert not leaks({name: parameters[name] for name in ticket.masks}, ticket)
        lth.attached(model).verify()
    return optimizer


def full(value: Tensor) -> Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value


def leaks(values: Mapping[str, Tensor], ticket: lth.Ticket) -> int:
    """How many pruned values are not zero, in this process's parts."""
    found = 0
    for name, value in values.items():
        mask, value = ticket.masks[name], value.detach()
        if isinstance(value, DTensor):
            parts = value.device_mesh, value.placements
            mask = distribute_tensor(mask, *parts, src_data_rank=None).to_local()
            value = value.to_local()
        found += int((value * ~mask).count_nonzero())
    return found


def masked(state: Mapping[str, Tensor], ticket: lth.Ticket) -> dict[str, Tensor]:
    return {name: state[name] for name in ticket.masks}


def assert_same(model: nn.Module, expected: Mapping[str, Tensor]) -> None:
    for name, value in model.state_dict().items():
        torch.testing.assert_close(full(value), expected[name], rtol=1e-6, atol=1e-9, msg=name)


def trains_like_one_process(setup: Setup, **options: Any) -> None:
    model, handle = setup.on_sharded(**options)
    train(model, setup.ticket)
    handle.verify()
    assert_same(model, setup.one_process)


def trains_like_one_process_if_it_was_sharded_before(setup: Setup) -> None:
    model = setup.sharded(setup.model())
    lth.attach(model, setup.ticket)
    train(model, setup.ticket)
    assert_same(model, setup.one_process)


def keeps_parameters_whole_after_the_forward_pass(setup: Setup) -> None:
    trains_like_one_process(setup, reshard_after_forward=False)


def trains_in_half_precision(setup: Setup) -> None:
    model, _ = setup.on_sharded(mp_policy=MixedPrecisionPolicy(torch.bfloat16, torch.float32))
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):  # a CPU does not mix the two
            norm.running_mean = norm.running_mean.bfloat16()
            norm.running_var = norm.running_var.bfloat16()
    before = full(model.layer2[0].conv1.weight).detach().clone()
    train(model, setup.ticket)
    assert not torch.equal(full(model.layer2[0].conv1.weight), before)


def trains_replicas_that_are_sharded(setup: Setup) -> None:
    mesh = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    trains_like_one_process(setup, mesh=mesh)


def accumulates_and_keeps_stages_frozen(setup: Setup) -> None:
    model = setup.model()
    lth.attach(model, setup.ticket)
    model.layer1.requires_grad_(False)
    setup.sharded(model)
    optimizer = optimizer_of(model)
    model.set_requires_gradient_sync(False)
    model(images().double()).square().mean().backward()
    model.set_requires_gradient_sync(True)
    train(model, setup.ticket, 1, optimizer)
    model.layer1.requires_grad_(True)
    train(model, setup.ticket, 2, optimizer)


def verifies_and_saves_at_any_moment(setup: Setup) -> None:
    """Also before the first step, and where a forward pass has left parameters whole."""
    for call in (lambda model: model.state_dict(), lambda model: lth.attached(model).verify()):
        model, handle = setup.on_sharded(reshard_after_forward=False)
        loss = model(images().double()).square().mean()
        call(model)
        loss.backward()
        train(model, setup.ticket, 1)
    model, handle = setup.on_sharded()
    handle.verify()
    assert not leaks(masked(model.state_dict(), setup.ticket), setup.ticket)


def saves_whole_and_sharded_state_dicts_with_stock_keys(setup: Setup) -> None:
    model, _ = setup.on_sharded()
    train(model, setup.ticket, 1)
    stock = setup.model()
    sharded = get_model_state_dict(model)
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    whole = get_model_state_dict(model, options=options)
    assert list(sharded) == list(stock.state_dict())
    assert not leaks(masked(sharded, setup.ticket), setup.ticket)
    if dist.get_rank() == 0:
        assert not leaks(masked(whole, setup.ticket), setup.ticket)
        stock.load_state_dict(whole)


def loads_a_dense_state_dict_masked(setup: Setup) -> None:
    model, handle = setup.on_sharded()
    dense = setup.model().state_dict()
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(model, dense if dist.get_rank() == 0 else {}, options=options)
    handle.verify()
    pruned = setup.ticket.masks.numel - setup.ticket.masks.kept
    assert handle.zeroed_by_load == pruned, "the count is of all processes"
    train(model, setup.ticket, 1)


def watches_what_is_loaded(setup: Setup) -> None:
    model = setup.model()
    lth.attach(model, setup.ticket)
    watch_loading(model)
    setup.sharded(model)
    own = model.state_dict()
    check_zeros(own, setup.ticket.masks, "the state dict")
    model.load_state_dict(own)
    dense = setup.sharded(setup.model()).state_dict()
    with pytest.raises(lth.TicketError, match=r"expected a checkpoint that was trained with this"):
        model.load_state_dict(dense)
    with pytest.raises(lth.TicketError, match=r"to be zero in the dense model"):
        check_zeros(dense, setup.ticket.masks, "the dense model")
    train(model, setup.ticket, 1)


def gives_a_ticket_of_whole_tensors(setup: Setup) -> None:
    model, handle = setup.on_sharded()
    train(model, setup.ticket, 1)
    ticket = handle.ticket(source="tuned")
    assert ticket.masks == handle.masks == lth.attached(model).masks == setup.ticket.masks
    fresh = setup.model()
    lth.attach(fresh, ticket)
    state = model.state_dict()
    expected = {n: full(v) for n, v in state.items() if n in ticket.weights}
    for name, value in expected.items():
        assert torch.equal(fresh.state_dict()[name], value.float().double()), name


def raises_in_all_processes_where_one_leaks(setup: Setup) -> None:
    model, handle = setup.on_sharded()
    train(model, setup.ticket, 1)
    conv = model.layer2[0].conv1
    if dist.get_rank() == 1:
        conv.weight.to_local().data.fill_(1)
    for call in (handle.verify, handle.ticket, model.state_dict, lth.attached(model.layer2).verify):
        with pytest.raises(lth.TicketError, match=r"layer2\.0\.conv1\.weight to be zero, found"):
            call()
    handle.zero()
    train(model, setup.ticket, 1)


def stops_an_update_loop_of_its_own(setup: Setup) -> None:
    def update(model: nn.Module, write: Callable[[Tensor], object]) -> None:
        model(images().double()).square().mean().backward()
        with torch.no_grad():
            for parameter in model.parameters():
                write(parameter)

    for write in (lambda p: p.data.add_(0.1), lambda p: p.detach().add_(0.1)):
        model, handle = setup.on_sharded()
        update(model, write)
        handle.zero()
        train(model, setup.ticket, 1)
        update(model, write)
        with pytest.raises(lth.TicketError, match=r"to be zero, found \d+ .*\.zero\(\)"):
            model(images().double())


def prunes_more_and_lets_go(setup: Setup) -> None:
    model, handle = setup.on_sharded()
    optimizer = train(model, setup.ticket, 1)
    sparser = lth.prune(dict(setup.ticket.weights), 0.9, masks=setup.ticket.masks)
    handle.replace(sparser, criterion="magnitude")
    narrowed = lth.Ticket(sparser, setup.ticket.weights, meta=setup.ticket.meta)
    train(model, narrowed, 1, optimizer)
    assert handle.masks == sparser
    lth.attach(model, setup.ticket)
    train(model, setup.ticket, 1, optimizer)
    lth.attached(model).detach()
    assert lth.attached(model) is None
    model(images().double()).square().mean().backward()
    optimizer.step()
    assert leaks(masked(model.state_dict(), setup.ticket), setup.ticket)


def begins_on_the_meta_device(setup: Setup) -> None:
    with torch.device("meta"):
        model = torchvision.models.resnet18(num_classes=4).double()
    setup.sharded(model)
    with pytest.raises(lth.TicketError, match=r"on the meta device"):
        lth.attach(model, setup.ticket)
    model.to_empty(device="cpu")
    lth.attach(model, setup.ticket, load_weights=True)
    options = StateDictOptions(full_state_dict=True, strict=False)
    head = {n: v for n, v in setup.model().state_dict().items() if n.startswith("fc.")}
    set_model_state_dict(model, head, options=options)
    train(model, setup.ticket)
    assert_same(model, setup.one_process)


def goes_to_the_meta_device_before_it_is_sharded(setup: Setup) -> None:
    """As accelerate does, to save memory."""
    model = setup.model()
    handle = lth.attach(model, setup.ticket)
    state = model.state_dict()
    model.to("meta")
    setup.sharded(model)
    model.to_empty(device="cpu")
    set_model_state_dict(model, state, options=StateDictOptions(full_state_dict=True))
    train(model, setup.ticket)
    handle.verify()
    assert_same(model, setup.one_process)


def partitions_the_state_of_the_optimizer(setup: Setup) -> None:
    """ZeRO stage 1, as PyTorch has it."""
    model = setup.model()
    handle = lth.attach(model, setup.ticket)
    wrapped = DistributedDataParallel(model)
    for as_views in (False, True):
        optimizer = ZeroRedundancyOptimizer(
            model.parameters(), torch.optim.SGD, parameters_as_bucket_view=as_views, lr=0.1
        )
        for _ in range(2):
            optimizer.zero_grad()
            wrapped(images().double()).square().mean().backward()
            optimizer.step()
            handle.verify()


def saves_after_a_step(setup: Setup) -> None:
    model, _ = setup.on_sharded()
    optimizer = train(model, setup.ticket, 1)
    states = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
    folder = setup.folder / f"by_{setup.mesh.size()}"
    dcp.save(states, checkpoint_id=folder, process_group=setup.mesh.get_group())


def resumes_from(processes: int) -> Callable[[Setup], None]:
    def resume(setup: Setup) -> None:
        model, handle = setup.on_sharded()
        optimizer = optimizer_of(model)
        states = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
        folder, group = setup.folder / f"by_{processes}", setup.mesh.get_group()
        dcp.load(states, checkpoint_id=folder, process_group=group)
        set_state_dict(
            model,
            optimizer,
            model_state_dict=states["model"],
            optim_state_dict=states["optimizer"],
        )
        handle.verify()
        train(model, setup.ticket, 1, optimizer)
        assert_same(model, setup.one_process)

    return resume


SCENARIOS: dict[str, tuple[int, Callable[[Setup], None]]] = {
    "trains like one process": (2, trains_like_one_process),
    "trains like one process, sharded before": (
        2,
        trains_like_one_process_if_it_was_sharded_before,
    ),
    "keeps parameters whole after the forward pass": (
        2,
        keeps_parameters_whole_after_the_forward_pass,
    ),
    "trains in half precision": (2, trains_in_half_precision),
    "trains replicas that are sharded": (4, trains_replicas_that_are_sharded),
    "accumulates, with frozen stages": (2, accumulates_and_keeps_stages_frozen),
    "verifies and saves at any moment": (2, verifies_and_saves_at_any_moment),
    "state dicts": (2, saves_whole_and_sharded_state_dicts_with_stock_keys),
    "loads a dense state dict": (4, loads_a_dense_state_dict_masked),
    "watches what is loaded": (2, watches_what_is_loaded),
    "gives a ticket": (2, gives_a_ticket_of_whole_tensors),
    "raises in all processes": (2, raises_in_all_processes_where_one_leaks),
    "an update loop of its own": (2, stops_an_update_loop_of_its_own),
    "prunes more, and lets go": (2, prunes_more_and_lets_go),
    "begins on the meta device": (2, begins_on_the_meta_device),
    "goes to the meta device": (2, goes_to_the_meta_device_before_it_is_sharded),
    "ZeroRedundancyOptimizer": (4, partitions_the_state_of_the_optimizer),
    "a checkpoint of two": (2, saves_after_a_step),
    "a checkpoint of two resumed by four": (4, resumes_from(2)),
    "a checkpoint of four": (4, saves_after_a_step),
    "a checkpoint of four resumed by two": (2, resumes_from(4)),
}
"""How many processes each takes, and what they do; in this order."""


def work(rank: int, ticket: lth.Ticket, folder: Path) -> list[str]:
    """Run all scenarios in this process; for each what went wrong, or an empty text."""
    groups = {n: dist.new_group(list(range(n))) for n in (2, PROCESSES)}
    setup, all_wrong = Setup(ticket, folder), []
    for processes, scenario in SCENARIOS.values():
        wrong = ""
        if rank < processes:
            setup.mesh = DeviceMesh.from_group(groups[processes], "cpu")
            try:
                scenario(setup)
            except Exception:
                wrong = traceback.format_exc()
        all_wrong.append(wrong)
        dist.barrier()
    return all_wrong
