"""Settings: fields of a dataclass that declare their bounds, and the one check of all of them.

`lth_plugins.config` reads such dataclasses from YAML; nothing here needs OmegaConf.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import MISSING as NO_DEFAULT
from dataclasses import Field, dataclass, field, fields, is_dataclass
from typing import Any, cast

from lth_plugins.errors import ConfigError, unknown

REQUIRED = "???"
"""The default of a setting that has to be given: OmegaConf's ``MISSING``."""


@dataclass(frozen=True)
class Setting:
    """What a field of a configuration accepts. Bounds that are None do not apply.

    Attributes:
        least, most: the smallest and the largest value.
        above, below: bounds that are not values themselves.
        choices: the known values, such as a `Registry`, which is looked at when a value is checked.
        recipe: whether a result depends on it, in a configuration if that is a function of one.
        was: its former name, which is refused with this one.
        help: what it means.
    """

    least: float | None = None
    most: float | None = None
    above: float | None = None
    below: float | None = None
    choices: Collection[str] | None = None
    recipe: bool | Callable[[Any], bool] = True
    was: str | None = None
    help: str = ""

    def check(self, key: str, value: Any) -> None:
        """Raise ``ConfigError`` unless a value is within the bounds. None is always accepted."""
        if value is None:
            return
        if self.choices is not None and value not in self.choices:
            raise unknown(key, value, self.choices)
        try:
            within = self._within(value)
        except TypeError:  # text, where a number is asked for
            within = False
        if not within:
            raise ConfigError(f"expected {key} to be {self._bounds()}, found {value}")

    def _within(self, value: Any) -> bool:
        return (
            (self.least is None or value >= self.least)
            and (self.most is None or value <= self.most)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
        )

    def _bounds(self) -> str:
        if self.above is not None and self.below is not None:
            return f"between {self.above} and {self.below}"
        if self.least is not None and self.most is None and self.below is None:
            return f"{self.least} or more"
        words = {"more than": self.above, "at least": self.least}
        words |= {"at most": self.most, "less than": self.below}
        return " and ".join(f"{word} {bound}" for word, bound in words.items() if bound is not None)


def setting(default: Any = REQUIRED, *, factory: Any = None, **declared: Any) -> Any:
    """A dataclass field with a `Setting`.

    Args:
        default: its default; without one the configuration has to give it.
        factory: makes the default where that is mutable, such as a group of settings.
        declared: the attributes of the `Setting`.
    """
    metadata = {"setting": Setting(**declared)}
    if factory is not None:
        return field(default_factory=factory, metadata=metadata)
    return field(default=default, metadata=metadata)


def setting_of(declared: Field[Any]) -> Setting:
    """The `Setting` of a dataclass field; one without bounds for a plain field."""
    return cast(Setting, declared.metadata.get("setting", Setting()))


def default_of(declared: Field[Any]) -> Any:
    """The default of a dataclass field."""
    if declared.default_factory is not NO_DEFAULT:
        return declared.default_factory()
    return declared.default


def check_settings(config: Any, prefix: str = "") -> None:
    """Check all values of a configuration against the `Setting`s of its fields.

    Groups, and dictionaries of groups, are checked too; a group's own ``check()`` is not called.

    Raises:
        ConfigError: naming the key, what was expected and what was found.
    """
    for declared in fields(config):
        key, value = prefix + declared.name, getattr(config, declared.name)
        if is_dataclass(value):
            check_settings(value, f"{key}.")
        elif isinstance(value, Mapping):
            for name, group in value.items():
                if is_dataclass(group):
                    check_settings(group, f"{key}.{name}.")
        else:
            for item in value if isinstance(value, list | tuple) else [value]:
                setting_of(declared).check(key, item)
