"""`lth ticket`: look at tickets, make, convert and disturb them."""

from collections.abc import Sequence


def main(argv: Sequence[str] | None = None, prog: str = "lth ticket") -> int:
    from lth_plugins.commands.ticket.arguments import main

    return main(argv, prog)
