"""The exceptions of this package, and how untrusted text is shown in their messages."""

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


def printable(text: str) -> str:
    """A text with whatever a terminal would act on, or cannot show, as an escape sequence."""
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)


class LthError(ValueError):
    """Base class: bad input, found before anything was changed in memory or on disk.

    The message says what was expected, what was found and what to do. It may quote a file that is
    not trusted: printing it is safe.
    """

    def __str__(self) -> str:
        return printable(BaseException.__str__(self))  # KeyError's own shows the text quoted


class TicketError(LthError):
    """A bad ticket, mask or checkpoint, or a mismatch between one and a model."""


class ConfigError(LthError):
    """An unknown key, an invalid value, or options that contradict each other."""


class UnknownName(ConfigError, KeyError):
    """A name that is not a known one. A `KeyError` too, as a failed lookup in a mapping is."""


class RunError(LthError):
    """An output folder, data or an environment in which a run cannot start or resume."""


class NotFound(TicketError):
    """The ticket that a path, a catalog name or a hub reference names is missing or unreachable.

    A host can infer from a trained checkpoint without the ticket if it is missing, but not if it is
    damaged or contradicted.
    """


class UnknownWeights(TicketError):
    """Masks keep weights that the ticket does not hold. A caller with an option for θ names it."""


def unknown(what: str, name: object, known: Iterable[str]) -> UnknownName:
    """An error about a name that is not a known one, with the nearest of those."""
    names = list(known)
    close = difflib.get_close_matches(str(name), names, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    return UnknownName(f"unknown {what} {name!r}; known are {', '.join(names)}{hint}")


@contextmanager
def enough_memory() -> Iterator[None]:
    """Raise `TicketError` where memory runs out, which PyTorch reports as a `RuntimeError`."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        said = any(words in str(error) for words in ("allocate memory", "not enough memory"))
        if isinstance(error, RuntimeError) and not said:
            raise
        raise TicketError(
            "expected enough memory for what the file describes, found too little: end other "
            "programs, or use a machine with more memory if you trust the file"
        ) from error
