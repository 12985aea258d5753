#!/usr/bin/env python3
"""Train tickets of several sources and rounds on several tasks, and report.

The same as `lth study`."""

import sys
from pathlib import Path

from lth_plugins.commands.start import stop_in_one_line

if __name__ == "__main__":
    stop_in_one_line()

from lth_plugins.commands.study import main

if __name__ == "__main__":
    sys.exit(main(prog=Path(__file__).name))
