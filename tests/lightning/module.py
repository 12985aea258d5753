"""A user's own LightningModule on a ticket, its images, and a training of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import torchvision
from pytorch_lightning.callbacks import Callback, ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lth_plugins as lth

STEPS = 2
"""Optimizer steps in an epoch of one process."""


class Classifier(pl.LightningModule):
    """A ResNet-18 whose momentum and weight decay would bring weights back.

    Args:
        ticket: None attaches none.
        late: attach it in ``configure_model``.
    """

    def __init__(self, ticket: lth.Ticket | None, late: bool = False) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.net, self.ticket = torchvision.models.resnet18(num_classes=10), ticket
        if not late:
            self._attach()
        self.late = late

    def configure_model(self) -> None:
        if self.late:
            self._attach()

    def _attach(self) -> None:
        if self.ticket is not None:
            lth.attach(self.net, self.ticket)

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        images, labels = batch
        return nn.functional.cross_entropy(self.net(images), labels)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.01, momentum=0.9, weight_decay=0.1)


def images() -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(0)
    shown = torch.rand(4, 3, 32, 32, generator=generator)
    return DataLoader(TensorDataset(shown, torch.arange(4)), batch_size=4 // STEPS)


def train(
    module: pl.LightningModule,
    folder: Path,
    *callbacks: Callback,
    epochs: int = 2,
    resume: Path | None = None,
    **options: Any,
) -> pl.Trainer:
    """Train, and keep a checkpoint of each epoch: ``epoch=0.ckpt``, …."""
    saves = ModelCheckpoint(folder, "{epoch}", save_top_k=-1, every_n_epochs=1)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[saves, *callbacks],
        **options,
    )
    trainer.fit(module, images(), ckpt_path=resume)
    return trainer
