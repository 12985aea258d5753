"""C3: what updates weights outside of `torch.optim` is noticed by the next forward pass."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.optim.swa_utils import AveragedModel

import lth_plugins as lth
from lth_plugins import TicketError
from tests.masking.models import backward, images, step_masked

LEAK = r"\.weight to be zero, found \d+ .*outside of a torch\.optim\.Optimizer's step.*\.zero\(\)"
Update = Callable[[list[nn.Parameter], list[Tensor]], object]


def one_by_one(write: Callable[[nn.Parameter, Tensor], object]) -> Update:
    def update(parameters: list[nn.Parameter], gradients: list[Tensor]) -> None:
        for parameter, gradient in zip(parameters, gradients, strict=True):
            write(parameter, gradient)

    return update


def replace_data(parameter: nn.Parameter, gradient: Tensor) -> None:
    parameter.data = parameter.data - 0.1 * gradient


UPDATES: dict[str, Update] = {
    "in place": one_by_one(lambda p, g: p.sub_(0.1 * g)),
    "data in place": one_by_one(lambda p, g: p.data.sub_(0.1 * g)),
    "data replaced": one_by_one(replace_data),
    "copied": one_by_one(lambda p, g: p.copy_(p - 0.1 * g)),
    "foreach": lambda p, g: torch._foreach_add_(p, g, alpha=-0.1),
}


@pytest.mark.parametrize("how", UPDATES)
def test_an_update_loop_stops_at_the_next_forward_pass(model, ticket18, how: str) -> None:
    handle = lth.attach(model, ticket18)
    parameters = list(model.parameters())

    def update() -> None:
        # Unlike `backward()`, this masks no gradient.
        gradients = torch.autograd.grad(model(images()).square().mean(), parameters)
        with torch.no_grad():
            UPDATES[how](parameters, list(gradients))

    update()
    for notice in (update, model.state_dict, handle.verify):
        with pytest.raises(TicketError, match=LEAK):
            notice()
    model.eval()(images())
    model.train()
    for _ in range(2):
        handle.zero()
        update()
    handle.zero()
    step_masked(model, ticket18)


def test_an_update_loop_on_masked_gradients_needs_no_call(model, ticket18) -> None:
    handle = lth.attach(model, ticket18)
    for _ in range(2):
        model.zero_grad()
        backward(model)
        for parameter in model.parameters():
            parameter.data -= 0.1 * parameter.grad
        handle.verify()


def test_a_loop_of_functions_stops_at_the_next_one(model, ticket18) -> None:
    handle = lth.attach(model, ticket18)
    parameters = dict(model.named_parameters())

    def loss(values: dict[str, Tensor]) -> Tensor:
        buffers = {name: value.clone() for name, value in model.named_buffers()}
        return functional_call(model, values | buffers, (images(),)).square().mean()

    for write in (Tensor.copy_, lambda p, value: p.data.copy_(value)):
        gradients = grad(loss)(parameters)
        with torch.no_grad():
            for name, parameter in parameters.items():
                write(parameter, parameter - 0.1 * gradients[name])
        with pytest.raises(TicketError, match=LEAK):
            grad(loss)(parameters)
        handle.zero()


def test_an_ensemble_of_functions_runs(model, ticket18) -> None:
    lth.attach(model, ticket18)
    models = [copy.deepcopy(model) for _ in range(2)]
    for norm in (m for one in models for m in one.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.track_running_stats = False
        norm.running_mean = norm.running_var = norm.num_batches_tracked = None
    parameters, _ = stack_module_state(models)

    def call(values: dict[str, Tensor]) -> Tensor:
        return functional_call(models[0], values, (images(),))

    assert vmap(call, randomness="same")(parameters).shape == (2, 2, 4)


class Engine:
    """Trains copies in single precision of flattened parameters, as DeepSpeed's ZeRO does."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self._parameters = model, list(model.parameters())
        self._flat = torch.cat([p.detach().flatten() for p in self._parameters])
        place = 0
        for parameter in self._parameters:
            part = self._flat[place : place + parameter.numel()]
            parameter.data = part.view_as(parameter)
            place += parameter.numel()
        self._masters = self._flat.clone()

    def step(self) -> None:
        self.model.zero_grad()
        backward(self.model)
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in self._parameters]
        self._masters -= 0.1 * torch.cat([gradient.flatten() for gradient in gradients])
        self._flat.data.copy_(self._masters)


def test_copies_of_flattened_parameters_hold_zeros_or_are_noticed(model, ticket18) -> None:
    handle = lth.attach(model, ticket18)
    engine = Engine(model)
    for _ in range(2):
        engine.step()
        handle.verify()
    handle.detach()

    engine = Engine(model)
    engine._masters += 0.1  # a dense model's, made before the ticket was attached
    lth.attach(model, ticket18, load_weights=False)
    engine.step()
    for notice in (engine.step, model.state_dict):
        with pytest.raises(TicketError, match=LEAK):
            notice()


def test_averages_that_are_swapped_in_are_no_leak(model, ticket18) -> None:
    lth.attach(model, ticket18)
    averages = AveragedModel(model)
    step_masked(model, ticket18)
    averages.update_parameters(model)
    with torch.no_grad():
        for parameter, average in zip(model.parameters(), averages.parameters(), strict=True):
            parameter.copy_(average)
    step_masked(model, ticket18)


def test_a_step_that_calls_the_model_is_one_of_an_optimizer(model, ticket18) -> None:
    """The directions of L-BFGS that predate the mask leak, until its step ends."""
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.01, max_iter=3)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model(images()).square().mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    handle = lth.attach(model, ticket18)
    optimizer.step(closure)
    handle.verify()
    with torch.no_grad():
        model.layer1[0].conv1.weight.add_(1)
    with pytest.raises(TicketError, match=LEAK):
        model(images())


@pytest.mark.parametrize("dynamic", [False, True])
def test_the_forward_pass_compiles_to_one_graph(model, ticket18, dynamic: bool) -> None:
    torch._dynamo.reset()
    handle = lth.attach(model, ticket18)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for size in (32, 48) if dynamic else (32, 32):
        compiled(torch.randn(2, 3, size, size)).square().mean().backward()
        optimizer.step()
        handle.verify()


def test_a_compiled_step_is_one_of_an_optimizer(model, ticket18) -> None:
    torch._dynamo.reset()
    handle = lth.attach(model, ticket18)
    weights = [model.layer1[0].conv1.weight]
    optimizer = torch.optim.SGD(weights, torch.tensor(0.1), momentum=0.9)
    step = torch.compile(optimizer.step, backend="eager")
    pruned = ~ticket18.masks["layer1.0.conv1.weight"]
    for _ in range(3):
        backward(model)
        weights[0].grad = torch.ones_like(weights[0])  # not masked
        step()
        handle.verify()
        assert not optimizer.state[weights[0]]["momentum_buffer"][pruned].any()
    weights[0].data.add_(1)
    with pytest.raises(TicketError, match=LEAK):
        backward(model)
