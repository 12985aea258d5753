"""Linear evaluation's first half: the features of a frozen sparse trunk, computed once.

IMP rewinds BatchNorm to the statistics of the dense network, which are wrong for the sub-network.
Where weights are trained they adapt; here they are re-estimated. The weights are not touched.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pytorch_lightning as pl
import torch
from safetensors.torch import load_file
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lth_plugins.errors import ConfigError, RunError
from lth_plugins.resilience.atomic import write_atomically
from lth_plugins.training.callbacks import StopOnSignal
from lth_plugins.training.loader import Labelled, Splits, TrainLoader
from lth_plugins.transfer.config import TransferConfig

_SPLITS = ("train", "val")


@dataclass(frozen=True)
class Features:
    """Features in place of images, and the trunk that they are of.

    Attributes:
        images: (features, label) pairs.
        trunk: its state dict, with the statistics that the features were computed with.
    """

    images: Splits
    trunk: dict[str, Tensor]


def features(
    config: TransferConfig, trunk: nn.Module, images: Splits, seed: int, cache: Path
) -> Features:
    """The features of all images, from the cache if it exists.

    Args:
        config: the configuration.
        trunk: frozen; its BatchNorm statistics are re-estimated on ``config.precise_bn`` batches.
        images: not augmented.
        seed: of the choice of those batches.
        cache: a file, written once.

    Raises:
        ConfigError: if several devices are to share the work.
        RunError: if fvcore is missing.
    """
    if not cache.exists():
        computed = _compute(config, trunk, images, seed)
        write_atomically(cache, to_safetensors(computed))
    stored = load_file(cache)
    train, val = (
        cast(Labelled, TensorDataset(stored[f"{split}.features"], stored[f"{split}.labels"]))
        for split in _SPLITS
    )
    kept = {k.removeprefix("trunk."): v for k, v in stored.items() if k.startswith("trunk.")}
    return Features(Splits(train, val, images.classes), kept)


def _compute(
    config: TransferConfig, trunk: nn.Module, images: Splits, seed: int
) -> dict[str, Tensor]:
    trainer = pl.Trainer(
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        callbacks=[StopOnSignal()],
        **vars(config.trainer),
    )
    if trainer.world_size > 1:
        raise ConfigError(
            f"mode=linear computes its features on one device, found {trainer.world_size}: give "
            "trainer.devices=1 and trainer.num_nodes=1"
        )
    workers = config.data.workers
    if config.precise_bn > 0:
        batches = TrainLoader(images.train, config.batch_size, seed, workers=workers)
        _re_estimate(trunk, batches, config.precise_bn, trainer.strategy.root_device)
    stored = {f"trunk.{name}": v.cpu().contiguous() for name, v in trunk.state_dict().items()}
    for split, dataset in zip(_SPLITS, (images.train, images.val), strict=True):
        loader = DataLoader(dataset, config.batch_size, num_workers=workers)
        found = cast(list[Any], trainer.predict(Extractor(trunk), loader))
        for name, parts in zip(("features", "labels"), zip(*found, strict=True), strict=True):
            stored[f"{split}.{name}"] = torch.cat(parts)
    return stored


def _re_estimate(trunk: nn.Module, batches: TrainLoader, count: int, device: torch.device) -> None:
    try:
        from fvcore.nn import update_bn_stats
    except ImportError:
        raise RunError(
            "re-estimating BatchNorm statistics needs fvcore: pip install fvcore, or give "
            "precise_bn=0 for a ticket whose statistics are its own, such as a fine-tuned one"
        ) from None

    def inputs() -> Iterator[Tensor]:
        for images, _ in batches:
            yield images.to(device)

    trunk.to(device).train()
    update_bn_stats(trunk, inputs(), min(count, len(batches)))


class Extractor(pl.LightningModule):
    """Computes the features of images, [N, C], with Lightning's devices and loops."""

    def __init__(self, trunk: nn.Module) -> None:
        super().__init__()
        self.trunk = trunk

    def predict_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Any:
        images, labels = batch  # [N, 3, H, W] float, [N] long
        return self.trunk(images).float().cpu(), labels.cpu()
