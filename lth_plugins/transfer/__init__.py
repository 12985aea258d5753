"""Downstream classification: a ticket fine-tuned, or probed linearly, on a data set of pictures.

`config` says what can be set, `run` does it, `data` opens the data sets and `task` is what is
trained. The loop, the seeds and the checkpoints are those of `lth_plugins.pretrain`. Importing
this package imports neither Lightning nor torchvision.
"""

from lth_plugins.transfer.config import TransferConfig, load_config

__all__ = ["TransferConfig", "load_config"]
