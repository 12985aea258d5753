#!/usr/bin/env python3
"""Train a ticket to classify images. The same as `lth cls`."""

import sys
from pathlib import Path

from lth_plugins.commands.start import stop_in_one_line

if __name__ == "__main__":
    stop_in_one_line()

from lth_plugins.commands.cls import main

if __name__ == "__main__":
    sys.exit(main(prog=Path(__file__).name))
