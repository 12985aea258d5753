"""The one exception of this package."""


class TicketError(ValueError):
    """A bad ticket, file, name or a mismatch between a ticket and a model.

    The message says what was expected, what was found and what to do. Whatever raised it has
    changed nothing, neither in memory nor on disk.
    """
