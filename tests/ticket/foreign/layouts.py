"""What libraries call a ResNet's parameters, written down apart from the package's tables."""

import re
from collections.abc import Callable
from typing import Any

from tests.ticket.states import Rule, State, full, head, renamed, trunk, under


def number(template: str, plus: int = 0, by: int = 1) -> Callable[[re.Match[str]], str]:
    """Replace by a template, in which the first group is a number that is counted otherwise."""
    return lambda match: template.format((int(match[1]) + plus) // by, *match.groups()[1:])


def letter(template: str) -> Callable[[re.Match[str]], str]:
    return lambda match: template.format("abc"[int(match[1]) - 1])


STAGE = r"^layer(\d)\.(\d+)"
NAMES: dict[str, list[Rule]] = {
    "detectron2": [
        (r"^(conv1|bn1)", r"stem.\1"),
        (r"^layer(\d)", number("res{}", 1)),
        (r"bn(\d)", r"conv\1.norm"),
        (r"downsample\.0", "shortcut"),
        (r"downsample\.1", "shortcut.norm"),
    ],
    "faster-rcnn.pytorch": [
        (r"^layer4", "RCNN_top.0"),
        (r"^conv1", "RCNN_base.0"),
        (r"^bn1", "RCNN_base.1"),
        (r"^layer(\d)", number("RCNN_base.{}", 3)),
    ],
    "mmaction2": [
        (r"downsample\.0", "downsample.conv"),
        (r"downsample\.1", "downsample.bn"),
        (r"(^|\.)conv(\d)", r"\1conv\2.conv"),
        (r"(^|\.)bn(\d)", r"\1conv\2.bn"),
    ],
    "mmpretrain V1c": [
        (r"^conv1\.([036])", number("stem.{}.conv", by=3)),
        (r"^conv1\.([14])", number("stem.{}.bn", by=3)),
        (r"^bn1", "stem.2.bn"),
    ],
    "pycls": [
        (r"^conv1", "stem.conv"),
        (r"^bn1", "stem.bn"),
        (r"^layer(\d)\.", r"s\1.b"),
        (r"(?<=\.b)(\d+)", number("{}", 1)),
        (r"downsample\.0", "proj"),
        (r"downsample\.1", "bn"),
        (r"\.conv(\d)", letter(".f.{}")),
        (r"\.bn(\d)", letter(".f.{}_bn")),
    ],
    "RigL, as converted for arXiv 2111.13445": [
        (r"^conv1", "initial_conv.conv"),
        (r"^bn1", "initial_conv.bn"),
        (STAGE, r"layer\1.block.\2"),
        (r"\.conv(\d)", r".conv\1.conv"),
        (r"\.bn(\d)", r".conv\1.bn"),
        (r"downsample\.0", "shortcut.conv"),
        (r"downsample\.1", "shortcut.bn"),
    ],
    "sequential": [
        (r"^conv1", "0"),
        (r"^bn1", "1"),
        (r"^layer(\d)", number("{}", 3)),
    ],
    "SimCLRv2-Pytorch": [
        (r"^conv1", "net.0.0"),
        (r"^bn1", "net.0.1.0"),
        (STAGE, r"net.\1.blocks.\2"),
        (r"\.conv(\d)", lambda match: f".net.{2 * int(match[1]) - 2}"),
        (r"\.bn(\d)", lambda match: f".net.{2 * int(match[1]) - 1}.0"),
        (r"downsample\.0", "projection.shortcut"),
        (r"downsample\.1", "projection.bn.0"),
    ],
    "sparseml": [
        (r"^conv1", "input.conv"),
        (r"^bn1", "input.bn"),
        (STAGE, number("sections.{}.{}", -1)),
        (r"downsample\.0", "identity.conv"),
        (r"downsample\.1", "identity.bn"),
    ],
    "transformers": [
        (r"^conv1", "embedder.embedder.convolution"),
        (r"^bn1", "embedder.embedder.normalization"),
        (r"downsample\.0", "shortcut.convolution"),
        (r"downsample\.1", "shortcut.normalization"),
        (STAGE, number("encoder.stages.{}.layers.{}", -1)),
        (r"\.conv(\d)", number(".layer.{}.convolution", -1)),
        (r"\.bn(\d)", number(".layer.{}.normalization", -1)),
    ],
}
NAMES["mmpretrain V1d"] = [  # the first shortcut has no pooling
    *NAMES["mmpretrain V1c"],
    (r"(?<=^layer1\.0\.downsample\.)(\d)", number("{}", -1)),
]
NAMES["transformers' RT-DETR"] = [  # a ResNet-D, whose stage 0 does not pool
    (r"^conv1\.([036])", number("embedder.embedder.{}.convolution", by=3)),
    (r"^conv1\.([14])", number("embedder.embedder.{}.normalization", by=3)),
    (r"^bn1", "embedder.embedder.2.normalization"),
    (r"(?<=^layer1\.0\.)downsample\.1", "shortcut.convolution"),
    (r"(?<=^layer1\.0\.)downsample\.2", "shortcut.normalization"),
    (r"downsample\.1", "shortcut.1.convolution"),
    (r"downsample\.2", "shortcut.1.normalization"),
    *NAMES["transformers"][4:],
]


def named(library: str, arch: str = "resnet50", **options: Any) -> State:
    """The trunk of a model of this library, without what is around it."""
    return renamed(trunk(arch, **options), *NAMES[library])


def maskrcnn_benchmark(heads: int = 0) -> State:
    """FrozenBatchNorm2d counts nothing; a C4 model has layer4 in heads that share it."""
    stem = (r"^(conv1|bn1)", r"stem.\1")
    state = under("backbone.body.", renamed(trunk("resnet50", counter=None), stem))
    if not heads:
        return state
    last = {name: value for name, value in state.items() if ".layer4." in name}
    found = {name: value for name, value in state.items() if name not in last}
    for part in ("box", "mask")[:heads]:
        where = f"roi_heads.{part}.feature_extractor.head.layer4."
        found |= renamed(last, (r"^.*\.layer4\.", where))
    return found


def moco(version: int, channels: int = 3) -> dict[str, Any]:
    """A checkpoint of the papers' code, or of SSL4EO-S12's for 13 channels, whose momentum encoder
    has other values."""
    encoders = ("base_encoder", "momentum_encoder") if version == 3 else ("encoder_q", "encoder_k")
    projection = {1: (2048, 128), 2: (2048, 2048, 128), 3: (2048, 4096, 256)}[version]
    state: State = {"module.queue": full(0.0, 128, 65536), "module.queue_ptr": full(0, 1)}
    if version == 3:
        state = head("module.predictor", 256, 4096, 256)
    for value, encoder in enumerate(encoders, start=1):
        model = trunk("resnet50", value, channels=channels) | head("fc", *projection)
        state |= under(f"module.{encoder}.", model)
    optimizer = {"state": {0: {"momentum_buffer": full(0.0, 64, 3, 7, 7)}}}
    return {"epoch": 800, "arch": "resnet50", "state_dict": state, "optimizer": optimizer}


def seco(channels: int) -> dict[str, Any]:
    """A Lightning checkpoint of ServiceNow/seasonal-contrast: encoders are ``nn.Sequential``s."""
    state: State = {"queue": full(0.0, 3, 128, 16384), "queue_ptr": full(0, 3, 1)}
    for value, side in enumerate("qk", start=1):
        encoder = renamed(trunk("resnet50", value, channels=channels), *NAMES["sequential"])
        state |= under(f"encoder_{side}.", encoder)
        for space in range(3):
            state |= head(f"heads_{side}.{space}", 2048, 2048, 128)
    return {"epoch": 200, "state_dict": state, "hparams_name": "kwargs", "callbacks": {}}


def with_average(prefix: str, average: str, library: str | None = None) -> State:
    """A trained trunk and a moving average of it, which has other values."""
    rules = NAMES[library] if library else []
    trained, averaged = (renamed(trunk("resnet50", value), *rules) for value in (1, 2))
    return under(average, averaged) | under(prefix, trained)
