"""The catalog: tickets by name, and the one place where a reference becomes a file.

A reference is a path, a catalog name, or ``hf://owner/repo[/file][@sha256:…]``: a file on the
Hugging Face hub, of which the digest may be pinned: SHA-256 of the whole file's bytes, as
``sha256sum`` prints it and the hub shows it. (`Ticket.digest` is of the content, another number.)
"""

import difflib
import os
from collections.abc import Callable
from os import PathLike
from pathlib import Path
from typing import Any, ClassVar

from lth_plugins.errors import ConfigError, NotFound, TicketError
from lth_plugins.ticket.hub import HUB, SUFFIX, download
from lth_plugins.ticket.zoo import zoo

Make = Callable[[], Any]
"""A function that returns a `Ticket`, a class of a layer above this one."""


class TicketCatalog:
    """Names for tickets, so that a config can say ``moco_r50_s79`` instead of a path."""

    _entries: ClassVar[dict[str, str | PathLike[str] | Make]] = {}

    @classmethod
    def register(cls, name: str, source: str | PathLike[str] | Make) -> None:
        """Give a ticket a name.

        Args:
            name: no path separator, and not ending in ``.ticket``: it must not look like a path.
            source: a path, an ``hf://`` reference, or a function that returns the ticket.

        Raises:
            ConfigError: if the name looks like a path or already stands for something else.
        """
        if not name or _is_path(name) or name.startswith(HUB):
            raise ConfigError(f"a catalog name must not look like a path, found {name!r}")
        known = cls._all()
        if known.get(name, source) != source:
            raise ConfigError(f"{name!r} already names {str(known[name])!r}: choose another name")
        cls._entries[name] = source

    @classmethod
    def names(cls) -> list[str]:
        """The registered names, and those of the tickets that come with the project."""
        return sorted(cls._all())

    @classmethod
    def _all(cls) -> dict[str, str | PathLike[str] | Make]:
        return {**zoo(), **cls._entries}

    @classmethod
    def find(cls, ref: str | PathLike[str]) -> Path | Make:
        """The file that a reference names, downloaded if need be, or the registered function.

        Raises:
            TicketError: if the reference is unknown, or the file differs from the one that is
                pinned. Whether a path exists is for its reader to check.
        """
        if not isinstance(ref, str | PathLike):
            raise TicketError(f"expected a ticket's path or name, found a {type(ref).__name__}")
        name = os.fspath(ref)
        known = cls._all()
        if name in known:
            source = known[name]
            return source if callable(source) else _path(os.fspath(source))
        # os.path.isfile, because Path.is_file raises where a name is too long.
        if isinstance(ref, PathLike) or _is_path(name) or os.path.isfile(name):
            return _path(name)
        close = difflib.get_close_matches(name, known, n=3)
        raise NotFound(
            f"expected a ticket's path or a catalog name, found {name!r}; "
            + (f"did you mean {', '.join(close)}? " if close else "")
            + f"Known names: {', '.join(cls.names()) or 'none'} (TicketCatalog.register adds one)"
        )


def _is_path(name: str) -> bool:
    return name.endswith(SUFFIX) or "/" in name or os.sep in name


def _path(name: str) -> Path:
    # os.path leaves the name of an unknown user as it is, where Path.expanduser raises.
    return download(name) if name.startswith(HUB) else Path(os.path.expanduser(name))
