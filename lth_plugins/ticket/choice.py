"""`Choice`: which ticket a configuration names, and how it changes it."""

import os
from dataclasses import dataclass, field, replace
from os import PathLike
from typing import Any

from lth_plugins.errors import ConfigError, NotFound, UnknownWeights
from lth_plugins.ticket.ticket import Ticket
from lth_plugins.ticket.wording import SCRIPT, Wording

_VARIANTS = {"reverse": True, "random": True, "load_weights": False}

_ahead: dict[Any, Ticket] = {}
"""The ticket that `Choice.load_ahead` has read, until it is loaded: at most one."""


@dataclass(frozen=True)
class Choice:
    """Which ticket to train: the options that all hosts share, as one value.

    A host makes it of its own configuration, and passes it on; nothing is read before `load`.

    Attributes:
        path: the ticket: a path, a catalog name or ``hf://owner/repo[/file][@sha256:…]``.
        weights: another ticket whose θ to use. A file holds only surviving weights, so ``reverse``
            and ``random`` need the dense ticket that this one was pruned from.
        reverse: (1 - m, θ), what the ticket left out.
        random: a random mask with the ticket's layer-wise densities.
        seed: of the random mask.
        outside: False drops what the ticket prunes outside the trunk, for another model.
        load_weights: False keeps the model's own initialisation, masked.
        wording: what the host calls these options, for messages; by default as they are called
            here.

    Raises:
        NotFound: if ``path`` is empty.
        ConfigError: if the options contradict each other.
    """

    path: str | PathLike[str]
    weights: str | PathLike[str] | None = None
    reverse: bool = False
    random: bool = False
    seed: int = 0
    outside: bool = True
    load_weights: bool = True
    wording: Wording = field(default=SCRIPT, compare=False, repr=False)

    def __post_init__(self) -> None:
        for option in ("path", "weights"):
            given = getattr(self, option)
            if not isinstance(given, str | PathLike | None):
                raise ConfigError(
                    f"expected {self.name(option)} to be a ticket's path or name, found a "
                    f"{type(given).__name__}"
                )
        if not self.path or not os.fspath(self.path):
            raise NotFound(
                f"expected a ticket, found none: set {self.name('path')} to a ticket file, a "
                "catalog name or hf://owner/repo"
            )
        if self.reverse and self.random:
            raise ConfigError(
                f"expected at most one of {self.name('reverse')} and {self.name('random')}, found "
                "both: choose one"
            )

    def name(self, option: str) -> str:
        """The host's name of an option."""
        return str(getattr(self.wording, option))

    def load(self) -> Ticket:
        """The ticket, which is read unless an equal choice has loaded it ahead.

        Raises:
            NotFound: if there is no such ticket.
            TicketError: if a ticket cannot be read, or the weights do not fit it.
        """
        return _ahead.pop(self._read_from, None) or self._read()

    def load_ahead(self) -> Ticket:
        """The ticket, for a check of a configuration: the model's `load` does not read it again.

        Raises:
            TicketError: as `load`.
        """
        key = self._read_from
        ticket = self.load()
        _ahead.clear()
        _ahead[key] = ticket
        return ticket

    def load_original(self) -> Ticket:
        """The ticket with its own masks and weights, as a search starts from.

        Raises:
            ConfigError: if an option changes them. Nothing was read then.
            TicketError: as `load`.
        """
        changed = [name for name, value in _VARIANTS.items() if getattr(self, name) is value]
        if changed:
            raise ConfigError(
                "finding tickets starts from all weights of a dense ticket, found "
                f"{self.name(changed[0])} {_VARIANTS[changed[0]]}: leave it at its default. To "
                "start from the model's initialisation rewind to init, to prune at random take the "
                "criterion random"
            )
        return self.load_ahead()

    @property
    def _read_from(self) -> Any:
        """What equal choices share for as long as nobody writes their files again."""
        refs = [os.path.expanduser(ref) for ref in (self.path, self.weights) if ref]
        written = [os.stat(ref).st_mtime_ns if os.path.isfile(ref) else None for ref in refs]
        return replace(self, load_weights=True), *written

    def _read(self) -> Ticket:
        ticket = Ticket.load(self.path)
        if not self.outside:
            ticket = ticket.without_outside()
        source = self.path
        try:
            if self.weights:
                source = self.weights
                ticket = ticket.with_weights(Ticket.load(self.weights))
            if self.reverse:
                return ticket.reversed()
            return ticket.shuffled(self.seed) if self.random else ticket
        except UnknownWeights as error:
            option = "reverse" if self.reverse else "random" if self.random else "weights"
            raise UnknownWeights(
                f"{self.name(option)} keeps weights that {os.fspath(source)} does not hold, "
                "because a ticket file stores only surviving weights: name the dense ticket it was "
                f"pruned from, of a search its round_00.ticket, as {self.name('weights')}"
            ) from error


Given = Ticket | Choice | str | PathLike[str]
"""A ticket, or a path, a catalog name or ``hf://owner/repo``; or a `Choice` of options for one."""


def load_given(
    ticket: Given, wording: Wording = SCRIPT, original: bool = False
) -> tuple[Ticket, bool]:
    """The ticket that a caller gives, and whether its weights are used.

    Args:
        ticket: what was given.
        wording: what the host calls the options of a choice, where none was given.
        original: whether it is for a search: a choice must not change it (`Choice.load_original`).

    Raises:
        TicketError, ConfigError: as `Choice.load` and `Choice.load_original`.
    """
    if isinstance(ticket, Ticket):
        return ticket, True
    choice = ticket if isinstance(ticket, Choice) else Choice(ticket, wording=wording)
    return choice.load_original() if original else choice.load(), choice.load_weights
