"""`lth det`: train or evaluate a detector on a ticket."""

from collections.abc import Sequence


def main(argv: Sequence[str] | None = None, prog: str = "lth det") -> int:
    from lth_plugins.commands.det.run import start

    start(argv, prog)
    return 0
