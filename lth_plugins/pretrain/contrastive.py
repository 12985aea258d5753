"""What simCLR and MoCo share: views from `lightly`, and how features are judged without labels.

Labels are never trained on. They serve one metric: whether a held-out image's neighbours among
the training images, in the trunk's feature space, are of its class (kNN).
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from lightly.utils.benchmarking.knn import knn_predict
from torch import Tensor, nn
from torch.nn import functional as F

from lth_plugins.errors import ConfigError, TicketError
from lth_plugins.pretrain.config import FindConfig
from lth_plugins.ticket import InputSpec
from lth_plugins.ticket.keys import State
from lth_plugins.training.module import FEATURES, Task, misfit

NEIGHBOURS = 20


class ContrastiveTask(Task):
    """A pre-training on pairs of views; a batch is (a list of two [N, 3, H, W], labels [N])."""

    config: FindConfig
    projection: nn.Module
    uses_bank: ClassVar[bool] = True
    distils: ClassVar[str] = FEATURES
    head_names: ClassVar[Sequence[str]] = ("projection_head.layers.",)
    """What checkpoints call the layers of the projection head; by default lightly's name."""

    def build_head(self, classes: int) -> None:
        self.classes = classes
        self._bank: list[tuple[Tensor, Tensor]] = []
        self.build_projection()

    def build_projection(self) -> None:
        """Add the projection head, and what else is trained beside the trunk."""
        raise NotImplementedError

    def take_head(self, state: State) -> bool:
        own = self.projection.state_dict()
        for prefix in self.head_names:
            names = {name: name.replace("layers.", f".{prefix}", 1) for name in own}
            found = {
                name: value
                for name, spelled in names.items()
                for key, value in state.items()
                if f".{key}".endswith(spelled) and "encoder_k" not in key
            }
            if not found:
                continue
            wrong = misfit(own, found)
            if wrong is not None:
                raise TicketError(
                    f"expected {type(self).__name__}'s projection head in init, with "
                    f"{names[wrong[0]][1:]} {wrong[1]}: set contrastive.projection to the "
                    "checkpoint's, or give one with such a head or with none"
                )
            self.projection.load_state_dict(found)
            return True
        return False

    def outputs(self, images: Tensor) -> Tensor:
        return self.trunk(images)

    def gathered(self, values: Tensor) -> Tensor:
        """The rows of all processes."""
        found = self.all_gather(values)
        assert isinstance(found, Tensor)
        return found.flatten(0, 1)

    def validation_step(
        self, batch: tuple[Tensor, Tensor], batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        images, labels = batch
        features = F.normalize(self.trunk(images), dim=1)
        if dataloader_idx == 0:
            self._bank.append((features, labels))
            return
        if batch_idx == 0:
            bank = [torch.cat(values) for values in zip(*self._bank, strict=True)]
            if self.trainer.world_size > 1:
                bank = [self.gathered(values) for values in bank]
            self._bank_features, self._bank_labels = bank
            self._bank.clear()
        near = knn_predict(
            features,
            self._bank_features.T,
            self._bank_labels,
            self.classes,
            knn_k=min(NEIGHBOURS, len(self._bank_labels)),
        )
        hits = near[:, :1] == labels[:, None]
        self.tally(len(labels), val_knn_top1=hits.float().mean())


def first_is_best(logits: Tensor) -> Tensor:
    """The contrastive accuracy: how often the positive, column 0 of [N, M], is most similar."""
    return (logits[:, 0] > logits[:, 1:].amax(1)).float().mean()


def view_options(config: FindConfig, spec: InputSpec) -> dict[str, Any]:
    """The arguments of `lightly`'s view transforms that a configuration sets.

    Raises:
        ConfigError: if the network wants another order of channels than theirs, RGB.
    """
    if spec.format != "RGB":
        raise ConfigError(
            f"expected init of a network that takes RGB, as the views of {config.task} are, found "
            f"{spec.format}: give another, or task=supervised"
        )
    settings, spec = config.contrastive, spec.of_unit_range
    return {
        "input_size": config.data.size,
        "min_scale": settings.min_scale,
        "cj_strength": settings.jitter,
        "hf_prob": settings.flip,
        "gaussian_blur": settings.blur,
        "normalize": {"mean": list(spec.mean), "std": list(spec.std)},
    }
