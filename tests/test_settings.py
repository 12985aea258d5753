"""Settings declare their bounds, and recipes hold those that differ from the defaults."""

from dataclasses import dataclass

import pytest

from lth_plugins.errors import ConfigError
from lth_plugins.resilience.recipe import recipe_of
from lth_plugins.settings import check_settings, setting


@dataclass
class Inner:
    kind: str = setting("round", choices=("round", "square"))
    size: float | None = setting(None, above=0, most=1)


@dataclass
class Outer:
    name: str = setting()
    steps: list[int] = setting(factory=list, least=1)
    workers: int = setting(0, least=0, recipe=False)
    early: float = setting(0.5, above=0, below=1, recipe=lambda config: config.name == "early")
    inner: Inner = setting(factory=Inner)
    others: dict[str, Inner] = setting(factory=dict)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (Outer("a", steps=[1, 0]), "steps to be 1 or more, found 0"),
        (Outer("a", early=1.0), "early to be between 0 and 1, found 1.0"),
        (Outer("a", inner=Inner(size=0)), "inner.size to be more than 0 and at most 1, found 0"),
        (Outer("a", inner=Inner("long")), "unknown inner.kind 'long'; known are round, square"),
        (Outer("a", others={"b": Inner(size=2)}), "others.b.size to be more than 0"),
        (Outer("a", early=float("nan")), "early to be between 0 and 1, found nan"),
    ],
)
def test_a_value_out_of_bounds_is_refused_by_its_key(config: Outer, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_settings(config)


def test_a_recipe_holds_what_differs_from_the_defaults_and_matters() -> None:
    check_settings(Outer("a"))
    assert recipe_of(Outer("a", workers=4, early=0.1)) == {"name": "a"}
    config = Outer("early", steps=[2], early=0.1, inner=Inner(size=1.0))
    assert recipe_of(config) == {
        "name": "early",
        "steps": [2],
        "early": 0.1,
        "inner": {"size": 1.0},
    }
