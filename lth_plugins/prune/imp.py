"""Iterative magnitude pruning (IMP), as the paper's loop: train, prune, rewind, again.

Chen et al., arXiv 2012.06908, section 3. What training is, is the caller's: the pre-trainings of
`lth_plugins.pretrain`, or a downstream task for a task-specific ticket. Each round is one atomic
file, and a round whose file exists is not computed again: resuming needs no code of its own.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any

from lth_plugins.prune import prune
from lth_plugins.prune.criteria import get_criterion
from lth_plugins.ticket.catalog import SUFFIX
from lth_plugins.ticket.dialects import State
from lth_plugins.ticket.errors import TicketError
from lth_plugins.ticket.ticket import Ticket

Train = Callable[[Ticket, int], State]
"""``train(ticket, k)``: what training (m, θ_p) in round k ends in, in any known dialect.

Rewinding is its part: whatever else was pre-trained (the task's head) starts from its pre-trained
values, too. The ticket holds BatchNorm's pre-trained statistics.
"""


def round_path(folder: str | PathLike[str], k: int) -> Path:
    """The file of round k."""
    return Path(folder) / f"round_{k:02d}{SUFFIX}"


def imp(
    dense: Ticket,
    train: Train,
    rounds: int,
    folder: str | PathLike[str],
    *,
    fraction: float = 0.2,
    criterion: str = "magnitude",
    already_trained: bool = True,
) -> Iterator[Ticket]:
    """Find tickets (m_k, θ_p) for k = 0 … rounds; round k keeps (1 - fraction)^k.

    Args:
        dense: (1, θ_p): all masks one over the weights that every round is rewound to. Its
            description and recipe are those of all rounds.
        train: called with (m_{k-1}, θ_p) and k, once for each round that is computed.
        rounds: how many times to prune.
        folder: an existing folder; gets ``round_00.ticket``, ``round_01.ticket``, …
        fraction: of the kept weights, pruned in each round.
        criterion: what the trained weights are ranked by; a name in `CRITERIA` that needs no data.
        already_trained: θ_p is trained on this very task, so round 1 prunes θ_p as it is. False
            trains (1, θ_p) first: a task-specific ticket (m_T, θ_p).

    Yields:
        The tickets of all rounds in order, each when its file is complete. They know all of θ_p.

    Raises:
        TicketError: at once if an argument is not one, or the folder's rounds were made by another
            recipe; nothing is overwritten.
    """
    if rounds < 0:
        raise TicketError(f"expected rounds of 0 or more, found {rounds}")
    if not 0 < fraction < 1:
        raise TicketError(f"expected a fraction to prune between 0 and 1, found {fraction}")
    if dense.density != 1:
        raise TicketError(f"IMP starts from a dense ticket, found {dense!r}: give (1, θ_p)")
    folder = Path(folder)
    if not folder.is_dir():
        raise TicketError(f"expected a folder for the rounds, found none at {folder}")

    get_criterion(criterion)({}, None, None)  # one that needs a loss fails now
    recipe = {
        "fraction": fraction,
        "criterion": criterion,
        "rewind": "pretrained",
        "already_trained": already_trained,
    }
    meta = replace(dense.meta, round=0, parent=None, recipe={**dense.meta.recipe, **recipe})
    start = Ticket(dense.masks, dense.weights, meta)
    stored = _stored_round(folder, start, 0, None)

    def run() -> Iterator[Ticket]:
        ticket = stored or _save(start, folder)
        yield ticket
        for k in range(1, rounds + 1):
            done = _stored_round(folder, start, k, ticket.digest)
            if done is None:
                trained = start.weights if k == 1 and already_trained else train(ticket, k)
                masks = prune(trained, fraction, ticket.masks, criterion)
                # The rewind: the new masks lie over θ_p, not over what was trained.
                rewound = Ticket(masks, start.weights, replace(meta, round=k, parent=ticket.digest))
                done = _save(rewound, folder)
            ticket = done
            yield ticket

    return run()


def check_recipe(stored: Mapping[str, Any], asked: Mapping[str, Any], where: str | Path) -> None:
    """Raise ``TicketError``, naming the first differing key, unless both recipes are the same."""
    there, here = _flat(stored), _flat(json.loads(json.dumps(dict(asked))))
    for key in sorted(there.keys() | here.keys()):
        if key not in there or key not in here or there[key] != here[key]:
            raise TicketError(
                f"{where} was made by another recipe: {key} is {there.get(key, 'not set')} there, "
                f"{here.get(key, 'not set')} was asked for. Ask for the same, or give another "
                "output folder; nothing was changed"
            )


def _stored_round(folder: Path, start: Ticket, k: int, parent: str | None) -> Ticket | None:
    """Round k of an earlier run, checked to belong to this one; None if there is none."""
    path = round_path(folder, k)
    if not path.exists():
        return None
    stored = Ticket.load(path)
    check_recipe(stored.meta.recipe, start.meta.recipe, path)
    # The file knows only its surviving weights; those that IMP rewinds to are known here.
    ticket = Ticket(stored.masks, start.weights, replace(start.meta, round=k, parent=parent))
    if ticket.digest != stored.digest:
        raise TicketError(
            f"{path} was made from other pre-trained weights, or from another round "
            f"{max(k - 1, 0)}, than this run's. Give another output folder; nothing was changed"
        )
    return ticket


def _save(ticket: Ticket, folder: Path) -> Ticket:
    ticket.save(round_path(folder, ticket.meta.round))
    return ticket


def _flat(recipe: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in recipe.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
