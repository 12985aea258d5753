"""A training in two processes, and one in which the second process alone has a leak."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback

import lth_plugins as lth
from lth_plugins.lightning import TicketCallback
from tests.lightning.module import Classifier, train


class LeakInTheSecond(Callback):
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.global_rank == 1 and trainer.current_epoch == 1:
            with torch.no_grad():
                pl_module.net.layer2[0].conv1.weight.fill_(1.0)


def train_and_leak(rank: int, ticket: str, out: str) -> str:
    """Train in one of two processes; then with a leak, and return what that is refused with."""
    os.environ["LOCAL_RANK"] = f"{rank}"
    loaded = lth.Ticket.load(ticket)
    both: dict[str, Any] = {"devices": 2, "strategy": "ddp"}
    train(Classifier(loaded), Path(out, "whole"), TicketCallback(), **both)
    with pytest.raises(lth.LthError) as refused:
        train(Classifier(loaded), Path(out, "leak"), TicketCallback(), LeakInTheSecond(), **both)
    return str(refused.value)
