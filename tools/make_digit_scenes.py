#!/usr/bin/env python3
"""Write scenes of real handwritten digits for detection and segmentation.

The same as `lth scenes`."""

import sys
from pathlib import Path

from lth_plugins.commands.start import stop_in_one_line

if __name__ == "__main__":
    stop_in_one_line()

from lth_plugins.commands.scenes import main

if __name__ == "__main__":
    sys.exit(main(prog=Path(__file__).name))
