#!/usr/bin/env python3
"""Look at tickets, make, convert and disturb them. The same as `lth ticket`."""

import sys
from pathlib import Path
from typing import NoReturn

from lth_plugins.commands.start import stop_in_one_line

if __name__ == "__main__":
    stop_in_one_line()

from lth_plugins.commands import ticket


def main() -> NoReturn:
    """Exit with the command's code."""
    sys.exit(ticket.main(prog=Path(__file__).name))


if __name__ == "__main__":
    main()
