"""What an importance is: it scores the channels of groups; `select` decides how many stay."""

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from lth_plugins.resilience.ranks import mean_over_ranks
from lth_plugins.slimming.channels import tensors_of
from lth_plugins.slimming.network import Group, Member, Network


class Importance(Protocol):
    """Scores the channels of a network's groups.

    An importance that looks at gradients collects them while the model trains, between `start` and
    `scores`.
    """

    def start(self, model: nn.Module, network: Network) -> None:
        """Begin to watch a model that is trained; nothing, where weights are enough."""
        ...

    def after_backward(self) -> None:
        """Take up the gradients of a step, before an optimizer makes it."""
        ...

    def scores(self) -> dict[str, Tensor]:
        """The score of each channel since the last call, by group, comparable between groups.

        On the CPU, float64, [channels]. All processes of a training return the same.
        """
        ...

    def state_dict(self) -> dict[str, Tensor]:
        """What was collected since the last call of `scores`, by group; for a checkpoint."""
        ...

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take up what was collected, after `start`."""
        ...

    def stop(self) -> None:
        """End watching; hooks on the model are removed."""
        ...


class Weights:
    """The base of importances that look at weights alone, and collect nothing."""

    def start(self, model: nn.Module, network: Network) -> None:
        self.model, self.network = model, network

    def after_backward(self) -> None:
        pass

    def state_dict(self) -> dict[str, Tensor]:
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        pass

    def stop(self) -> None:
        pass


class Sums:
    """The base of importances that add something up over steps, in each process.

    Attributes:
        sums: by group, float64, [channels].
    """

    def start(self, model: nn.Module, network: Network) -> None:
        self.model, self.network = model, network
        self._reset()

    def _reset(self) -> None:
        self.sums = {
            name: torch.zeros(group.channels, dtype=torch.float64)
            for name, group in self.network.groups.items()
        }

    def scores(self) -> dict[str, Tensor]:
        found = {name: self.scale(name, mean_over_ranks(s)) for name, s in self.sums.items()}
        self._reset()
        return found

    def scale(self, name: str, sums: Tensor) -> Tensor:
        """Make the sums of a group comparable with those of others."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Tensor]:
        return {name: sums.clone() for name, sums in self.sums.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.sums = {name: sums.clone() for name, sums in state.items()}

    def stop(self) -> None:
        pass


def by_channel(values: Tensor, dim: int, member: Member) -> Tensor:
    """Sum a layer's tensor over all but a group's channels; float64, [channels]."""
    others = [d for d in range(values.dim()) if d != dim]
    summed = values.double().sum(others) if others else values.double()
    return summed.cpu()[member.at].sum(1)


def weights_of(model: nn.Module, group: Group) -> list[tuple[str, Tensor, int, Member]]:
    """The weights and biases of a group's layers, without normalisations' statistics.

    Returns:
        For each: its name in the model, the tensor, the dimension of the channels, the member.
    """
    found = []
    for member in group.members:
        module = model.get_submodule(member.module)
        for key, dim in tensors_of(module, member.side):
            if key in ("weight", "bias"):
                found.append((f"{member.module}.{key}", getattr(module, key), dim, member))
    return found


def relative(scores: Tensor) -> Tensor:
    """Scores of a group over their mean, so that groups of other scales compare."""
    mean = float(scores.mean())
    return scores / mean if mean > 0 else torch.zeros_like(scores)
