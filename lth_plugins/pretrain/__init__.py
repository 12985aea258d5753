"""The pre-trainings that IMP finds tickets in, on Lightning.

`config` says what can be set and which pre-trainings there are, `find` runs one and then IMP on it,
by the loop of `lth_plugins.training`. Importing this package imports neither Lightning nor
torchvision.
"""

from lth_plugins.pretrain.config import TASKS, FindConfig, load_config

__all__ = ["TASKS", "FindConfig", "load_config"]
