"""Making tickets of checkpoints and of other tickets: import, prune and convert."""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from lth_plugins import ConfigError, Ticket, TicketError
from lth_plugins import prune as pruned
from lth_plugins.commands.ticket.written import wrote
from lth_plugins.errors import printable, unknown
from lth_plugins.pruning.criteria import data_free
from lth_plugins.pruning.criteria.random import Random
from lth_plugins.ticket import IMAGENET, UNIT_RANGE, InputSpec
from lth_plugins.ticket.card import described, sparsity
from lth_plugins.ticket.file import holds_ticket
from lth_plugins.ticket.foreign.convert import ZEROS, from_checkpoint
from lth_plugins.ticket.foreign.formats import FORMATS, to_checkpoint
from lth_plugins.ticket.hub import HUB, SUFFIX
from lth_plugins.ticket.on_disk import check_there

CAFFE = InputSpec("BGR", (0.406, 0.456, 0.485), (1 / 255, 1 / 255, 1 / 255))
PIXELS = {  # the input a network expects, and whether its stride is in the first 1x1 convolution
    "imagenet": (IMAGENET, False),
    "unit-range": (UNIT_RANGE, False),
    "caffe": (CAFFE, True),
}


def _pixels(name: str) -> tuple[InputSpec, bool]:
    if name not in PIXELS:
        raise unknown("input of --pixels", name, PIXELS)
    return PIXELS[name]


def import_(args: argparse.Namespace) -> None:
    _imported(args).save(args.output)
    wrote(args.output)


def _imported(args: argparse.Namespace) -> Ticket:
    """Make a ticket of a checkpoint, and print what was recognised."""
    spec, stride_in_1x1 = _pixels(args.pixels) if args.pixels else (_bands(args), False)
    ticket = from_checkpoint(
        args.checkpoint,
        args.source,
        spec,
        masks=args.mask if args.mask in (None, ZEROS) else Path(args.mask),
        weights=args.weights,
        prefix=args.prefix,
        stride_in_1x1=stride_in_1x1,
        skip_objects=args.skip_objects,
    )
    recipe = ticket.meta.recipe
    print(
        f"recognised  {ticket.meta.arch} in {recipe['imported']} naming, "
        f"under {printable(recipe['prefix']) or 'no prefix'}\n"
        f"masks       {recipe['masks']} ({100 * ticket.sparsity:.2f} % sparse)\n"
        f"input       {described(ticket.meta.input)}"
        + ("" if spec else "; --pixels says otherwise")
    )
    return ticket


def _bands(args: argparse.Namespace) -> InputSpec | None:
    """The input that --bands, --mean and --std state; None where they are not given."""
    given = [getattr(args, name) for name in BANDS_OPTIONS]
    if given.count(None) == len(given):
        return None
    if None in given:
        missing = BANDS_OPTIONS[given.index(None)]
        raise ConfigError(
            "expected --bands, --mean and --std together, which state the input of a network, "
            f"found no --{missing}: add it"
        )
    bands = f"{args.bands} bands" if args.bands.isdigit() else args.bands
    count = InputSpec.channels_of(bands)
    mean, std = (values * count if len(values) == 1 else values for values in given[1:])
    return InputSpec(bands, mean, std, scale=1)


BANDS_OPTIONS = ("bands", "mean", "std")


def prune(args: argparse.Namespace) -> None:
    criterion = data_free(args.criterion)
    if args.seed is not None and args.criterion != "random":
        raise ConfigError(
            f"expected --seed with --criterion random alone, found it with {args.criterion}, "
            "which draws nothing: leave it out"
        )
    ticket = _ticket_or_checkpoint(args)
    masks = ticket.masks
    wanted = round(args.sparsity * masks.numel) - (masks.numel - masks.kept)
    if wanted < 0 or (wanted == 0 and args.sparsity > 0):
        raise TicketError(
            f"{args.checkpoint} is {100 * ticket.sparsity:.2f} % sparse already: give a higher "
            f"--sparsity than {ticket.sparsity:.4f}, or the dense ticket it was pruned from"
        )
    recipe: dict[str, Any] = {"sparsity": args.sparsity, "criterion": args.criterion}
    recipe["allocation"] = args.allocation
    if args.criterion == "random":
        recipe["seed"] = args.seed or 0
        criterion = Random(recipe["seed"])
    fraction = wanted / masks.kept
    found = pruned(ticket.weights, fraction, masks, criterion, args.allocation)
    sparser = ticket.with_masks(found, {"masks": "one-shot", "pruned": recipe})
    meta = replace(sparser.meta, round=ticket.meta.round + (wanted > 0))
    sparser = replace(sparser, meta=meta)
    sparser.save(args.output)
    print(f"pruned      {sparsity(sparser.masks)}")
    if ticket.outside:
        print(f"outside     stays as it is: {sparsity(ticket.outside.masks)}")
    wrote(args.output)


IMPORT_OPTIONS = ("mask", "weights", "pixels", *BANDS_OPTIONS, "prefix", "skip_objects", "source")


def _ticket_or_checkpoint(args: argparse.Namespace) -> Ticket:
    """Load the ticket IN, or make one of the checkpoint IN as `import` does."""
    path = Path(args.checkpoint).expanduser()
    if path.suffix and not args.checkpoint.startswith(HUB):
        check_there(path, "a ticket or a checkpoint")
    if path.is_file() and path.suffix != SUFFIX and not holds_ticket(path):
        args.source = args.source or "unknown"
        args.checkpoint = path
        return _imported(args)
    given = [name for name in IMPORT_OPTIONS if getattr(args, name)]
    if given:
        raise ConfigError(
            f"--{given[0].replace('_', '-')} says how to read a checkpoint, and {args.checkpoint} "
            "is no file of one: leave it out, or correct the path"
        )
    return Ticket.load(args.checkpoint)


def convert(args: argparse.Namespace) -> None:
    if args.to:
        to_checkpoint(Ticket.load(args.checkpoint), args.output, args.to)
        wrote(args.output)
    elif args.output.suffix == SUFFIX:
        args.checkpoint = Path(args.checkpoint)
        import_(args)
    else:
        raise ConfigError(
            f"expected --to ({', '.join(FORMATS)}) to write a checkpoint, or an output that ends "
            f"in {SUFFIX} to make a ticket, found neither"
        )
