"""The files that come with the project: its configurations and tickets.

In a checkout they are in ``configs/`` and ``zoo/`` at the top; a wheel has both folders inside the
package.
"""

import ast
import difflib
import os
from collections.abc import Iterator
from functools import cache
from os import PathLike
from pathlib import Path

import yaml

from lth_plugins.errors import ConfigError

_PACKAGE = Path(__file__).resolve().parent
CONFIGS = "configs"


def folder(name: str) -> Path:
    """The folder ``configs`` or ``zoo``, wherever this installation has it."""
    inside = _PACKAGE / name
    return inside if inside.is_dir() else _PACKAGE.parent / name


@cache
def configs() -> dict[str, Path]:
    """The configurations that come with the project, by their paths below ``configs/``."""
    root = folder(CONFIGS)
    found = (path for end in ("py", "yaml") for path in root.rglob(f"*.{end}"))
    return {path.relative_to(root).as_posix(): path for path in sorted(found)}


def config_path(name: str | PathLike[str]) -> str:
    """The file of a configuration that comes with the project, as text, which ``_base_`` expects.

    Args:
        name: its path below ``configs/``, with or without that.

    Raises:
        ConfigError: if there is none of that name; the message has the nearest ones.
    """
    short = Path(name).as_posix().removeprefix(f"{CONFIGS}/")
    known = configs()
    if short in known:
        return f"{known[short]}"
    raise ConfigError(
        "expected a configuration that comes with lth_plugins, found none named "
        f"{os.fspath(name)}: `lth config list` has all names{_nearest(short)}"
    )


def find_config(text: str | PathLike[str]) -> Path:
    """The file that a path or the name of a configuration stands for; a file there comes first.

    Raises:
        ConfigError: if it is neither.
    """
    path = Path(text).expanduser()
    short = path.as_posix().removeprefix(f"{CONFIGS}/")
    if path.is_file():
        return path
    if short in configs():
        return configs()[short]
    raise ConfigError(
        f"expected a configuration, found none at {os.fspath(text)}, and none that comes with "
        f"lth_plugins has that name: check the path{_nearest(short)}"
    )


def _nearest(name: str) -> str:
    """The names that a wrong one may stand for, as part of a message; "" where none is near."""
    known = configs()
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    last = [key for key in known if Path(key).name == Path(name).name]
    meant = list(dict.fromkeys([*last, *close]))[:3]
    return f". Did you mean {', '.join(meant)}?" if meant else ""


def with_bases(config: Path) -> list[Path]:
    """A configuration and the files that it is based on, as far as they lie beside it.

    No file is executed, so bases that it computes, such as those in a framework, are left out.

    Raises:
        ConfigError: if there is no such file, or one cannot be read.
    """
    if not config.is_file():
        raise ConfigError(f"expected a configuration file, found none at {config}: check the path")
    files = [config]
    for file in files:
        try:
            names = list(_base_names(file))
        except (SyntaxError, ValueError, yaml.YAMLError) as error:
            raise ConfigError(f"{file} cannot be read as a configuration: {error}") from None
        found = [Path(os.path.normpath(file.parent / name)) for name in names]
        files += [path for path in found if path.is_file() and path not in files]
    return files


def _base_names(config: Path) -> Iterator[str]:
    """The texts in what a configuration gives as ``_base_`` (mmengine) or ``_BASE_`` (YAML)."""
    if config.suffix == ".py":
        for statement in ast.parse(config.read_text()).body:
            if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == "_base_":
                for node in ast.walk(statement.value):
                    if isinstance(node, ast.Constant) and isinstance(node.value, str):
                        yield node.value
        return
    root = yaml.compose(config.read_text(), yaml.SafeLoader)
    for key, value in root.value if isinstance(root, yaml.MappingNode) else ():
        if key.value == "_BASE_":
            nodes = value.value if isinstance(value, yaml.SequenceNode) else [value]
            yield from (node.value for node in nodes if isinstance(node, yaml.ScalarNode))
