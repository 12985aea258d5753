#!/usr/bin/env python3
"""Evaluate a segmentor that train_seg.py trained. The same as `lth test-seg`."""

import sys
from pathlib import Path

from lth_plugins.commands.start import stop_in_one_line

if __name__ == "__main__":
    stop_in_one_line()

from lth_plugins.commands.test_seg import main

if __name__ == "__main__":
    sys.exit(main(prog=Path(__file__).name))
