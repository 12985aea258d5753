#!/usr/bin/env python3
"""How much faster a compacted channel ticket runs than the same ticket with its zeros.

    benchmarks/compact.py
    benchmarks/compact.py --device cuda --dtype float16    the trunk in PyTorch alone

On a GPU also how much faster 2:4 tickets run where sparse tensor cores multiply their 1x1
convolutions (`torch.sparse.to_sparse_semi_structured`).

Both run in turns on the same pictures, and the ratio is the median over the turns: what else the
machine does meets both. Prints a Markdown table, of medians ± interquartile ranges. Tickets are
made of random weights, by L1 channel pruning, which leaves all convolutions about the same share
of their channels: how fast a network is depends on its widths alone.
"""

import argparse
import copy
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
from benchmarks import report
from benchmarks.measure import Run, Times, in_turns
from benchmarks.setting import THREADS
from benchmarks.setting import Setting as Shared
from lth_plugins.deploy.onnx import Trunk, export_onnx, resnet
from lth_plugins.pruning.structure import NM, Channels, structured
from lth_plugins.ticket import Ticket

ROOT = Path(__file__).parents[1]
ARCH = "resnet50"
MULTIPLE = 16  # of the channels kept
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
        masked: the masked model.
        compact: the compact one.
        ideal: how many times fewer FLOPs it has, by fvcore.
        target: how many times as fast it should be, if anything.
    """

    what: str
    removed: float
    masked: Times
    compact: Times
    ideal: float
    target: float | None = None

    def __str__(self) -> str:
        ratio = self.masked.over(self.compact)
        target = "–" if self.target is None else f"≥ {self.target:.1f}"
        cells = (self.what, f"{self.removed:.0f} %", str(self.masked), str(self.compact))
        cells += (f"{ratio:.2f}", target, f"{self.ideal:.2f}", f"{ratio / self.ideal:.0%}")
        return f"| {' | '.join(cells)} |"

    def beside_others(self) -> report.Row:
        """The measurement as `benchmarks/run.py` writes it."""
        ratio = self.masked.over(self.compact)
        return report.Row(
            f"{self.what}, {self.removed:.0f} % of the inner channels removed",
            str(self.compact),
            f"{self.masked} (masked)",
            ratio,
            None if self.target is None else report.at_least(self.target),
            f"{ratio / self.ideal:.0%} of the {self.ideal:.2f} × fewer FLOPs",
            "narrow convolutions use the processor less well, and a second thread gains them less",
        )


TITLES = ("", "channels removed", "masked", "compact", "times as fast", "must be")
TITLES += ("times fewer FLOPs", "share of that")


@dataclass(frozen=True)
class Setting:
    """How it is measured.

    Attributes:
        size: of the pictures, in pixels.
        repeats: turns of a trunk; training steps, detectors and segmentors take half as many.
        device: of the trunk in PyTorch, which is all that is measured on a GPU.
        dtype: likewise.
    """

    size: int
    repeats: int
    device: torch.device
    dtype: torch.dtype

    @property
    def like(self) -> dict[str, Any]:
        """What ``to`` is given."""
        like = {"device": self.device, "dtype": self.dtype}
        return {**like, "memory_format": torch.channels_last}

    @property
    def batches(self) -> tuple[int, ...]:
        return (1, 8, 64) if self.device.type == "cuda" else (1, 8)

    def pictures(self, batch: int) -> Tensor:
        """Random ones, float32, on the CPU: [batch, 3, size, size]."""
        return torch.randn(batch, 3, self.size, self.size)

    def turns(self, masked: Run, compact: Run, repeats: int) -> dict[str, Times]:
        return in_turns({"masked": lambda: masked, "compact": lambda: compact}, repeats)


def random_ticket(arch: str) -> Ticket:
    torch.manual_seed(0)
    return Ticket.dense(torchvision.models.get_model(arch), source="random")


def channel_ticket(arch: str, removed: int, multiple: int) -> Ticket:
    """A ticket without so many per cent, at least, of the channels inside blocks."""
    dense = random_ticket(arch)
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


@torch.inference_mode()
def _infer(model: nn.Module, inputs: Any) -> Any:
    return model(inputs)


def _session(model: nn.Module, size: int) -> onnxruntime.InferenceSession:
    """Of pictures in any number."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trunk.onnx"
        export_onnx(model, torch.randn(2, 3, size, size), path)
        return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def _infer_onnx(session: onnxruntime.InferenceSession, pictures: Tensor) -> Any:
    return session.run(None, {session.get_inputs()[0].name: pictures.numpy()})


def _train(model: nn.Module, pictures: Tensor) -> Run:
    model = model.train()
    optimizer = torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9, fused=True)

    def step() -> None:
        optimizer.zero_grad()
        sum(features.square().mean() for features in model(pictures)).backward()
        optimizer.step()

    return step


def trunk_rows(setting: Setting, ticket: Ticket, removed: int) -> Iterator[Row]:
    """A trunk alone, in both runtimes, and its training step."""
    arch = ticket.meta.arch
    wide = resnet(ticket.sparse_weights())
    trunks = [Trunk(model) for model in (wide, lth.compact(wide))]
    ideal = _fewer_flops(trunks, setting.pictures(1))
    row = partial(Row, removed=share_removed(ticket.masks, ticket), ideal=ideal)
    on_gpu = setting.device.type == "cuda"
    sessions = [] if on_gpu else [_session(trunk, setting.size) for trunk in trunks]
    fast = [copy.deepcopy(t).to(**setting.like) for t in trunks]
    for batch in setting.batches:
        pictures = setting.pictures(batch)
        if not on_gpu:
            runs = [partial(_infer_onnx, session, pictures) for session in sessions]
            target = TARGETS.get(("onnxruntime", removed))
            what = f"{arch} trunk, onnxruntime, batch {batch}"
            yield row(what, **setting.turns(*runs, setting.repeats), target=target)
        pictures = pictures.to(**setting.like)
        runs = [partial(_infer, trunk, pictures) for trunk in fast]
        target = None if on_gpu else TARGETS.get(("PyTorch", removed))
        what = f"{arch} trunk, PyTorch, batch {batch}"
        yield row(what, **setting.turns(*runs, setting.repeats), target=target)
    runs = [_train(trunk, pictures) for trunk in fast]
    what = f"{arch} trunk, PyTorch, training step, batch {batch}"
    yield row(what, **setting.turns(*runs, _half(setting.repeats)))


class Pointwise(nn.Module):
    """A 1x1 convolution as the matrix product that sparse tensor cores have; [N, C, H, W].

    Args:
        conv: the convolution, dense, of stride 1 or more.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.stride = conv.stride
        self.weight = nn.Parameter(conv.weight.detach().flatten(1))  # [out, in]
        self.bias = conv.bias

    def forward(self, x: Tensor) -> Tensor:
        down, across = self.stride
        x = x[:, :, ::down, ::across].permute(0, 2, 3, 1)  # channels last, as they lie in memory
        return nn.functional.linear(x, self.weight, self.bias).permute(0, 3, 1, 2)


def with_products(model: nn.Module) -> nn.Module:
    """A copy whose 1x1 convolutions are `Pointwise`."""
    model = copy.deepcopy(model)
    for parent in list(model.modules()):
        for name, conv in parent.named_children():
            if _is_pointwise(conv):
                setattr(parent, name, Pointwise(conv))
    return model


def nm_rows(setting: Setting) -> Iterator[Row]:
    """A trunk with a 2:4 ticket on a GPU's sparse tensor cores: its 1x1 convolutions."""
    masked = Trunk(resnet(structured(random_ticket(ARCH), NM()).sparse_weights()))
    ideal = _fewer_products(masked, setting.pictures(1))
    masked.to(**setting.like)
    sparse = with_products(masked)
    for module in sparse.modules():
        if isinstance(module, Pointwise):
            compressed = torch.sparse.to_sparse_semi_structured(module.weight.detach())
            module.weight = nn.Parameter(compressed, requires_grad=False)
    for batch in setting.batches:
        pictures = setting.pictures(batch).to(**setting.like)
        runs = [partial(_infer, model, pictures) for model in (masked, sparse)]
        times = setting.turns(*runs, setting.repeats)
        what = f"{ARCH} trunk, 2:4 on 1x1 convolutions, batch {batch}"
        yield Row(what, 0.0, **times, ideal=ideal)


def _fewer_products(trunk: nn.Module, pictures: Tensor) -> float:
    """How many times fewer FLOPs there are if 1x1 convolutions have half of theirs."""
    counted = FlopCountAnalysis(trunk, pictures)
    flops = counted.unsupported_ops_warnings(False).by_module()
    pointwise = [name for name, module in trunk.named_modules() if _is_pointwise(module)]
    return flops[""] / (flops[""] - sum(flops[name] for name in pointwise) / 2)


def _is_pointwise(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1)


def host_rows(setting: Setting, ticket: Ticket) -> Iterator[Row]:
    """A whole detector and a whole segmentor, in PyTorch on the CPU."""
    share, size = share_removed(ticket.masks, ticket), setting.size
    for name, build, make_inputs in (
        ("Faster R-CNN R-50-FPN", _detector, partial(_detector_inputs, size)),
        ("FCN R-50", _segmentor, lambda batch: torch.randn(batch, 3, size, size)),
    ):
        model = build()
        lth.attach(model, ticket)
        models = [model.eval(), lth.compact(model)]
        ideal = _fewer_flops(models, make_inputs(1))
        for batch in (1, 8):
            runs = [partial(_infer, m, make_inputs(batch)) for m in models]
            times = setting.turns(*runs, _half(setting.repeats))
            yield Row(f"{name}, PyTorch, batch {batch}", share, **times, ideal=ideal)


def trunks(shared: Shared) -> Iterator[report.Row]:
    """The trunk's rows for `benchmarks/run.py`."""
    setting = _as_here(shared)
    for removed in shared.removed:
        for row in trunk_rows(setting, _ticket(shared.arch, removed), removed):
            yield row.beside_others()


def hosts(shared: Shared) -> Iterator[report.Row]:
    """Likewise, of a detector and a segmentor, with the narrowest of its tickets."""
    for row in host_rows(_as_here(shared), _ticket(ARCH, max(shared.removed))):
        yield row.beside_others()


def _as_here(shared: Shared) -> Setting:
    return Setting(shared.image, shared.repeats, shared.device, torch.float32)


def _ticket(arch: str, removed: int, multiple: int = MULTIPLE) -> Ticket:
    """`channel_ticket`, without what is logged about the tickets that are tried on the way."""
    logger = logging.getLogger("lth_plugins.pruning.structure")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        return channel_ticket(arch, removed, multiple)
    finally:
        logger.setLevel(level)


def _half(repeats: int) -> int:
    return (repeats + 1) // 2


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


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=224, help="of the pictures, in pixels")
    parser.add_argument("--repeats", type=int, default=7, help="turns of a trunk; others: half")
    parser.add_argument("--multiple", type=int, default=MULTIPLE, help="of the channels kept")
    parser.add_argument("--removed", type=int, nargs="+", default=REMOVED, metavar="PERCENT")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float32")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda needs a GPU that PyTorch can use, found none")
    warnings.simplefilter("ignore")
    torch.set_num_threads(THREADS)
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    setting = Setting(args.size, args.repeats, device, dtype)
    print(f"| {' | '.join(TITLES)} |\n|{' --- |' * len(TITLES)}", flush=True)
    for removed in args.removed:
        ticket = _ticket(ARCH, removed, args.multiple)
        for row in trunk_rows(setting, ticket, removed):
            print(row, flush=True)
        if args.device == "cpu":
            for row in host_rows(setting, ticket):
                print(row, flush=True)
    if args.device == "cuda" and dtype != torch.float32:  # which sparse tensor cores do not have
        for row in nm_rows(setting):
            print(row, flush=True)


if __name__ == "__main__":
    main()
