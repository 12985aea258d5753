"""The settings of a search for tickets: one value, of which every host's configuration is made."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, TypeVar

from lth_plugins.errors import ConfigError
from lth_plugins.pruning import SCOPES
from lth_plugins.pruning.criteria import CRITERIA, data_free
from lth_plugins.pruning.search.modules import BACKBONE, MODEL_SCOPES, PREDICTORS
from lth_plugins.pruning.structure import Refill
from lth_plugins.settings import check_settings, setting

REWINDS = ("pretrained", "init", "early", "learning_rate", "none")
"""What a round is rewound to before it trains.

"pretrained": θ_p (Chen et al., arXiv 2012.06908).
"init": θ_0, the random initialisation (Frankle & Carbin, arXiv 1803.03635).
"early": θ_t, an early step of the first training (Frankle et al., arXiv 1912.05671).
"learning_rate": the weights stay as trained, and only the learning rate goes back to the start of
its schedule; "none": not even that, which is fine-tuning (both Renda et al., arXiv 2003.02389).
"""

KEPT = ("learning_rate", "none")
"""The `REWINDS` whose rounds hold the weights as trained: (m_k, what round k pruned)."""

ROUNDS, TRAINED = KEEPS = ("rounds", "trained")
"""What a search leaves: the tickets of its rounds, or beside each also what it was trained to."""

SettingsT = TypeVar("SettingsT", bound="SearchSettings")


@dataclass
class SearchSettings:
    """How to find tickets by iterative magnitude pruning."""

    has_loss: ClassVar[bool] = False
    """Whether what trains also gives the losses that some criteria rank by."""

    rounds: int = setting(
        0, least=0, recipe=False, help="how many times to prune; 0 is an ordinary training"
    )
    fraction: float = setting(
        0.2, above=0, below=1, help="of the weights kept so far, pruned in each round"
    )
    criterion: str = setting(
        "magnitude",
        choices=CRITERIA,
        help="what ranks the trained weights; those that need data take some batches",
    )
    allocation: str = setting(
        "global",
        choices=SCOPES,
        was="scope",
        help="rank all weights together (global), or share out by layer: layer (uniform) or erk",
    )
    rewind: str = setting(
        "pretrained", choices=REWINDS, help="what a round is rewound to before it trains"
    )
    keep: str = setting(
        ROUNDS,
        choices=KEEPS,
        recipe=False,
        help="also keep what each round's training ends in, beside its ticket (trained)",
    )
    structure: Refill = setting(
        factory=Refill, help="what each round's masks are refilled to: whole channels or kernels"
    )

    def check(self) -> None:
        """Check all values.

        Raises:
            ConfigError: if one is invalid, or values contradict each other.
            TicketError: if there is no such structure.
        """
        check_settings(self)
        if not self.has_loss:
            data_free(self.criterion)
        self.structure.make()


@dataclass
class TaskSettings(SearchSettings):
    """How to find task-specific tickets in the trainer of a host, which counts iterations."""

    has_loss: ClassVar[bool] = True  # a host without says so itself

    scope: str = setting(BACKBONE, choices=MODEL_SCOPES, help="which modules are pruned")
    exclude: tuple[str, ...] = setting(
        (PREDICTORS,),
        help="modules outside the trunk to leave dense, by patterns of their names; predictors are "
        "the layers that heads end in",
    )
    early_iter: int = setting(
        0, least=0, help="of rewind early: the iteration of the first training to rewind to"
    )

    def check(self) -> None:
        super().check()
        if (self.rewind == "early") != (self.early_iter > 0):
            raise ConfigError(
                "expected an early iteration of 1 or more with rewind 'early', and none with "
                f"another, found rewind {self.rewind!r} and early_iter {self.early_iter}"
            )


def settings_from(kind: type[SettingsT], given: Mapping[str, Any], where: str) -> SettingsT:
    """The settings in a host's own configuration, checked.

    Args:
        kind: their class.
        given: values by name; ``structure`` is a mapping of those of `Refill`, in which "" and 0
            stand for None, and a single string is a tuple of one.
        where: what the host calls the mapping, for messages.

    Raises:
        ConfigError: if a key is unknown or a value invalid.
    """
    values = dict(given)
    structure = dict(values.pop("structure", {}))
    for prefix, group, mapping in (("", kind, values), ("structure.", Refill, structure)):
        known = [declared.name for declared in fields(group)]
        for name in mapping:
            if name not in known:
                raise ConfigError(
                    f"unknown key {prefix}{name} in {where}; known are {', '.join(known)}"
                )
    if isinstance(values.get("exclude"), str):
        values["exclude"] = (values["exclude"],)
    settings = kind(**values, structure=Refill.of(structure))
    settings.check()
    return settings
