"""Whose an output folder is: it is only ever continued by the recipe that it was started with.

A recipe is all of a configuration that the results depend on, as plain JSON types.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from lth_plugins.errors import TicketError

Recipe = Mapping[str, Any]


def read_recipe(path: Path) -> Recipe:
    """A recipe that was stored as it is."""
    return json.loads(path.read_text())


def check_folder(
    folder: Path,
    asked: Recipe,
    note: str,
    results: Iterable[str] = (),
    read: Callable[[Path], Recipe] = read_recipe,
) -> None:
    """Check that a folder is this recipe's, or nobody's yet.

    Args:
        folder: need not be there.
        asked: the recipe.
        note: the file in it that says what recipe it was started with.
        results: files and folders that are not there without it.
        read: the recipe in the note.

    Raises:
        TicketError: if the folder is another recipe's, or a file.
    """
    if folder.exists() and not folder.is_dir():
        raise TicketError(f"the output folder {folder} is a file: give a folder")
    if (folder / note).exists():
        check_recipe(read(folder / note), asked, folder)
        return
    for name in results:
        if (folder / name).exists():
            raise TicketError(
                f"{folder} has a {name} but no {note} that says what made it: give another output "
                "folder; nothing was changed"
            )


def check_recipe(stored: Recipe, asked: Recipe, where: Path) -> None:
    """Raise ``TicketError``, naming the first differing key, unless both recipes are the same."""
    there, here = _flat(stored), _flat(json.loads(json.dumps(dict(asked))))
    for key in sorted(there.keys() | here.keys()):
        if key not in there or key not in here or there[key] != here[key]:
            raise TicketError(
                f"{where} was made by another recipe: {key} is {there.get(key, 'not set')} there, "
                f"{here.get(key, 'not set')} was asked for. Ask for the same, or give another "
                "output folder; nothing was changed"
            )


def digest(recipe: Recipe) -> str:
    """SHA-256 of a recipe, or of a result."""
    return hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()


def _flat(recipe: Recipe, prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in recipe.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
