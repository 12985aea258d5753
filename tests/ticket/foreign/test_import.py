"""What people already have becomes a ticket: released checkpoints by their true key sets, masks of
other projects, sparse models by their zeros; and foreign files cannot do anything but be read.
"""

import argparse
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from lth_plugins import ConfigError, InputSpec, Ticket, TicketError
from lth_plugins.ticket import IMAGENET, UNIT_RANGE
from lth_plugins.ticket.foreign.checkpoints import read_checkpoint
from lth_plugins.ticket.foreign.convert import from_checkpoint
from tests.ticket.foreign.layouts import moco, named, seco, with_average
from tests.ticket.states import State, full, head, save, trunk, under

FC = head("fc", 2048, 1000)
PROJECTION = (2048, 2048, 128)
LAYER = "layer1.0.conv1.weight"


def detectron2_pickle() -> dict[str, Any]:
    """As MoCo's convert-pretrain-to-detectron2.py writes one."""
    state = named("detectron2", "resnet18") | head("stem.fc", *PROJECTION)
    arrays = {name: value.numpy() for name, value in state.items()}
    return {"model": arrays, "__author__": "MOCO", "matching_heuristics": True}


def mmpretrain_moco() -> dict[str, Any]:
    state = with_average("backbone.", "encoder_k.module.0.") | head("neck.mlp", *PROJECTION)
    state |= head("encoder_k.module.1.mlp", *PROJECTION)
    state |= {"encoder_k.steps": torch.tensor(9), "queue": torch.zeros(128, 16)}
    return {"meta": {"epoch": 200}, "state_dict": state}


def mmselfsup_moco() -> dict[str, Any]:
    state = with_average("encoder_q.0.", "encoder_k.0.") | under("backbone.", trunk("resnet50"))
    for neck in ("encoder_q.1", "encoder_k.1", "neck"):
        state |= head(f"{neck}.mlp", *PROJECTION)
    return {"meta": {}, "state_dict": state}


TRUNK = "resnet50 torchvision"
VISSL = "_feature_blocks."  # it keeps torchvision's modules in a dictionary
CLASSY = "classy_state_dict.base_model.model.trunk."
RELEASES: dict[str, tuple[Callable[[], Any], str, str, str]] = {
    # content, source, architecture and dialect, prefix
    "torchvision-r50": (lambda: trunk("resnet50") | FC, "imagenet", TRUNK, ""),
    "torchvision-r18": (
        lambda: trunk("resnet18") | head("fc", 512, 1000),
        *("imagenet", "resnet18 torchvision", ""),
    ),
    "timm-r50d": (
        lambda: {"state_dict": trunk("resnet50d") | FC},
        *("imagenet", "resnet50d torchvision", "state_dict."),
    ),
    "timm-training": (
        lambda: (
            {"args": argparse.Namespace(model="resnet50", lr=0.1), "metric": np.float64(76.1)}
            | {"state_dict": trunk("resnet50") | FC}
        ),
        *("imagenet", TRUNK, "state_dict."),
    ),
    "moco-v1": (lambda: moco(1), "moco", TRUNK, "state_dict.module.encoder_q."),
    "moco-v2": (lambda: moco(2), "moco", TRUNK, "state_dict.module.encoder_q."),
    "moco-v3": (lambda: moco(3), "moco", TRUNK, "state_dict.module.base_encoder."),
    "moco-mmpretrain": (mmpretrain_moco, "moco", TRUNK, "state_dict.backbone."),
    "moco-mmselfsup": (mmselfsup_moco, "moco", TRUNK, "state_dict.backbone."),
    "moco-detectron2.pkl": (detectron2_pickle, "moco", "resnet18 detectron2", "model."),
    "moco-lightly": (
        lambda: {
            "state_dict": with_average("backbone.", "backbone_momentum.", "sequential")
            | head("projection_head.layers", *PROJECTION)
        },
        *("moco", "resnet50 sequential", "state_dict.backbone."),
    ),
    "moco-lightly-benchmark": (
        lambda: {
            "state_dict": with_average("query_backbone.", "backbone."),
            "pytorch-lightning_version": "2.0.2",
            "callbacks": {},
        },
        *("moco", TRUNK, "state_dict.query_backbone."),
    ),
    "simclr-v1-tonylins": (
        lambda: {"state_dict": trunk("resnet50", counter=0) | FC},
        *("simclr", TRUNK, "state_dict."),
    ),
    "simclr-v2-separius": (
        lambda: {
            "resnet": named("SimCLRv2-Pytorch", counter=0) | FC,
            "head": head("layers", *PROJECTION),
        },
        *("simclr", "resnet50 simclrv2", "resnet."),
    ),
    "simclr-solo-learn": (
        lambda: {
            "state_dict": with_average("backbone.", "momentum_backbone.")
            | head("classifier", 2048, 1000)
            | head("projector", 2048, 4096, 256),
            "hparams_name": "kwargs",
        },
        *("simclr", TRUNK, "state_dict.backbone."),
    ),
    "simclr-vissl": (
        lambda: (
            under(f"{CLASSY}{VISSL}", trunk("resnet50"))
            | head("classy_state_dict.heads.0.clf", *PROJECTION)
        ),
        *("simclr", TRUNK, f"{CLASSY}{VISSL}"),
    ),
    "swav-vissl-flat": (
        lambda: {"model_state_dict": under(f"trunk.base_model.{VISSL}", trunk("resnet50"))},
        *("swav", TRUNK, f"model_state_dict.trunk.base_model.{VISSL}"),
    ),
    "sparseml": (
        lambda: {
            "state_dict": under("module.", named("sparseml") | head("classifier.fc", 2048, 1000)),
            "recipe": "!Modifier",
        },
        *("imagenet", "resnet50 sparseml", "state_dict.module."),
    ),
    "rigl": (
        lambda: {
            "model_config": {"arch": "resnet50_rigl"},
            "model_state_dict": named("RigL, as converted for arXiv 2111.13445") | FC,
        },
        *("imagenet", "resnet50 rigl", "model_state_dict."),
    ),
}
BANDS: dict[str, tuple[Callable[[], Any], int, str, str]] = {
    # content, channels, dialect, prefix
    "ssl4eo-s12-moco": (lambda: moco(2, 13), 13, "torchvision", "state_dict.module.encoder_q."),
    "torchgeo-s2-moco": (lambda: trunk("resnet18", channels=13), 13, "torchvision", ""),
    "torchgeo-landsat-etm-moco": (lambda: trunk("resnet50", channels=9), 9, "torchvision", ""),
    "seco": (lambda: seco(12), 12, "sequential", "state_dict.encoder_q."),
}
"""Multispectral releases, by their key sets: TorchGeo's are timm's ResNets without a classifier."""
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


@pytest.mark.parametrize("release", BANDS)
def test_a_multispectral_release_is_imported_with_its_bands(
    tmp_path, ticket_tool, release: str
) -> None:
    make, channels, dialect, prefix = BANDS[release]
    path, out = save(make(), tmp_path / "a.pth"), tmp_path / "a.ticket"
    command = ["import", path, "--source", "moco", "--out", out]
    done = ticket_tool(*command)
    assert done.returncode == 2 and not out.exists()
    assert f"reads {channels} channels to be stated, found none" in done.stderr
    assert "--bands NAMES --mean VALUES --std VALUES" in done.stderr
    done = ticket_tool(*command, "--bands", channels, "--mean", 0, "--std", 10000)
    assert done.returncode == 0, done.stderr
    assert f"input       {channels} bands, mean 0 0" in done.stdout
    ticket = Ticket.load(out)
    assert ticket.meta.input == InputSpec(
        f"{channels} bands", (0.0,) * channels, (10000.0,) * channels, scale=1
    )
    assert (ticket.meta.recipe["imported"], ticket.meta.recipe["prefix"]) == (dialect, prefix)
    assert ticket.weights["conv1.weight"].shape[1] == channels
    assert all((value == 1).all() for n, value in ticket.weights.items() if "num_batches" not in n)


def test_bands_have_names_and_statistics(tmp_path, ticket_tool) -> None:
    path, out = save(trunk(), tmp_path / "a.pth"), tmp_path / "a.ticket"
    options = ["--bands", "B8,B4,B3", "--mean=-2318.7,1373.1,1322.3", "--std", "1249,1144,878"]
    done = ticket_tool("import", path, "--source", "moco", "--out", out, *options)
    assert done.returncode == 0, done.stderr
    stats = (-2318.7, 1373.1, 1322.3), (1249.0, 1144.0, 878.0)
    assert Ticket.load(out).meta.input == InputSpec("B8,B4,B3", *stats, scale=1)
    done = ticket_tool("show", out)
    assert "B8,B4,B3, mean -2318.7 1373.1 1322.3" in done.stdout and "as stored" in done.stdout


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--bands", "13"], "found no --mean: add it"),
        (["--mean", "0", "--std", "1"], "found no --bands: add it"),
        (["--bands", "13", "--mean", "0", "--std", "1"], "read 13 channels (13 bands)"),
        (["--bands", "3", "--mean", "0,1", "--std", "1"], "input.mean to be three numbers"),
        (["--bands", "3", "--mean", "0", "--std", "0"], "input.std to be three positive numbers"),
        (["--bands", "0", "--mean", "0", "--std", "1"], "or their number ('13 bands')"),
        (["--bands", "B1,,B2", "--mean", "0", "--std", "1"], "found 'B1,,B2'"),
        (["--bands", "3", "--mean", "x", "--std", "1"], "--mean: expected one number"),
        (["--bands", "3", "--pixels", "caffe"], "not allowed with argument"),
    ],
)
def test_bands_that_do_not_fit_are_refused_in_a_sentence(
    tmp_path, ticket_tool, options: list[str], said: str
) -> None:
    path, out = save(trunk(), tmp_path / "a.pth"), tmp_path / "a.ticket"
    done = ticket_tool("import", path, "--source", "moco", "--out", out, *options)
    assert done.returncode == 2 and said in done.stderr, done.stderr
    assert not out.exists()


def test_selective_kernels_are_refused_by_name(tmp_path) -> None:
    kernels = {"net.1.blocks.0.net.2.main_conv.0.weight": full(1.0, 128, 64, 3, 3)}
    path = save({"resnet": named("SimCLRv2-Pytorch") | kernels}, tmp_path / "a.pth")
    named_so = "selective kernels.*main_conv.*only plain ResNets can be tickets"
    with pytest.raises(TicketError, match=named_so):
        from_checkpoint(path)


def test_a_wider_resnet_is_refused_by_its_shapes(tmp_path) -> None:
    """Google's simCLR is also released with all widths doubled."""

    def doubled(name: str, shape: torch.Size) -> list[int]:
        channels = 1 if name == "conv1.weight" else 2
        return [2 * c if i == 0 else channels * c if i == 1 else c for i, c in enumerate(shape)]

    wide = {n: full(0.0, *doubled(n, v.shape)) for n, v in trunk("resnet50").items()}
    with pytest.raises(TicketError, match=r"of another shape \(such as .* is \(\d+,.* instead of"):
        from_checkpoint(save({"state_dict": wide}, tmp_path / "resnet50-2x.pth"), "simclr")


def test_the_source_and_the_counters_decide_the_input_of_simclr(tmp_path) -> None:
    copied = save({"state_dict": trunk(counter=0)}, tmp_path / "a.pth")
    assert from_checkpoint(copied, "simclr").meta.input == UNIT_RANGE
    assert from_checkpoint(copied, "imagenet").meta.input == IMAGENET
    assert from_checkpoint(copied, "simclr", IMAGENET).meta.input == IMAGENET


@pytest.mark.parametrize("outer", ["", "backbone."])
def test_of_two_trained_trunks_the_prefix_chooses(outer: str, tmp_path) -> None:
    """Also where the prefix of one is the end of the other's."""
    content = under(outer, trunk()) | under(f"teacher.{outer}", trunk("resnet34", 2))
    path = save(content, tmp_path / "two.pth")
    with pytest.raises(TicketError, match=rf"found 2, .*'teacher\.{outer}'.*--prefix"):
        from_checkpoint(path)
    assert from_checkpoint(path, prefix=outer).meta.arch == "resnet18"
    assert from_checkpoint(path, prefix="teacher").meta.arch == "resnet34"
    with pytest.raises(TicketError, match="under the prefix 'eacher'"):
        from_checkpoint(path, prefix="eacher")


# --- masks


@pytest.fixture
def masks(ticket18: Ticket) -> State:
    return {name: mask.float() for name, mask in ticket18.masks.items()}


@pytest.fixture
def weights_file(resnet18_state: State, tmp_path: Path) -> Path:
    return save(resnet18_state, tmp_path / "weights.pth")


@pytest.mark.parametrize("prefix", ["", "module.encoder_q."])
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
    assert torch.equal(ticket.weights[LAYER], resnet18_state[LAYER])


def test_the_encoders_of_a_pruned_moco_share_the_query_mask(ticket18, masks, tmp_path) -> None:
    pruned: State = {}
    for side, prefix in ((0, "module.encoder_q."), (1, "module.encoder_k.")):
        for name, value in trunk().items():
            if name in masks:
                pruned[f"{prefix}{name}_orig"] = value + side
                pruned[f"{prefix}{name}_mask"] = masks[name] if side == 0 else 1 - masks[name]
            else:
                pruned[prefix + name] = value
    ticket = from_checkpoint(save({"state_dict": pruned}, tmp_path / "a.pth.tar"), "moco")
    assert ticket.masks == ticket18.masks
    assert (ticket.weights[LAYER] == 1).all()


def test_rewound_weights_beside_trained_ones_are_chosen_by_prefix(
    ticket18, masks, tmp_path
) -> None:
    """The checkpoints that the code of arXiv 2012.06908 writes after each round."""
    found = {f"{name}_mask": mask for name, mask in masks.items()}
    trained = {(f"{n}_orig" if n in masks else n): v for n, v in trunk(value=2).items()}
    content = {"state_dict": trained | found, "mask": found, "init_weight": trunk()}
    path = save(content, tmp_path / "5model_best.pth.tar")
    with pytest.raises(TicketError, match=r"'state_dict\.', 'init_weight\.'"):
        from_checkpoint(path)
    ticket = from_checkpoint(path, prefix="init_weight")
    assert ticket.masks == ticket18.masks and (ticket.weights[LAYER] == 1).all()


@pytest.mark.parametrize("numpy", [True, False])
def test_open_lth_masks(ticket18, masks, weights_file, tmp_path, caplog, numpy: bool) -> None:
    """As the checkpoint, with the weights of another file, and as the masks of a checkpoint."""
    content = under("model.", {name: mask.int() for name, mask in masks.items()})
    content["model.conv1.weight"] = torch.zeros(64, 3, 7, 7, dtype=torch.int32)
    content["model.fc.weight"] = torch.ones(1000, 512, dtype=torch.int32)
    if numpy:
        content = {name: mask.numpy() for name, mask in content.items()}
    file = save(content, tmp_path / "mask.pth")
    for ticket in (
        from_checkpoint(file, weights=weights_file),
        from_checkpoint(weights_file, masks=file),
    ):
        assert ticket.masks == ticket18.masks and ticket.weights["conv1.weight"].any()
    said = "Left out the mask of model.conv1.weight, which prunes 9,408 of 9,408"
    assert caplog.text.count(said) == 2 and "fc" not in caplog.text


class Pruner:
    def __init__(self) -> None:
        self.mask = {"a": torch.ones(3)}


def test_the_voc_tickets_of_2012_04643(tmp_path) -> None:
    """Their masks are the zeros of the weights; a pruner object, with its model, lies beside."""
    state = named("faster-rcnn.pytorch", "resnet18") | head("RCNN_cls_score", 512, 21)
    pruned = {"RCNN_base.5.0.conv1.weight", "RCNN_top.0.1.conv2.weight", "RCNN_base.0.weight"}
    state |= {name: full(0.0, *state[name].shape) for name in pruned}
    state |= {"RCNN_rpn.RPN_Conv.weight": full(1.0, 512, 256, 3, 3)}
    content = {"session": 1, "model": state, "lth_pruner": Pruner(), "optimizer": {"state": {}}}
    path = save(content, tmp_path / "faster_rcnn_1_2_12_833.pth")
    with pytest.raises(TicketError, match=r"it holds .*Pruner.*--skip-objects"):
        from_checkpoint(path, masks="zeros")
    ticket = from_checkpoint(path, masks="zeros", skip_objects=True)
    assert ticket.meta.recipe["imported"] == "faster-rcnn.pytorch"
    densities = {name: d for name, d in ticket.masks.densities().items() if d < 1}
    assert densities == {"layer2.0.conv1.weight": 0, "layer4.1.conv2.weight": 0}
    assert not ticket.weights["conv1.weight"].any()  # a stem's zeros are weights like others


def test_the_coco_tickets_of_2012_04643(tmp_path) -> None:
    """detectron2's Faster R-CNN with FPN, with FrozenBN, which counts no batches."""
    state = under("backbone.bottom_up.", named("detectron2", counter=None))
    key = "backbone.bottom_up.res3.2.conv2.weight"
    state[key] = state[key].clone()
    state[key][:100] = 0
    state["backbone.fpn_lateral2.weight"] = full(0.0, 256, 256, 1, 1)
    path = save({"model": state, "iteration": 1}, tmp_path / "model_final.pth")
    ticket = from_checkpoint(path, "coco", masks="zeros", stride_in_1x1=True)
    assert ticket.meta.arch == "resnet50" and ticket.meta.stride_in_1x1
    assert {n: d for n, d in ticket.masks.densities().items() if d < 1} == {
        "layer2.2.conv2.weight": 28 / 128
    }


def test_zeros_become_masks_and_the_survivors_are_known(
    ticket18, weights_file, resnet18_state, tmp_path
) -> None:
    state = under("module.", ticket18.sparse_weights() | {"fc.weight": full(0.0, 1000, 512)})
    path = save({"state_dict": state}, tmp_path / "sparse.pth")
    ticket = from_checkpoint(path, "imagenet", masks="zeros")
    assert ticket.masks == ticket18.masks and ticket.meta.recipe["masks"] == "exact zeros"
    assert Ticket.load(ticket.save(tmp_path / "a.ticket")) == ticket
    with pytest.raises(TicketError, match="keep weights that the ticket does not know"):
        ticket.reversed()
    over_others = from_checkpoint(path, masks="zeros", weights=weights_file)
    assert over_others.masks == ticket18.masks and over_others.known is None
    assert torch.equal(over_others.weights[LAYER], resnet18_state[LAYER])


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
    weight = resnet18_state[LAYER]
    kept = weight.abs() > threshold
    assert torch.equal(ticket.masks[LAYER], kept) and kept.float().mean() > 0.1
    expected = weight[kept] - threshold * weight[kept].sign()
    assert torch.allclose(ticket.weights[LAYER][kept], expected, atol=1e-6)


def test_acdc_and_woodfisher_wrap_every_layer(ticket18, masks, tmp_path) -> None:
    """Conv2d and Linear layers sit in wrappers with masks; the optimizer's class is pickled."""
    state: dict[str, Any] = {}
    for name, value in (trunk() | head("fc", 512, 1000)).items():
        layer, _, entry = name.rpartition(".")
        if value.ndim == 4 or layer == "fc":
            mask = masks.get(name, torch.ones(value.shape))
            state[f"module.{layer}._layer.{entry}"] = value * mask if entry == "weight" else value
            state[f"module.{layer}._{entry}_mask"] = mask
        else:
            state[f"module.{name}"] = value
    optimizer = {"type": torch.optim.SGD, "state_dict": {}}
    content = {"epoch": 99, "model_state_dict": state, "optimizer": optimizer}
    path = save(content, tmp_path / "best_sparse_checkpoint.ckpt")
    with pytest.raises(TicketError, match=r"it holds torch\.optim\.sgd\.SGD.*--skip-objects"):
        from_checkpoint(path)
    for how in (None, "zeros"):
        ticket = from_checkpoint(path, "imagenet", masks=how, skip_objects=True)
        assert ticket.masks == ticket18.masks == ticket.known
        assert ticket.meta.recipe["imported"] == "acdc"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (trunk(value=0.5), "must hold only 0 and 1, found 0.5"),
        (
            {"features.0.weight": torch.ones(3)},
            "expected masks of resnet18's convolutions, found 1 ent",
        ),
        (trunk() | {LAYER: torch.ones(3)}, r"layer1\.0\.conv1\.weight has shape \(3,\)"),
        (
            under("a.", trunk()) | under("b.", trunk(value=0)),
            r"found 2 that differ, under 'a\.', 'b\.'",
        ),
    ],
)
def test_masks_that_are_none_or_ambiguous_are_refused(
    content: State, message: str, weights_file, tmp_path
) -> None:
    file = save(content, tmp_path / "masks.pth")
    with pytest.raises(TicketError, match=message):
        from_checkpoint(weights_file, masks=file)
    with pytest.raises(ConfigError, match="found both"):
        from_checkpoint(weights_file, masks=file, weights=file)


def test_of_several_masks_the_prefix_chooses(ticket18, masks, weights_file, tmp_path) -> None:
    both = under("a.", masks) | under("b.", {name: 1 - mask for name, mask in masks.items()})
    file = save(both, tmp_path / "masks.pth")
    assert from_checkpoint(file, weights=weights_file, prefix="a").masks == ticket18.masks


# --- foreign files


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
