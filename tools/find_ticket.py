#!/usr/bin/env python3
"""Find tickets: pre-train a ResNet, then prune it by iterative magnitude pruning.

The same as `lth find`."""

import sys
from pathlib import Path

from lth_plugins.commands.start import stop_in_one_line

if __name__ == "__main__":
    stop_in_one_line()

from lth_plugins.commands.find import main

if __name__ == "__main__":
    sys.exit(main(prog=Path(__file__).name))
