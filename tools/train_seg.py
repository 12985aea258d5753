#!/usr/bin/env python3
"""Train a segmentor on a ticket, with mmengine's own Runner. The same as `lth seg`."""

import sys
from pathlib import Path

from lth_plugins.commands.start import stop_in_one_line

if __name__ == "__main__":
    stop_in_one_line()

from lth_plugins.commands.seg import main

if __name__ == "__main__":
    sys.exit(main(prog=Path(__file__).name))
