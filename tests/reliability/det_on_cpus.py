"""tools/train_det.py in several processes on CPUs: detectron2 wraps a model for a GPU each."""

import sys
from functools import partial

from detectron2.engine import defaults

from lth_plugins.commands import det

# Here, and not only in the process that is started: the others import this module, too.
defaults.create_ddp_model = partial(defaults.create_ddp_model, device_ids=None)

if __name__ == "__main__":
    sys.exit(det.main())
