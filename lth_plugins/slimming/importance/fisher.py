"""Fisher: a channel is worth the squared gradient of a mask on it, per memory that it takes."""

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lth_plugins.slimming.importance.importance import Sums
from lth_plugins.slimming.network import Member, Network


class Fisher(Sums):
    """The Fisher information of the masks of channels (Group Fisher, arXiv 2108.00708, eq. 4).

    The gradient of a mask is the sum, over the elements that a layer reads, of the element times
    its gradient. The layers of a group that read equally many samples share their mask, and add
    their gradients; regions of interest are other samples than images. Squares are added up over
    samples and steps, and divided by the activations that a channel takes in memory (section 3.4).
    """

    def start(self, model: nn.Module, network: Network) -> None:
        super().start(model, network)
        self._read: dict[str, list[tuple[str, Member]]] = defaultdict(list)
        for name, member in network.members():
            if member.side == "in":
                self._read[member.module].append((name, member))
        self._memory = {name: self._activations(name) for name in network.groups}
        self._masks: dict[tuple[str, int], Tensor] = {}
        self._hooks: list[RemovableHandle] = [
            model.get_submodule(layer).register_forward_pre_hook(self._watch(layer))
            for layer in self._read
        ]

    def _activations(self, name: str) -> float:
        """The activations of one channel of a group, in all layers that write it."""
        group = self.network.groups[name]
        writers = {member.module for member in group.writers}
        layers = (self.network.layers[w] for w in writers if w in self.network.layers)
        return max(1.0, sum(layer.activations for layer in layers) / group.channels)

    def _watch(self, layer: str) -> Callable[[nn.Module, tuple[Any, ...]], Any]:
        def before(module: nn.Module, inputs: tuple[Any, ...]) -> Any:
            features: Tensor = inputs[0]
            if not (module.training and torch.is_grad_enabled() and features.requires_grad):
                return None
            values = features.detach()
            features = features.view_as(features)  # whose gradient is that of this layer alone

            def take(gradient: Tensor) -> None:
                product = (values * gradient).float()
                each = (product if product.dim() == 2 else product.flatten(2).sum(2)).cpu()
                for name, member in self._read[layer]:
                    mask = each[:, member.at].sum(2)
                    key = (name, len(mask))
                    self._masks[key] = self._masks[key] + mask if key in self._masks else mask

            features.register_hook(take)
            return features, *inputs[1:]

        return before

    def after_backward(self) -> None:
        for (name, _), mask in self._masks.items():
            if bool(mask.isfinite().all()):  # mixed precision skips steps that overflow
                self.sums[name] += mask.double().square().sum(0)
        self._masks = {}

    def scale(self, name: str, sums: Tensor) -> Tensor:
        return sums / self._memory[name]

    def stop(self) -> None:
        for hook in self._hooks:
            hook.remove()
