"""C4, C5: ``init_cfg=dict(type='Ticket')`` puts a ticket on mmseg's backbones, or says why not."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import mmseg.models  # noqa: F401  # fills mmseg's registry
import pytest
import torch
import torchvision
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmseg.registry import MODELS
from torch import Tensor, nn

import lth_plugins as lth
import lth_plugins.mmseg
from lth_plugins import InputSpec, Ticket, TicketError
from lth_plugins.errors import LthError
from lth_plugins.ticket import ARCHITECTURES

CONFIGS = Path(__file__).parents[2] / "configs/mmseg"
REAL_CONFIGS = sorted(path.name for path in CONFIGS.glob("*.py"))
IMAGENET = dict(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], bgr_to_rgb=True)


pytestmark = pytest.mark.usefixtures("quiet")


def build(type: str = "TicketResNet", depth: int = 18, ticket: Any = None, **options: Any) -> Any:
    backbone = {k: options.pop(k) for k in ("style", "norm_eval", "pretrained") if k in options}
    init_cfg = dict(type="Ticket", checkpoint=str(ticket), **options)
    return MODELS.build(dict(type=type, depth=depth, init_cfg=init_cfg, **backbone))


def segmentor(backbone: dict[str, Any], data_preprocessor: dict[str, Any] | None = None) -> Any:
    head = dict(type="FCNHead", in_channels=512, channels=16, num_convs=1, num_classes=11)
    preprocessor = dict(type="SegDataPreProcessor", size=(64, 64), **(data_preprocessor or {}))
    return MODELS.build(
        dict(
            type="EncoderDecoder",
            data_preprocessor=preprocessor,
            backbone=backbone,
            decode_head=head,
        )
    )


def stages(model: nn.Module, images: Tensor) -> list[Tensor]:
    """The four feature maps of a torchvision ResNet."""
    x = model.maxpool(model.relu(model.bn1(model.conv1(images))))
    features = []
    for stage in (model.layer1, model.layer2, model.layer3, model.layer4):
        x = stage(x)
        features.append(x)
    return features


def assert_carries(model: nn.Module, ticket: Ticket) -> None:
    handle = lth.attached(model)
    assert handle is not None
    assert handle.masks == ticket.masks
    weights = handle.ticket().weights
    for name, value in ticket.sparse_weights().items():
        assert torch.equal(weights[name], value), name


def test_there_are_real_configs_for_the_three_datasets() -> None:
    assert len(REAL_CONFIGS) == 4


@pytest.mark.parametrize("name", REAL_CONFIGS)
def test_a_real_config_builds_and_gets_the_ticket(name, ticket50, ticket50_file) -> None:
    cfg = Config.fromfile(CONFIGS / name)
    cfg.model.backbone.init_cfg.checkpoint = str(ticket50_file)
    model = MODELS.build(cfg.model)
    model.init_weights()
    assert_carries(model, ticket50)
    assert cfg.model.data_preprocessor.mean == list(ticket50.meta.input.mean_255)


def test_the_names_are_in_the_registry_that_mmdet_and_mmpretrain_share() -> None:
    from mmengine import registry

    for name in ("TicketResNet", "TicketResNetV1c", "TicketResNetV1d"):
        assert registry.MODELS.get(name) is getattr(lth_plugins.mmseg, name)
    assert registry.WEIGHT_INITIALIZERS.get("Ticket") is lth_plugins.mmseg.TicketInit
    assert registry.HOOKS.get("TicketHook") is lth_plugins.mmseg.TicketHook


@pytest.mark.parametrize("depth", [18, 50])
def test_features_are_torchvisions(depth, ticket18, ticket50, tmp_path) -> None:
    ticket = {18: ticket18, 50: ticket50}[depth]
    reference = getattr(torchvision.models, f"resnet{depth}")()
    reference.load_state_dict(ticket.sparse_weights(), strict=False)
    model = build(depth=depth, ticket=ticket.save(tmp_path / "a.ticket"))
    model.init_weights()
    model.eval()  # returns nothing: mmseg's ResNet.train does not
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        found = model(images)
        expected = stages(reference.eval(), images)
    # Both run the same convolutions in the same order: not only close.
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    ("arch", "type"),
    [
        ("resnet18c", "TicketResNetV1c"),
        ("resnet18d", "TicketResNetV1d"),
        ("resnet18c", "ResNetV1c"),
        ("resnet18", "ResNet"),
    ],
)
def test_stock_backbones_and_deep_stems_take_tickets_too(arch, type, tmp_path) -> None:
    torch.manual_seed(0)
    shapes = ARCHITECTURES[arch].shapes
    state = {name: torch.randn(shape) for name, shape in shapes.items() if shape}
    ticket = Ticket(lth.prune(state, 0.5), state, lth.TicketMeta(arch))
    model = build(type, ticket=ticket.save(tmp_path / "a.ticket"))
    model.init_weights()
    assert_carries(model, ticket)


def test_nothing_initialises_the_weights_again(ticket18, ticket18_file) -> None:
    backbone = dict(
        type="TicketResNet",
        depth=18,
        zero_init_residual=True,
        init_cfg=[
            dict(type="Constant", val=3, layer="Conv2d"),
            dict(type="Ticket", checkpoint=str(ticket18_file)),
        ],
    )
    model = segmentor(backbone, IMAGENET)
    model.init_weights()
    assert_carries(model, ticket18)


def test_without_theta_the_masked_weights_are_mmsegs_own(ticket18, ticket18_file) -> None:
    model = build(ticket=ticket18_file, load_weights=False)
    model.init_weights()
    found = lth.attached(model).ticket()
    name = "layer4.1.conv2.weight"
    assert found.masks == ticket18.masks
    survivors = found.weights[name][ticket18.masks[name]]
    assert not torch.equal(survivors, ticket18.weights[name][ticket18.masks[name]])
    # Kaiming, fan out: what mmseg gives a ResNet that is trained from scratch.
    assert survivors.std().item() == pytest.approx((2 / (512 * 9)) ** 0.5, rel=0.05)


def test_what_is_tested_needs_no_ticket_file(ticket18_file) -> None:
    MODELS.build(dict(type="TicketResNet", depth=18, init_cfg=None))
    build(ticket=Path("no/such.ticket"))


def test_a_simclr_ticket_takes_raw_pixels(ticket18, tmp_path) -> None:
    raw = InputSpec("RGB", (0, 0, 0), (1, 1, 1))
    meta = lth.TicketMeta("resnet18", input=raw)
    file = Ticket(ticket18.masks, ticket18.weights, meta).save(tmp_path / "simclr.ticket")
    backbone = dict(type="TicketResNet", depth=18, init_cfg=dict(type="Ticket", checkpoint=file))
    with pytest.raises(TicketError) as error:
        segmentor(backbone, IMAGENET).init_weights()
    line = str(error.value).splitlines()[1].strip()
    assert line == (
        "model = dict(data_preprocessor="
        "dict(mean=[0.0, 0.0, 0.0], std=[255.0, 255.0, 255.0], bgr_to_rgb=True))"
    )
    # What the error says to write is what works.
    right = eval(line.removeprefix("model = "))["data_preprocessor"]
    segmentor(backbone, right).init_weights()


def test_a_ticket_of_bands_needs_a_backbone_and_a_preprocessor_of_them(
    bands18_file, tmp_path
) -> None:
    init_cfg = dict(type="Ticket", checkpoint=str(bands18_file))
    backbone = dict(type="TicketResNet", depth=18, in_channels=13, init_cfg=init_cfg)
    with pytest.raises(
        TicketError, match=r"13-channel input .*\n.*mean=\[0\.0\], std=\[10000\.0\]"
    ):
        segmentor(backbone, IMAGENET).init_weights()
    bands = dict(mean=[0.0], std=[10000.0])
    with pytest.raises(TicketError, match=r"stem reads 3: .*backbone=dict\(in_channels=13"):
        segmentor({**backbone, "in_channels": 3}, bands).init_weights()
    model = segmentor(backbone, bands)
    model.init_weights()
    assert_carries(model, Ticket.load(bands18_file))
    images = [torch.full((13, 64, 64), 5000.0)]
    inputs = model.data_preprocessor(dict(inputs=images, data_samples=None))["inputs"]
    assert (inputs == 0.5).all()
    assert model.eval()(inputs).shape[1] == 11
    ticket = Ticket.load(bands18_file)
    uneven = replace(ticket.meta.input, mean=tuple(range(13)))
    ticket = replace(ticket, meta=replace(ticket.meta, input=uneven)).save(tmp_path / "a.ticket")
    init_cfg["checkpoint"] = str(ticket)
    with pytest.raises(TicketError, match=r"Normalise the bands in the pipeline.*\n.*keep_input"):
        segmentor(backbone, dict(mean=None, std=None)).init_weights()
    init_cfg["keep_input"] = True
    segmentor(backbone, dict(mean=None, std=None)).init_weights()


@pytest.mark.parametrize(
    "preprocessor",
    [
        None,
        {**IMAGENET, "bgr_to_rgb": False},
        {**IMAGENET, "mean": [0, 0, 0]},
        {**IMAGENET, "std": [1.0]},
    ],
    ids=["none", "BGR", "mean", "std"],
)
def test_a_contradicting_input_is_an_error_unless_kept(preprocessor, ticket18_file) -> None:
    init_cfg = dict(type="Ticket", checkpoint=str(ticket18_file))
    backbone = dict(type="TicketResNet", depth=18, init_cfg=init_cfg)
    model = segmentor(backbone, preprocessor)
    before = {name: value.clone() for name, value in model.backbone.state_dict().items()}
    with pytest.raises(TicketError, match=r"bgr_to_rgb=True.*\n.*keep_input=True"):
        model.init_weights()
    assert lth.attached(model) is None
    assert all(torch.equal(v, before[n]) for n, v in model.backbone.state_dict().items())

    init_cfg["keep_input"] = True
    segmentor(backbone, preprocessor).init_weights()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(depth=34), r"type='TicketResNet', depth=18"),
        (dict(type="TicketResNetV1c"), r"type='TicketResNet', depth=18"),
        (dict(type="ResNetV1d"), r"one 7x7 convolution.*a resnet18d"),
        (dict(norm_eval=True), "norm_eval=False"),
        (dict(pretrained="open-mmlab://resnet18_v1c"), "pretrained=None"),
        (dict(ticket="nothing.ticket"), "nothing.ticket"),
        (dict(ticket="mocco_r50"), "catalog name"),
        (dict(random=True), "stores only surviving weights"),
        (dict(reverse=True), "stores only surviving weights"),
        (dict(reverse=True, random=True), "at most one"),
    ],
)
def test_a_contradiction_says_what_to_write(options, message, ticket18_file) -> None:
    with pytest.raises(LthError, match=message):
        build(**{"ticket": ticket18_file, **options}).init_weights()


def test_a_bottleneck_with_caffes_strides_is_refused(ticket50_file) -> None:
    with pytest.raises(TicketError, match="style='pytorch'"):
        build(depth=50, style="caffe", ticket=ticket50_file).init_weights()


def test_a_ticket_with_its_own_statistics_may_freeze_them(ticket18_file) -> None:
    build(ticket=ticket18_file, norm_eval=True, keep_norm_eval=True).init_weights()


@pytest.mark.parametrize(
    "init_cfg", [None, dict(type="Ticket"), dict(type="Kaiming", layer="Conv2d")]
)
def test_a_ticket_backbone_does_not_train_without_a_ticket(init_cfg) -> None:
    model = MODELS.build(dict(type="TicketResNet", depth=18, init_cfg=init_cfg))
    with pytest.raises(TicketError, match="init_cfg"):
        model.init_weights()


def test_a_ticket_on_the_segmentor_is_sent_to_the_backbone(ticket18_file) -> None:
    model = segmentor(dict(type="ResNet", depth=18))
    model.init_cfg = dict(type="Ticket", checkpoint=str(ticket18_file))
    with pytest.raises(TicketError, match="backbone"):
        model.init_weights()


def nested(kind: str, init_cfg: Any, **data_preprocessor: Any) -> Config:
    """A config whose backbone holds the ResNet, as mmseg's own BiSeNetV1 and ICNet do."""
    resnet = dict(type="ResNet", depth=18, init_cfg=init_cfg, num_stages=4, norm_eval=False)
    backbones = {
        "BiSeNetV1": dict(spatial_channels=(8, 8, 8, 128), context_channels=(128, 256, 512)),
        "ICNet": dict(layer_channels=(128, 512), light_branch_middle_channels=8),
    }
    head = dict(type="FCNHead", in_channels=256, channels=16, num_convs=1, num_classes=11)
    preprocessor = {"type": "SegDataPreProcessor", **IMAGENET, **data_preprocessor}
    model = dict(
        type="EncoderDecoder",
        data_preprocessor=preprocessor,
        backbone=dict(type=kind, backbone_cfg=resnet, **backbones[kind]),
        decode_head=head,
        pretrained=None,
    )
    return Config(dict(model=model))


@pytest.mark.parametrize("kind", ["BiSeNetV1", "ICNet"])
@pytest.mark.parametrize("by", ["config", "argument", "argument for pre-trained weights"])
def test_a_backbone_inside_a_backbone_gets_the_ticket(kind, by, ticket18, ticket18_file) -> None:
    ref = None if by == "config" else str(ticket18_file)
    found = {
        "config": dict(type="Ticket", checkpoint=str(ticket18_file)),
        "argument": None,
        "argument for pre-trained weights": dict(type="Pretrained", checkpoint="r18"),
    }[by]
    cfg = nested(kind, found)
    lth_plugins.mmseg.apply_ticket(cfg, ref)
    assert cfg.model.backbone.get("init_cfg") is None
    model = MODELS.build(cfg.model)
    model.init_weights()
    assert_carries(model, ticket18)


@pytest.mark.parametrize("kind", ["BiSeNetV1", "ICNet"])
def test_what_a_backbone_inside_a_backbone_is_fed_is_checked(kind, ticket18_file) -> None:
    init_cfg = dict(type="Ticket", checkpoint=str(ticket18_file))
    cfg = nested(kind, init_cfg, mean=[0.0, 0.0, 0.0])
    with pytest.raises(TicketError, match="SegDataPreProcessor returns RGB input with mean"):
        MODELS.build(cfg.model).init_weights()
    init_cfg["keep_input"] = True
    MODELS.build(nested(kind, init_cfg, mean=[0.0, 0.0, 0.0]).model).init_weights()


def test_a_ticket_on_the_outer_backbone_is_sent_to_the_inner(ticket18_file) -> None:
    cfg = nested("BiSeNetV1", None)
    cfg.model.backbone.init_cfg = dict(type="Ticket", checkpoint=str(ticket18_file))
    with pytest.raises(TicketError, match=r"backbone=dict\(backbone_cfg=dict\(init_cfg="):
        lth_plugins.mmseg.apply_ticket(cfg)
    with pytest.raises(TicketError, match="into the backbone_cfg"):
        MODELS.build(cfg.model).init_weights()


def test_an_input_that_nobody_knows_is_said_to_be_unchecked(ticket18_file, caplog) -> None:
    logger = MMLogger.get_current_instance()
    logger.addHandler(caplog.handler)
    build(ticket=ticket18_file).init_weights()
    logger.removeHandler(caplog.handler)
    assert "is not checked" in caplog.text


def test_a_backbone_without_batch_norm_is_told_so(ticket18_file) -> None:
    norm_cfg = dict(type="GN", num_groups=8)
    init_cfg = dict(type="Ticket", checkpoint=str(ticket18_file))
    model = MODELS.build(dict(type="ResNet", depth=18, norm_cfg=norm_cfg, init_cfg=init_cfg))
    with pytest.raises(TicketError, match=r"write backbone=dict\(norm_cfg=dict\(type='BN'\)"):
        model.init_weights()
