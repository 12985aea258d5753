"""The check that a narrower model computes what the model with zeros does."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lth_plugins.errors import TicketError
from lth_plugins.slimming.network import Network
from lth_plugins.slimming.tracing import Forward, evaluating, run_on_example, tensors_in

TOLERANCE = 1e-4
"""How far an output may be off, relative to its largest value."""


def check_same(zeroed: nn.Module, narrow: nn.Module, network: Network, forward: Forward) -> None:
    """Check that two models compute the same on an example.

    Compared are the outputs of all layers whose channels are held, which those of the task are
    among, and the sizes of what the models return.

    Raises:
        TicketError: if they do not, naming the layer, and the modules to keep.
    """
    decisions = _Decisions()
    wanted, returned = _outputs(zeroed, network, forward, decisions)
    decisions.replay()
    try:
        found, smaller = _outputs(narrow, network, forward, decisions)
    except TicketError as error:
        raise TicketError(
            f"channels of the {type(zeroed).__name__} depend on each other in a way that tracing "
            f"does not see: without some of them the model fails. {error}. Keep the module that "
            "does more with its features than layers, sums, concatenations and flattening"
        ) from error
    for wide, small in zip(returned, smaller, strict=False):
        if wide.shape[1:] != small.shape[1:]:
            writers = [n for n, g in network.groups.items() if g.channels in wide.shape[1:]]
            raise TicketError(
                f"expected the model to return features of the shape {tuple(wide.shape)}, found "
                f"{tuple(small.shape)}: it returns channels that its layers read, too. Keep the "
                f"modules that write them, among {', '.join(writers)}"
            )
    for name, wide in wanted.items():
        small = found[name]
        same = wide.shape == small.shape
        off = float((wide - small).abs().max()) if same and wide.numel() else 0.0
        if not same or not off <= TOLERANCE * max(1.0, float(wide.abs().max())):
            raise TicketError(
                f"expected {name} to compute the same without the removed channels, found outputs "
                f"{off:.2g} apart, of the shapes {tuple(wide.shape)} and {tuple(small.shape)}: "
                "something between the layers mixes channels. Keep the module that it is in"
            )


@torch.no_grad()
def _outputs(
    model: nn.Module, network: Network, forward: Forward, decisions: "_Decisions"
) -> tuple[dict[str, Tensor], list[Tensor]]:
    """What the held layers compute, by name (each of several calls has a number), and the model."""
    outputs: dict[str, Tensor] = {}

    def taker(name: str) -> Callable[..., None]:
        def take(module: nn.Module, inputs: object, output: Tensor) -> None:
            call = sum(key == name or key.startswith(f"{name} (call ") for key in outputs)
            outputs[f"{name} (call {call + 1})" if call else name] = output.detach().clone()

        return take

    modules = dict(model.named_modules())
    hooks = [modules[n].register_forward_hook(taker(n)) for n in network.held if n in modules]
    try:
        with evaluating(model), decisions:
            returned = [t.detach() for t in tensors_in(run_on_example(model, forward))]
    finally:
        for hook in hooks:
            hook.remove()
    if not hooks:
        outputs = {f"output {i}": t for i, t in enumerate(returned)}
    return outputs, returned


class _Decisions(TorchFunctionMode):
    """What a model decides by numbers, such as which boxes it keeps; replayed in a second run.

    Both models round differently, and two boxes of nearly equal scores may change places.
    """

    def __init__(self) -> None:
        super().__init__()
        self._made: list[object] = []
        self._to_replay: Iterator[object] | None = None

    def replay(self) -> None:
        self._to_replay = iter(self._made)

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        found = result if isinstance(result, tuple) else (result,)
        by_numbers = any(isinstance(a, Tensor) and a.is_floating_point() for a in args)
        if not by_numbers or not any(
            isinstance(value, Tensor) and not value.is_floating_point() for value in found
        ):
            return result
        if self._to_replay is not None:
            return next(self._to_replay, result)
        self._made.append(result)
        return result
