"""Where the paths of a study lead: into the working directory, all of them.

Only what is shipped with the tools, configurations and scripts, is also found from elsewhere, in
the checkout that the tools are in. Data and results never are.
"""

from collections.abc import Iterable
from functools import cache
from os import PathLike
from pathlib import Path

import lth_plugins

CHECKOUT = Path(lth_plugins.__file__).resolve().parents[1]


def shipped(text: str | PathLike[str]) -> Path:
    """A configuration or script: in the working directory or, where it is not, in the checkout."""
    path = Path(text).expanduser()
    if path.is_absolute() or path.exists() or not (CHECKOUT / path).exists():
        return path
    return CHECKOUT / path


def from_checkout(texts: Iterable[str | PathLike[str]]) -> list[str]:
    """Those that `shipped` finds in the checkout alone, each once."""
    found = dict.fromkeys(f"{text}" for text in texts)
    return [text for text in found if shipped(text) != Path(text).expanduser()]


def tool(script: str) -> str:
    """A script of the checkout, such as ``tools/train_cls.py``, as a command has it here."""
    return f"{near(CHECKOUT / script)}"


def near(path: Path) -> Path:
    """A path relative to the working directory, where it leads into that."""
    return _near(path, Path.cwd())


@cache  # a plan names the same few files in each of thousands of runs
def _near(path: Path, directory: Path) -> Path:
    return path.relative_to(directory) if path.is_relative_to(directory) else path
