"""A training in two processes, and one in which the second process alone has a leak.

It is a script: its processes are forked before anything has trained.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

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


def main(ticket: str, out: str) -> None:
    loaded = lth.Ticket.load(ticket)
    both: dict[str, Any] = {"devices": 2, "strategy": "ddp_fork"}
    train(Classifier(loaded), Path(out, "whole"), TicketCallback(), **both)
    try:
        train(Classifier(loaded), Path(out, "leak"), TicketCallback(), LeakInTheSecond(), **both)
    except Exception as error:
        print(error)


if __name__ == "__main__":
    main(*sys.argv[1:])
