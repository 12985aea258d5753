#!/usr/bin/env python3
"""How much faster a compacted channel ticket runs than the same ticket with its zeros.

    benchmarks/compact.py --size 224 --repeats 10

Both run in turns on the same pictures, and the ratio is the median over the turns: what else the
machine does meets both. Prints a Markdown table. Tickets are made of random weights, by L1 channel
pruning: how fast a network is depends on its widths alone.
"""

import argparse
import logging
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import onnxruntime
import torch
import torchvision
from fvcore.nn import FlopCountAnalysis
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))

import lth_plugins as lth
from benchmarks.measure import Run, in_turns
from lth_plugins.export import Trunk, export_onnx, resnet
from lth_plugins.prune.structure import Channels, structured
from lth_plugins.ticket import Ticket

ROOT = Path(__file__).parents[1]
REMOVED = (30, 50, 70, 75)  # % of the channels inside blocks
TARGETS = {  # of the speed-up of a ResNet-50 trunk, by runtime and % removed
    ("PyTorch", 50): 1.6,
    ("PyTorch", 70): 1.8,
    ("onnxruntime", 50): 1.8,
    ("onnxruntime", 70): 2.2,
    ("onnxruntime", 75): 2.7,
}


@dataclass(frozen=True)
class Row:
    """One measurement.

    Attributes:
        what: model, runtime and batch.
        removed: % of the channels inside blocks.
        masked: seconds of one run of the masked model, the median.
        ratio: how many times as fast the compact model is, the median over turns.
        ideal: how many times fewer FLOPs it has, by fvcore.
        target: what the ratio should be, if anything.
    """

    what: str
    removed: float
    masked: float
    ratio: float
    ideal: float
    target: float | None = None

    def __str__(self) -> str:
        target = "" if self.target is None else f"{self.target:.1f}"
        return (
            f"| {self.what} | {self.removed:.0f} % | {1000 * self.masked:.0f} ms | "
            f"{self.ratio:.2f} | {target} | {self.ideal:.2f} | {self.ratio / self.ideal:.0%} |"
        )


def channel_ticket(arch: str, removed: int, multiple: int) -> Ticket:
    """A ticket without so many per cent, at least, of the channels inside blocks."""
    torch.manual_seed(0)
    dense = Ticket.dense(torchvision.models.get_model(arch), source="random")
    low, high = 0.0, 1.0
    removing = partial(Channels, "global", multiple=multiple)
    for _ in range(10):  # the fewer weights, the fewer channels
        density = (low + high) / 2
        enough = share_removed(removing(density)(dense), dense) >= removed
        low, high = (density, high) if enough else (low, density)
    return structured(dense, removing(low))


def share_removed(masks: lth.Masks, ticket: Ticket) -> float:
    """% of the channels inside blocks that nothing writes."""
    written = [masks[f"{inner.conv}.weight"].flatten(1).any(1) for inner in ticket.arch.inner]
    channels = torch.cat(written)
    return 100 * float((~channels).float().mean())


def measure(masked: Run, compact: Run, repeats: int) -> tuple[float, float]:
    """Median seconds of the first, and the median ratio of both, run in turns."""
    times = in_turns({"masked": lambda: masked, "compact": lambda: compact}, repeats)
    return times["masked"].median, times["masked"].over(times["compact"])


@torch.inference_mode()
def _infer(model: nn.Module, inputs: Any) -> Any:
    return model(inputs)


def _session(model: nn.Module, pictures: Tensor, folder: str) -> Run:
    path = Path(folder) / f"{id(model)}.onnx"
    export_onnx(model, pictures[:2] if len(pictures) > 1 else pictures.repeat(2, 1, 1, 1), path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: pictures.numpy()}
    return lambda: session.run(None, feed)


def _train(model: nn.Module, pictures: Tensor) -> Run:
    model = model.train()
    optimizer = torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9, fused=True)

    def step() -> None:
        optimizer.zero_grad()
        sum(features.square().mean() for features in model(pictures)).backward()
        optimizer.step()

    return step


def rows(size: int, repeats: int, multiple: int, removed: Sequence[int]) -> Iterator[Row]:
    """All measurements, at pictures of ``size`` pixels."""
    for percent in removed:
        ticket = channel_ticket("resnet50", percent, multiple)
        share = share_removed(ticket.masks, ticket)
        wide = resnet(ticket.sparse_weights())
        trunks = [Trunk(model) for model in (wide, lth.compact(wide))]
        for batch in (1, 8):
            pictures = torch.randn(batch, 3, size, size)
            ideal = _fewer_flops(trunks, pictures[:1])
            row = partial(Row, removed=share, ideal=ideal)
            with tempfile.TemporaryDirectory() as folder:
                runs = [_session(trunk, pictures, folder) for trunk in trunks]
            took, ratio = measure(*runs, repeats)
            what = f"ResNet-50 trunk, onnxruntime, batch {batch}"
            yield row(what, masked=took, ratio=ratio, target=TARGETS.get(("onnxruntime", percent)))
            last = [trunk.to(memory_format=torch.channels_last) for trunk in trunks]
            pictures = pictures.to(memory_format=torch.channels_last)
            took, ratio = measure(*(partial(_infer, t, pictures) for t in last), repeats)
            what = f"ResNet-50 trunk, PyTorch, batch {batch}"
            yield row(what, masked=took, ratio=ratio, target=TARGETS.get(("PyTorch", percent)))
        took, ratio = measure(*(_train(trunk, pictures) for trunk in trunks), max(repeats // 2, 1))
        yield row("ResNet-50 trunk, PyTorch, training step, batch 8", masked=took, ratio=ratio)
        for name, build, make_inputs in (
            ("Faster R-CNN R-50-FPN", _detector, partial(_detector_inputs, size)),
            ("FCN R-50", _segmentor, lambda batch: torch.randn(batch, 3, size, size)),
        ):
            model = build()
            lth.attach(model, ticket)
            models = [model.eval(), lth.compact(model)]
            for batch in (1, 8):
                inputs = make_inputs(batch)
                took, ratio = measure(*(partial(_infer, m, inputs) for m in models), repeats // 3)
                ideal = _fewer_flops(models, make_inputs(1))
                yield Row(f"{name}, PyTorch, batch {batch}", share, took, ratio, ideal)


def _detector() -> nn.Module:
    """detectron2's, of its model zoo, with the 3x3 strides and the BatchNorm of a ticket."""
    from detectron2 import model_zoo
    from detectron2.modeling import build_model

    cfg = model_zoo.get_config("PascalVOC-Detection/faster_rcnn_R_50_FPN.yaml")
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.RESNETS.NORM = "BN"
    cfg.MODEL.RESNETS.STRIDE_IN_1X1 = False
    return build_model(cfg)


def _detector_inputs(size: int, batch: int) -> list[dict[str, Tensor]]:
    return [{"image": torch.rand(3, size, size) * 255} for _ in range(batch)]


def _segmentor() -> nn.Module:
    """mmseg's, as configured for Cityscapes; it has dilated convolutions at stride 8."""
    from mmengine.config import Config
    from mmengine.registry import init_default_scope
    from mmseg.registry import MODELS

    init_default_scope("mmseg")
    cfg = Config.fromfile(ROOT / "configs/mmseg/fcn_r50_cityscapes_ticket.py")
    cfg.merge_from_dict({"model.backbone.init_cfg": None, "norm_cfg.type": "BN"})
    for part in (cfg.model.backbone, cfg.model.decode_head, cfg.model.auxiliary_head):
        part.norm_cfg = {"type": "BN"}
    return MODELS.build(cfg.model)


def _fewer_flops(models: Sequence[nn.Module], inputs: Any) -> float:
    analysis = FlopCountAnalysis
    if not isinstance(inputs, Tensor):  # a detector's, which fvcore alone cannot trace
        from detectron2.utils.analysis import FlopCountAnalysis as analysis
    counts = []
    for model in models:
        counted = analysis(model, inputs)
        counts.append(counted.unsupported_ops_warnings(False).uncalled_modules_warnings(False))
    return counts[0].total() / counts[1].total()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=224, help="of the pictures, in pixels")
    parser.add_argument("--repeats", type=int, default=9, help="turns of a trunk; 3 at the least")
    parser.add_argument("--multiple", type=int, default=16, help="of the channels kept")
    parser.add_argument("--removed", type=int, nargs="+", default=REMOVED, metavar="PERCENT")
    args = parser.parse_args()
    logging.getLogger("lth_plugins.prune.structure").setLevel(logging.ERROR)  # while searching
    warnings.simplefilter("ignore")
    titles = ("compact against masked", "channels removed", "masked")
    titles += ("times as fast", "target", "times fewer FLOPs", "share of that")
    print(f"| {' | '.join(titles)} |\n|{' --- |' * len(titles)}", flush=True)
    for row in rows(args.size, args.repeats, args.multiple, args.removed):
        print(row, flush=True)


if __name__ == "__main__":
    main()
