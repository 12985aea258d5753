"""``python -m lth_plugins``: the same as `lth`."""

import sys

from lth_plugins.commands.main import main

if __name__ == "__main__":
    sys.exit(main())
