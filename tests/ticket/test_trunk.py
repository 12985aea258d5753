"""One reading path: what reads a trunk uses all of it, says what it leaves out, or refuses."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn
from torch.ao.pruning import WeightNormSparsifier
from torch.fx.experimental.optimization import fuse
from torch.nn.utils import prune as torch_prune

import lth_plugins as lth
from lth_plugins import Ticket, TicketError
from lth_plugins.deploy.onnx import Trunk, resnet
from lth_plugins.ticket.foreign.checkpoints import read_checkpoint
from lth_plugins.ticket.foreign.convert import from_checkpoint
from lth_plugins.ticket.trunk import read_trunk
from tests.ticket.states import State, renamed, save, trunk, under

BLOCK, STEM = "layer1.0.conv1.weight", "conv1.weight"


@pytest.fixture
def model18() -> torchvision.models.ResNet:
    """A ResNet-18 whose normalisation is not the identity."""
    torch.manual_seed(0)
    model = torchvision.models.resnet18()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.8, 1.2)
    return model.eval()


def with_biases(model: nn.Module, names: Callable[[str], bool]) -> None:
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d) and names(name):
            module.bias = nn.Parameter(torch.linspace(-1, 1, module.out_channels))


def features(model: nn.Module) -> Tensor:
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return Trunk(model.eval())(images)[-1]


def of_ticket(ticket: Ticket) -> Tensor:
    return features(resnet(ticket.sparse_weights()))


def apart(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).abs().max() / wanted.abs().max())


READERS: dict[str, Callable[[State, Path, Ticket], object]] = {
    "import": lambda state, path, _: from_checkpoint(save(state, path)),
    "Ticket.dense": lambda state, *_: Ticket.dense(state),
    "export": lambda state, *_: resnet(state),
    "with_weights": lambda state, _, ticket: ticket.with_weights(state),
    "init of a search": lambda state, *_: lth.ticket.to_torchvision(state),
}


@pytest.mark.parametrize("reader", READERS)
def test_what_a_plain_resnet_has_not_is_refused_by_name_whoever_reads(
    reader: str, ticket18, tmp_path
) -> None:
    state = trunk() | {"layer1.1.gain": torch.ones(())}
    with pytest.raises(TicketError, match=r"a plain resnet18, found layer1\.1\.gain"):
        READERS[reader](state, tmp_path / "a.pth", ticket18)


@pytest.mark.parametrize(
    ("extra", "value", "message"),
    [
        *(
            (extra, torch.ones(shape), f"a plain resnet18, found {extra}")
            for extra, shape in (
                ("layer2.0.se.fc1.weight", (8, 128, 1, 1)),  # squeeze and excitation
                ("layer3.0.alpha", (1,)),  # of one element, as SkipInit has
                ("layer4.attention.weight", (512,)),  # in a stage, outside its blocks
                ("bn1.scale", (1,)),
                ("relu.weight", (1,)),  # PReLU between the stem and the stages
                ("layer1.0.bn1.eps", ()),
            )
        ),
        ("conv1.bias", torch.ones(3), r"expected conv1\.bias to have one value"),
        ("layer1.0.bn1.weight_mask", torch.full((64,), 0.5), "must hold only 0 and 1"),
        ("layer1.0.bn1.weight_mask", torch.ones(3), r"shape \(3,\).*found shape \(64,\)"),
        ("layer1.0.conv9.weight_mask", torch.ones(3), "conv9.weight, found none"),
    ],
)
def test_an_entry_that_cannot_be_accounted_for_is_refused_by_name(
    extra: str, value: Tensor, message: str
) -> None:
    for apply_masks in (True, False):
        with pytest.raises(TicketError, match=message):
            read_trunk(trunk() | {extra: value}, apply_masks=apply_masks)


@pytest.mark.parametrize("layer", ["conv1", "layer1.0.conv2", "layer3.0.downsample.0"])
def test_a_model_that_holds_more_is_refused_by_name(layer: str, model18, ticket18) -> None:
    model18.get_submodule(layer).register_parameter("gain", nn.Parameter(torch.ones(())))
    before = {name: value.clone() for name, value in model18.state_dict().items()}
    for read in (Ticket.dense, lth.compact, lambda model: lth.attach(model, ticket18)):
        with pytest.raises(TicketError, match=f"found {layer}.gain"):
            read(model18)
    assert all(torch.equal(before[name], value) for name, value in model18.state_dict().items())


def test_what_was_added_after_attach_is_not_dropped_from_the_ticket(model18, ticket18) -> None:
    handle = lth.attach(model18, ticket18)
    model18.layer1[0].gain = nn.Parameter(torch.ones(()))
    with pytest.raises(TicketError, match=r"found layer1\.0\.gain"):
        handle.ticket()


def test_a_model_with_biases_is_refused_and_its_checkpoint_is_read(
    model18, ticket18, caplog, tmp_path
) -> None:
    with_biases(model18, lambda name: name == "conv1")
    with pytest.raises(TicketError, match=r"without biases, found conv1\.bias.*import"):
        lth.attach(model18, ticket18)
    ticket = from_checkpoint(save(model18.state_dict(), tmp_path / "a.pth"))
    assert "Folded conv1.bias into the running means" in caplog.text
    assert apart(of_ticket(ticket), features(model18)) < 1e-5


@pytest.mark.parametrize("arch", ["resnet18", "resnet50d"])
def test_biases_of_all_convolutions_are_folded(arch: str, tmp_path) -> None:
    """Conversions of Keras' models have them."""
    model = timm.create_model(arch).eval()
    with_biases(model, lambda name: True)
    ticket = from_checkpoint(save(model.state_dict(), tmp_path / "a.pth"))
    assert apart(of_ticket(ticket), features(model)) < 1e-4


def test_what_is_harmless_is_named(caplog) -> None:
    counted = {f"{layer}.total_ops": torch.ones(1) for layer in ("conv1", "layer1.0.bn1")}
    with caplog.at_level(logging.INFO, "lth_plugins.ticket"):
        read_trunk(trunk() | counted)
    assert "Left out conv1.total_ops, layer1.0.bn1.total_ops: what thop counted" in caplog.text


# --- masks


def test_masks_in_a_state_dict_are_applied_where_the_network_is_wanted(model18) -> None:
    for module in model18.modules():
        if hasattr(module, "weight"):
            torch_prune.random_unstructured(module, "weight", 0.3)
        if isinstance(module, nn.BatchNorm2d):
            torch_prune.random_unstructured(module, "bias", 0.3)
    wanted = features(model18)
    assert apart(features(resnet(model18.state_dict())), wanted) < 1e-5
    assert apart(of_ticket(Ticket.dense(model18.state_dict())), wanted) < 1e-5


def test_a_ticket_has_masks_of_convolutions_and_zeros_of_normalisation(
    model18, tmp_path, caplog
) -> None:
    """Lightning prunes weights and biases of all modules unless it is told which."""
    norms = [module for module in model18.modules() if isinstance(module, nn.BatchNorm2d)]
    for module in norms:
        torch_prune.random_unstructured(module, "weight", 0.25)
        torch_prune.random_unstructured(module, "bias", 0.25)
    torch_prune.l1_unstructured(model18.layer2[0].conv1, "weight", 0.5)
    content = {"state_dict": under("model.", model18.state_dict())}
    ticket = from_checkpoint(save(content, tmp_path / "a"))
    assert "Set to zero what masks prune of state_dict.model.bn1." in caplog.text
    assert ticket.masks.densities()["layer2.0.conv1.weight"] == 0.5
    assert int((ticket.weights["bn1.weight"] == 0).sum()) == 16
    assert ticket.weights["layer2.0.conv1.weight"].all()  # θ, also where it is pruned
    assert apart(of_ticket(ticket), features(model18)) < 1e-5


def test_masks_of_ones_beside_all_parameters_need_no_word(
    ticket18, resnet18_state, tmp_path, caplog
) -> None:
    """SynFlow's models have a mask for every weight and bias."""
    state = dict(resnet18_state)
    for name in resnet18_state:
        if name.endswith(("weight", "bias")):
            state[f"{name}_mask"] = ticket18.masks.get(name, torch.ones_like(state[name])).float()
    ticket = from_checkpoint(save(state, tmp_path / "model.pt"))
    assert ticket.masks == ticket18.masks and not caplog.text
    assert all(torch.equal(v, resnet18_state[n]) for n, v in ticket.weights.items())


@pytest.mark.parametrize("alone", [True, False])
def test_a_pruned_parameter_whose_mask_is_missing_is_refused(
    alone: bool, ticket18, resnet18_state, tmp_path
) -> None:
    for name, mask in ticket18.masks.items():
        if name == BLOCK or not alone:
            resnet18_state[f"{name}_orig"] = resnet18_state.pop(name)
            resnet18_state |= {f"{name}_mask": mask.float()} if name != BLOCK else {}
    for read in (read_trunk, lambda state: from_checkpoint(save(state, tmp_path / "a.pth"))):
        with pytest.raises(TicketError, match=f"expected {BLOCK}_mask"):
            read(resnet18_state)
    masks = save({BLOCK: torch.zeros(64, 64, 3, 3)}, tmp_path / "masks.pth")
    ticket = from_checkpoint(tmp_path / "a.pth", masks=masks)  # it is in a file of its own
    assert ticket.masks.densities()[BLOCK] == 0


def test_masks_of_stem_and_head_alone_leave_a_dense_ticket_and_are_named(
    model18, tmp_path, caplog
) -> None:
    torch_prune.l1_unstructured(model18.fc, "weight", 0.5)
    torch_prune.l1_unstructured(model18.conv1, "weight", 0.5)
    ticket = from_checkpoint(save(model18.state_dict(), tmp_path / "a.pth"))
    assert ticket.density == 1 and ticket.meta.recipe["masks"] == "none: dense"
    for words in ("conv1.weight, which prunes 4,704 of 9,408", "fc.weight, which prunes 256,000"):
        assert f"Left out the mask of {words}" in caplog.text


@pytest.mark.parametrize("version", [1, 2])
def test_a_model_wrapped_by_nni_is_unwrapped(
    version: int, ticket18, resnet18_state, tmp_path
) -> None:
    state: State = {}
    for name, value in resnet18_state.items():
        if name not in ticket18.masks:
            state[f"module.{name}"] = value  # also of DataParallel
            continue
        layer = f"module.{name.removesuffix('.weight')}"
        state[f"{layer}.weight_mask"] = ticket18.masks[name].float()
        if version == 1:
            state[f"{layer}.module.weight"] = value
        else:
            state[f"{layer}.weight"] = value
            state[f"{layer}.module.weight"] = value * ticket18.masks[name]
    ticket = from_checkpoint(save(state, tmp_path / "wrapped.pth"))
    assert ticket.masks == ticket18.masks and ticket.known is None
    assert torch.equal(ticket.weights[BLOCK], resnet18_state[BLOCK])
    dense = Ticket.dense(state)
    assert torch.equal(dense.weights[BLOCK], resnet18_state[BLOCK] * ticket18.masks[BLOCK])


def of_nni(mask: Tensor) -> dict[str, Any]:
    return {"weight": mask.float(), "bias": None, "_output_0": mask[:, 0, 0, 0]}


@pytest.mark.parametrize(
    ("suffix", "pack"),
    [("", Tensor.bool), ("_mask", Tensor.bool), (".mask", Tensor.bool), ("", of_nni)],
)
def test_masks_in_a_file_of_their_own_may_be_named_after_modules(
    suffix: str, pack: Callable[[Tensor], Any], ticket18, tmp_path, caplog
) -> None:
    masks = {n.removesuffix(".weight") + suffix: pack(m) for n, m in ticket18.masks.items()}
    file = save(masks, tmp_path / "masks.pth")
    weights = save(trunk(), tmp_path / "weights.pth")
    assert from_checkpoint(weights, masks=file).masks == ticket18.masks
    assert from_checkpoint(file, weights=weights).masks == ticket18.masks
    assert "_output_" not in caplog.text


# --- what only a model, or a name, tells


@pytest.mark.parametrize("arch", ["resnetblur18", "resnetaa50"])
def test_an_anti_aliased_model_is_refused(arch: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(arch)
    for read in (Ticket.dense, lth.compact):
        with pytest.raises(
            TicketError, match=r"reduce the resolution by their strides.*resnetblur50"
        ):
            read(model)


def test_a_ticket_is_not_attached_to_an_anti_aliased_model(ticket18) -> None:
    model = timm.create_model("resnetblur18")
    with pytest.raises(TicketError, match="found BlurPool2d at maxpool"):
        lth.attach(model, ticket18)
    assert lth.attached(model) is None


def test_pooling_that_has_no_name_is_told_by_the_strides(model18) -> None:
    block = model18.layer2[0]
    block.conv1.stride = (1, 1)
    block.forward = lambda x: x  # whatever it does instead
    with pytest.raises(TicketError, match="found strides of 1, and 2 in the shortcut at layer2.0"):
        Ticket.dense(model18)


@pytest.mark.parametrize(
    "make",
    [
        lambda: timm.create_model("resnet50d", output_stride=8),
        lambda: timm.create_model("resnet18", output_stride=16),
        lambda: torchvision.models.resnet50(replace_stride_with_dilation=[False, True, True]),
    ],
)
def test_a_dilated_model_is_a_plain_one(make: Callable[[], nn.Module]) -> None:
    with torch.device("meta"):
        read_trunk(make())


def test_a_dense_ticket_of_a_model_knows_where_its_strides_are() -> None:
    with torch.device("meta"):
        model = torchvision.models.resnet50()
    assert read_trunk(model).stride_in_1x1 is False
    for stage in (model.layer2, model.layer3, model.layer4):
        stage[0].conv1.stride, stage[0].conv2.stride = (2, 2), (1, 1)
    assert read_trunk(model).stride_in_1x1 is True
    assert read_trunk(model.state_dict()).stride_in_1x1 is None


@pytest.mark.parametrize(
    ("file", "content", "remarked"),
    [
        ("resnetblur50.bt_in1k.pth", {}, True),
        ("models--timm--resnetaa50.a1h_in1k/snapshot/model.pth", {}, True),
        ("model.pth", {"arch": "resnetaa50"}, True),
        ("resnet50.a1_in1k.pth", {"arch": "resnet50"}, False),
    ],
)
def test_a_checkpoint_that_is_called_anti_aliased_is_remarked_on(
    file: str, content: dict[str, Any], remarked: bool, tmp_path, caplog
) -> None:
    path = tmp_path / file
    path.parent.mkdir(parents=True, exist_ok=True)
    from_checkpoint(save(content | {"state_dict": trunk()}, path))
    assert ("is what anti-aliased ResNets are called" in caplog.text) == remarked
    assert remarked or not caplog.text


def test_a_config_beside_the_file_calls_it_anti_aliased_too(tmp_path, caplog) -> None:
    (tmp_path / "config.json").write_text('{"architecture": "resnetblur50"}')
    from_checkpoint(save(trunk(), tmp_path / "model.pth"))
    assert "is what anti-aliased ResNets are called" in caplog.text


def test_normalisation_folded_into_convolutions_is_said(model18) -> None:
    folded = fuse(model18)
    with pytest.raises(TicketError, match="normalisation is folded into layer1.0.conv1.bias"):
        read_trunk(folded.state_dict())


# --- export


def test_the_tool_exports_the_network_that_a_checkpoint_describes(
    ticket_tool, model18, tmp_path, caplog
) -> None:
    """STR's thresholds, a stem's bias and masks: none is forgotten."""
    with_biases(model18, lambda name: name == "conv1")
    torch_prune.l1_unstructured(model18.layer4[0].conv1, "weight", 0.5)
    state = {name: value.clone() for name, value in model18.state_dict().items()}
    state["layer1.0.sparseThreshold"] = torch.zeros(())  # is refused: of no convolution
    path = tmp_path / "a.pth"
    done = ticket_tool("export", save(state, path), tmp_path / "a.onnx", "--size", 64)
    assert done.returncode == 2 and "found layer1.0.sparseThreshold" in done.stderr
    del state["layer1.0.sparseThreshold"]
    state["layer3.0.conv1.sparseThreshold"] = torch.full((1, 1), -4.0)
    with torch.no_grad():
        weight = model18.layer3[0].conv1.weight
        weight.copy_(weight.sign() * torch.relu(weight.abs() - torch.sigmoid(torch.tensor(-4.0))))
    done = ticket_tool("export", save(state, path), tmp_path / "a.onnx", "--size", 64)
    assert done.returncode == 0, done.stderr
    assert "Folded conv1.bias" in caplog.text and "Applied STR's thresholds" in caplog.text

    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    session = onnxruntime.InferenceSession(tmp_path / "a.onnx", providers=["CPUExecutionProvider"])
    found = session.run(None, {session.get_inputs()[0].name: images.numpy()})[-1]
    assert apart(torch.from_numpy(found), features(model18)) < 1e-4


def test_export_chooses_among_trunks_as_import_does(
    ticket_tool, resnet18_state, tmp_path, caplog
) -> None:
    two = {"student": resnet18_state, "teacher": trunk(value=2)}
    file, out = save(two, tmp_path / "two.pth"), tmp_path / "a.onnx"
    with pytest.raises(TicketError, match=r"found 2, under 'student\.', 'teacher\.'.*--prefix"):
        resnet(read_checkpoint(file))
    assert ticket_tool("export", file, out, "--prefix", "nobody").returncode == 2
    chosen = resnet(read_checkpoint(file), "student").state_dict()
    assert torch.equal(chosen[BLOCK], resnet18_state[BLOCK])
    averaged = {"model": trunk(), "model_ema": trunk(value=2)}
    with caplog.at_level(logging.WARNING):
        resnet(read_checkpoint(save(averaged, tmp_path / "ema.pth")))
    assert "left out model_ema. (a moving average of it)" in caplog.text


def test_caffe2_strides_are_not_exported_elsewhere() -> None:
    arch = lth.ticket.ARCHITECTURES["resnet50"]
    blobs = lth.ticket.from_torchvision(trunk("resnet50"), arch, "caffe2")
    with pytest.raises(TicketError, match="strides in the 3x3 .* found Caffe2's names"):
        resnet(blobs)


def test_a_scripted_model_takes_no_ticket(model18, ticket18) -> None:
    with pytest.raises(TicketError, match="found one of TorchScript"):
        lth.attach(torch.jit.script(model18), ticket18)


# --- what is not read


UNREAD: dict[str, Callable[[Tensor], Tensor]] = {
    "sparse": Tensor.to_sparse,
    "float8": lambda value: value.to(torch.float8_e4m3fn),
    "complex": lambda value: value.to(torch.complex64),
    "without data": lambda value: value.to("meta"),
    "quantised": lambda value: torch.quantize_per_tensor(value, 0.1, 0, torch.qint8),
}


@pytest.mark.parametrize(
    ("kind", "key"),
    [
        *((kind, BLOCK) for kind in UNREAD),
        *(("sparse", key) for key in (f"{BLOCK}_mask", "layer2.0.gate", "masks.layer1.0.conv2")),
    ],
)
def test_what_is_no_plain_tensor_is_refused_by_name(kind: str, key: str, tmp_path) -> None:
    value = UNREAD[kind](torch.ones(64, 64, 3, 3))
    file = save(trunk() | {key: value}, tmp_path / "model.pth")
    with pytest.raises(TicketError, match=f"{key}.*{kind}"):
        from_checkpoint(file)


@pytest.mark.parametrize("kind", ["sparse", "float8", "complex", "without data"])
def test_a_state_dict_of_no_plain_tensors_is_refused_by_name(kind: str) -> None:
    state = trunk() | {BLOCK: UNREAD[kind](torch.ones(64, 64, 3, 3))}
    with pytest.raises(TicketError, match=f"{BLOCK}.*{kind}"):
        Ticket.dense(state)


def test_what_is_no_tensor_is_left_out_of_the_trunk_only() -> None:
    dense = Ticket.dense(trunk() | {"head._extra_state": "text"})
    assert (dense.weights[BLOCK] == 1).all()
    with pytest.raises(TicketError, match=r"layer1\.0\._extra_state.*no tensor"):
        Ticket.dense(trunk() | {"layer1.0._extra_state": "text"})
    with pytest.raises(TicketError, match="ndarray, and no tensor"):
        Ticket.dense({key: value.numpy() for key, value in trunk().items()})


def test_a_model_without_weights_is_no_ticket() -> None:
    with torch.device("meta"):
        model = torchvision.models.resnet18()
    for source in (model, model.state_dict()):
        with pytest.raises(TicketError, match="without data, on the meta device"):
            Ticket.dense(source)


def test_no_plain_tensor_outside_the_trunk_matters(tmp_path) -> None:
    outside = {f"head.{kind}": make(torch.ones(2, 2)) for kind, make in UNREAD.items()}
    ticket = from_checkpoint(save(trunk() | outside, tmp_path / "model.pth"))
    assert (ticket.weights[BLOCK] == 1).all()


def test_integers_are_no_weights(tmp_path) -> None:
    state = trunk() | {BLOCK: torch.ones(64, 64, 3, 3, dtype=torch.int8)}
    with pytest.raises(TicketError, match=rf"{BLOCK}, found torch\.int8.*quantised"):
        from_checkpoint(save(state, tmp_path / "model.pth"))


# --- masks of other pruners


@pytest.mark.parametrize(
    "name",
    [
        "{}.pre_ops.0.op._binary_mask",
        "{}.binary_mask",
        "{}.mask",
        "{}.weight.mask",
        "{}.mask_weight",
        "{}.weight_keep_mask",
        "pruning_masks.{}.weight",
        "mask_dict.{}.weight",
        "mask.{}",
    ],
)
def test_masks_are_found_by_the_names_of_pruners(name: str, ticket18, tmp_path) -> None:
    masks = {name.format(key.removesuffix(".weight")): m for key, m in ticket18.masks.items()}
    ticket = from_checkpoint(save(trunk() | masks, tmp_path / "model.pth"))
    assert ticket.masks == ticket18.masks


def test_a_model_that_a_sparsifier_of_pytorch_has_prepared(ticket18, tmp_path) -> None:
    model = torchvision.models.resnet18()
    sparsifier = WeightNormSparsifier()
    sparsifier.prepare(model, [{"tensor_fqn": name} for name in ticket18.masks])
    computed = {}
    for name, mask in ticket18.masks.items():
        module = model.get_submodule(name.removesuffix(".weight"))
        module.parametrizations.weight[0].mask.copy_(mask)  # its own steps know linear layers only
        computed[name] = module.weight.detach().clone()
    content = {"model": model.state_dict(), "sparsifier": sparsifier.state_dict()}
    ticket = from_checkpoint(save(content, tmp_path / "model.pth"))
    assert ticket.masks == ticket18.masks
    weights = ticket.sparse_weights()
    assert all(torch.equal(weights[name], value) for name, value in computed.items())


@pytest.mark.parametrize(
    ("beside", "pack"), [("mask", dict), ("masks", lambda masks: list(masks.items()))]
)
def test_masks_may_lie_beside_the_weights(beside: str, pack, ticket18, tmp_path) -> None:
    content = {"state_dict": trunk(), beside: pack(ticket18.masks)}
    ticket = from_checkpoint(save(content, tmp_path / "a.pth"))
    assert ticket.masks == ticket18.masks and ticket.known is None


@pytest.mark.parametrize(
    ("pack", "message"),
    [
        (
            lambda masks: {"masks": list(masks.values())},
            r"found masks: a list of 19 .*named_parameters",
        ),
        (
            lambda masks: {"masks": tuple(masks.values())},
            r"found masks: a list of 19 .*named_parameters",
        ),
        (
            lambda masks: under("masks.", renamed(masks, (r"\.", "_"))),
            r"other names such as masks\.layer1_0_conv1_weight",
        ),
    ],
)
def test_masks_without_known_names_beside_the_weights_are_no_dense_ticket(
    pack, message: str, ticket18, tmp_path
) -> None:
    content = {"state_dict": trunk()} | pack(ticket18.masks)
    with pytest.raises(TicketError, match=message):
        from_checkpoint(save(content, tmp_path / "model.pth"))


def test_a_head_of_masks_is_no_mask(tmp_path) -> None:
    head = {"mask.conv.weight": torch.randn(64, 64, 3, 3), "attn_mask": torch.zeros(1, 4, 4)}
    assert from_checkpoint(save(trunk() | head, tmp_path / "model.pth")).sparsity == 0
