#!/usr/bin/env python3
"""How much faster a compacted channel ticket runs than the same ticket with its zeros.

    benchmarks/compact.py
    benchmarks/compact.py --device cuda --dtype float16    the trunk in PyTorch alone

On a GPU also how much faster 2:4 tickets run where sparse tensor cores multiply their 1x1
convolutions (`torch.sparse.to_sparse_semi_structured`).

Both run in turns on the same images, and the ratio is the median over the turns, so that other load
of the machine affects both alike. Prints a Markdown table of medians ± interquartile ranges.
Tickets are made of random weights, by L1 channel pruning, which leaves all convolutions about the
same share of their channels: how fast a network is depends on its widths alone.
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
from benchmarks.hosts import faster_rcnn
from benchmarks.measure import Run, in_turns
from benchmarks.report import Row, at_least, table_head
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
class Setting:
    """How it is measured.

    Attributes:
        size: side of the images, in pixels.
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
        """The arguments of ``to``."""
        like = {"device": self.device, "dtype": self.dtype}
        return {**like, "memory_format": torch.channels_last}

    @property
    def batches(self) -> tuple[int, ...]:
        return (1, 8, 64) if self.device.type == "cuda" else (1, 8)

    def images(self, batch: int) -> Tensor:
        """Random images, float32, on the CPU: [batch, 3, size, size]."""
        return torch.randn(batch, 3, self.size, self.size)

    def row(
        self,
        what: str,
        runs: Sequence[Run],
        repeats: int,
        ideal: float,
        target: float | None = None,
    ) -> Row:
        """Time the masked model and the compact one in turns.

        Args:
            what: model, runtime and batch, and what the ticket removes.
            runs: of the masked model and of the compact one.
            repeats: how often each runs.
            ideal: how many times fewer FLOPs the compact one has, by fvcore.
            target: how many times as fast it must be, if anything.
        """
        masked, compact = runs
        times = in_turns({"masked": lambda: masked, "compact": lambda: compact}, repeats)
        ratio = times["masked"].over(times["compact"])
        return Row(
            what,
            str(times["compact"]),
            f"{times['masked']} (masked)",
            ratio,
            None if target is None else at_least(target),
            f"{ratio / ideal:.0%} of the {ideal:.2f} × fewer FLOPs",
            "narrow convolutions use the processor less well, and a second thread gains them less",
        )


def random_ticket(arch: str) -> Ticket:
    torch.manual_seed(0)
    return Ticket.dense(torchvision.models.get_model(arch), source="random")


def channel_ticket(arch: str, removed: int, multiple: int) -> Ticket:
    """A ticket that removes at least so many per cent of the channels inside blocks."""
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
    """A session that takes any number of images."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trunk.onnx"
        export_onnx(model, torch.randn(2, 3, size, size), path)
        return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def _infer_onnx(session: onnxruntime.InferenceSession, images: Tensor) -> Any:
    return session.run(None, {session.get_inputs()[0].name: images.numpy()})


def _train(model: nn.Module, images: Tensor) -> Run:
    model = model.train()
    optimizer = torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9, fused=True)

    def step() -> None:
        optimizer.zero_grad()
        sum(features.square().mean() for features in model(images)).backward()
        optimizer.step()

    return step


def trunk_rows(setting: Setting, ticket: Ticket, removed: int) -> Iterator[Row]:
    """A trunk alone, in both runtimes, and its training step."""
    arch = ticket.meta.arch
    wide = resnet(ticket.sparse_weights())
    trunks = [Trunk(model) for model in (wide, lth.compact(wide))]
    row = partial(setting.row, ideal=_fewer_flops(trunks, setting.images(1)))
    end = _removed(ticket)
    on_gpu = setting.device.type == "cuda"
    sessions = [] if on_gpu else [_session(trunk, setting.size) for trunk in trunks]
    fast = [copy.deepcopy(t).to(**setting.like) for t in trunks]
    for batch in setting.batches:
        images = setting.images(batch)
        if not on_gpu:
            runs = [partial(_infer_onnx, session, images) for session in sessions]
            target = TARGETS.get(("onnxruntime", removed))
            what = f"{arch} trunk, onnxruntime, batch {batch}{end}"
            yield row(what, runs, setting.repeats, target=target)
        images = images.to(**setting.like)
        runs = [partial(_infer, trunk, images) for trunk in fast]
        target = None if on_gpu else TARGETS.get(("PyTorch", removed))
        what = f"{arch} trunk, PyTorch, batch {batch}{end}"
        yield row(what, runs, setting.repeats, target=target)
    what = f"{arch} trunk, PyTorch, training step, batch {batch}{end}"
    yield row(what, [_train(trunk, images) for trunk in fast], _half(setting.repeats))


def _removed(ticket: Ticket) -> str:
    return f", {share_removed(ticket.masks, ticket):.0f} % of the inner channels removed"


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
    ideal = _fewer_products(masked, setting.images(1))
    masked.to(**setting.like)
    sparse = with_products(masked)
    for module in sparse.modules():
        if isinstance(module, Pointwise):
            compressed = torch.sparse.to_sparse_semi_structured(module.weight.detach())
            module.weight = nn.Parameter(compressed, requires_grad=False)
    for batch in setting.batches:
        images = setting.images(batch).to(**setting.like)
        runs = [partial(_infer, model, images) for model in (masked, sparse)]
        what = f"{ARCH} trunk, 2:4 on 1x1 convolutions, batch {batch}"
        yield setting.row(what, runs, setting.repeats, ideal)


def _fewer_products(trunk: nn.Module, images: Tensor) -> float:
    """How many times fewer FLOPs there are if 1x1 convolutions have half of theirs."""
    counted = FlopCountAnalysis(trunk, images)
    flops = counted.unsupported_ops_warnings(False).by_module()
    pointwise = [name for name, module in trunk.named_modules() if _is_pointwise(module)]
    return flops[""] / (flops[""] - sum(flops[name] for name in pointwise) / 2)


def _is_pointwise(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1)


def host_rows(setting: Setting, ticket: Ticket) -> Iterator[Row]:
    """A whole detector and a whole segmentor, in PyTorch on the CPU."""
    size = setting.size
    for name, build, make_inputs in (
        ("Faster R-CNN R-50-FPN", _detector, partial(_detector_inputs, size)),
        ("FCN R-50", _segmentor, setting.images),
    ):
        model = build()
        lth.attach(model, ticket)
        models = [model.eval(), lth.compact(model)]
        ideal = _fewer_flops(models, make_inputs(1))
        for batch in (1, 8):
            runs = [partial(_infer, m, make_inputs(batch)) for m in models]
            what = f"{name}, PyTorch, batch {batch}{_removed(ticket)}"
            yield setting.row(what, runs, _half(setting.repeats), ideal)


def trunks(shared: Shared) -> Iterator[Row]:
    """The rows of the trunk for `benchmarks/run.py`."""
    setting = _as_here(shared)
    for removed in shared.removed:
        yield from trunk_rows(setting, _ticket(shared.arch, removed), removed)


def hosts(shared: Shared) -> Iterator[Row]:
    """The rows of a detector and a segmentor, with the narrowest of its tickets."""
    return host_rows(_as_here(shared), _ticket(ARCH, max(shared.removed)))


def _as_here(shared: Shared) -> Setting:
    return Setting(shared.image, shared.repeats, shared.device, torch.float32)


def _ticket(arch: str, removed: int, multiple: int = MULTIPLE) -> Ticket:
    """`channel_ticket`, without the log of the tickets that its search tries."""
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
    return faster_rcnn(ARCH, 64)[0]


def _detector_inputs(size: int, batch: int) -> list[dict[str, Tensor]]:
    return [{"image": torch.rand(3, size, size) * 255} for _ in range(batch)]


def _segmentor() -> nn.Module:
    """mmseg's FCN for Cityscapes; it has dilated convolutions at stride 8."""
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
    parser.add_argument("--size", type=int, default=224, help="side of the images, in pixels")
    parser.add_argument("--repeats", type=int, default=7, help="turns per trunk; others take half")
    parser.add_argument(
        "--multiple", type=int, default=MULTIPLE, help="channels kept divide by this"
    )
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
    print(table_head(), flush=True)
    for row in _rows(setting, args.removed, args.multiple):
        print(row, flush=True)


def _rows(setting: Setting, shares: Sequence[int], multiple: int) -> Iterator[Row]:
    on_gpu = setting.device.type == "cuda"
    for removed in shares:
        ticket = _ticket(ARCH, removed, multiple)
        yield from trunk_rows(setting, ticket, removed)
        if not on_gpu:
            yield from host_rows(setting, ticket)
    if on_gpu and setting.dtype != torch.float32:  # which sparse tensor cores do not have
        yield from nm_rows(setting)


if __name__ == "__main__":
    main()
