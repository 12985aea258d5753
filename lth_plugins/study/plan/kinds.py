"""Kinds of run: what a study can train. A kind is one row here, or an entry point elsewhere.

Another package adds one with an entry point ``NAME = "its_module:KIND"`` in the group
``lth_plugins.study_kinds``, where ``KIND`` is a `Kind`.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from lth_plugins.registry import Registry

FIND, SEARCH, PERTURB, STRUCTURE = "find", "search", "perturb", "structure"
"""The tasks of runs that make tickets: a search in a pre-training, a search on a task of the study,
and what `tools/ticket.py` does."""

UNMASK = "unmask"
"""What `tools/ticket.py` calls the ticket that keeps all weights: the masks of a dense network."""

MAKING = (FIND, SEARCH, PERTURB, STRUCTURE)

LINE = "line"
"""The kind of runs that evaluate between two seeds of one condition: ``tools/study.py connect``."""

LINE_FILE = "line.json"
"""What such a run leaves: the metric by the place on the line, from 0 to 1."""


@dataclass(frozen=True)
class Strength:
    """The strength of a perturbation: above 0, up to ``most``; ``axis`` labels it in figures."""

    axis: str
    most: float = math.inf


@dataclass(frozen=True)
class Kind:
    """A kind of run.

    Attributes:
        label: its name in tables and figures; ``{weights}`` stands for the source of θ.
        options: how the ticket is trained: options of `lth_plugins.ticket.choice.Choice`.
        dense_weights: whether it, or what makes its tickets, needs θ of the dense ticket. A file
            holds only surviving weights.
        other_weights: whether θ is that of each other source.
        complement: whether it keeps what the ticket prunes.
        made_by: `PERTURB` or `STRUCTURE` if a command makes its tickets first; else "".
        made_as: what that command calls them.
        strength: of a perturbation.
        dense_label: its name at round 0, where a name alone says that nothing is pruned.
        least_round: the first round at which it differs from the dense network.
        explained: a sentence for the report.
    """

    label: str
    options: Mapping[str, bool] = field(default_factory=dict)
    dense_weights: bool = False
    other_weights: bool = False
    complement: bool = False
    made_by: str = ""
    made_as: str = ""
    strength: Strength | None = None
    dense_label: str = ""
    least_round: int = 1
    explained: str = ""


KINDS: Registry[Kind] = Registry("kind of run", "lth_plugins.study_kinds")

for _name, _kind in {
    "dense": Kind("dense", dense_label="dense", least_round=0),
    "ticket": Kind("ticket"),
    "random": Kind(
        "random mask",
        {"random": True},
        dense_weights=True,
        explained="Random masks have the ticket's layer-wise densities.",
    ),
    "reversed": Kind(
        "reversed mask",
        {"reverse": True},
        dense_weights=True,
        complement=True,
        explained="Reversed masks keep what the ticket pruned.",
    ),
    "transplant": Kind(
        "mask over weights of {weights}",
        dense_weights=True,
        other_weights=True,
        explained="Transplants are the masks of one source over the weights of another.",
    ),
    "reinit": Kind(
        "random weights",
        {"load_weights": False},
        dense_label="from scratch",
        least_round=0,
        explained="Random weights are the ticket's masks over a random initialisation. From "
        "scratch, the dense network has one.",
    ),
    "swap": Kind(
        "swap",
        dense_weights=True,
        made_by=PERTURB,
        made_as="swap",
        strength=Strength("Mask entries swapped in each layer (fraction)", most=1),
        least_round=0,
    ),
    "noise": Kind(
        "noise",
        made_by=PERTURB,
        made_as="noise",
        strength=Strength("Noise (standard deviations of the layer's weights)"),
        least_round=0,
    ),
    "channel": Kind(
        "channel ticket",
        dense_weights=True,
        made_by=STRUCTURE,
        made_as="channel",
        explained="A channel ticket fills up the channels in which the ticket kept most, and drops "
        "the others.",
    ),
    "channel_l1": Kind(
        "L1 channels",
        dense_weights=True,
        made_by=STRUCTURE,
        made_as="channel_l1",
        explained="L1 channels are as many of each convolution, those with the largest weights, "
        "whatever the ticket kept of them.",
    ),
    "narrow": Kind(
        "narrower network",
        {"load_weights": False},
        dense_weights=True,
        made_by=STRUCTURE,
        made_as="channel",
        explained="A narrower network is dense, has as many channels, and a random initialisation.",
    ),
}.items():
    KINDS.register(_name, _kind)

JUDGED = ("dense", "ticket")
"""The kinds that the verdict is about; the others are shown beside them."""


def baselines() -> list[str]:
    """The kinds that ``baselines`` of a configuration may name."""
    return [name for name in KINDS if name not in JUDGED and KINDS[name].strength is None]


def perturbations() -> list[str]:
    """The kinds that ``perturbations`` of a configuration may name."""
    return [name for name in KINDS if KINDS[name].strength is not None]


def is_structured(kind: str) -> bool:
    """Whether its masks are structured, so that all such kinds of a ticket have equal FLOPs."""
    return KINDS[kind].made_by == STRUCTURE
