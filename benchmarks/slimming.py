"""How much faster whole models are at half of their FLOPs, and what slimming costs in training.

Weights are untrained, and channels are ranked by L2: how fast a network is depends on its widths
alone. How many boxes a detector finds depends on weights: all predict their anchors, with equal
scores. An R-CNN's heads get the most proposals that its config allows, as none is suppressed, and
nothing is detected.
"""

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnxruntime
import torch
import torchvision
from torch import Tensor, nn

import lth_plugins as lth
from benchmarks.hosts import detector, segmentor
from benchmarks.measure import Run, in_turns, seconds_in
from benchmarks.report import Row, at_least, at_most
from benchmarks.setting import Setting
from benchmarks.training import Trained, cross_entropy
from lth_plugins.slimming.cost import Flops
from lth_plugins.slimming.gradual import Slimming
from lth_plugins.slimming.selection import budget_of
from lth_plugins.slimming.tracing import Forward, trace

SHARE = 0.5
PERIOD = 10
BATCHES = (1, 8)
ALL_PROPOSALS = {"RPN.NMS_THRESH": 1.0}
PREDICTORS = ("anchor_deltas", "objectness_logits", "cls_score")
OURS = {"before", "take", "_before_step", "after_step"}
"""The functions in which slimming spends time in a step."""


@dataclass
class Pair:
    """A dense model and the narrower one.

    Attributes:
        what: the model's name and the size of its images.
        models: both, in evaluation mode.
        fewer: how many times fewer FLOPs the narrower one has.
    """

    what: str
    models: tuple[nn.Module, nn.Module]
    fewer: float

    @classmethod
    def of(cls, what: str, model: nn.Module, forward: Forward) -> "Pair":
        model.eval()
        small = lth.slim(model, None, flops=SHARE, forward=forward).eval()
        dense, narrow = (_flops(m, forward) for m in (model, small))
        return cls(what, (model, small), dense / narrow)

    def row(self, how: str, runs: list[Run], bound: float, repeats: int) -> Row:
        """Time both in turns."""
        dense, small = runs
        times = in_turns({"dense": lambda: dense, "slim": lambda: small}, repeats)
        ratio = times["dense"].over(times["slim"])
        return Row(
            f"{self.what}, {how}",
            str(times["slim"]),
            f"{times['dense']} (dense)",
            ratio,
            at_least(bound),
            f"{ratio / self.fewer:.0%} of the {self.fewer:.2f} × fewer FLOPs",
            "normalisations, sums and what follows the layers are not half as much work, and "
            "narrow convolutions use the processor less well",
        )


def classifier(setting: Setting) -> Iterator[Row]:
    """A ResNet."""
    torch.manual_seed(0)
    model = torchvision.models.get_model(setting.arch)
    yield from _of_tensors(
        f"{setting.arch}, {setting.image} px", model, setting, setting.image, 1.7
    )


def segmentors(setting: Setting) -> Iterator[Row]:
    """FCN, DeepLabV3+ and PSPNet, without their auxiliary heads, which inference does not run."""
    for name, title in (("fcn", "FCN"), ("deeplabv3plus", "DeepLabV3+"), ("pspnet", "PSPNet")):
        model = segmentor(name, setting.arch)
        del model.auxiliary_head
        what = f"{title} {setting.arch}, {setting.small} px"
        yield from _of_tensors(what, model, setting, setting.small, 1.75)


def _of_tensors(
    what: str, model: nn.Module, setting: Setting, side: int, bound: float
) -> Iterator[Row]:
    images = torch.randn(max(BATCHES), 3, side, side)
    pair = Pair.of(what, model, lambda m: m(images[:1]))
    for batch in BATCHES:
        runs = [_inference(m, images[:batch]) for m in pair.models]
        yield pair.row(f"PyTorch, batch {batch}", runs, bound, setting.repeats)
    sessions = [_onnx(m, images[:1]) for m in pair.models]
    yield pair.row("onnxruntime, batch 1", sessions, 1.8, setting.repeats)


def detectors(setting: Setting) -> Iterator[Row]:
    """Faster R-CNN and RetinaNet with an FPN."""
    from lth_plugins.detectron2 import add_slim_config, example_of

    for name, title in (("faster_rcnn", "Faster R-CNN"), ("retinanet", "RetinaNet")):
        model, cfg = detector(name, setting.arch, **ALL_PROPOSALS)
        for layer, module in model.named_modules():
            if layer.split(".")[-1] in PREDICTORS:
                nn.init.zeros_(module.weight)
        add_slim_config(cfg)
        cfg.SLIM.SIZE = setting.scene
        forward = example_of(cfg)
        pair = Pair.of(f"{title} {setting.arch} FPN, {setting.scene} px", model, forward)
        for batch in BATCHES:
            inputs = [{"image": _scene(setting)} for _ in range(batch)]
            runs = [_inference(m, inputs) for m in pair.models]
            yield pair.row(f"PyTorch, batch {batch}", runs, 1.75, setting.repeats)
        sessions = [_onnx_detector(m, _scene(setting)) for m in pair.models]
        yield pair.row("onnxruntime, batch 1", sessions, 1.8, setting.repeats)


def training(setting: Setting) -> Iterator[Row]:
    """What slimming adds to the steps of a classifier: collecting, and a removal each period."""
    for importance in ("l2", "fisher"):
        yield _training(setting, importance)


def _training(setting: Setting, importance: str) -> Row:
    torch.manual_seed(0)
    model = torchvision.models.get_model(setting.arch)
    loss = cross_entropy(setting.batch, setting.image, setting.device)
    trained = Trained.start(model, loss)
    slimming = Slimming(budget_of(SHARE, None), 0, 10 * PERIOD, PERIOD, importance)
    image = torch.randn(1, 3, setting.image, setting.image)
    slimming.start(model, trained.optimizer, lambda m: m(image), 0, 10 * PERIOD)

    def step(done: int) -> None:
        trained.step()
        slimming.after_step(model, done)

    times = in_turns({"steps": lambda: lambda: step(1)}, setting.steps)["steps"]
    ordinary, removal = (
        seconds_in(lambda done=done: step(done), OURS, setting.device) for done in (1, PERIOD)
    )
    own = (PERIOD - 1) * ordinary + removal
    return Row(
        f"slimming's own time: {setting.arch}, {setting.batch} × {setting.image} px, "
        f"{importance}, a removal each {PERIOD} steps",
        f"{1e3 * ordinary:.3g} ms a step, {1e3 * removal:.3g} ms with a removal (profiled)",
        f"{times} (a step)",
        own / (PERIOD * times.median),
        at_most(0.05),
        "0 is no slimming",
        "a removal costs the same in a step of few images",
    )


def _flops(model: nn.Module, forward: Forward) -> float:
    network = trace(model, forward)
    return Flops()(network, network.all_kept())


def _scene(setting: Setting) -> Tensor:
    return torch.rand(3, setting.scene, setting.scene) * 255


def _inference(model: nn.Module, inputs: Any) -> Run:
    @torch.inference_mode()
    def run() -> object:
        return model(inputs)

    return run


def _onnx(model: nn.Module, images: Tensor) -> Run:
    def write(path: Path) -> None:
        torch.onnx.export(model, (images,), dynamo=True, verbose=False).save(path)

    return _session(write, images)


def _onnx_detector(model: nn.Module, image: Tensor) -> Run:
    from lth_plugins.detectron2 import export_onnx

    return _session(lambda path: export_onnx(model, [image], path), image)


def _session(write: Callable[[Path], object], inputs: Tensor) -> Run:
    """Inference by onnxruntime, on as many threads as PyTorch has."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        write(path)
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda: session.run(None, {session.get_inputs()[0].name: inputs.numpy()})
