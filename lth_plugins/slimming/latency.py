"""Latency: the time of inference on this machine, from a table of measured layer times.

Each convolution and linear layer is timed alone, at some widths of its two sides. What is left of
the whole model's time (normalisations, activations, sums, what a detector does with boxes) goes
with the activations. As layers that run alone find their weights in a cache, and those of a model
do not, narrower models are measured, too, and the table is corrected.
"""

import copy
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lth_plugins.slimming.channels import cut, narrow_copy, tensors_of
from lth_plugins.slimming.cost import Cost, shares_of
from lth_plugins.slimming.network import Kept, Network, Side
from lth_plugins.slimming.tracing import LAYERS, Forward, is_depthwise, run_on_example

logger = logging.getLogger(__name__)

WIDTHS = (1 / 8, 1 / 4, 1 / 2, 3 / 4, 1.0)
"""The shares of a side that a layer is timed with."""

RUNS = 5
"""How often something is timed, after a first run that is not."""

TOLERANCE = 0.03
"""How far the table may be off what is measured."""


@dataclass(frozen=True)
class Surface:
    """The seconds of a layer, in all its calls, by the shares of its two sides that are left.

    Between the points it is bilinear, and below the first ones as high as there.

    Attributes:
        outs, ins: shares, ascending to 1.
        seconds: for each of the first a row, for each of the second a column.
    """

    outs: tuple[float, ...]
    ins: tuple[float, ...]
    seconds: tuple[tuple[float, ...], ...]

    def __call__(self, out: float, into: float) -> float:
        rows = [np.interp(into, self.ins, row) for row in self.seconds]
        return float(np.interp(out, self.outs, rows))

    @classmethod
    def fitted(
        cls, outs: Sequence[float], ins: Sequence[float], seconds: Sequence[Sequence[float]]
    ) -> "Surface":
        """A surface that does not fall as a side grows, nearest to these times.

        It lies in the middle of the lowest such surface above them and the highest below.
        """
        above = below = np.asarray(seconds, dtype=np.float64)
        for axis in (0, 1):
            above = np.maximum.accumulate(above, axis)
            below = np.flip(np.minimum.accumulate(np.flip(below, axis), axis), axis)
        middle = (above + below) / 2
        return cls(tuple(outs), tuple(ins), tuple(tuple(row) for row in middle.tolist()))


@dataclass(frozen=True)
class Latency:
    """Seconds of inference, on the device of the model and the threads of the process.

    On a CPU it is processor time over threads: other work on the machine takes cores away from a
    process, which lengthens what a clock shows many times, and processor time hardly. What remains
    of a disturbance only adds to a time, so that the least of some runs is taken. On a GPU it is
    the time on the clock, until the GPU has finished.

    Attributes:
        layers: the time of each layer, by its name.
        rest: the seconds that the layers do not explain.
        gain: the seconds that the model has lost over those that the table says, where a narrower
            model was measured.
    """

    layers: Mapping[str, Surface] = field(default_factory=dict)
    rest: float = 0.0
    gain: float = 1.0
    unit: str = "time of inference"

    def __call__(self, network: Network, kept: Kept) -> float:
        return self._whole - self.gain * (self._whole - self._estimate(network, kept))

    @property
    def _whole(self) -> float:
        return self.rest + sum(surface(1.0, 1.0) for surface in self.layers.values())

    def _estimate(self, network: Network, kept: Kept) -> float:
        shares = shares_of(network, kept)
        layers = network.layers.values()
        activations = sum(layer.activations for layer in layers)
        left = sum(layer.activations * shares.get((layer.name, "out"), 1.0) for layer in layers)
        rest = self.rest * left / activations
        return rest + sum(self.by_layer(network, kept).values())

    def by_layer(self, network: Network, kept: Kept) -> dict[str, float]:
        shares = shares_of(network, kept)
        return {
            name: self.layers[name](shares.get((name, "out"), 1.0), shares.get((name, "in"), 1.0))
            for name in network.layers
        }

    def of(self, model: nn.Module, network: Network, forward: Forward) -> Cost:
        whole = narrow_copy(model, network, network.all_kept()).eval()
        started = time.monotonic()
        layers = _table(whole, network, forward)
        (seconds,) = seconds_of([lambda: run_on_example(whole, forward)], _device(whole))
        alone = sum(surface(1.0, 1.0) for surface in layers.values())
        logger.info(
            "Measured the time of inference on %s in %.0f s: %.3g ms, %.0f %% of it in %d layers",
            *(_device(whole), time.monotonic() - started, 1e3 * seconds),
            *(100 * min(1.0, alone / seconds), len(layers)),
        )
        return replace(self, layers=layers, rest=max(0.0, seconds - alone))

    def corrected(self, model: nn.Module, network: Network, kept: Kept, forward: Forward) -> Cost:
        models = [narrow_copy(model, network, k).eval() for k in (network.all_kept(), kept)]
        runs = [lambda m=m: run_on_example(m, forward) for m in models]
        wide, small = seconds_of(runs, _device(model))
        found = small / wide
        expected = self(network, kept) / self._whole
        logger.info(
            "The narrower model has %.1f %% of the time of inference (%.3g of %.3g ms), and by "
            "the table of layers %.1f %%",
            *(100 * found, 1e3 * small, 1e3 * wide, 100 * expected),
        )
        lost = 1 - self._estimate(network, kept) / self._whole
        if abs(found - expected) <= TOLERANCE * expected or lost <= 0:
            return self
        return replace(self, gain=max(0.0, (1 - found) / lost))

    def state_dict(self) -> dict[str, Any]:
        layers = {name: [s.outs, s.ins, s.seconds] for name, s in self.layers.items()}
        return {"layers": layers, "rest": self.rest, "gain": self.gain}

    def with_state(self, state: Mapping[str, Any]) -> Cost:
        layers = {name: Surface(*points) for name, points in state["layers"].items()}
        return replace(self, layers=layers, rest=state["rest"], gain=state["gain"])


@torch.no_grad()
def seconds_of(runs: Sequence[Callable[[], object]], device: torch.device) -> list[float]:
    """The seconds that each of some functions takes, as `Latency` has it; they run in turns."""
    on_cpu = device.type == "cpu"
    threads = torch.get_num_threads() if on_cpu else 1
    clock = time.process_time if on_cpu else time.perf_counter
    least = [float("inf")] * len(runs)
    for turn in range(RUNS + 1):
        for i, run in enumerate(runs):
            _synchronize(device)
            started = clock()
            run()
            _synchronize(device)
            if turn:
                least[i] = min(least[i], (clock() - started) / threads)
    return least


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


@dataclass(frozen=True)
class _Call:
    """What a layer is called with."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    memory_format: torch.memory_format

    @classmethod
    def of(cls, features: Tensor) -> "_Call":
        last = torch.channels_last
        is_last = features.dim() == 4 and features.is_contiguous(memory_format=last)
        plain = features.is_contiguous() or not is_last
        return cls(
            tuple(features.shape), features.dtype, torch.contiguous_format if plain else last
        )

    def features(self, width: int, dim: int, device: torch.device) -> Tensor:
        shape = [*self.shape]
        shape[dim] = width
        features = torch.ones(shape, dtype=self.dtype, device=device)
        return features.contiguous(memory_format=self.memory_format)


def _table(model: nn.Module, network: Network, forward: Forward) -> dict[str, Surface]:
    """The time of each layer; layers that are alike are measured once."""
    modules = {name: model.get_submodule(name) for name in network.layers}
    calls = _calls(model, modules, forward)
    narrowed = {(member.module, member.side) for _, member in network.members()}
    known: dict[tuple[Any, ...], list[list[float]]] = {}
    table = {}
    for name, layer in network.layers.items():
        outs = WIDTHS if (name, "out") in narrowed else (1.0,)
        ins = WIDTHS if (name, "in") in narrowed and not layer.depthwise else (1.0,)
        total = np.zeros((len(outs), len(ins)))
        for call in calls[name]:
            key = (call, outs, ins, *_geometry(modules[name]))
            if key not in known:
                known[key] = [[_alone(modules[name], call, o, i) for i in ins] for o in outs]
            total += known[key]
        table[name] = Surface.fitted(outs, ins, total.tolist())
    return table


def _calls(
    model: nn.Module, modules: Mapping[str, nn.Module], forward: Forward
) -> dict[str, list[_Call]]:
    calls: dict[str, list[_Call]] = {name: [] for name in modules}

    def noter(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        return lambda _, inputs: calls[name].append(_Call.of(inputs[0]))

    hooks = [module.register_forward_pre_hook(noter(name)) for name, module in modules.items()]
    try:
        with torch.no_grad():
            run_on_example(model, forward)
    finally:
        for hook in hooks:
            hook.remove()
    return calls


def _geometry(module: nn.Module) -> tuple[Any, ...]:
    """What makes layers alike, beside what they are called with."""
    keys = ("stride", "padding", "dilation", "output_padding", "groups", "transposed")
    weight: Any = module.weight
    has_bias = module.bias is not None
    return (tuple(weight.shape), has_bias, *(getattr(module, key, None) for key in keys))


def _alone(module: Any, call: _Call, out: float, into: float) -> float:
    """The seconds of one call of a layer with these shares of its sides.

    Without hooks, and without what detectron2's convolutions do after the convolution.
    """
    small = copy.deepcopy(module)
    kind: Any = next(kind for kind in LAYERS if isinstance(module, kind))
    sides: dict[Side, float] = {"out": out, "in": into}
    for side, share in sides.items():
        if share < 1:
            dim = next(d for key, d in tensors_of(module, side) if key == "weight")
            size = module.weight.shape[dim]
            cut(small, side, torch.arange(size) < max(1, round(share * size)))
    channels = len(call.shape) - 1 if kind is nn.Linear else 1
    read = out if is_depthwise(module) else into
    width = max(1, round(read * call.shape[channels]))
    features = call.features(width, channels, _device(module))
    (seconds,) = seconds_of([lambda: kind.forward(small, features)], features.device)
    return seconds
