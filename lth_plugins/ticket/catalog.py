"""The catalog: tickets by name, and the one place where a reference becomes a ticket.

A reference is a path, a catalog name, or ``hf://owner/repo[/file][@sha256:…]``: a file on the
Hugging Face hub, of which the digest may be pinned: SHA-256 of the whole file's bytes, as
``sha256sum`` prints it and the hub shows it. (`Ticket.digest` is of the content, another number.)
"""

import difflib
import hashlib
import os
import re
import tempfile
from collections.abc import Callable
from os import PathLike
from pathlib import Path
from types import ModuleType
from typing import ClassVar

from lth_plugins.ticket.errors import NotFound, TicketError, UnknownWeights
from lth_plugins.ticket.ticket import Ticket

Source = str | PathLike[str] | Callable[[], Ticket]

HUB = "hf://"
_ANSWER_SECONDS = 10
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


def resolve(
    ref: str | PathLike[str],
    weights: str | PathLike[str] | None = None,
    reverse: bool = False,
    random: bool = False,
    seed: int = 0,
    rest: bool = True,
    weights_option: str = "the weights option",
) -> Ticket:
    """The ticket that a framework's config describes: the options that all plug-ins share.

    Args:
        ref: the ticket: a path, a catalog name or ``hf://owner/repo[/file][@sha256:…]``.
        weights: another ticket whose θ to use. A file holds only surviving weights, so ``reverse``
            and ``random`` need the dense ticket it was pruned from here.
        reverse: (1 - m, θ), what the ticket left out.
        random: a random mask with the ticket's layer-wise densities.
        seed: of the random mask.
        rest: False leaves out what the ticket prunes outside the trunk, in the model it was found
            in: for another model.
        weights_option: what ``weights`` is called where it was given, for messages.

    Raises:
        TicketError: if a ticket cannot be read, the two do not fit, or the options contradict.
    """
    if reverse and random:
        raise TicketError("expected at most one of reverse and random, found both: choose one")
    ticket = TicketCatalog.load(ref)
    if not rest:
        ticket = ticket.without_rest()
    given, option = ref, "reverse" if reverse else "random" if random else "weights"
    try:
        if weights is not None:
            other, given = TicketCatalog.load(weights), weights
            ticket = ticket.with_weights(other)
        return ticket.reversed() if reverse else ticket.shuffled(seed) if random else ticket
    except UnknownWeights as error:
        raise UnknownWeights(
            f"{option} keeps weights that {os.fspath(given)} does not hold, because a ticket file "
            "stores only surviving weights: name the dense ticket it was pruned from, of a search "
            f"its round_00.ticket, as {weights_option}"
        ) from error


def _is_path(name: str) -> bool:
    return name.endswith(SUFFIX) or "/" in name or os.sep in name


def _load_file(name: str) -> Ticket:
    # os.path leaves the name of a user that there is not, where Path.expanduser raises.
    return _read(_download(name) if name.startswith(HUB) else Path(os.path.expanduser(name)))


def _read(path: Path) -> Ticket:
    # Not at the top: what reads files is imported, and has to be installed, only for them.
    from lth_plugins.ticket.file import read

    return read(path)


def push(ticket: Ticket, repo: str, file: str | None = None) -> str:
    """Upload a ticket to a model repository on the Hugging Face hub, made if it does not exist.

    Args:
        ticket: the ticket.
        repo: ``owner/repo``.
        file: its path there; by default the one that ``hf://owner/repo`` loads.

    Returns:
        The reference it can be loaded by.

    Raises:
        TicketError: if a name is not one, nobody is logged in, or the hub refuses.
    """
    ref = f"{HUB}{repo}/{file}" if file is not None else f"{HUB}{repo}"
    repo, file, pinned = _hub_names(ref)
    if not file.endswith(SUFFIX) or pinned is not None:
        raise TicketError(
            f"expected a file name that ends in {SUFFIX}, without digest, found {ref!r}"
        )
    hub = _hub(ref)
    with tempfile.TemporaryDirectory() as folder:
        path = ticket.save(Path(folder) / f"upload{SUFFIX}")
        try:
            hub.create_repo(repo, exist_ok=True)
            hub.upload_file(path_or_fileobj=path, path_in_repo=file, repo_id=repo)
        except Exception as error:  # see _download
            raise TicketError(
                f"cannot upload {file} to {repo} on the Hugging Face hub: {_first_line(error)}. "
                "Log in with `hf auth login` (or set HF_TOKEN) to an account that may write there"
            ) from error
    return f"{HUB}{repo}/{file}"


def _download(ref: str) -> Path:
    """Fetch what a reference names into Hugging Face's cache and return the local path."""
    repo, file, pinned = _hub_names(ref)
    hub = _hub(ref)
    reachable = _is_reachable(hub, repo, file)
    try:
        path = Path(hub.hf_hub_download(repo, file, local_files_only=not reachable))
    except Exception as error:  # the hub's errors share no base class with those of its transport
        reason = (
            _first_line(error)
            if reachable
            else "it cannot be reached, and there is no copy in its cache. Check the network, or "
            "download the file elsewhere and give its path"
        )
        raise NotFound(
            f"cannot fetch {file} of {repo} from the Hugging Face hub: {reason}"
        ) from error
    if pinned is not None:
        _check_pinned(path, pinned, f"{file} of {repo}")
    return path


def _is_reachable(hub: ModuleType, repo: str, file: str) -> bool:
    """Whether the hub answers at all; its own download tries for 23 seconds to find that out."""
    try:
        hub.utils.get_session().head(hub.hf_hub_url(repo, file), timeout=_ANSWER_SECONDS)
    except Exception:  # see _download
        return False
    return True


def _check_pinned(path: Path, pinned: str, what: str) -> None:
    content = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            content.update(chunk)
    found = content.hexdigest()
    if found != pinned:
        raise TicketError(
            f"expected {what} with the SHA-256 {pinned}, found {found}: it is another file than "
            "the one that was pinned. Ask its owner which is right; nothing of it was read"
        )


_HUB_NAME = r"(?![\w.-]*(?:--|\.\.))[A-Za-z0-9_][\w.-]{0,95}(?<![.-])"
_HUB_FILE = r"(?!\.{1,2}(?:/|@|$))[\w.-]{1,255}"
_HUB_REF = re.compile(
    rf"(?P<owner>{_HUB_NAME})/(?P<name>{_HUB_NAME})(?:/(?P<file>{_HUB_FILE}(?:/{_HUB_FILE})*))?"
    r"(?:@sha256:(?P<pinned>[0-9a-f]{64}))?",
    re.ASCII,
)


def _hub_names(ref: str) -> tuple[str, str, str | None]:
    """The repository, the file (NAME.ticket by default) and the digest that a reference names."""
    match = _HUB_REF.fullmatch(ref.removeprefix(HUB))
    if match is None:
        raise TicketError(
            "expected hf://owner/repo or hf://owner/repo/file, or either with @sha256: and 64 "
            f"digits or letters a to f, found {ref!r:.300}: names have letters, digits, '-', '_' "
            "and '.', and a file's path has no '.' or '..' in it"
        )
    file = match["file"] or f"{match['name']}{SUFFIX}"
    return f"{match['owner']}/{match['name']}", file, match["pinned"]


def _hub(ref: str) -> ModuleType:
    try:
        import huggingface_hub
    except ImportError:
        raise TicketError(f"{ref} needs huggingface_hub: pip install huggingface_hub") from None
    return huggingface_hub


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
