"""`Registry`: things that configurations choose by name, open to other packages.

A registry holds what this package registers, what a user's code registers, and the entry points of
installed packages. A package adds one without being imported first, in its ``pyproject.toml``::

    [project.entry-points."lth_plugins.criteria"]
    mine = "my_package:my_criterion"
"""

from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from importlib.metadata import EntryPoint, entry_points
from typing import TypeVar, overload

from lth_plugins.errors import ConfigError, unknown

T = TypeVar("T")


class Registry(Mapping[str, T]):
    """Values by name, in the order they were registered; entry points come last.

    Entry points are listed without being imported, and each is loaded when it is looked up.
    Where a name is both registered and an entry point, the registered value is used.

    Args:
        what: what a value is called in messages, such as "criterion".
        group: the group of entry points, such as "lth_plugins.criteria"; None for none.
    """

    def __init__(self, what: str, group: str | None = None) -> None:
        self._what = what
        self._group = group
        self._values: dict[str, T] = {}

    @overload
    def register(self, name: str) -> Callable[[T], T]: ...

    @overload
    def register(self, name: str, value: T) -> T: ...

    def register(self, name: str, value: T | None = None) -> T | Callable[[T], T]:
        """Register a value under a name: ``register(name, value)`` or ``@register(name)``.

        Raises:
            ConfigError: if the name is already registered for another value.
        """
        if value is None:
            return lambda decorated: self.register(name, decorated)
        if self._values.setdefault(name, value) is not value:
            raise ConfigError(f"{self._what} {name!r} is already registered: choose another name")
        return value

    @cached_property
    def _entry_points(self) -> Mapping[str, EntryPoint]:
        return {e.name: e for e in entry_points(group=self._group)} if self._group else {}

    def __getitem__(self, name: str) -> T:
        """The value of this name.

        Raises:
            ConfigError: if there is none, or its entry point cannot be loaded.
        """
        if name not in self._values:
            if name not in self._entry_points:
                raise unknown(self._what, name, self)
            self._values[name] = self._load(self._entry_points[name])
        return self._values[name]

    def _load(self, point: EntryPoint) -> T:
        try:
            return point.load()
        except Exception as error:  # whatever importing another package raises
            package = point.dist.name if point.dist else "a package"
            raise ConfigError(
                f"{self._what} {point.name!r} of {package} cannot be loaded from {point.value}: "
                f"{type(error).__name__}: {error}"
            ) from error

    def __contains__(self, name: object) -> bool:
        return name in self._values or name in self._entry_points

    def __iter__(self) -> Iterator[str]:
        return iter({**self._values, **self._entry_points})

    def __len__(self) -> int:
        return len({**self._values, **self._entry_points})
