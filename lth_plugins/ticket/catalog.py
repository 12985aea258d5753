"""The catalog: tickets by name, and the one place where a reference becomes a ticket.

A reference is a path, a catalog name, or ``hf://owner/repo[/file][@sha256:…]``: a file on the
Hugging Face hub, of which the digest may be pinned: SHA-256 of the whole file's bytes, as
``sha256sum`` prints it and the hub shows it. (`Ticket.digest` is of the content, another number.)
"""

import difflib
import os
from collections.abc import Callable
from os import PathLike
from pathlib import Path
from typing import ClassVar

from lth_plugins.errors import NotFound, TicketError
from lth_plugins.ticket.hub import HUB, SUFFIX, download
from lth_plugins.ticket.ticket import Ticket

Source = str | PathLike[str] | Callable[[], Ticket]


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
        """The ticket that a path, a catalog name or an ``hf://`` reference refers to.

        Raises:
            TicketError: if there is none, it is damaged, or it is not the one that is pinned.
        """
        name = os.fspath(ref)
        if name in cls._entries:
            source = cls._entries[name]
            return source() if callable(source) else _load_file(os.fspath(source))
        if name.startswith(HUB) or isinstance(ref, PathLike) or _is_path(name):
            return _load_file(name)
        if os.path.isfile(name):  # for Path.is_file a name may be too long
            return _read(Path(name))
        close = difflib.get_close_matches(name, cls._entries, n=3)
        raise NotFound(
            f"expected a ticket's path or a catalog name, found {name!r}; "
            + (f"did you mean {', '.join(close)}? " if close else "")
            + f"Registered names: {', '.join(cls.names()) or 'none'} (TicketCatalog.register)"
        )


def _is_path(name: str) -> bool:
    return name.endswith(SUFFIX) or "/" in name or os.sep in name


def _load_file(name: str) -> Ticket:
    # os.path leaves the name of a user that there is not, where Path.expanduser raises.
    return _read(download(name) if name.startswith(HUB) else Path(os.path.expanduser(name)))


def _read(path: Path) -> Ticket:
    # Not at the top: what reads files is imported, and has to be installed, only for them.
    from lth_plugins.ticket.file import read

    return read(path)
