"""What people already have becomes a ticket: released checkpoints by their true key sets, masks of
other projects, sparse models by their zeros; and foreign files cannot do anything but be read.
"""

import argparse
import functools
import itertools
import os
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

from lth_plugins import ConfigError, Ticket, TicketError
from lth_plugins.ticket import IMAGENET, UNIT_RANGE, locate
from lth_plugins.ticket.foreign.checkpoints import read_checkpoint
from lth_plugins.ticket.foreign.convert import from_checkpoint
from tests.ticket.states import save, under

State = dict[str, Tensor]


def filled(module: nn.Module, value: float = 1.0, counter: int = 7) -> State:
    """The state dict of a module on the meta device, each entry one number (in a file, too)."""
    return {
        name: torch.tensor(value if entry.is_floating_point() else counter).expand(entry.shape)
        for name, entry in module.state_dict().items()
    }


def meta(make: Callable[[], Any]) -> Any:
    with torch.device("meta"):
        return make()


@functools.cache
def resnet(arch: str = "resnet50") -> nn.Module:
    return meta(lambda: torchvision.models.get_model(arch))


def mlp(*widths: int, norm: bool = False) -> nn.Module:
    layers: list[nn.Module] = []
    for c_in, c_out in itertools.pairwise(widths):
        layers += [nn.Linear(c_in, c_out), *([nn.BatchNorm1d(c_out)] if norm else []), nn.ReLU()]
    return meta(lambda: nn.Sequential(*layers[:-1]))


def encoder(fc: nn.Module) -> nn.Module:
    """A ResNet-50 with a projection head in the place of its classifier."""
    model = meta(lambda: torchvision.models.resnet50())
    model.fc = fc
    return model


# --- structures of released models that torchvision does not have: names and shapes, no forward


def modules(**children: nn.Module) -> nn.Module:
    module = nn.Module()
    for name, child in children.items():
        module.add_module(name, child)
    return module


def conv(c_in: int, c_out: int, kernel: int = 1) -> nn.Conv2d:
    return nn.Conv2d(c_in, c_out, kernel, bias=False)


def stages(
    block: Callable[[int, int, bool], nn.Module], depths: tuple[int, ...] = (3, 4, 6, 3)
) -> list[list[nn.Module]]:
    """Four stages of ``block(channels in, width, whether it has a shortcut)``."""
    made = []
    c_in = 64
    for depth, width in zip(depths, (64, 128, 256, 512), strict=True):
        made.append([block(c_in if i == 0 else 4 * width, width, i == 0) for i in range(depth)])
        c_in = 4 * width
    return made


def simclrv2(selective_kernels: bool = False) -> nn.Module:
    """Separius/SimCLRv2-Pytorch."""

    def norm(c: int) -> nn.Module:
        return nn.Sequential(nn.BatchNorm2d(c), nn.ReLU())

    def block(c_in: int, width: int, first: bool) -> nn.Module:
        mixing = nn.Sequential(conv(width, 32), norm(32), conv(32, 2 * width))
        main = nn.Sequential(conv(width, 2 * width, 3), norm(2 * width))
        spatial = [conv(width, width, 3), norm(width)]
        if selective_kernels:
            spatial = [modules(main_conv=main, mixing_conv=mixing)]
        net = [conv(c_in, width), norm(width), *spatial, conv(width, 4 * width), norm(4 * width)]
        shortcut = modules(shortcut=conv(c_in, 4 * width), bn=norm(4 * width))
        return modules(projection=shortcut if first else nn.Identity(), net=nn.Sequential(*net))

    stem = nn.Sequential(conv(3, 64, 7), norm(64), nn.MaxPool2d(3))
    blocks = [modules(blocks=nn.ModuleList(stage)) for stage in stages(block)]
    return modules(net=nn.Sequential(stem, *blocks), fc=nn.Linear(2048, 1000))


def sparseml() -> nn.Module:
    def block(c_in: int, width: int, first: bool) -> nn.Module:
        made = modules(
            conv1=conv(c_in, width),
            bn1=nn.BatchNorm2d(width),
            conv2=conv(width, width, 3),
            bn2=nn.BatchNorm2d(width),
            conv3=conv(width, 4 * width),
            bn3=nn.BatchNorm2d(4 * width),
        )
        if first:
            made.identity = modules(conv=conv(c_in, 4 * width), bn=nn.BatchNorm2d(4 * width))
        return made

    return modules(
        input=modules(conv=conv(3, 64, 7), bn=nn.BatchNorm2d(64)),
        sections=nn.Sequential(*(nn.Sequential(*stage) for stage in stages(block))),
        classifier=modules(fc=nn.Linear(2048, 1000)),
    )


def rigl() -> nn.Module:
    """RigL as converted for arXiv 2111.13445."""

    def basic(c_in: int, c_out: int, kernel: int = 1) -> nn.Module:
        return modules(conv=conv(c_in, c_out, kernel), bn=nn.BatchNorm2d(c_out))

    def block(c_in: int, width: int, first: bool) -> nn.Module:
        return modules(
            **({"shortcut": basic(c_in, 4 * width)} if first else {}),
            conv1=basic(c_in, width),
            conv2=basic(width, width, 3),
            conv3=basic(width, 4 * width),
        )

    layers = {
        f"layer{i}": modules(block=nn.Sequential(*stage))
        for i, stage in enumerate(stages(block), start=1)
    }
    return modules(initial_conv=basic(3, 64, 7), **layers, fc=nn.Linear(2048, 1000))


def faster_rcnn(arch: str) -> nn.Module:
    """The VOC models of arXiv 2012.04643."""
    trunk = meta(lambda: torchvision.models.get_model(arch))
    children = [trunk.conv1, trunk.bn1, trunk.relu, trunk.maxpool]
    return modules(
        RCNN_rpn=modules(RPN_Conv=nn.Conv2d(256, 512, 3)),
        RCNN_base=nn.Sequential(*children, trunk.layer1, trunk.layer2, trunk.layer3),
        RCNN_top=nn.Sequential(trunk.layer4),
        RCNN_cls_score=nn.Linear(512, 21),
    )


def vissl(state: State) -> State:
    """VISSL keeps torchvision's modules in a dictionary named _feature_blocks."""
    return {f"_feature_blocks.{n}": v for n, v in state.items() if not n.startswith("fc.")}


def detectron2_names(state: State) -> dict[str, np.ndarray]:
    """As MoCo's convert-pretrain-to-detectron2.py respells them, classifier included."""
    respelled = {}
    for name, value in state.items():
        if "layer" not in name:
            name = f"stem.{name}"
        for stage in (1, 2, 3, 4):
            name = name.replace(f"layer{stage}", f"res{stage + 1}")
        for k in (1, 2, 3):
            name = name.replace(f"bn{k}", f"conv{k}.norm")
        name = name.replace("downsample.0", "shortcut").replace("downsample.1", "shortcut.norm")
        respelled[name] = np.broadcast_to(value.numpy(), value.shape)
    return respelled


def without_fc(state: State) -> State:
    return {name: value for name, value in state.items() if not name.startswith("fc.")}


def moco(version: int) -> dict[str, Any]:
    if version == 3:
        q, k, dim = "module.base_encoder.", "module.momentum_encoder.", 256
        head = mlp(2048, 4096, dim, norm=True)
        extra = under("module.predictor.", filled(mlp(dim, 4096, dim, norm=True)))
    else:
        q, k, dim = "module.encoder_q.", "module.encoder_k.", 128
        head = meta(lambda: nn.Linear(2048, dim)) if version == 1 else mlp(2048, 2048, dim)
        queue = {"queue": torch.zeros(()).expand(dim, 65536), "queue_ptr": torch.zeros(1).long()}
        extra = under("module.", queue)
    model = encoder(head)
    state = under(q, filled(model, 1)) | under(k, filled(model, 2)) | extra
    momentum = {0: {"momentum_buffer": torch.zeros(64, 3, 7, 7)}}
    optimizer = {"state": momentum, "param_groups": [{"lr": 0.03}]}
    return {"epoch": 800, "arch": "resnet50", "state_dict": state, "optimizer": optimizer}


def lightly_moco() -> dict[str, Any]:
    backbone = nn.Sequential(*list(resnet().children())[:-1])
    state = under("backbone.", filled(backbone)) | under("backbone_momentum.", filled(backbone, 2))
    return {"state_dict": state | under("projection_head.layers.", filled(mlp(2048, 2048, 128)))}


def lightly_benchmark() -> dict[str, Any]:
    trunk = without_fc(filled(resnet()))
    key = without_fc(filled(resnet(), 2))
    state = under("backbone.", key) | under("query_backbone.", trunk)
    return {"state_dict": state, "pytorch-lightning_version": "2.0.2", "callbacks": {}}


def solo_learn() -> dict[str, Any]:
    trunk, average = without_fc(filled(resnet())), without_fc(filled(resnet(), 2))
    state = under("backbone.", trunk) | under("momentum_backbone.", average)
    heads = under("classifier.", filled(meta(lambda: nn.Linear(2048, 1000))))
    heads |= under("projector.", filled(mlp(2048, 4096, 256)))
    return {"epoch": 99, "state_dict": state | heads, "hparams_name": "kwargs"}


def mmpretrain_moco() -> dict[str, Any]:
    trunk, average = without_fc(filled(resnet())), without_fc(filled(resnet(), 2))
    neck = under("mlp.", filled(mlp(2048, 2048, 128)))
    state = under("backbone.", trunk) | under("neck.", neck)
    state |= under("encoder_k.module.0.", average) | under("encoder_k.module.1.", neck)
    state |= {"encoder_k.steps": torch.tensor(9), "queue": torch.zeros(128, 16)}
    return {"meta": {"epoch": 200}, "state_dict": state}


def mmselfsup_moco() -> dict[str, Any]:
    trunk, average = without_fc(filled(resnet())), without_fc(filled(resnet(), 2))
    neck = under("mlp.", filled(mlp(2048, 2048, 128)))
    state = under("encoder_q.0.", trunk) | under("encoder_q.1.", neck)
    state |= under("encoder_k.0.", average) | under("encoder_k.1.", neck)
    return {"meta": {}, "state_dict": state | under("backbone.", trunk) | under("neck.", neck)}


TRUNK = "resnet50 torchvision"
VISSL = "classy_state_dict.base_model.model.trunk."
RELEASES: dict[str, tuple[Callable[[], Any], str, str, str]] = {
    # content, source, architecture and dialect, prefix
    "torchvision-r50": (lambda: filled(resnet()), "imagenet", TRUNK, ""),
    "torchvision-r18": (lambda: filled(resnet("resnet18")), "imagenet", "resnet18 torchvision", ""),
    "timm-r50d": (
        lambda: {"state_dict": filled(meta(lambda: timm.create_model("resnet50d")))},
        *("imagenet", "resnet50d torchvision", "state_dict."),
    ),
    "timm-training": (
        lambda: (
            {"args": argparse.Namespace(model="resnet50", lr=0.1), "metric": np.float64(76.1)}
            | {"state_dict": filled(resnet())}
        ),
        *("imagenet", TRUNK, "state_dict."),
    ),
    "moco-v1": (lambda: moco(1), "moco", TRUNK, "state_dict.module.encoder_q."),
    "moco-v2": (lambda: moco(2), "moco", TRUNK, "state_dict.module.encoder_q."),
    "moco-v3": (lambda: moco(3), "moco", TRUNK, "state_dict.module.base_encoder."),
    "moco-mmpretrain": (mmpretrain_moco, "moco", TRUNK, "state_dict.backbone."),
    "moco-mmselfsup": (mmselfsup_moco, "moco", TRUNK, "state_dict.backbone."),
    "moco-detectron2.pkl": (
        lambda: {
            "model": detectron2_names(filled(encoder(mlp(2048, 2048, 128)))),
            "__author__": "MOCO",
            "matching_heuristics": True,
        },
        *("moco", "resnet50 detectron2", "model."),
    ),
    "moco-lightly": (lightly_moco, "moco", "resnet50 sequential", "state_dict.backbone."),
    "moco-lightly-benchmark": (lightly_benchmark, "moco", TRUNK, "state_dict.query_backbone."),
    "simclr-v1-tonylins": (
        lambda: {"state_dict": filled(resnet(), counter=0)},
        *("simclr", TRUNK, "state_dict."),
    ),
    "simclr-v2-separius": (
        lambda: {
            "resnet": filled(meta(simclrv2), counter=0),
            "head": under("layers.", filled(mlp(2048, 2048, 128, norm=True))),
        },
        *("simclr", "resnet50 simclrv2", "resnet."),
    ),
    "simclr-solo-learn": (solo_learn, "simclr", TRUNK, "state_dict.backbone."),
    "simclr-vissl": (
        lambda: (
            under(VISSL, vissl(filled(resnet())))
            | under("classy_state_dict.heads.0.clf.", filled(mlp(2048, 2048, 128)))
        ),
        *("simclr", TRUNK, f"{VISSL}_feature_blocks."),
    ),
    "swav-vissl-flat": (
        lambda: {"model_state_dict": under("trunk.base_model.", vissl(filled(resnet())))},
        *("swav", TRUNK, "model_state_dict.trunk.base_model._feature_blocks."),
    ),
    "sparseml": (
        lambda: {"state_dict": under("module.", filled(meta(sparseml))), "recipe": "!Modifier"},
        *("imagenet", "resnet50 sparseml", "state_dict.module."),
    ),
    "rigl": (
        lambda: {"model_config": {"arch": "resnet50_rigl"}, "model_state_dict": filled(meta(rigl))},
        *("imagenet", "resnet50 rigl", "model_state_dict."),
    ),
}
# Weights that Google released, and others converted: RGB in [0, 1]. Their counters are at 0.
UNIT = ("simclr-v1-tonylins", "simclr-v2-separius")


@pytest.mark.parametrize("release", RELEASES)
def test_a_released_checkpoint_is_recognised(tmp_path, release: str) -> None:
    make, source, what, prefix = RELEASES[release]
    suffix = Path(release).suffix or ".pth.tar"
    ticket = from_checkpoint(save(make(), tmp_path / f"checkpoint{suffix}"), source)
    assert f"{ticket.meta.arch} {ticket.meta.recipe['imported']}" == what
    assert ticket.meta.recipe["prefix"] == prefix
    assert ticket.meta.input == (UNIT_RANGE if release in UNIT else IMAGENET)
    assert ticket.meta.source == source
    assert ticket.density == 1 and ticket.meta.round == 0
    # 1 is the value of the trained trunk, 2 of its moving average.
    assert all((value == 1).all() for n, value in ticket.weights.items() if "num_batches" not in n)


def test_selective_kernels_are_refused_by_name(tmp_path) -> None:
    path = save({"resnet": filled(meta(lambda: simclrv2(True)))}, tmp_path / "a.pth")
    named = "selective kernels.*main_conv.*only plain ResNets can be tickets"
    with pytest.raises(TicketError, match=named):
        from_checkpoint(path)


def test_a_wider_resnet_is_refused_by_its_shapes(tmp_path) -> None:
    """Google's simCLR is also released with all widths doubled."""

    def doubled(name: str, shape: torch.Size) -> list[int]:
        channels = 1 if name == "conv1.weight" else 2
        return [2 * c if i == 0 else channels * c if i == 1 else c for i, c in enumerate(shape)]

    wide = {n: torch.zeros(()).expand(doubled(n, v.shape)) for n, v in filled(resnet()).items()}
    with pytest.raises(TicketError, match=r"of another shape \(such as .* is \(\d+,.* instead of"):
        from_checkpoint(save({"state_dict": wide}, tmp_path / "resnet50-2x.pth"), "simclr")


def test_the_source_and_the_counters_decide_how_simclr_was_fed(tmp_path) -> None:
    copied = save({"state_dict": filled(resnet("resnet18"), counter=0)}, tmp_path / "a.pth")
    assert from_checkpoint(copied, "simclr").meta.input == UNIT_RANGE
    assert from_checkpoint(copied, "imagenet").meta.input == IMAGENET
    assert from_checkpoint(copied, "simclr", IMAGENET).meta.input == IMAGENET


def test_of_two_trained_trunks_the_prefix_chooses(tmp_path) -> None:
    state = under("student.", filled(resnet("resnet18"), 1))
    state |= under("teacher.", filled(resnet("resnet34"), 2))
    path = save({"state_dict": state}, tmp_path / "a.pth")
    found = r"found 2, under 'state_dict\.student\.', 'state_dict\.teacher\.'.*--prefix"
    with pytest.raises(TicketError, match=found):
        from_checkpoint(path)
    assert from_checkpoint(path, prefix="student").meta.arch == "resnet18"
    assert from_checkpoint(path, prefix="state_dict.teacher.").meta.arch == "resnet34"
    with pytest.raises(TicketError, match="under the prefix 'eacher'"):
        from_checkpoint(path, prefix="eacher")


@pytest.mark.parametrize("outer", ["", "backbone."])
def test_a_trunk_that_others_are_named_after_can_be_chosen(outer: str, tmp_path) -> None:
    trunks = [torchvision.models.get_model(name) for name in ("resnet18", "resnet34")]
    content = under(outer, trunks[0].state_dict())
    content |= under(f"teacher.{outer}", trunks[1].state_dict())
    path = save(content, tmp_path / "two.pth")
    assert from_checkpoint(path, prefix=outer).meta.arch == "resnet18"
    assert from_checkpoint(path, prefix=f"teacher.{outer}").meta.arch == "resnet34"


def test_a_model_with_a_moving_average_is_ambiguous() -> None:
    model = modules(encoder_q=resnet("resnet18"), encoder_k=resnet("resnet18"))
    assert locate(model.state_dict()).prefix == "encoder_q."
    with pytest.raises(TicketError, match="found 2"):  # both want the mask
        locate(model)


# --- masks


@pytest.fixture
def masks(ticket18: Ticket) -> State:
    return {name: mask.float() for name, mask in ticket18.masks.items()}


@pytest.fixture
def weights_file(resnet18_state: State, tmp_path: Path) -> Path:
    return save(resnet18_state, tmp_path / "weights.pth")


@pytest.mark.parametrize("prefix", ["", "module.", "module.encoder_q."])
def test_a_file_of_masks_alone_needs_the_weights(
    ticket18, masks, weights_file, resnet18_state, tmp_path, prefix: str
) -> None:
    """The released tickets of arXiv 2012.06908."""
    content: Any = under(prefix, {f"{name}_mask": mask for name, mask in masks.items()})
    file = save({"state_dict": content} if prefix else content, tmp_path / "mask.pt")
    with pytest.raises(TicketError, match="expected weights, found only masks.*--weights"):
        from_checkpoint(file, "moco")
    ticket = from_checkpoint(file, "moco", weights=weights_file)
    assert ticket.masks == ticket18.masks and ticket.meta.round == 5
    assert ticket.known is None and ticket.reversed().density == pytest.approx(1 - 0.8**5)
    name = "layer2.0.conv1.weight"
    assert torch.equal(ticket.weights[name], resnet18_state[name])


def test_the_encoders_of_a_pruned_moco_share_the_query_mask(ticket18, masks, tmp_path) -> None:
    state = filled(resnet("resnet18"))
    pruned: State = {}
    for side, prefix in ((0, "module.encoder_q."), (1, "module.encoder_k.")):
        for name, value in state.items():
            if name in masks:
                pruned[f"{prefix}{name}_orig"] = value + side
                pruned[f"{prefix}{name}_mask"] = masks[name] if side == 0 else 1 - masks[name]
            else:
                pruned[prefix + name] = value
    ticket = from_checkpoint(save({"state_dict": pruned}, tmp_path / "a.pth.tar"), "moco")
    assert ticket.masks == ticket18.masks
    assert (ticket.weights["layer1.0.conv1.weight"] == 1).all()


def test_rewound_weights_beside_trained_ones_are_chosen_by_prefix(
    ticket18, masks, tmp_path
) -> None:
    """The checkpoints that the code of arXiv 2012.06908 writes after each round."""
    trained = {
        (f"{n}_orig" if n in masks else n): v for n, v in filled(resnet("resnet18"), 2).items()
    }
    found = {f"{name}_mask": mask for name, mask in masks.items()}
    content = {
        "epoch": 10,
        "state_dict": trained | found,
        "mask": found,
        "init_weight": filled(resnet("resnet18"), 1),
    }
    path = save(content, tmp_path / "5model_best.pth.tar")
    with pytest.raises(TicketError, match=r"'state_dict\.', 'init_weight\.'"):
        from_checkpoint(path)
    ticket = from_checkpoint(path, prefix="init_weight")
    assert ticket.masks == ticket18.masks and (ticket.weights["layer1.0.conv1.weight"] == 1).all()


@pytest.mark.parametrize("as_checkpoint", [True, False])
@pytest.mark.parametrize("numpy", [True, False])
def test_open_lth_masks(
    ticket18, masks, weights_file, tmp_path, caplog, as_checkpoint: bool, numpy: bool
) -> None:
    content = under("model.", {name: mask.int() for name, mask in masks.items()})
    content["model.conv1.weight"] = torch.zeros(64, 3, 7, 7, dtype=torch.int32)
    content["model.fc.weight"] = torch.ones(1000, 512, dtype=torch.int32)
    if numpy:
        content = {name: mask.numpy() for name, mask in content.items()}
    file = save(content, tmp_path / "mask.pth")
    if as_checkpoint:
        ticket = from_checkpoint(file, weights=weights_file)
    else:
        ticket = from_checkpoint(weights_file, masks=file)
    assert ticket.masks == ticket18.masks
    assert "Left out the mask of model.conv1.weight, which prunes 9,408 of 9,408" in caplog.text
    assert "fc" not in caplog.text and ticket.weights["conv1.weight"].any()


def test_the_voc_tickets_of_2012_04643(tmp_path) -> None:
    """Their masks are the zeros of the weights; a pruner object, with its model, lies beside."""
    state = filled(faster_rcnn("resnet18"))
    pruned = {"RCNN_base.5.0.conv1.weight", "RCNN_top.0.1.conv2.weight", "RCNN_base.0.weight"}
    state |= {name: torch.zeros(state[name].shape) for name in pruned}
    content = {"session": 1, "model": state, "lth_pruner": Pruner(), "optimizer": {"state": {}}}
    path = save(content, tmp_path / "faster_rcnn_1_2_12_833.pth")
    with pytest.raises(TicketError, match=r"it holds .*Pruner.*--skip-objects"):
        from_checkpoint(path, masks="zeros")
    ticket = from_checkpoint(path, masks="zeros", skip_objects=True)
    assert ticket.meta.recipe["imported"] == "faster-rcnn.pytorch"
    densities = {name: d for name, d in ticket.masks.densities().items() if d < 1}
    assert densities == {"layer2.0.conv1.weight": 0, "layer4.1.conv2.weight": 0}
    assert not ticket.weights["conv1.weight"].any()  # a stem's zeros are weights like others


class Pruner:
    def __init__(self) -> None:
        self.mask = {"a": torch.ones(3)}


def test_the_coco_tickets_of_2012_04643(tmp_path) -> None:
    """detectron2's Faster R-CNN with FPN, with FrozenBN, which counts no batches."""
    named = detectron2_names(without_fc(filled(resnet())))
    trunk = {n: torch.from_numpy(v.copy()) for n, v in named.items() if "num_batches" not in n}
    trunk["res3.2.conv2.weight"][:100] = 0
    state = under("backbone.bottom_up.", trunk)
    state["backbone.fpn_lateral2.weight"] = torch.zeros(256, 256, 1, 1)
    path = save({"model": state, "iteration": 1}, tmp_path / "model_final.pth")
    ticket = from_checkpoint(path, "coco", masks="zeros", stride_in_1x1=True)
    assert ticket.meta.arch == "resnet50" and ticket.meta.stride_in_1x1
    assert {n: d for n, d in ticket.masks.densities().items() if d < 1} == {
        "layer2.2.conv2.weight": 28 / 128
    }


def test_zeros_become_masks_and_the_survivors_are_known(ticket18, tmp_path) -> None:
    state = under("module.", ticket18.sparse_weights())
    state["module.fc.weight"] = torch.zeros(1000, 512)
    path = save({"state_dict": state}, tmp_path / "sparse.pth")
    ticket = from_checkpoint(path, "imagenet", masks="zeros")
    assert ticket.masks == ticket18.masks and ticket.meta.recipe["masks"] == "exact zeros"
    assert Ticket.load(ticket.save(tmp_path / "a.ticket")) == ticket
    with pytest.raises(TicketError, match="keep weights that the ticket does not know"):
        ticket.reversed()


def test_zeros_nobody_asked_about_are_mentioned(ticket18, tmp_path, caplog) -> None:
    path = save(ticket18.sparse_weights(), tmp_path / "sparse.pth")
    assert from_checkpoint(path).density == 1
    assert "prunable weights are exactly zero: --mask zeros" in caplog.text


def test_the_masks_of_one_file_over_the_weights_of_another(
    ticket18, weights_file, resnet18_state, tmp_path
) -> None:
    path = save(ticket18.sparse_weights(), tmp_path / "sparse.pth")
    ticket = from_checkpoint(path, masks="zeros", weights=weights_file)
    assert ticket.masks == ticket18.masks and ticket.known is None
    name = "layer4.0.downsample.0.weight"
    assert torch.equal(ticket.weights[name], resnet18_state[name])


def test_a_dense_checkpoint_has_no_zeros(weights_file) -> None:
    with pytest.raises(TicketError, match="expected exact zeros.*found none: the check"):
        from_checkpoint(weights_file, masks="zeros")


def test_str_stores_weights_that_are_still_to_be_thresholded(resnet18_state, tmp_path) -> None:
    """RAIVNLab/STR: the network uses sign(w) relu(|w| - sigmoid(s)); fc is a convolution."""
    state = under("module.", resnet18_state)
    state["module.fc.weight"] = torch.randn(1000, 512, 1, 1)
    for name in [n for n in state if n.endswith("weight") and state[n].ndim == 4]:
        state[name.removesuffix("weight") + "sparseThreshold"] = torch.full((1, 1), -4.0)
    ticket = from_checkpoint(save({"state_dict": state}, tmp_path / "a.pth"), masks="zeros")
    threshold = 1 / (1 + np.exp(4.0))
    weight = resnet18_state["layer3.0.conv1.weight"]
    kept = weight.abs() > threshold
    assert torch.equal(ticket.masks["layer3.0.conv1.weight"], kept) and kept.float().mean() > 0.1
    expected = weight[kept] - threshold * weight[kept].sign()
    assert torch.allclose(ticket.weights["layer3.0.conv1.weight"][kept], expected, atol=1e-6)


def test_acdc_and_woodfisher_wrap_every_layer(ticket18, masks, tmp_path) -> None:
    """Conv2d and Linear layers sit in wrappers with masks; the optimizer's class is pickled."""
    state: dict[str, Any] = {}
    for name, value in filled(resnet("resnet18")).items():
        layer, _, entry = name.rpartition(".")
        if value.ndim == 4 or layer == "fc":
            mask = masks.get(name, torch.ones(value.shape))
            state[f"module.{layer}._layer.{entry}"] = value * mask if entry == "weight" else value
            state[f"module.{layer}._{entry}_mask"] = mask
        else:
            state[f"module.{name}"] = value
    content = {
        "epoch": 99,
        "model_config": {"arch": "resnet18"},
        "model_state_dict": state,
        "optimizer": {"type": torch.optim.SGD, "state_dict": {}},
    }
    path = save(content, tmp_path / "best_sparse_checkpoint.ckpt")
    with pytest.raises(TicketError, match=r"it holds torch\.optim\.sgd\.SGD.*--skip-objects"):
        from_checkpoint(path)
    for how in (None, "zeros"):
        ticket = from_checkpoint(path, "imagenet", masks=how, skip_objects=True)
        assert ticket.masks == ticket18.masks == ticket.known
        assert ticket.meta.recipe["imported"] == "acdc"


def test_masks_that_are_none_are_refused(weights_file, masks, tmp_path) -> None:
    dense = save(filled(resnet("resnet18"), 0.5), tmp_path / "dense.pth")
    with pytest.raises(TicketError, match="must hold only 0 and 1, found 0.5"):
        from_checkpoint(weights_file, masks=dense)
    other = save({"features.0.weight": torch.ones(3)}, tmp_path / "other.pth")
    with pytest.raises(TicketError, match="expected masks of resnet18's convolutions, found 1 ent"):
        from_checkpoint(weights_file, masks=other)
    shape = save(masks | {"layer1.0.conv1.weight": torch.ones(3)}, tmp_path / "shape.pth")
    with pytest.raises(TicketError, match=r"layer1\.0\.conv1\.weight has shape \(3,\)"):
        from_checkpoint(weights_file, masks=shape)
    with pytest.raises(ConfigError, match="found both"):
        from_checkpoint(weights_file, masks=shape, weights=dense)


def test_several_masks_that_differ_are_ambiguous(ticket18, masks, weights_file, tmp_path) -> None:
    both = under("a.", masks) | under("b.", {name: 1 - mask for name, mask in masks.items()})
    file = save(both, tmp_path / "masks.pth")
    with pytest.raises(TicketError, match=r"found 2 that differ, under 'a\.', 'b\.'"):
        from_checkpoint(weights_file, masks=file)
    assert from_checkpoint(file, weights=weights_file, prefix="a").masks == ticket18.masks


# --- foreign files


class Payload:
    def __reduce__(self):
        return os.system, ("touch ran",)


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("kind", ["zip", "legacy", "protocol 4", "pkl", "safetensors", "whole"])
def test_no_reader_runs_what_a_file_brings_along(tmp_path, monkeypatch, kind, skip: bool) -> None:
    monkeypatch.chdir(tmp_path)
    content: Any = {"state_dict": {"w": np.ones(2)}, "payload": Payload(), "lambda": os.getcwd}
    pickled = kind in ("pkl", "safetensors")  # by its name
    path = tmp_path / f"evil.{kind if pickled else 'pth'}"
    if pickled:
        path.write_bytes(pickle.dumps(content))
    elif kind == "whole":
        torch.save(Payload(), path)
    else:
        options: dict[str, Any] = {"pickle_protocol": 4} if kind == "protocol 4" else {}
        torch.save(content, path, _use_new_zipfile_serialization=kind != "legacy", **options)
    if skip and kind != "whole":
        assert list(read_checkpoint(path, skip_objects=True)) == ["state_dict.w"]
    else:
        expected = "found a whole object" if skip else "cannot be read safely"
        with pytest.raises(TicketError, match=expected):
            read_checkpoint(path, skip_objects=skip)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("skip", [False, True])
def test_archives_that_pytorch_would_run_or_unpack_are_refused(tmp_path, skip: bool) -> None:
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), tmp_path / "script.pth")
    with pytest.raises(TicketError, match="it is a TorchScript archive"):
        read_checkpoint(tmp_path / "script.pth", skip_objects=skip)
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        archive.add(tmp_path / "script.pth", "storages")
    with pytest.raises(TicketError, match="it is a tar file"):
        read_checkpoint(tmp_path / "a.tar", skip_objects=skip)


def test_a_file_that_contains_itself_is_read_once(tmp_path) -> None:
    content: dict[str, Any] = {"w": torch.ones(1)}
    content["self"] = content
    assert list(read_checkpoint(save(content, tmp_path / "a.pth"))) == ["w"]


def test_the_tool_imports_and_says_what_it_found(
    ticket_tool, ticket18, tmp_path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    state = under("module.encoder_q.", ticket18.sparse_weights())
    save({"state_dict": state}, tmp_path / "sparse.pth")
    command = ["import", "sparse.pth", "--source", "simclr", "--mask", "zeros", "--out", "a.ticket"]
    done = ticket_tool(*command, "--pixels", "caffe")
    assert done.returncode == 0, done.stderr
    for words in (
        "resnet18 in torchvision naming, under state_dict.module.encoder_q.",
        f"exact zeros ({100 * ticket18.sparsity:.2f} % sparse)",
        "BGR, mean 0.406 0.456 0.485",
        "wrote a.ticket",
    ):
        assert words in done.stdout
    ticket = Ticket.load(tmp_path / "a.ticket")
    assert ticket.masks == ticket18.masks and ticket.meta.stride_in_1x1
    assert ticket.meta.input.mean_255 == (103.53, 116.28, 123.675)
