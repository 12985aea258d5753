"""The catalog: tickets by name, and the one place where a reference becomes a ticket."""

import difflib
import os
from collections.abc import Callable
from os import PathLike
from pathlib import Path
from typing import ClassVar

from lth_plugins.ticket.errors import TicketError
from lth_plugins.ticket.file import read
from lth_plugins.ticket.ticket import Ticket

Source = str | PathLike[str] | Callable[[], Ticket]

HUB = "hf://"
SUFFIX = ".ticket"


class TicketCatalog:
    """Names for tickets, so that a config can say ``moco_r50_s79`` instead of a path."""

    _entries: ClassVar[dict[str, Source]] = {}

    @classmethod
    def register(cls, name: str, source: Source) -> None:
        """Give a ticket a name.

        Args:
            name: no path separator, and not ending in ``.ticket``: it must not look like a path.
            source: a path, an ``hf://`` reference, or a function that returns the ticket.

        Raises:
            TicketError: if the name looks like a path or already stands for something else.
        """
        if not name or _is_path(name) or name.startswith(HUB):
            raise TicketError(f"a catalog name must not look like a path, found {name!r}")
        if cls._entries.get(name, source) != source:
            raise TicketError(f"{name!r} already names {cls._entries[name]!r}: choose another name")
        cls._entries[name] = source

    @classmethod
    def names(cls) -> list[str]:
        return sorted(cls._entries)

    @classmethod
    def load(cls, ref: str | PathLike[str]) -> Ticket:
        """The ticket that a path, a catalog name or ``hf://owner/repo[/file]`` refers to.

        Raises:
            TicketError: if there is none, or it is damaged.
        """
        name = os.fspath(ref)
        if name in cls._entries:
            source = cls._entries[name]
            return source() if callable(source) else _load_file(os.fspath(source))
        if name.startswith(HUB) or isinstance(ref, PathLike) or _is_path(name):
            return _load_file(name)
        if Path(name).is_file():
            return read(Path(name))
        close = difflib.get_close_matches(name, cls._entries, n=3)
        raise TicketError(
            f"expected a ticket's path or a catalog name, found {name!r}; "
            + (f"did you mean {', '.join(close)}? " if close else "")
            + f"Registered names: {', '.join(cls.names()) or 'none'} (TicketCatalog.register)"
        )


def resolve(
    ref: str | PathLike[str],
    weights: str | PathLike[str] | None = None,
    reverse: bool = False,
    random: bool = False,
    seed: int = 0,
) -> Ticket:
    """The ticket that a framework's config describes: the options that all plug-ins share.

    Args:
        ref: the ticket: a path, a catalog name or ``hf://owner/repo[/file]``.
        weights: another ticket whose θ to use. A file holds only surviving weights, so ``reverse``
            and ``random`` need the round-0 ticket here.
        reverse: (1 - m, θ), what the ticket left out.
        random: a random mask with the ticket's layer-wise densities.
        seed: of the random mask.

    Raises:
        TicketError: if a ticket cannot be read, the two do not fit, or the options contradict.
    """
    if reverse and random:
        raise TicketError("expected at most one of reverse and random, found both: choose one")
    ticket = TicketCatalog.load(ref)
    if weights is not None:
        ticket = ticket.with_weights(TicketCatalog.load(weights))
    try:
        return ticket.reversed() if reverse else ticket.shuffled(seed) if random else ticket
    except TicketError as error:
        if weights is not None:
            raise
        option = "reverse" if reverse else "random"
        raise TicketError(
            f"{option} keeps weights that {os.fspath(ref)} does not hold, because a ticket file "
            "stores only surviving weights: name the dense (round-0) ticket it was pruned from as "
            "the weights option"
        ) from error


def _is_path(name: str) -> bool:
    return name.endswith(SUFFIX) or "/" in name or os.sep in name


def _load_file(name: str) -> Ticket:
    return read(_download(name) if name.startswith(HUB) else Path(name).expanduser())


def _download(ref: str) -> Path:
    """Fetch ``hf://owner/repo[/file]`` into Hugging Face's cache and return the local path."""
    parts = ref.removeprefix(HUB).split("/", 2)
    if len(parts) < 2 or not all(parts):
        raise TicketError(f"expected hf://owner/repo or hf://owner/repo/file, found {ref!r}")
    try:
        from huggingface_hub import hf_hub_download
    except ImportError:
        raise TicketError(f"{ref} needs huggingface_hub: pip install huggingface_hub") from None
    repo, file = "/".join(parts[:2]), parts[2] if len(parts) == 3 else f"{parts[1]}{SUFFIX}"
    try:
        return Path(hf_hub_download(repo, file))
    except Exception as error:  # the hub's errors share no base class with those of its transport
        raise TicketError(
            f"cannot fetch {file} of {repo} from the Hugging Face hub: {error}"
        ) from error
