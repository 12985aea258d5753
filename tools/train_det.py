#!/usr/bin/env python3
"""Train or evaluate a detector on a ticket, with detectron2's own trainer.

The same as `lth det`."""

import sys
from pathlib import Path

from lth_plugins.commands.start import stop_in_one_line

if __name__ in ("__main__", "__mp_main__"):
    stop_in_one_line()

from lth_plugins.commands.det import main

if __name__ == "__main__":
    sys.exit(main(prog=Path(__file__).name))
