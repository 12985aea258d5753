"""Interpolating trained tickets: pool."""

import argparse

from lth_plugins import cli
from lth_plugins.commands.ticket.written import wrote


def pool(args: argparse.Namespace) -> None:
    with cli.needing("pip install 'lth_plugins[pretrain]'"):
        from lth_plugins.pretrain.pool import pool_tickets
    cli.quiet_lightning()
    done = pool_tickets(args.ticket, args.neighbours, args.output)
    found = done.pool
    for ticket, coefficient in found.used:
        print(f"takes       {coefficient:g} of {ticket!r}")
    print(f"{done.metric:<12}{100 * found.before:.2f} % before, {100 * found.after:.2f} % now")
    print(
        f"cost        {found.evaluations} evaluations, {done.evaluating:.1f} s; with pruning and "
        f"statistics {done.seconds / done.evaluating:.2f} times that"
    )
    if not found.used:
        print("no interpolation is better: the ticket is written as it was")
    wrote(args.output)
