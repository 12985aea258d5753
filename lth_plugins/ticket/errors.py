"""The one exception of this package, and how a file's words are shown."""


def printable(text: str) -> str:
    """A text with whatever a terminal would act on, or cannot show, as an escape sequence."""
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)


class TicketError(ValueError):
    """A bad ticket, file, name or a mismatch between a ticket and a model.

    The message says what was expected, what was found and what to do. Whatever raised it has
    changed nothing, neither in memory nor on disk. It may quote a stranger's file: printing it is
    safe.
    """

    def __str__(self) -> str:
        return printable(super().__str__())
