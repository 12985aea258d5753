"""Recipes: an output folder is only resumed with the recipe that it was started with.

A recipe is what the results depend on and what differs from the defaults, as plain JSON types. A
new setting whose default changes nothing is therefore absent from older recipes, and matches them.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from lth_plugins.errors import RunError
from lth_plugins.settings import default_of, setting_of

Recipe = Mapping[str, Any]


def recipe_of(config: Any) -> dict[str, Any]:
    """The recipe of a configuration: its settings that results depend on and that are no defaults.

    Args:
        config: a dataclass, whose fields' `Setting`s say what belongs to the recipe. A group is
            there if any of its settings is.
    """
    recipe: dict[str, Any] = {}
    for declared in fields(config):
        value, relevant = getattr(config, declared.name), setting_of(declared).recipe
        if not (relevant(config) if callable(relevant) else relevant):
            continue
        if is_dataclass(value):
            if group := recipe_of(value):
                recipe[declared.name] = group
        elif value != default_of(declared):
            recipe[declared.name] = list(value) if isinstance(value, tuple) else value
    return recipe


def file_digest(path: str | Path, key: str) -> str:
    """SHA-256 of the file that a key of a configuration names.

    Raises:
        RunError: if there is none.
    """
    if not Path(path).is_file():
        raise RunError(f"expected a file of weights at {key}={path}, found no such file")
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def read_recipe(path: Path) -> Recipe:
    """Read a recipe from a JSON file."""
    return json.loads(path.read_text())


def check_folder(
    folder: Path,
    asked: Recipe,
    note: str,
    results: Iterable[str] = (),
    read: Callable[[Path], Recipe] = read_recipe,
) -> None:
    """Check that a folder was started with this recipe, or holds no run yet.

    Args:
        folder: the folder; need not exist.
        asked: the recipe.
        note: the file in it that holds the recipe it was started with.
        results: files and folders that only a run with a note leaves.
        read: reads the recipe from the note.

    Raises:
        RunError: if the folder was started with another recipe, or is a file.
    """
    if folder.exists() and not folder.is_dir():
        raise RunError(f"the output folder {folder} is a file: give a folder")
    if (folder / note).exists():
        check_recipe(read(folder / note), asked, folder)
        return
    for name in results:
        if (folder / name).exists():
            raise RunError(
                f"{folder} has a {name} but no {note} that says what made it: give another output "
                "folder; nothing was changed"
            )


def check_recipe(stored: Recipe, asked: Recipe, where: Path) -> None:
    """Raise ``RunError``, naming the first differing key, unless both recipes are equal.

    Args:
        stored: the recipe that was started with.
        asked: the recipe now.
        where: what holds the stored one, for the message.
    """
    there, here = _flat(stored), _flat(json.loads(json.dumps(dict(asked))))
    for key in sorted(there.keys() | here.keys()):
        if key not in there or key not in here or there[key] != here[key]:
            raise RunError(
                f"{where} was made by another recipe: {key} is {there.get(key, 'the default')} "
                f"there, {here.get(key, 'the default')} was asked for. Ask for the same, or give "
                "another output folder; nothing was changed"
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
