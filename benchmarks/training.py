"""Training steps, masked and dense: of a classifier, a detector and a segmentor; and their memory.

The dense model, ours and the peer's start from the same values, pruned ones at zero, so that all
three compute the same.
"""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

import lth_plugins as lth
from benchmarks.hosts import Loss, deeplabv3plus, faster_rcnn
from benchmarks.measure import in_turns, peak_of_tensors, seconds_in
from benchmarks.peers import mask_as_torch
from benchmarks.report import Row, at_most
from benchmarks.setting import Setting, make_ticket
from lth_plugins.ticket import Ticket, locate

PEER = "torch.nn.utils.prune"
DENSITY = 0.8**7  # 79.03 % sparse
OURS = {
    "cpu": {"zero_gradient", "_before_optimizer_step", "_after_optimizer_step"},
    "cuda": {"aten::masked_fill_"},
}
"""The functions (CPU) or operators (GPU) in which a step spends time on our masks."""
# A gradient and a weight are each read and written once, and the mask is read with both.
MOVED = 2 * (4 + 4 + 1)


@dataclass
class Trained:
    """A model in training."""

    model: nn.Module
    loss: Loss
    optimizer: torch.optim.Optimizer

    @classmethod
    def start(cls, model: nn.Module, loss: Loss) -> "Trained":
        settings = {"lr": 1e-4, "momentum": 0.9, "weight_decay": 1e-4}
        return cls(model, loss, torch.optim.SGD(model.parameters(), **settings))

    def step(self) -> None:
        torch.manual_seed(0)  # detectors draw their samples
        self.optimizer.zero_grad()
        self.loss(self.model).backward()
        self.optimizer.step()


def classifier(setting: Setting) -> Iterator[Row]:
    """A step of a classifier, and the time to verify all its masks."""
    torch.manual_seed(0)
    model = torchvision.models.get_model(setting.arch).to(setting.device)
    loss = cross_entropy(setting.batch, setting.image, setting.device)
    what = f"{setting.arch}, {setting.batch} × {setting.image} px"
    on_gpu = setting.device.type == "cuda"
    trained, medians = yield from _steps(what, model, loss, setting, 1.01 if on_gpu else 1.02)
    handle = lth.attached(trained.model)
    assert handle is not None
    times = in_turns({"ours": lambda: handle.verify}, setting.repeats)["ours"]
    yield Row(
        f"verify all masks, {setting.arch} / step",
        str(times),
        f"{medians:.3g} s (a masked step of {setting.batch} × {setting.image} px)",
        times.median / medians,
        at_most(0.01),
        setting.against_moving(setting.weight_bytes * 5 / 4, times.median),
    )


def detector(setting: Setting) -> Iterator[Row]:
    """A step of Faster R-CNN with an FPN."""
    model, loss = faster_rcnn(setting.arch, setting.scene)
    what = f"Faster R-CNN {setting.arch} FPN, 2 × {setting.scene} px"
    yield from _steps(what, model, loss, setting, 1.02)


def segmentor(setting: Setting) -> Iterator[Row]:
    """A step of DeepLabV3+."""
    model, loss = deeplabv3plus(setting.arch, setting.scene)
    what = f"DeepLabV3+ {setting.arch}, 2 × {setting.scene} px"
    yield from _steps(what, model, loss, setting, 1.02)


def memory(setting: Setting) -> Iterator[Row]:
    """The memory that masks add to the peak of a step with few activations."""
    loss = cross_entropy(2, 32, setting.device)

    def peak(put_on: Callable[[nn.Module, Ticket], object]) -> int:
        def run() -> None:
            torch.manual_seed(0)
            model = torchvision.models.get_model(setting.arch).to(setting.device)
            put_on(model, ticket)
            trained = Trained.start(model, loss)
            trained.step()
            trained.step()

        return peak_of_tensors(run, setting.device)

    torch.manual_seed(0)
    ticket = _ticket_of(torchvision.models.get_model(setting.arch))
    dense = peak(lambda model, ticket: None)
    ours = peak(lth.attach) - dense
    theirs = peak(lambda model, ticket: mask_as_torch(model, ticket.masks)) - dense
    whole = setting.weight_bytes
    yield Row(
        f"extra memory while training, {setting.arch} / W",
        f"{ours / 1e6:.0f} MB",
        f"{theirs / 1e6:.0f} MB = {theirs / whole:.2f} W ({PEER})",
        ours / whole,
        at_most(0.25),
        f"{8 * ours / (whole / 4):.1f} bits a weight; 1 would do",
        unit="W",
    )


def _steps(
    what: str, model: nn.Module, loss: Loss, setting: Setting, bound: float
) -> Iterator[Row]:
    """Yield the rows of a step; return the training with our masks and its median step."""
    ticket = _ticket_of(model)
    lth.attach(model, ticket).detach()  # pruned weights are zero in all three
    masked, pruned = copy.deepcopy(model), copy.deepcopy(model)
    lth.attach(masked, ticket, load_weights=False)
    keys = locate(pruned).keys
    mask_as_torch(pruned, {keys[name]: mask for name, mask in ticket.masks.items()})
    trained = {
        "dense": Trained.start(model, loss),
        "ours": Trained.start(masked, loss),
        PEER: Trained.start(pruned, loss),
    }
    times = in_turns(
        {name: lambda one=one: one.step for name, one in trained.items()}, setting.steps
    )
    ours, dense, theirs = times["ours"], times["dense"], times[PEER]
    on_masks = seconds_in(trained["ours"].step, OURS[setting.device.type], setting.device)
    moved = MOVED * ticket.masks.numel
    yield Row(
        f"step, masked / dense: {what}",
        str(ours),
        f"{dense} (dense); {PEER}: {theirs.over(dense):.3f} × dense",
        ours.over(dense),
        at_most(bound),
        "1 is no masks at all",
        "steps of the same model differ by more than the masks' own time, in the next row",
    )
    yield Row(
        f"the masks' own time in a step: {what}",
        f"{1e3 * on_masks:.3g} ms (profiled)",
        f"{ours.median:.3g} s (masked step)",
        on_masks / ours.median,
        at_most(round(bound - 1, 2)),
        setting.against_moving(moved, on_masks),
        "gradients and weights are both read and written once a step, however short it is",
    )
    return trained["ours"], ours.median


def _ticket_of(model: nn.Module) -> Ticket:
    layout = locate(model)
    state = {name: value.cpu() for name, value in layout.extract(model.state_dict()).items()}
    return make_ticket(state, lth.prune(state, 1 - DENSITY), layout.arch.name)


def cross_entropy(batch: int, image: int, device: torch.device) -> Loss:
    images = torch.randn(batch, 3, image, image, device=device)
    labels = torch.randint(1000, (batch,), device=device)

    def loss(model: nn.Module) -> Tensor:
        # On a GPU as one trains there: the shorter a step, the more its masks weigh.
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            return F.cross_entropy(model(images), labels)

    return loss
