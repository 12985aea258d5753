"""Where the paths of a study lead: into the working directory, all of them.

Only what comes with the project, configurations and commands, is also found from elsewhere. Data
and results never are.
"""

import shlex
from collections.abc import Iterable
from functools import cache
from os import PathLike
from pathlib import Path

from lth_plugins.cli import COMMANDS, command
from lth_plugins.errors import ConfigError
from lth_plugins.shipped import find_config


def from_elsewhere(texts: Iterable[str | PathLike[str]]) -> list[str]:
    """The configurations that come with the project, and are not in the working directory."""
    found = dict.fromkeys(f"{text}" for text in texts)
    return [text for text in found if find_config(text) != Path(text).expanduser()]


def prepared_by(line: str) -> tuple[str, ...]:
    """What Python runs for a line of ``prepare``: a script, or a command of `lth`, and arguments.

    A script of ``tools/`` that is not there stands for the command that it starts.

    Raises:
        ConfigError: if it is neither.
    """
    try:
        words = shlex.split(line)
    except ValueError as error:
        raise ConfigError(f"prepare, {line!r}, is no command: {error}") from None
    script = Path(words[0]).expanduser() if words else Path()
    if script.is_file():
        return (f"{near(script)}", *words[1:])
    if words[:1] == ["lth"] and words[1:2] and words[1] in COMMANDS:
        return (*command(words[1]), *words[2:])
    for name, of_tools in COMMANDS.items():
        if of_tools is not None and script == Path("tools", of_tools):
            return (*command(name), *words[1:])
    raise ConfigError(
        "expected prepare to be Python scripts, or commands such as lth scenes, with arguments, "
        f"found no script at {words[0] if words else line!r}: check the path"
    )


def near(path: Path) -> Path:
    """A path relative to the working directory, where it leads into that."""
    return _near(path, Path.cwd())


@cache  # a plan names the same few files in each of thousands of runs
def _near(path: Path, directory: Path) -> Path:
    return path.relative_to(directory) if path.is_relative_to(directory) else path
