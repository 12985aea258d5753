"""C8: a mask that is lost, or cannot hold, is named by what verifies, trains or saves the model."""

import copy
import gc
import io
import logging
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.ao.quantization import (
    get_default_qat_qconfig,
    get_default_qat_qconfig_mapping,
    prepare_qat,
)
from torch.ao.quantization.quantize_fx import prepare_qat_fx
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.utils import parametrizations, parametrize, prune
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

import lth_plugins as lth
from lth_plugins import Ticket, TicketError
from tests.masking.models import backward, images, pruned_gradients, unchanged

NAME = r"layer1\.0\.conv1\.weight"
LOST = rf"the mask of {NAME}.* no longer sits on the model: "


def step(model: nn.Module) -> None:
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    backward(model)
    optimizer.step()


def save(model: nn.Module) -> None:
    model.state_dict()


def verify(model: nn.Module) -> None:
    lth.attached(model).verify()


def holds(model: nn.Module) -> bool:
    """Whether a model trains, is saved and verifies."""
    for notice in (step, save, verify):
        notice(model)
    return True


def assert_lost(*models: nn.Module, reason: str = "") -> None:
    """Each of these is refused by what trains, saves or verifies it."""
    for model in models:
        for notice in (step, save, verify):
            with pytest.raises(TicketError, match=LOST + reason):
                notice(model)


def leaked(model: nn.Module, ticket: Ticket) -> int:
    masks = ticket.masks.items()
    return sum(int((model.get_parameter(n)[~mask] != 0).sum()) for n, mask in masks)


def convolution(weight: nn.Parameter) -> nn.Conv2d:
    new = nn.Conv2d(64, 64, 3, padding=1, bias=False)
    new.weight = weight
    return new


def take_over(model: nn.Module) -> None:
    """Another module gets the parameter itself."""
    model.layer1[0].conv1 = convolution(model.layer1[0].conv1.weight)
    gc.collect()


def take_over_copy(model: nn.Module) -> None:
    weight = model.layer1[0].conv1.weight.detach().clone()
    model.layer1[0].conv1 = convolution(nn.Parameter(weight))


def wrap_copy(model: nn.Module) -> None:
    weight = model.layer1[0].conv1.weight.detach().clone()
    model.layer1[0].conv1 = nn.Sequential(convolution(nn.Parameter(weight)), nn.Identity())


@pytest.mark.parametrize("surgery", [take_over, take_over_copy, wrap_copy])
def test_a_mask_whose_module_was_replaced_is_named(model, ticket18, surgery) -> None:
    handle = lth.attach(model, ticket18)
    surgery(model)
    assert_lost(model, reason="the .* was replaced, .*Attach the ticket again")
    with pytest.raises(TicketError, match=LOST):
        handle.verify()
    if surgery is wrap_copy:  # no longer a ResNet's layout
        lth.attached(model).detach()
    else:
        lth.attach(model, ticket18)
    step(model)
    save(model)


@pytest.mark.parametrize("how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_remember_what_was_attached(model, ticket18, how) -> None:
    handle = lth.attach(model, ticket18)
    late, early = how(model), how(model)
    take_over_copy(late)
    assert_lost(late, how(late))
    handle.verify()
    step(model)
    step(early)


def test_modules_that_keep_their_masks_may_move(model, ticket18) -> None:
    lth.attach(model, ticket18)
    model.layer1[0].conv1 = nn.Sequential(model.layer1[0].conv1)
    assert holds(model)
    features = nn.Sequential(*list(model.children())[:-2])
    del model
    gc.collect()
    assert holds(features)


def test_a_stage_that_is_cut_off_takes_its_masks_along(model, ticket18) -> None:
    handle = lth.attach(model, ticket18)
    model.layer4, model.fc = nn.Identity(), nn.Linear(256, 4)
    assert holds(model)
    handle.verify()


def test_a_handle_of_a_ticket_that_was_replaced_leaves_the_new_one_alone(model, ticket18) -> None:
    first = lth.attach(model, ticket18)
    second = lth.attach(model, ticket18)
    first.detach()
    second.verify()
    take_over_copy(model)
    assert_lost(model)


def test_a_part_may_be_detached(model, ticket18) -> None:
    lth.attach(model, ticket18)
    lth.attached(model.layer1).detach()
    assert holds(model)
    assert len(lth.attached(model).masks) == len(ticket18.masks) - 4


@pytest.mark.filterwarnings("ignore")
def test_eager_quantisation_aware_preparation_is_noticed(model, ticket18) -> None:
    lth.attach(model, ticket18)
    model.qconfig = get_default_qat_qconfig("fbgemm")
    prepared = prepare_qat(model)
    assert_lost(prepared)
    lth.attach(prepared, ticket18, load_weights=False)
    step(prepared)
    verify(prepared)
    assert not leaked(prepared, ticket18)


@pytest.mark.filterwarnings("ignore")
def test_fx_quantisation_aware_preparation_is_noticed(ticket18) -> None:
    model = torchvision.models.resnet18(num_classes=4)
    lth.attach(model, ticket18)
    mapping = get_default_qat_qconfig_mapping("fbgemm")
    prepared = prepare_qat_fx(model, mapping, (images(),))
    del model
    gc.collect()
    for notice in (verify, step):
        with pytest.raises(TicketError, match=LOST):
            notice(prepared)
    with pytest.raises(TicketError, match=LOST):
        lth.attached(prepared).meta  # noqa: B018
    lth.attached(prepared).detach()
    assert lth.attached(prepared) is None
    step(prepared)


def old(function: Callable[..., object]) -> Callable[[nn.Module], object]:
    return lambda module: function(module, "weight")


def parametrized(module: nn.Module) -> None:
    parametrize.remove_parametrizations(module, "weight")


REMOVE = r"remove_parametrizations\(module, 'weight'\)"
PRUNE = r"torch\.nn\.utils\.prune\.remove\(module, 'weight'\)"
REPLACED = {  # how a weight is replaced, and that is undone; the advice
    "prune": (lambda m: prune.l1_unstructured(m, "weight", 0.2), old(prune.remove), PRUNE),
    "spectral_norm": (parametrizations.spectral_norm, parametrized, REMOVE),
    "weight_norm": (parametrizations.weight_norm, parametrized, REMOVE),
    "old weight_norm": (
        old(nn.utils.weight_norm),
        nn.utils.remove_weight_norm,
        r"remove_weight_norm\(module\)",
    ),
    "old spectral_norm": (
        old(nn.utils.spectral_norm),
        nn.utils.remove_spectral_norm,
        r"remove_spectral_norm\(module\)",
    ),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("what", REPLACED)
def test_a_weight_that_is_computed_from_others_is_named_and_can_be_undone(
    model, ticket18, stock, what: str
) -> None:
    replace, undo, message = REPLACED[what]
    handle = lth.attach(model, ticket18)
    replace(model.layer1[0].conv1)
    for call in (handle.verify, handle.ticket, lth.attached(model).verify):
        with pytest.raises(TicketError, match=LOST + f".*{message}.* attach the ticket again"):
            call()
    for call in (lambda: lth.attach(model, ticket18), lambda: lth.compact(model)):
        with pytest.raises(TicketError, match=rf"expected {NAME} to be a parameter, .*{message}"):
            call()
    model.load_state_dict(stock, strict=False)
    if "weight_norm" in what:  # its parameters are others
        with pytest.raises(TicketError, match=LOST + f".*{message}"):
            step(model)
    else:  # the masked parameter is still the one that trains
        step(model)
        save(model)
    undo(model.layer1[0].conv1)
    handle = lth.attach(model, ticket18)
    step(model)
    handle.verify()


class Adapted(nn.Module):
    """A low-rank adapter, as a parametrization."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Parameter(torch.zeros(64, 4)), nn.Parameter(torch.ones(4, 64))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + (self.up @ self.down)[:, :, None, None]


def test_a_weight_that_is_computed_to_leak_is_named_by_training_and_saving(model, ticket18) -> None:
    handle = lth.attach(model, ticket18)
    conv = model.layer1[0].conv1
    parametrize.register_parametrization(conv, "weight", Adapted())
    step(model)  # the sum is zero where the weight is pruned, until then
    assert_lost(model, reason=r".*remove_parametrizations\(module")
    assert conv.parametrizations.weight.training, "looking changes nothing"
    parametrize.remove_parametrizations(conv, "weight")
    with pytest.raises(TicketError, match="to be zero, found"):
        save(model)
    lth.attach(model, ticket18, load_weights=False)
    save(model)
    assert handle is not lth.attached(model)


def test_a_pruned_parameter_that_loaded_dense_weights_is_not_saved(model, ticket18) -> None:
    lth.attach(model, ticket18)
    conv = model.layer1[0].conv1
    prune.identity(conv, "weight")
    conv.load_state_dict({"weight_orig": torch.ones(64, 64, 3, 3)}, strict=False)
    with pytest.raises(TicketError, match=LOST + r".*torch\.nn\.utils\.prune\.remove"):
        save(model)


def test_a_model_that_torch_prunes_is_refused_and_unchanged(model, ticket18) -> None:
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            prune.random_unstructured(module, "weight", 0.5)
    with (
        unchanged(model),
        pytest.raises(TicketError, match=r"conv1\.weight .*prune\.remove\(module"),
    ):
        lth.attach(model, ticket18)


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    store = f"file://{tmp_path}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def flat(model: nn.Module, original: bool) -> nn.Module:
    return FullyShardedDataParallel(model, use_orig_params=original, device_id=torch.device("cpu"))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("original", [False, True], ids=["flat", "original parameters"])
def test_flattening_is_refused_by_name(model, ticket18, one_process, original: bool) -> None:
    handle = lth.attach(model, ticket18)
    wrapped = flat(model, original)
    refusal = r"FSDP \(Fully.*\) was applied after .*fully_shard .*DistributedDataParallel"
    for call in (lambda: step(wrapped), lambda: verify(wrapped), handle.verify):
        with pytest.raises(TicketError, match=LOST + refusal):
            call()

    wrapped = flat(torchvision.models.resnet18(num_classes=4), original)
    refusal = r"expected a model with parameters of its own, found FSDP \(.*DistributedDataParallel"
    with pytest.raises(TicketError, match=refusal):
        lth.attach(wrapped, ticket18)


def partitioned(model: nn.Module) -> nn.Module:
    """As DeepSpeed's ZeRO-3, which is not installed, leaves blocks between two uses: empty."""
    for number, (name, parameter) in enumerate(model.named_parameters()):
        if name.startswith("layer"):
            parameter.ds_id, parameter.data = number, torch.empty(0)
    return model


def test_what_deepspeed_partitions_is_refused_by_name(model, ticket18) -> None:
    handle = lth.attach(model, ticket18)
    assert_lost(partitioned(model), reason="DeepSpeed ZeRO-3 was applied after .*FSDP2")
    with pytest.raises(TicketError, match=f"{LOST}DeepSpeed ZeRO-3 was applied"):
        handle.verify()
    refusal = "parameters of its own, found DeepSpeed ZeRO-3: .*DistributedDataParallel"
    with pytest.raises(TicketError, match=refusal):
        lth.attach(partitioned(torchvision.models.resnet18()), ticket18)


@pytest.mark.parametrize("load_weights", [True, False])
def test_a_model_without_values_is_refused(ticket18, load_weights: bool) -> None:
    with torch.device("meta"):
        model = torchvision.models.resnet18()
    with pytest.raises(TicketError, match=r"conv1\.weight on the meta device: .*to_empty\(device"):
        lth.attach(model, ticket18, load_weights)
    assert lth.attached(model) is None


@pytest.mark.parametrize("how", ["to_empty", "assign"])
def test_masks_come_back_from_the_meta_device(model, ticket18, stock, how: str) -> None:
    handle = lth.attach(model, ticket18)
    model.to("meta")
    with pytest.raises(TicketError, match=LOST):
        handle.verify()
    if how == "to_empty":
        model.to_empty(device="cpu")
        nn.init.zeros_(model.fc.weight)
        nn.init.zeros_(model.fc.bias)
    else:
        model.fc = nn.Linear(512, 4)
    model.load_state_dict(stock, strict=False, assign=how == "assign")
    handle.verify()
    step(model)
    handle.verify()
    assert not leaked(model, ticket18)


def warned(caplog: pytest.LogCaptureFixture, words: str) -> list[str]:
    found = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    return [message for message in found if words in message]


def swap_parameters(model: nn.Module) -> None:
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model.to(torch.float64).to(torch.float32)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


def backward_by_hand(model: nn.Module) -> None:
    parameters = list(model.parameters())
    gradients = torch.autograd.grad(model(images()).square().mean(), parameters)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient


@pytest.mark.parametrize("how", ["assigned", "swapped", "verified after a swap"])
def test_gradients_that_pass_by_the_hooks_are_zero_in_the_step(
    model, ticket18, caplog, how: str
) -> None:
    handle = lth.attach(model, ticket18)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    if how != "assigned":
        swap_parameters(model)
    if how == "verified after a swap":
        handle.verify()
    for _ in range(2):
        optimizer.zero_grad()
        (backward_by_hand if how == "assigned" else backward)(model)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        assert all(not gradient.any() for gradient in pruned_gradients(model, ticket18))
        states = [optimizer.state[model.get_parameter(name)] for name in ticket18.masks]
        masks = ticket18.masks.values()
        assert not any(s["momentum_buffer"][~m].any() for s, m in zip(states, masks, strict=True))
        handle.verify()
    said = warned(caplog, "reached an optimizer")
    assert len(said) == (how != "verified after a swap")
    assert all("layer1.0.conv1.weight and 18 more" in message for message in said)
    if how != "assigned":  # the hooks are back
        optimizer.zero_grad()
        backward(model)
        assert all(not gradient.any() for gradient in pruned_gradients(model, ticket18))


def test_gradients_from_before_the_ticket_are_zeroed_with_its_weights(
    model, ticket18, caplog
) -> None:
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=1)

    def closure() -> Tensor:
        optimizer.zero_grad(set_to_none=False)
        loss = model(torch.ones(2, 3, 32, 32)).square().mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    handle = lth.attach(model, ticket18)
    assert all(not gradient.any() for gradient in pruned_gradients(model, ticket18))
    optimizer.step(closure)
    handle.verify()
    assert not warned(caplog, "without being zeroed")


@pytest.mark.parametrize("write", [lambda p: p.data.fill_(1), lambda p: p.detach().fill_(1)])
def test_a_leak_is_not_saved_by_anybody(model, ticket18, write) -> None:
    handle = lth.attach(model, ticket18)
    step(model)
    write(model.layer3[1].conv2.weight)
    for part in (model, model.layer3, nn.ModuleDict({"net": model})):
        with pytest.raises(TicketError, match=r"layer3\.1\.conv2\.weight to be zero, found \d+"):
            part.state_dict()
    model.state_dict(keep_vars=True)  # parameters to look at or to write to
    lth.attach(model, ticket18)  # zeroes them
    model.state_dict()
    write(model.layer3[1].conv2.weight)
    lth.attached(model).detach()
    assert model.state_dict()["layer3.1.conv2.weight"].eq(1).all(), "nothing is promised then"
    with pytest.raises(TicketError, match="no longer sits on the model"):
        handle.verify()


def test_a_loaded_checkpoint_that_does_not_fit_is_said_once_with_the_count(
    model, ticket18, stock, caplog
) -> None:
    handle = lth.attach(model, ticket18)
    own = {name: value.clone() for name, value in model.state_dict().items()}
    whole = nn.ModuleDict({"net": model})
    pruned, numel = ticket18.masks.numel - ticket18.masks.kept, ticket18.masks.numel
    for load in (
        lambda: model.load_state_dict(stock, strict=False),
        lambda: whole.load_state_dict({f"net.{n}": v for n, v in stock.items()}, strict=False),
    ):
        caplog.clear()
        load()
        (said,) = warned(caplog, "were zeroed by the attached mask: ")
        assert f"{pruned:,} of {numel:,} weights" in said
        assert handle.zeroed_by_load == lth.attached(whole).zeroed_by_load == pruned
    caplog.clear()
    stage = {n.removeprefix("layer1."): v for n, v in stock.items() if n.startswith("layer1.")}
    model.layer1.load_state_dict(stage)
    assert len(warned(caplog, "were zeroed")) == 1
    caplog.clear()
    model.load_state_dict(own)
    assert not warned(caplog, "were zeroed") and handle.zeroed_by_load == 0


def test_parameters_that_are_saved_load_without_unpickling_code(model, ticket18) -> None:
    lth.attach(model, ticket18)
    file = io.BytesIO()
    torch.save(list(model.parameters()), file)
    file.seek(0)
    assert len(torch.load(file, weights_only=True)) == len(list(model.parameters()))
    printed = repr(model.layer1[0].conv1.__dict__["ticket_mask"])
    assert printed == "MaskedWeight(layer1.0.conv1.weight, (64, 64, 3, 3))", "and no weights"


def test_compiled_optimizers_and_training_steps(model, ticket18, capfd) -> None:
    torch._dynamo.reset()
    block, features = model.layer1[0], torch.randn(2, 64, 8, 8)
    optimizer = torch.optim.SGD(block.parameters(), torch.tensor(0.01), momentum=0.9)
    block(features).square().mean().backward()
    optimizer.step()  # momentum that predates the mask would bring weights back
    handle = lth.attach(model, ticket18)
    compiled = torch.compile(optimizer.step, backend="aot_eager")

    @torch.compile(backend="aot_eager")
    def train() -> None:
        optimizer.zero_grad()
        block(features).square().mean().backward()
        optimizer.step()

    mask = ticket18.masks["layer1.0.conv1.weight"]
    for call in (compiled, compiled, train, train):
        before = block.conv1.weight.detach().clone()
        block(features).square().mean().backward()
        call()
        handle.verify()
        assert not block.conv1.weight.grad[~mask].any()
        assert not torch.equal(block.conv1.weight, before)
    assert "recompile_limit" not in capfd.readouterr().err


def test_compiled_autograd(model, ticket18) -> None:
    torch._dynamo.reset()
    lth.attach(model, ticket18)
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
        model.layer1[0].conv1(torch.randn(2, 64, 8, 8)).square().mean().backward()
    gradient = model.layer1[0].conv1.weight.grad
    assert gradient.any() and not gradient[~ticket18.masks["layer1.0.conv1.weight"]].any()


def test_inductor_compiles_steps_of_optimizers_and_of_trainings(model, ticket18) -> None:
    torch._dynamo.reset()
    handle = lth.attach(model, ticket18)
    conv, features = model.layer1[0].conv1, torch.randn(2, 64, 4, 4)
    optimizer = torch.optim.SGD(conv.parameters(), 0.1, weight_decay=0.1)

    @torch.compile
    def train() -> None:
        optimizer.zero_grad()
        conv(features).square().mean().backward()
        optimizer.step()

    conv.weight.grad = torch.ones_like(conv.weight)
    for call in (torch.compile(optimizer.step), train, train):
        before = conv.weight.detach().clone()
        call()
        handle.verify()
        assert not torch.equal(conv.weight, before)


@pytest.mark.parametrize("trains", [False, True], ids=["frozen weights", "weights that train"])
@pytest.mark.parametrize("frozen", ["FrozenBatchNorm2d", "BatchNorm2d in evaluation mode"])
def test_frozen_normalisation_is_warned_of(ticket18, caplog, frozen: str, trains: bool) -> None:
    norm = torchvision.ops.FrozenBatchNorm2d if frozen.startswith("Frozen") else nn.BatchNorm2d
    model = resnet_fpn_backbone(
        backbone_name="resnet18", weights=None, norm_layer=norm, trainable_layers=5
    )
    if norm is nn.BatchNorm2d:
        lth.attach(model, ticket18)
        assert not warned(caplog, "frozen"), "it trains"
        lth.attach(model.eval(), ticket18)
        assert not warned(caplog, "frozen"), "the whole model infers"
        model.train().body.layer2.eval().requires_grad_(trains)
    lth.attach(model, Ticket.dense(ticket18.weights))
    assert not warned(caplog, "frozen"), "the statistics of a dense ticket are its own"
    lth.attach(model, ticket18)
    (said,) = warned(caplog, "frozen")
    assert frozen in said and "precise_bn" in said
