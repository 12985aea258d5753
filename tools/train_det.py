#!/usr/bin/env python3
"""Train or evaluate a detector on a ticket, with detectron2's own trainer.

The same as `lth det`."""

import sys
from pathlib import Path
from typing import Any

from lth_plugins.commands.start import stop_in_one_line

if __name__ in ("__main__", "__mp_main__"):
    stop_in_one_line()

from lth_plugins.commands.det import main, parse_args

__all__ = ["main", "parse_args"]


def __getattr__(name: str) -> Any:
    """Import `Trainer`, `run` and the rest when a script that loads this one uses them."""
    from lth_plugins.commands.det import run

    return getattr(run, name)


if __name__ == "__main__":
    sys.exit(main(prog=Path(__file__).name))
