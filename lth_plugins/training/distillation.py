"""Losses by which a student learns from a teacher, here and in hosts.

The teacher is a dense model of the same task and the same outputs. Each trainer finds the tensors;
here is what is computed of them, in single precision, whatever precision the models run in.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from lth_plugins.errors import RunError

T = TypeVar("T")


def soft_labels(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """Distillation of logits (Hinton et al., arXiv 1503.02531).

    τ² KL(teacher‖student) of the softmax of logits / τ, averaged over rows. Ma et al., "Good
    Students Play Big Lottery Better" (arXiv 2101.03255), train tickets so.

    Args:
        student: logits, (N, classes).
        teacher: of the same shape. It gets no gradient.
        temperature: τ; above 1 it weighs unlikely classes more.

    Returns:
        A scalar.
    """
    ours, theirs = (
        F.log_softmax(_precise(logits) / temperature, dim=1)
        for logits in (student, teacher.detach())
    )
    divergence = F.kl_div(ours, theirs, reduction="sum", log_target=True)
    return divergence * temperature**2 / len(student)


def alike(student: Tensor, teacher: Tensor) -> Tensor:
    """Distillation of features: 1 - cosine, averaged over rows.

    Half the squared distance of features of length 1 (SimReg; Navaneet et al., arXiv 2201.05131).

    Args:
        student: features, (N, D).
        teacher: of the same shape. It gets no gradient.

    Returns:
        A scalar.
    """
    ours, theirs = _precise(student), _precise(teacher.detach())
    return 1 - F.cosine_similarity(ours, theirs, dim=1).mean()


def _precise(values: Tensor) -> Tensor:
    """In single precision, or double where they are."""
    return values if values.dtype == torch.float64 else values.float()


def channel_wise(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """Channel-wise distillation (CWD; Shu et al., ICCV 2021, arXiv 2011.13256, eq. 2 to 4).

    A softmax over all positions turns each channel of the logits into a distribution: where in the
    image its class is. The loss is τ² KL(teacher‖student), averaged over channels and images.

    Args:
        student: logits, (N, C, H, W).
        teacher: of the same shape. It gets no gradient.
        temperature: τ; above 1 it weighs larger regions of a channel.

    Returns:
        A scalar.
    """
    ours, theirs = (logits.flatten(2).flatten(0, 1) for logits in (student, teacher))
    return soft_labels(ours, theirs, temperature)


def decoupled(
    student: Sequence[Tensor], teacher: Sequence[Tensor], foreground: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """Decoupled feature distillation (DeFeat; Guo et al., CVPR 2021, arXiv 2103.14475, sec. 3).

    Half the mean squared difference of the features, apart for foreground and background, averaged
    over levels: the background, which is most of an image, does not outweigh the objects.

    Args:
        student: the features of each level, (N, C, H, W).
        teacher: of the same shapes. They get no gradient.
        foreground: of each level True where an object is, (N, H, W), by `inside`.

    Returns:
        The scalars of foreground and background. An area that is empty has the loss 0.
    """
    parts = []
    for ours, theirs, objects in zip(student, teacher, foreground, strict=True):
        squared = (ours.float() - theirs.detach().float()).square().mean(1)
        for area in (objects, ~objects):
            parts.append((squared * area).sum() / (2 * area.sum().clamp(min=1)))
    foreground_loss, background_loss = torch.stack(parts).view(-1, 2).mean(0)
    return foreground_loss, background_loss


def decoupled_classes(
    student: Tensor, teacher: Tensor, foreground: Tensor
) -> tuple[Tensor, Tensor]:
    """Distillation of proposals' classes, also of DeFeat (arXiv 2103.14475, sec. 3, with T = 1).

    KL(teacher‖student) of the class probabilities, apart for proposals of objects and others.

    Args:
        student: logits, (proposals, classes).
        teacher: of the same proposals. They get no gradient.
        foreground: True where a proposal is an object, (proposals,).

    Returns:
        The scalars of foreground and background, means over their proposals; 0 where there is none.
    """
    ours, theirs = (F.log_softmax(x.float(), dim=1) for x in (student, teacher.detach()))
    divergence = F.kl_div(ours, theirs, reduction="none", log_target=True).sum(1)
    of_objects, others = (
        (divergence * area).sum() / area.sum().clamp(min=1) for area in (foreground, ~foreground)
    )
    return of_objects, others


def inside(boxes: Sequence[Tensor], size: Sequence[int], stride: float) -> Tensor:
    """Which cells of a feature map a box touches.

    Args:
        boxes: of each image, (number of boxes, 4): x0, y0, x1, y1 in pixels of the input.
        size: the height and width of the feature map.
        stride: pixels of the input per cell.

    Returns:
        A mask (N, height, width); True where a box is, at least one cell for each.
    """
    masks = []
    for of_image in boxes:
        low = (of_image[:, :2] / stride).floor()
        high = torch.maximum((of_image[:, 2:] / stride).ceil(), low + 1)
        rows, columns = (
            (cells >= low[:, [axis]]) & (cells < high[:, [axis]])
            for axis, cells in (
                (1, torch.arange(size[0], device=of_image.device)),
                (0, torch.arange(size[1], device=of_image.device)),
            )
        )
        masks.append((rows[:, :, None] & columns[:, None, :]).any(0))
    return torch.stack(masks)


_kept: dict[str, Any] = {}


def keep(key: str, teacher: object) -> None:
    """Keep a teacher that was loaded to check it until it is trained with; at most one is kept.

    Args:
        key: all that the teacher depends on.
        teacher: it.
    """
    _kept.clear()
    _kept[key] = teacher


def loaded(key: str, load: Callable[[], T]) -> T:
    """The teacher that was kept under an equal key, or a new one."""
    found: T = _kept.pop(key) if key in _kept else load()
    return found


def check_same_teacher(started: str | None, asked: str | None) -> None:
    """Raise ``RunError`` where a run would resume with another teacher than it started with.

    Args:
        started: the digest of the teacher's file that the checkpoint notes; None if it had none.
        asked: of the one that is given now; None if none is.
    """
    if started != asked:
        was, now = (
            f"teacher {digest[:12]}" if digest else "no teacher" for digest in (started, asked)
        )
        raise RunError(
            f"expected to resume with {was}, as the run started, found {now}: give the same "
            "--teacher as then, or another output folder; nothing was changed"
        )
