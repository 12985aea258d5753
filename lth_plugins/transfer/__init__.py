"""Downstream classification: a ticket fine-tuned, or probed linearly, on a dataset of images.

`config` says what can be set, `run` does it, `data` opens the datasets and `task` is what is
trained, by the loop of `lth_plugins.training`. Importing this package imports neither Lightning nor
torchvision.
"""

from lth_plugins.transfer.config import TransferConfig, load_config

__all__ = ["TransferConfig", "load_config"]
