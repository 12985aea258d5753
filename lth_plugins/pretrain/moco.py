"""MoCo v2 (Chen et al., arXiv 2003.04297): a query attracts its key and repels a queue of others.

Keys come from a second encoder that follows the first by momentum. A ticket's mask is the query
encoder's, and both encoders carry it.
"""

import copy
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from lightly.loss import NTXentLoss
from lightly.models.modules import MoCoProjectionHead
from lightly.models.utils import batch_shuffle, batch_unshuffle, update_momentum
from lightly.transforms import MoCoV2Transform
from torch import Tensor
from torch.nn import functional as F

from lth_plugins.errors import ConfigError
from lth_plugins.masking.attachment import Attachment, attach
from lth_plugins.pretrain.config import FindConfig
from lth_plugins.pretrain.contrastive import ContrastiveTask, first_is_best, view_options
from lth_plugins.ticket import InputSpec, Ticket
from lth_plugins.ticket.keys import State
from lth_plugins.training.loader import Transform


class MoCo(ContrastiveTask):
    """InfoNCE against a queue, on an MLP head.

    The queue is no part of the state dict: each training, so each rewind, starts from a fresh one.
    """

    # MoCo's own checkpoints keep the query's MLP in fc.0 and fc.2.
    head_names: ClassVar[Sequence[str]] = ("fc.", *ContrastiveTask.head_names)
    trunks: ClassVar[Sequence[str]] = ("trunk.", "key_trunk.")

    @classmethod
    def views(cls, config: FindConfig, spec: InputSpec) -> Sequence[Transform]:
        return MoCoV2Transform(**view_options(config, spec)).transforms

    def build_projection(self) -> None:
        settings, batch_size = self.config.contrastive, self.config.batch_size
        if settings.queue % batch_size:
            raise ConfigError(
                f"expected contrastive.queue to be a multiple of batch_size={batch_size}, found "
                f"{settings.queue}: each batch of keys replaces the oldest ones in the queue"
            )
        self.projection = MoCoProjectionHead(self.features, self.features, settings.projection)
        self.key_trunk = copy.deepcopy(self.trunk).requires_grad_(False)
        self.key_projection = copy.deepcopy(self.projection).requires_grad_(False)
        size = (settings.queue, settings.projection)
        self.loss = NTXentLoss(settings.temperature, size, gather_distributed=True)

    @property
    def queue(self) -> Tensor:
        """The keys to contrast with, [queue, projection], of length 1; the oldest at `position`."""
        return self.loss.memory_bank.bank

    def take(self, state: State | Ticket) -> bool:
        had_head = super().take(state)
        self.key_trunk.load_state_dict(self.trunk.state_dict())
        self.key_projection.load_state_dict(self.projection.state_dict())
        return had_head

    def rewind(self, pretrained: State, ticket: Ticket) -> Attachment:
        attachment = super().rewind(pretrained, ticket)
        # The key encoder's own pre-trained weights, under the query encoder's mask.
        attach(self.key_trunk, ticket, load_weights=False)
        return attachment

    def training_step(self, batch: tuple[list[Tensor], Tensor], batch_idx: int) -> Tensor:
        (query_view, key_view), labels = batch
        features = self.outputs(query_view)
        query = self.projection(features)
        key = self._key(key_view)
        accuracy = self._accuracy(query, key)  # against the queue that the loss sees
        loss = self.loss(query, key)
        self.tally(len(labels), train_loss=loss, train_top1=accuracy)
        return loss + self.taught(query_view, features)

    @torch.no_grad()
    def _key(self, view: Tensor) -> Tensor:
        momentum = self.config.contrastive.momentum
        update_momentum(self.trunk, self.key_trunk, momentum)
        update_momentum(self.projection, self.key_projection, momentum)
        # Shuffled over all processes, so that batch statistics do not tell which key is whose.
        several = self.trainer.world_size > 1
        view, order = batch_shuffle(view, distributed=several)
        return batch_unshuffle(self.key_projection(self.key_trunk(view)), order, several)

    @torch.no_grad()
    def _accuracy(self, query: Tensor, key: Tensor) -> Tensor:
        query, key = F.normalize(query, dim=1), F.normalize(key, dim=1)
        positive = (query * key).sum(1, keepdim=True)
        return first_is_best(torch.cat([positive, query @ self.queue.T], dim=1))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        bank = self.loss.memory_bank
        checkpoint["queue"] = {"keys": bank.bank, "position": bank.bank_ptr}

    def on_load_checkpoint(self, checkpoint: Mapping[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        bank = self.loss.memory_bank
        bank.bank.copy_(checkpoint["queue"]["keys"])
        bank.bank_ptr.copy_(checkpoint["queue"]["position"])
