"""Iterative magnitude pruning (IMP), as the paper's loop: train, prune, rewind, again.

Chen et al., arXiv 2012.06908, section 3. What training is, is the caller's: the pre-trainings of
`lth_plugins.pretrain`, or a downstream task for a task-specific ticket; so is θ, what every round
is rewound to. Each round is one atomic file, and a round whose file exists is not computed again:
resuming needs no code of its own.
"""

import gc
from collections.abc import Callable, Iterator
from dataclasses import replace
from os import PathLike
from pathlib import Path

from lth_plugins.errors import LthError, TicketError, unknown
from lth_plugins.pruning import SCOPES, prune
from lth_plugins.pruning.criteria import CRITERIA
from lth_plugins.pruning.structure import Structure, describe
from lth_plugins.resilience.recipe import check_recipe
from lth_plugins.ticket.hub import SUFFIX
from lth_plugins.ticket.keys import State
from lth_plugins.ticket.ticket import Ticket

Train = Callable[[Ticket], State]
"""``train(ticket)``: what training the ticket (m, θ) of a round ends in, in any known dialect.

Rewinding whatever else is trained (the task's head) is its part. The ticket holds BatchNorm's
statistics.
"""

REWINDS = ("pretrained", "init", "early", "learning_rate", "none")
"""What a round goes back to before it trains.

"pretrained": θ_p (Chen et al., arXiv 2012.06908).
"init": θ_0, the random initialisation (Frankle & Carbin, arXiv 1803.03635).
"early": θ_t, an early step of the first training (Frankle et al., arXiv 1912.05671).
"learning_rate": the weights stay as trained, and only the learning rate goes back to the start of
its schedule; "none": not even that, which is fine-tuning (both Renda et al., arXiv 2003.02389).
"""

KEPT = ("learning_rate", "none")
"""The `REWINDS` whose rounds hold the weights as trained: (m_k, what round k pruned)."""


def round_path(folder: str | PathLike[str], k: int) -> Path:
    """The file of round k."""
    return Path(folder) / f"round_{k:02d}{SUFFIX}"


def imp(
    start: Ticket,
    train: Train,
    rounds: int,
    folder: str | PathLike[str],
    *,
    fraction: float = 0.2,
    criterion: str = "magnitude",
    scope: str = "global",
    trained: State | None = None,
    rewind: str = "pretrained",
    structure: Structure | None = None,
    save: Callable[[Ticket, Path], object] = Ticket.save,
) -> Iterator[Ticket]:
    """Find tickets (m_k, θ) for k = 0 … rounds; round k keeps (1 - fraction)^k.

    Args:
        start: (1, θ): all masks one over the weights that every round is rewound to. Its
            description and recipe are those of all rounds.
        train: called with the ticket of round k - 1, once for each round k that is computed.
        rounds: how many times to prune.
        folder: an existing folder; gets ``round_00.ticket``, ``round_01.ticket``, …
        fraction: of the kept weights, pruned in each round.
        criterion: what the trained weights are ranked by; a name in `CRITERIA` that needs no data.
        scope: as `prune`'s: whether all weights are ranked together.
        trained: what round 1 prunes as it is, in any known dialect: θ_p, which is trained on this
            very task. None trains (1, θ) first: a task-specific ticket (m_T, θ).
        rewind: what θ is, one of `REWINDS`; those in `KEPT` do not go back to ``start``.
        structure: what each round's masks are refilled to, before they are trained; a round's
            budget is what pruning left of the round before it.
        save: how a round is written, where several processes run this and one of them writes.

    Yields:
        The tickets of all rounds in order, each when its file is complete. They know all of θ,
        unless ``rewind`` is in `KEPT`.

    Raises:
        TicketError: at once if an argument is not one, or the folder's rounds were made by another
            recipe; nothing is overwritten.
    """
    if rounds < 0:
        raise TicketError(f"expected rounds of 0 or more, found {rounds}")
    check_options(fraction, criterion, scope, rewind)
    if start.density != 1:
        raise TicketError(f"IMP starts from a dense ticket, found {start!r}: give (1, θ)")
    folder = Path(folder)
    if not folder.is_dir():
        raise TicketError(f"expected a folder for the rounds, found none at {folder}")

    recipe = {
        "fraction": fraction,
        "criterion": criterion,
        "scope": scope,
        "rewind": rewind,
        "already_trained": trained is not None,
    }
    if structure is not None:  # absent otherwise: folders from before there were any go on
        recipe["structure"] = describe(structure)
    meta = replace(start.meta, round=0, parent=None, recipe={**start.meta.recipe, **recipe})
    start = replace(start, meta=meta)
    stored = _stored_round(folder, start, 0, None)

    def run() -> Iterator[Ticket]:
        ticket = stored or start
        if stored is None:
            save(ticket, round_path(folder, 0))
        yield ticket
        for k in range(1, rounds + 1):
            done = _stored_round(folder, start, k, ticket.digest)
            if done is None:
                state = trained if k == 1 and trained is not None else train(ticket)
                # A trainer and its model refer to each other: they would stay while the next
                # ones are made, and hold a GPU's memory, until Python looks for such circles.
                gc.collect()
                masks = prune(state, fraction, ticket.all_masks, criterion, scope)
                # The rewind: the new masks lie over θ, not over what was trained.
                under = start.with_weights(state) if rewind in KEPT else start
                done = under.with_masks(masks, {})
                if structure is not None:
                    done = done.with_masks(structure(done), {})
                done = replace(done, meta=replace(meta, round=k, parent=ticket.digest))
                save(done, round_path(folder, k))
            ticket = done
            yield ticket

    return run()


def check_options(
    fraction: float, criterion: str, scope: str, rewind: str, scope_name: str = "scope"
) -> None:
    """Raise ``TicketError`` if one of these is not what `imp` can be given.

    Args:
        scope_name: what whoever asks calls ``scope``.
    """
    if not 0 < fraction < 1:
        raise TicketError(f"expected fraction to be between 0 and 1, found {fraction}")
    for key, value, known in ((scope_name, scope, SCOPES), ("rewind", rewind, REWINDS)):
        if value not in known:
            raise unknown(key, value, known)
    chosen = CRITERIA[criterion]
    try:
        chosen({}, None, None)
    except LthError:  # it has no loss
        raise TicketError(
            f"criterion {criterion!r} ranks weights by the gradients of a loss on data, and here "
            "is none: choose magnitude or random, or in Python give lth.prune a model and a loss"
        ) from None


def _stored_round(folder: Path, start: Ticket, k: int, parent: str | None) -> Ticket | None:
    """Round k of an earlier run, checked to belong to this one; None if there is none."""
    path = round_path(folder, k)
    if not path.exists():
        return None
    stored = Ticket.load(path)
    check_recipe(stored.meta.recipe, start.meta.recipe, path)
    # The file knows only its surviving weights; those that IMP rewinds to are known here.
    kept = k > 0 and start.meta.recipe["rewind"] in KEPT
    ticket = (stored if kept else start).with_masks(stored.all_masks, {})
    ticket = replace(ticket, meta=replace(start.meta, round=k, parent=parent))
    if ticket.digest != stored.digest:
        raise TicketError(
            f"{path} was made from other weights to rewind to, or from another round "
            f"{max(k - 1, 0)}, than this run's. Give another output folder; nothing was changed"
        )
    return ticket
