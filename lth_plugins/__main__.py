"""``python -m lth_plugins``: the same as `lth`."""

import sys

from lth_plugins.commands.start import stop_in_one_line


def start() -> int:
    stop_in_one_line()
    from lth_plugins.commands.main import main

    return main()


if __name__ == "__main__":
    sys.exit(start())
