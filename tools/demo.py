#!/usr/bin/env python3
"""Find tickets on real images, transfer them, report. The same as `lth demo`."""

import sys
from pathlib import Path

from lth_plugins.commands.start import stop_in_one_line

if __name__ == "__main__":
    stop_in_one_line()

from lth_plugins.commands.demo import main

if __name__ == "__main__":
    sys.exit(main(prog=Path(__file__).name))
