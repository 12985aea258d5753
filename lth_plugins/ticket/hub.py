"""Tickets on the Hugging Face hub: ``hf://owner/repo[/file][@sha256:…]``, download and upload."""

import hashlib
import logging
import re
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Protocol

from lth_plugins.errors import ConfigError, NotFound, RunError, TicketError

logger = logging.getLogger(__name__)

HUB = "hf://"
SUFFIX = ".ticket"
_ANSWER_SECONDS = 10


class Savable(Protocol):
    """A `Ticket`, a class of a layer above this one."""

    def save(self, path: Path) -> Path: ...


def push(ticket: Savable, repo: str, file: str | None = None, card: str | None = None) -> str:
    """Upload a ticket to a model repository on the Hugging Face hub, made if it does not exist.

    Args:
        ticket: the ticket.
        repo: ``owner/repo``.
        file: its path there; by default the one that ``hf://owner/repo`` loads.
        card: Markdown about it, as of `lth_plugins.ticket.card`. Of the repository's own ticket it
            becomes ``README.md``, which the hub shows; of another, ``NAME.md`` beside
            ``NAME.ticket``. A card that is there already stays.

    Returns:
        The reference it can be loaded by.

    Raises:
        TicketError: if the repository's name is invalid.
        ConfigError: if the file's name is invalid.
        RunError: if no account is logged in, or the hub refuses.
    """
    ref = f"{HUB}{repo}/{file}" if file is not None else f"{HUB}{repo}"
    named = file is not None
    repo, file, pinned = hub_names(ref)
    if not file.endswith(SUFFIX) or pinned is not None:
        raise ConfigError(
            f"expected a file name that ends in {SUFFIX}, without digest, found {ref!r}"
        )
    hub = _hub(ref)
    with tempfile.TemporaryDirectory() as folder:
        path = ticket.save(Path(folder) / f"upload{SUFFIX}")
        try:
            hub.create_repo(repo, exist_ok=True)
            contents: dict[str, Path | bytes] = {file: path}
            if card is not None:
                beside = f"{file.removesuffix(SUFFIX)}.md" if named else "README.md"
                if hub.file_exists(repo, beside):
                    logger.info("%s of %s is there already, and stays as it is", beside, repo)
                else:
                    contents[beside] = card.encode()
            adding = [hub.CommitOperationAdd(name, data) for name, data in contents.items()]
            hub.create_commit(repo, adding, commit_message=f"Upload {file}")
        except Exception as error:  # see download
            raise RunError(
                f"cannot upload {file} to {repo} on the Hugging Face hub: {_first_line(error)}. "
                "Log in with `hf auth login` (or set HF_TOKEN) to an account that may write there"
            ) from error
    return f"{HUB}{repo}/{file}"


def download(ref: str) -> Path:
    """Fetch what a reference names into Hugging Face's cache and return the local path."""
    repo, file, pinned = hub_names(ref)
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
    except Exception:  # see download
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


def hub_names(ref: str) -> tuple[str, str, str | None]:
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
        import huggingface_hub.utils  # no attribute of the package before it is imported
    except ImportError:
        raise RunError(f"{ref} needs huggingface_hub: pip install huggingface_hub") from None
    return huggingface_hub


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
