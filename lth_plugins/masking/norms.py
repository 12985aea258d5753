"""BatchNorm that trains, in the place of a frozen one that a host builds into a trunk."""

from typing import Any

from torch import nn

from lth_plugins.ticket.layout import Layout


class _BatchNorm2d(nn.BatchNorm2d):
    """BatchNorm with the state-dict keys of a frozen one, which has no counter of batches."""

    def __init__(self, frozen: Any) -> None:
        weight, eps = frozen.weight, getattr(frozen, "eps", 1e-5)
        super().__init__(len(weight), eps, device=weight.device, dtype=weight.dtype)
        self.num_batches_tracked = None
        self.load_state_dict(frozen.state_dict())
        self.train(frozen.training)

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, local_metadata: Any, *others: Any
    ) -> None:
        state_dict.pop(f"{prefix}num_batches_tracked", None)
        # Of an older version PyTorch would expect a counter.
        metadata = {**local_metadata, "version": self._version}
        super()._load_from_state_dict(state_dict, prefix, metadata, *others)


def train_norms(model: nn.Module, layout: Layout) -> dict[str, nn.Module]:
    """Replace frozen BatchNorm in a trunk by BatchNorm that trains, under the same keys.

    Frozen is what keeps its weight in a buffer, as FrozenBatchNorm of torchvision, detectron2 and
    transformers do.

    Args:
        model: holds the trunk.
        layout: where `locate` found it.

    Returns:
        The frozen ones by their paths, for ``model.set_submodule``.
    """
    entry = ".running_var"
    paths = [key.removesuffix(entry) for name, key in layout.keys.items() if name.endswith(entry)]
    norms = {path: model.get_submodule(path) for path in paths}
    frozen = {path: norm for path, norm in norms.items() if "weight" in norm._buffers}
    for path, norm in frozen.items():
        model.set_submodule(path, _BatchNorm2d(norm))
    return frozen
