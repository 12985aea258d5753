"""What a teacher costs in a training step: of a detector and a segmentor, in time and memory.

Teacher and student are the same dense network. A random teacher would make its student diverge: the
losses are computed and differentiated, and have the weight 0.
"""

import copy
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from benchmarks.hosts import Loss, deeplabv3plus, faster_rcnn
from benchmarks.measure import in_turns, peak_of_tensors
from benchmarks.report import Row
from benchmarks.setting import Setting
from benchmarks.training import Trained

Make = Callable[[], tuple[nn.Module, Loss]]


def detector(setting: Setting) -> Iterator[Row]:
    """Faster R-CNN with an FPN, which learns the FPN's features and the classes of proposals."""
    from lth_plugins.detectron2.teacher import LOSSES, Distillation

    def teach(model: nn.Module, teacher: nn.Module) -> None:
        model.add_module(
            "distillation", Distillation(model, teacher, "", dict.fromkeys(LOSSES, 0.0))
        )

    arch = setting.sizes[0]

    def make() -> tuple[nn.Module, Loss]:
        return faster_rcnn(arch, setting.scene)

    what = f"Faster R-CNN {arch} FPN, 2 × {setting.scene} px"
    # Of the teacher's box head, which runs on the proposals, the least is not counted.
    yield from _costs(what, make, teach, lambda teacher: teacher.backbone, setting)


def segmentor(setting: Setting) -> Iterator[Row]:
    """DeepLabV3+, which learns the logits."""
    from lth_plugins.mmseg.teacher import Distillation

    def teach(model: nn.Module, teacher: nn.Module) -> None:
        Distillation(model, teacher, 0.0, 1.0)

    arch = setting.sizes[0]

    def make() -> tuple[nn.Module, Loss]:
        return deeplabv3plus(arch, setting.scene)

    what = f"DeepLabV3+ {arch}, 2 × {setting.scene} px"
    yield from _costs(what, make, teach, lambda teacher: teacher, setting)


def _costs(
    what: str,
    make: Make,
    teach: Callable[[nn.Module, nn.Module], None],
    asked: Callable[[nn.Module], nn.Module],
    setting: Setting,
) -> Iterator[Row]:
    """Yield the rows of a model; ``asked`` is the part of the teacher that a step runs."""

    def start(taught: bool) -> Trained:
        model, loss = make()
        if taught:
            teach(model, copy.deepcopy(model).eval().requires_grad_(False))
        return Trained.start(model, loss)

    teacher = asked(make()[0]).eval()
    images = torch.randn(2, 3, setting.scene, setting.scene)

    @torch.no_grad()
    def forward() -> Tensor:
        return teacher(images)

    with_teacher, alone = start(True), start(False)
    ways = {"taught": with_teacher.step, "alone": alone.step, "forward": forward}
    times = in_turns({name: lambda run=run: run for name, run in ways.items()}, setting.steps)
    taught, plain = times["taught"], times["alone"]
    extra = taught.median - plain.median
    yield Row(
        f"step, with a teacher / without: {what}",
        str(taught),
        f"{plain} (without)",
        taught.over(plain),
        None,
        f"{extra / times['forward'].median:.2f} × the teacher's forward pass, "
        f"{times['forward']}, which is the least",
    )
    del with_teacher, alone, ways

    def peak(is_taught: bool) -> int:
        def run() -> None:
            start(is_taught).step()

        return peak_of_tensors(run, setting.device)

    ours, theirs = peak(True), peak(False)
    weights = sum(p.nbytes for p in teacher.parameters())
    yield Row(
        f"peak memory of training, with a teacher / without: {what}",
        f"{ours / 1e6:.0f} MB",
        f"{theirs / 1e6:.0f} MB (without)",
        ours / theirs,
        None,
        f"{(ours - theirs) / weights:.2f} × the teacher's weights, {weights / 1e6:.0f} MB",
    )
