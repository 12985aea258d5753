"""What is trained downstream: a classifier on a ticket's trunk, or on the trunk's features.

Both are `lth_plugins.training.supervised.Supervised` apart from their stem, their schedule and a
line of metrics for each epoch.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pytorch_lightning.utilities import rank_zero_only
from torch import nn

from lth_plugins.resilience.atomic import write_atomically
from lth_plugins.training.supervised import Supervised
from lth_plugins.transfer.config import TransferConfig


class Classifier(Supervised):
    """A trunk and a linear head, initialised from the configuration's seed.

    Args:
        config: the configuration.
        classes: how many the data has.
        lines: ``metrics.jsonl``, written whole after each epoch.
    """

    config: TransferConfig

    def __init__(self, config: TransferConfig, classes: int, lines: Path) -> None:
        super().__init__(config, config.training, classes, stream=0)
        self._lines = lines
        self.history: list[dict[str, float]] = []

    def build_head(self, classes: int) -> None:
        super().build_head(classes)
        if self.config.stem == "small":
            self.trunk.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
            # As torchvision initialises the stem it replaces.
            nn.init.kaiming_normal_(self.trunk.conv1.weight, mode="fan_out", nonlinearity="relu")
            self.trunk.maxpool = nn.Identity()

    def on_train_epoch_end(self) -> None:
        super().on_train_epoch_end()
        self.history.append({"epoch": len(self.history) + 1, **self.metrics})
        self._write_lines()

    @rank_zero_only
    def _write_lines(self) -> None:
        text = "".join(json.dumps(line) + "\n" for line in self.history)
        write_atomically(self._lines, text.encode())

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["history"] = list(self.history)

    def on_load_checkpoint(self, checkpoint: Mapping[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self.history = list(checkpoint["history"])

    def decay(self, step: int) -> float:
        drops = self.config.training.milestones
        return super().decay(step) * 0.1 ** sum(step >= epoch * self.steps for epoch in drops)


class Probe(Classifier):
    """A linear head on features that were computed before: its batches are [N, features]."""

    def build_head(self, classes: int) -> None:
        super().build_head(classes)
        self.trunk = nn.Identity()
