"""simCLR (Chen et al., arXiv 2002.05709): two views of an image attract, all others repel."""

from collections.abc import Sequence

import torch
from lightly.loss import NTXentLoss
from lightly.models.modules import SimCLRProjectionHead
from lightly.transforms import SimCLRTransform
from torch import Tensor
from torch.nn import functional as F

from lth_plugins.pretrain.config import FindConfig
from lth_plugins.pretrain.contrastive import ContrastiveTask, first_is_best, view_options
from lth_plugins.ticket import InputSpec
from lth_plugins.training.loader import Transform


class SimCLR(ContrastiveTask):
    """NT-Xent over the batch, on a projection head of two layers."""

    @classmethod
    def views(cls, config: FindConfig, spec: InputSpec) -> Sequence[Transform]:
        return SimCLRTransform(**view_options(config, spec)).transforms

    def build_projection(self) -> None:
        settings = self.config.contrastive
        self.projection = SimCLRProjectionHead(self.features, self.features, settings.projection)
        self.loss = NTXentLoss(settings.temperature, gather_distributed=True)

    def training_step(self, batch: tuple[list[Tensor], Tensor], batch_idx: int) -> Tensor:
        views, labels = batch
        features = [self.outputs(view) for view in views]
        one, other = (self.projection(of_view) for of_view in features)
        loss = self.loss(one, other)
        if self.trainer.world_size > 1:  # as the loss does, look among all processes' views
            one, other = (self.gathered(views) for views in (one, other))
        self.tally(len(labels), train_loss=loss, train_top1=_accuracy(one, other))
        return loss + self.taught(torch.cat(views), torch.cat(features))


@torch.no_grad()
def _accuracy(one: Tensor, other: Tensor) -> Tensor:
    """How often, of all other views in the batch, a view's partner is the nearest."""
    one, other = F.normalize(one, dim=1), F.normalize(other, dim=1)
    itself = torch.eye(len(one), dtype=torch.bool, device=one.device)
    across = one @ other.T
    within = (one @ one.T).masked_fill(itself, -torch.inf)
    positive = across.diagonal()[:, None]
    return first_is_best(torch.cat([positive, across.masked_fill(itself, -torch.inf), within], 1))
