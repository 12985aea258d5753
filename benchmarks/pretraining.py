"""Pre-training by `tools/find_ticket.py`'s Lightning loop, beside a plain loop of PyTorch."""

import logging
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch.nn import functional as F
from torch.optim.lr_scheduler import CosineAnnealingLR

from benchmarks.measure import Times, seconds_of
from benchmarks.report import Row, at_least
from benchmarks.setting import Setting
from lth_plugins.pretrain import load_config
from lth_plugins.pretrain.config import FindConfig
from lth_plugins.pretrain.data import open_images
from lth_plugins.training.fit import fit
from lth_plugins.training.loader import Splits, TrainLoader
from lth_plugins.training.supervised import Supervised

CONFIG = Path(__file__).parents[1] / "configs/pretrain/digits_supervised.yaml"


def throughput(setting: Setting) -> Iterator[Row]:
    """Batches of one epoch, data loading included, checkpoints and validation not."""
    for name in ("pytorch_lightning", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as folder:
        size, batch = (64, 32) if setting.batches > 1 else (32, 8)
        options = [f"out={folder}", f"data.size={size}", f"batch_size={batch}"]
        options += [f"data.subset={batch * setting.batches}", "pretrain.epochs=1"]
        config = load_config(CONFIG, [*options, "trainer.accelerator=cpu"])
        images = open_images(config.data)
        ours, theirs = [], []
        for repetition in range(-1, setting.steps):
            mine = _fit(config, images, Path(folder) / str(repetition))
            plain = seconds_of(_plain(config, images))
            if repetition >= 0:
                ours.append(mine)
                theirs.append(plain)
    count = batch * setting.batches
    lightning, loop = Times(tuple(ours)), Times(tuple(theirs))
    yield Row(
        f"pre-training of the find tool, {config.arch}, {batch} × {size} px",
        f"{count / lightning.median:.1f} images/s ({lightning})",
        f"{count / loop.median:.1f} images/s ({loop}, a plain loop)",
        loop.over(lightning),
        at_least(0.97),
        "1 is the plain loop",
        f"the plain loop alone differs by {loop.spread / loop.median:.0%} from turn to turn",
    )


class _Clock(pl.Callback):
    """From the start of an epoch to the end of its last batch."""

    def on_train_epoch_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.started = time.perf_counter()

    def on_train_batch_end(self, *_: Any) -> None:
        self.seconds = time.perf_counter() - self.started


def _fit(config: FindConfig, images: Splits, folder: Path) -> float:
    clock = _Clock()
    fit(_task(config, images), images, "pretrain", folder, [clock])
    return clock.seconds


def _plain(config: FindConfig, images: Splits) -> Any:
    task = _task(config, images).train()
    settings = {"lr": config.pretrain.lr, "weight_decay": config.optimizer.weight_decay}
    loader = TrainLoader(images.train, config.batch_size, task.stream)
    optimizer = torch.optim.AdamW(task.trained(), fused=True, **settings)
    schedule = CosineAnnealingLR(optimizer, len(loader) * config.pretrain.epochs)

    def run() -> None:
        for images, labels in loader:
            optimizer.zero_grad()
            F.cross_entropy(task.fc(task.trunk(images)), labels).backward()
            optimizer.step()
            schedule.step()

    return run


def _task(config: FindConfig, images: Splits) -> Supervised:
    return Supervised(config, config.pretrain, len(images.classes), 0)
