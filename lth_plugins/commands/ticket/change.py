"""Changing the masks or the weights of a ticket: perturb and structure."""

import argparse

from lth_plugins import ConfigError
from lth_plugins.commands.ticket.written import wrote
from lth_plugins.pruning.structure import make_structure, structured
from lth_plugins.ticket import Choice
from lth_plugins.ticket.perturb import noisy, swapped, unmasked


def perturb(args: argparse.Namespace) -> None:
    if not (args.shuffle or args.unmask) and args.swap is None and args.noise is None:
        raise ConfigError(
            "expected --shuffle, --swap, --unmask or --noise, found none of them; `transplant` "
            "lays the masks over other weights"
        )
    choice = Choice(args.ticket, args.weights, random=args.shuffle, seed=args.seed)
    ticket = choice.load()
    if args.swap is not None:
        ticket = swapped(ticket, args.swap, args.seed)
    if args.unmask:
        ticket = unmasked(ticket)
    if args.noise is not None:
        ticket = noisy(ticket, args.noise, args.seed)
    args.output.parent.mkdir(parents=True, exist_ok=True)  # a study gives each a folder
    ticket.save(args.output)
    wrote(args.output)


def structure(args: argparse.Namespace) -> None:
    options = {name: getattr(args, name) for name in STRUCTURE_OPTIONS}
    chosen = make_structure(args.kind, **options)
    ticket = Choice(args.ticket, args.weights).load()
    found = structured(ticket, chosen)
    args.output.parent.mkdir(parents=True, exist_ok=True)  # a study gives each a folder
    found.save(args.output)
    wrote(args.output)
    print(f"density {100 * ticket.density:.2f} % before, {100 * found.density:.2f} % now")


STRUCTURE_OPTIONS = ("scope", "density", "surplus", "minimum", "multiple", "n", "m")
