"""tools/train_det.py in several processes on CPUs: detectron2 wraps a model for a GPU each."""

import sys
from functools import partial
from pathlib import Path

from detectron2.engine import defaults

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

import train_det

# Here, and not only in the process that is started: the others import this module, too.
defaults.create_ddp_model = partial(defaults.create_ddp_model, device_ids=None)

if __name__ == "__main__":
    train_det.start()
