"""The settings of the benchmarks (sizes, repetitions, device) and the networks they share."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torchvision
from torch import Tensor

from lth_plugins import Masks, Ticket, TicketMeta
from lth_plugins.ticket import ARCHITECTURES

BYTES = 4  # of a weight
THREADS = 2


@dataclass(frozen=True)
class Setting:
    """How large and how often.

    Attributes:
        device: of weights and models.
        bandwidth: of its memory, bytes per second, read and written together.
        arch: the ResNet of most rows.
        sizes: ResNets from small to large, for figures that must be linear.
        repeats: repetitions of what takes less than a second.
        steps: repetitions of training steps and of what takes seconds.
        rounds: rounds of IMP.
        stored: rounds whose tickets are written to files.
        sources: searches, of ``rounds`` + 1 tickets each, that are compared.
        batch: images in a classifier's step.
        image: their side, pixels.
        scene: side of the two images in a detector's and segmentor's step, pixels.
        small: side of the images of segmentors at inference, pixels.
        batches: batches of pre-training per repetition.
        removed: % of the channels inside blocks that compacted tickets remove.
        study: the configuration in configs/study whose runs are planned and reported.
    """

    device: torch.device
    bandwidth: float
    arch: str = "resnet50"
    sizes: tuple[str, ...] = ("resnet18", "resnet50", "resnet152")
    repeats: int = 9
    steps: int = 5
    rounds: int = 18
    stored: tuple[int, ...] = (7, 15, 18)
    sources: int = 3
    batch: int = 16
    image: int = 224
    scene: int = 320
    small: int = 256
    batches: int = 12
    removed: tuple[int, ...] = (50, 70)
    study: str = "paper"

    @property
    def weight_bytes(self) -> int:
        return BYTES * prunable_weights(self.arch)

    def against_moving(self, nbytes: float, seconds: float) -> str:
        """These seconds, as a multiple of the time that moving so many bytes takes."""
        return f"{seconds * self.bandwidth / nbytes:.1f} × moving {nbytes / 1e6:.0f} MB"


TINY = {"arch": "resnet18", "sizes": ("resnet18",), "repeats": 1, "steps": 1, "rounds": 1}
TINY |= {
    "stored": (15,),
    "sources": 1,
    "batch": 2,
    "image": 32,
    "scene": 64,
    "small": 64,
    "batches": 1,
}
TINY |= {"removed": (50,), "study": "digits_sensitivity"}
"""The settings that only show that everything runs."""


def prunable_weights(arch: str) -> int:
    return sum(int(np.prod(shape)) for shape in ARCHITECTURES[arch].prunable.values())


def distinct_weights(arch: str, seed: int = 0) -> dict[str, Tensor]:
    """A trunk's state dict whose prunable weights all differ in magnitude.

    All ways to prune then give the same masks, whatever they do with ties. Magnitudes are
    consecutive float bit patterns, from 5e-4 to 0.125, shuffled by a bijection.
    """
    torch.manual_seed(seed)
    state = dict(torchvision.models.get_model(arch).state_dict())
    bits = np.arange(prunable_weights(arch), dtype=np.uint32)
    most = np.uint32((1 << 26) - 1)
    for odd in (0x9E3779B1 + 2 * seed, 0x85EBCA77, 0xC2B2AE3D):
        bits *= np.uint32(odd)
        bits &= most
        bits ^= bits >> np.uint32(13)
    signs = (bits & np.uint32(8)) << np.uint32(28)
    values = ((bits + np.uint32(0x3A000000)) | signs).view(np.float32)
    start = 0
    for name, shape in ARCHITECTURES[arch].prunable.items():
        size = int(np.prod(shape))
        state[name] = torch.from_numpy(values[start : start + size].copy()).view(shape)
        start += size
    return state


def prunable_of(state: Mapping[str, Tensor], arch: str) -> dict[str, Tensor]:
    return {name: state[name] for name in ARCHITECTURES[arch].prunable}


def make_ticket(state: Mapping[str, Tensor], masks: Masks, arch: str) -> Ticket:
    trunk = {name: state[name] for name in ARCHITECTURES[arch].shapes}
    return Ticket(masks, trunk, TicketMeta(arch, source="benchmark"))
