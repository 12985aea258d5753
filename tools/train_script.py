#!/usr/bin/env python3
"""Run a training script of your own on a ticket. The same as `lth script`."""

import sys
from pathlib import Path

from lth_plugins.commands.start import stop_in_one_line

if __name__ == "__main__":
    stop_in_one_line()

from lth_plugins.commands.script import main

if __name__ == "__main__":
    sys.exit(main(prog=Path(__file__).name))
