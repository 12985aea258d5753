"""The pre-trainings that IMP finds tickets in, on Lightning.

`config` says what can be set, `find` runs a pre-training and then IMP on it, `task` is what all
pre-trainings share and `supervised` is the first of them; `data` and `fit` make a run repeat and
resume bit for bit. Importing this package imports neither Lightning nor torchvision.
"""

from lth_plugins.pretrain.config import TASKS, FindConfig, load_config

__all__ = ["TASKS", "FindConfig", "load_config"]
