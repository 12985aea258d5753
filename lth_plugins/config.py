"""Configurations: YAML files and ``key=value`` overrides, checked against a dataclass.

OmegaConf's structured configs check names and types, and `lth_plugins.settings` the bounds.
"""

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from os import PathLike
from pathlib import Path
from typing import Any, TypeVar, cast

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lth_plugins.errors import ConfigError
from lth_plugins.settings import check_settings, setting_of

ConfigT = TypeVar("ConfigT")


def read_config(
    schema: type[ConfigT], path: str | PathLike[str], overrides: Sequence[str] = ()
) -> ConfigT:
    """Read a YAML file, apply ``key=value`` overrides, and check names, types and bounds.

    A schema with a method ``check`` checks how its values fit together there.

    Raises:
        ConfigError: if there is no such file, it is not YAML, a key is unknown (the known ones are
            shown) or missing, a value is invalid, or values contradict each other.
    """
    if not Path(path).is_file():
        raise ConfigError(f"expected a configuration file, found none at {path}: check the path")
    for override in overrides:
        if "=" not in override:
            raise ConfigError(f"expected key=value after the configuration, found {override!r}")
    known = OmegaConf.structured(schema)
    try:
        given = OmegaConf.merge(OmegaConf.load(Path(path)), OmegaConf.from_dotlist(list(overrides)))
    except Exception as error:  # OmegaConf passes on whatever its YAML parser raises
        raise ConfigError(f"{path} and {list(overrides)} cannot be read as YAML: {error}") from None
    if not isinstance(given, DictConfig):
        raise ConfigError(f"expected keys and values in {path}, found a list")
    _check_known(cast(dict, OmegaConf.to_container(given)), known, _nested(known))
    try:
        merged = OmegaConf.merge(known, given)
        missing = OmegaConf.missing_keys(merged)
        config = None if missing else cast(ConfigT, OmegaConf.to_object(merged))
    except OmegaConfBaseException as error:
        key = f"{error.full_key}: " if error.full_key else ""
        raise ConfigError(f"{path}: {key}{str(error).splitlines()[0]}") from None
    if config is None:
        raise ConfigError(f"{path} leaves out {', '.join(sorted(missing))}: give key=value")
    check_settings(config)
    if hasattr(config, "check"):
        config.check()
    return config


def _nested(schema: DictConfig, prefix: str = "") -> list[str]:
    """All keys of a schema; those of a group are preceded by the group's name."""
    keys = []
    for key in map(str, schema):
        node = schema._get_node(key)
        keys.append(prefix + key)
        if isinstance(node, DictConfig) and is_dataclass(node._metadata.ref_type):
            keys += _nested(node, f"{prefix}{key}.")
    return keys


def _check_known(
    given: Mapping[str, Any], schema: DictConfig, everywhere: Sequence[str], prefix: str = ""
) -> None:
    known = [str(key) for key in schema]
    renamed = dict(_renamed(schema))
    for key, value in given.items():
        if key in renamed:
            raise ConfigError(
                f"the key {prefix}{key} is now called {prefix}{renamed[key]}: write "
                f"{prefix}{renamed[key]}={value}"
            )
        if key not in known:
            raise _unknown(str(key), known, everywhere, prefix)
        node = schema._get_node(key)
        if isinstance(node, DictConfig):
            if not isinstance(value, Mapping):
                within = ", ".join(f"{prefix}{key}.{name}" for name in map(str, node))
                raise ConfigError(
                    f"expected {prefix}{key} to be a group of {within}, found {value!r}"
                )
            _check_group(value, node, everywhere, f"{prefix}{key}.")


def _renamed(schema: DictConfig) -> Iterator[tuple[str, str]]:
    """Former names of keys, each with the present one."""
    group = OmegaConf.get_type(schema)
    if is_dataclass(group):
        for declared in fields(group):
            if (was := setting_of(declared).was) is not None:
                yield was, declared.name


def _unknown(key: str, known: Sequence[str], everywhere: Sequence[str], prefix: str) -> ConfigError:
    """An error that names the likely key: one of this name in another group, or one spelt alike."""
    last = [name.rpartition(".")[2] for name in everywhere]
    nearest = next(iter(difflib.get_close_matches(key, last, n=1)), "")
    if nearest in known:
        close = [prefix + nearest]
    else:
        close = [name for name, own in zip(everywhere, last, strict=True) if own == nearest]
    hint = f"; did you mean {' or '.join(close)}?" if close else "."
    names = ", ".join(prefix + name for name in known)
    return ConfigError(f"unknown key {prefix}{key}{hint} Known are {names}")


def _check_group(
    given: Mapping[str, Any], schema: DictConfig, everywhere: Sequence[str], prefix: str
) -> None:
    if is_dataclass(schema._metadata.ref_type):
        return _check_known(given, schema, everywhere, prefix)
    # A dict[str, X]: its keys are free, and what is below each is an X.
    element = schema._metadata.element_type
    for name, value in given.items():
        if is_dataclass(element) and isinstance(value, Mapping):
            within = OmegaConf.structured(element)
            _check_known(value, within, _nested(within), f"{prefix}{name}.")
