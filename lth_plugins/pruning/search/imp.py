"""Iterative magnitude pruning (IMP), as the paper's loop: train, prune, rewind, again.

Chen et al., arXiv 2012.06908, section 3. The caller says what training is, and what θ is, to which
every round is rewound. Each round is one atomic file, and a round whose file exists is not computed
again: resuming needs no code of its own.
"""

import gc
from collections.abc import Callable, Iterator
from dataclasses import replace
from os import PathLike
from pathlib import Path

from torch import nn

from lth_plugins.errors import RunError, TicketError
from lth_plugins.pruning import CRITERIA, Losses, Surgeon, prune, prune_and_update
from lth_plugins.pruning.search.settings import KEPT, SearchSettings
from lth_plugins.resilience.recipe import check_recipe, recipe_of
from lth_plugins.ticket.hub import SUFFIX
from lth_plugins.ticket.keys import State
from lth_plugins.ticket.masks import Masks
from lth_plugins.ticket.ticket import Ticket

Train = Callable[[Ticket], State]
"""``train(ticket)``: the state that training the ticket (m, θ) of a round ends in, in any known
dialect.

It also rewinds whatever else is trained (the task's head). The ticket holds BatchNorm's statistics.
"""

Probe = Callable[[State], tuple[nn.Module, Losses]]
"""``probe(state)``: a model in that state, and the losses to rank its weights by."""


def round_path(folder: str | PathLike[str], k: int) -> Path:
    """The file of round k."""
    return Path(folder) / f"round_{k:02d}{SUFFIX}"


def trained_path(folder: str | PathLike[str], k: int) -> Path:
    """The file of what training round k ended in, where a search keeps it."""
    return round_path(folder, k).with_suffix(f".trained{SUFFIX}")


def imp(
    start: Ticket,
    train: Train,
    settings: SearchSettings,
    folder: str | PathLike[str],
    save: Callable[[Ticket, Path], object] = Ticket.save,
    probe: Probe | None = None,
    update: bool = True,
) -> Iterator[Ticket]:
    """Find tickets (m_k, θ) for k = 0 … rounds; round k keeps (1 - fraction)^k.

    Args:
        start: (1, θ): all masks one over the weights that every round is rewound to. Its
            description and recipe are those of all rounds.
        train: called with the ticket of round k - 1, once for each round k that is computed. For a
            task that θ is already trained on, it returns θ in round 1.
        settings: how to prune and rewind. With a ``rewind`` in `KEPT`, rounds do not go back to
            ``start``.
        folder: an existing folder; gets ``round_00.ticket``, ``round_01.ticket``, …
        save: writes a round, for several processes of which one writes.
        probe: of what ``train`` returned, for criteria that look at gradients.
        update: whether those that update weights, such as "cap", do so where rounds are not
            rewound.

    Yields:
        The tickets of all rounds in order, each when its file is complete. They know all of θ,
        unless ``rewind`` is in `KEPT`.

    Raises:
        LthError: at once if an argument is invalid, or the folder's rounds were made by another
            recipe; nothing is overwritten.
    """
    settings.check()
    if start.density != 1:
        raise TicketError(f"IMP starts from a dense ticket, found {start!r}: give (1, θ)")
    folder = Path(folder)
    if not folder.is_dir():
        raise RunError(f"expected a folder for the rounds, found none at {folder}")
    structure = settings.structure.make()
    recipe = {**start.meta.recipe, **recipe_of(settings)}
    meta = replace(start.meta, round=0, parent=None, recipe=recipe)
    start = replace(start, meta=meta)
    kept = settings.rewind in KEPT
    stored = _stored_round(folder, start, 0, None, kept)

    def run() -> Iterator[Ticket]:
        ticket = stored or start
        if stored is None:
            save(ticket, round_path(folder, 0))
        yield ticket
        for k in range(1, settings.rounds + 1):
            done = _stored_round(folder, start, k, ticket.digest, kept)
            if done is None:
                state = train(ticket)
                # A trainer and its model refer to each other: without this they would hold a GPU's
                # memory while the next ones are made.
                gc.collect()
                updates = update and kept
                masks, state = _pruned(state, ticket.all_masks, settings, probe, updates)
                # The rewind: the new masks lie over θ, not over what was trained.
                under = start.with_weights(state) if kept else start
                done = under.with_masks(masks, {})
                if structure is not None:
                    done = done.with_masks(structure(done), {})
                done = replace(done, meta=replace(meta, round=k, parent=ticket.digest))
                save(done, round_path(folder, k))
            ticket = done
            yield ticket

    return run()


def _pruned(
    state: State, masks: Masks, settings: SearchSettings, probe: Probe | None, update: bool
) -> tuple[Masks, State]:
    """The masks of the next round, and the weights that it has if it is not rewound."""
    how = (settings.fraction, masks, settings.criterion, settings.allocation)
    if probe is None:
        return prune(state, *how), state
    model, losses = probe(state)
    if update and isinstance(CRITERIA[settings.criterion], Surgeon):
        return prune_and_update(model, *how, losses)
    return prune(model, *how, losses), state


def _stored_round(
    folder: Path, start: Ticket, k: int, parent: str | None, kept: bool
) -> Ticket | None:
    """Round k of an earlier run, checked to belong to this one; None if there is none.

    Args:
        kept: whether rounds hold the weights as trained.
    """
    path = round_path(folder, k)
    if not path.exists():
        return None
    stored = Ticket.load(path)
    check_recipe(stored.meta.recipe, start.meta.recipe, path)
    # The file knows only its surviving weights; those that IMP rewinds to are known here.
    ticket = (stored if kept and k > 0 else start).with_masks(stored.all_masks, {})
    ticket = replace(ticket, meta=replace(start.meta, round=k, parent=parent))
    if ticket.digest != stored.digest:
        raise RunError(
            f"{path} was made from other weights to rewind to, or from another round "
            f"{max(k - 1, 0)}, than this run's. Give another output folder; nothing was changed"
        )
    return ticket
