#!/usr/bin/env python3
"""Look at tickets, make, convert and disturb them.

ticket.py list                      the tickets that come with the project
ticket.py show F                    what a ticket is, and how dense each of its layers
ticket.py diff A B                  what two tickets share
ticket.py import CKPT --source moco --out F
                                    a checkpoint as a ticket: pre-trained weights, sparse models,
                                    masks (docs/import.md)
ticket.py prune IN OUT --sparsity 0.59
                                    a sparser ticket of a ticket or a checkpoint, in one shot
ticket.py convert IN OUT --to …     a ticket as another framework's checkpoint (--to), or a
                                    checkpoint as a ticket, as import does (OUT ends in .ticket)
ticket.py perturb IN OUT --swap 0.3 a ticket with swapped mask entries, noise on its weights, or
                                    another ticket's weights: is the metric sensitive to it?
ticket.py structure IN OUT --kind channel --weights round_00.ticket
                                    masks whose zeros can be skipped, by refilling
                                    (docs/structured.md)
ticket.py export IN OUT.onnx        the trunk of a ticket or of any host's checkpoint as an ONNX
                                    file, without its dead channels
ticket.py push F OWNER/REPO         upload a ticket to the Hugging Face hub
"""

import argparse
import json
import logging
import os
import sys
import textwrap
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    from _start import stop_in_one_line

    stop_in_one_line()

import torch
from rich.bar import Bar
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lth_plugins import ConfigError, Masks, Ticket, TicketCatalog, TicketError, cli, compact
from lth_plugins import prune as pruned
from lth_plugins.deploy.onnx import Trunk, check_full_width, export_onnx, resnet
from lth_plugins.errors import UnknownWeights, printable
from lth_plugins.pruning import SCOPES
from lth_plugins.pruning.criteria import data_free
from lth_plugins.pruning.criteria.random import Random
from lth_plugins.pruning.structure import SCOPES as BUDGETS
from lth_plugins.pruning.structure import STRUCTURES, make_structure, structured
from lth_plugins.ticket import IMAGENET, UNIT_RANGE, Choice, InputSpec
from lth_plugins.ticket.arch import STAGES, part_of
from lth_plugins.ticket.card import card_of, described, facts, sparsity
from lth_plugins.ticket.file import holds_ticket
from lth_plugins.ticket.foreign.checkpoints import read_checkpoint
from lth_plugins.ticket.foreign.convert import ZEROS, from_checkpoint
from lth_plugins.ticket.foreign.formats import FORMATS, to_checkpoint
from lth_plugins.ticket.hub import HUB, SUFFIX, push
from lth_plugins.ticket.on_disk import check_there
from lth_plugins.ticket.perturb import noisy, swapped, unmasked
from lth_plugins.ticket.zoo import zoo

CAFFE = InputSpec("BGR", (0.406, 0.456, 0.485), (1 / 255, 1 / 255, 1 / 255))
PIXELS = {  # the input a network expects, and whether its stride is in the first 1x1 convolution
    "imagenet": (IMAGENET, False),
    "unit-range": (UNIT_RANGE, False),
    "caffe": (CAFFE, True),
}


def show(args: argparse.Namespace) -> None:
    ticket = Ticket.load(args.ticket)
    if args.json:
        _print_json({**_described(ticket), "layers": _counts(ticket.masks)})
        return
    console = _console()
    for name, value in facts(ticket).items():
        _print_fact(console, name, value)
    console.print()

    layers = _table("density of each layer", "weights", "kept", "density")
    longest = max(map(len, ticket.all_masks))
    layers.add_column("", width=max(4, min(20, COLUMNS - longest - len("1,000,000 " * 2) - 11)))
    by_stage: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for name, mask in ticket.masks.items():
        kept, numel = int(mask.sum()), mask.numel()
        layers.add_row(*_layer(name, numel, kept), end_section=False)
        by_stage[part_of(name)][0] += numel
        by_stage[part_of(name)][1] += kept
    layers.add_section()
    for stage in STAGES:
        layers.add_row(*_layer(f"all of {stage}", *by_stage[stage]))
    layers.add_row(*_layer("all", ticket.masks.numel, ticket.masks.kept), style="bold")
    if ticket.outside:
        layers.add_section()
        for name, mask in ticket.outside.masks.items():
            layers.add_row(*_layer(name, mask.numel(), int(mask.sum())))
        masks = ticket.outside.masks
        layers.add_row(*_layer("all outside the trunk", masks.numel, masks.kept), style="bold")
    console.print(layers)


COLUMNS = 80
"""The width of tables, unless the names of parameters need more."""


def _console() -> Console:
    """A console as wide as the terminal; in a pipe or a file nothing is wrapped."""
    fits = sys.stdout.isatty() or "COLUMNS" in os.environ
    return Console(width=None if fits else 1000)


def _print_fact(console: Console, name: str, value: str) -> None:
    """Print a fact, wrapped below itself; 64 digits of a digest fit on one line."""
    indent = len("architecture  ")
    for line in textwrap.wrap(printable(value), max(20, console.width - indent)):
        console.print(Text(f"{name:<{indent}}{line}"), soft_wrap=True)
        name = ""


def _table(title: str, *counts: str) -> Table:
    """A table of parameters and counts, with its columns close together."""
    table = Table(title=title, title_justify="left", box=SIMPLE, padding=0, show_edge=False)
    table.add_column("parameter", overflow="fold")
    for name in counts:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _described(ticket: Ticket) -> dict[str, Any]:
    """The description, counts and digest of a ticket, as plain JSON types."""
    masks = ticket.masks
    return {
        **ticket.meta.to_dict(),
        "sparsity": ticket.sparsity,
        "weights": masks.numel,
        "kept": masks.kept,
        "outside": _counts(ticket.outside.masks),
        "digest": ticket.digest,
    }


def _counts(masks: Masks) -> dict[str, dict[str, int]]:
    return {n: {"weights": mask.numel(), "kept": int(mask.sum())} for n, mask in masks.items()}


def _print_json(content: dict[str, Any]) -> None:
    print(json.dumps(content, indent=1))


def _shown(text: str) -> Text:
    """Text from a file, without the markup of rich or of a terminal."""
    return Text(printable(text))


def _layer(name: str, numel: int, kept: int) -> tuple[Text, str, str, str, Bar]:
    density = kept / numel
    return _shown(name), f"{numel:,}", f"{kept:,}", f"{100 * density:6.2f} %", Bar(1, 0, density)


def list_(args: argparse.Namespace) -> None:
    files = zoo()
    tickets = {name: Ticket.load(path) for name, path in files.items()}
    if args.json:
        _print_json({name: _described(ticket) for name, ticket in tickets.items()})
        return
    console = _console()
    if not tickets:
        console.print("No ticket comes with this installation.")
        return
    table = Table("name", "architecture", "source", box=SIMPLE, padding=0, show_edge=False)
    for name in ("weights kept", "sparsity", "file"):
        table.add_column(name, justify="right", no_wrap=True)
    for name, ticket in tickets.items():
        kept, size = f"{ticket.masks.kept:,}", f"{files[name].stat().st_size / 1e6:.1f} MB"
        percent = f"{100 * ticket.sparsity:.2f} %"
        table.add_row(name, ticket.meta.arch, _shown(ticket.meta.source), kept, percent, size)
    console.print(table)
    console.print('\nlth.Ticket.load("NAME") loads one; docs/zoo.md says what each is good for.')


def diff(args: argparse.Namespace) -> None:
    first, second = Ticket.load(args.first), Ticket.load(args.second)
    ours, theirs = facts(first), facts(second)
    differing = {n: (ours[n], theirs[n]) for n in ours if ours[n] != theirs[n]}
    comparable = first.arch == second.arch
    overlaps = _overlaps(first, second) if comparable else {}
    weights = _differing_weights(first, second) if comparable else []
    if args.json:
        described = {"first": _described(first), "second": _described(second)}
        names = ("both", "first_only", "second_only")
        layers = {n: dict(zip(names, c.tolist(), strict=True)) for n, c in overlaps.items()}
        _print_json({**described, "layers": layers, "differing_weights": weights})
        return
    console = _console()
    if not differing:
        console.print("The tickets are the same.")
        return
    for name, pair in {"tickets": (args.first, args.second), **differing}.items():
        _print_fact(console, name, pair[0])
        _print_fact(console, "", pair[1])
    console.print()
    if not comparable:
        console.print("They are for different architectures: there is nothing more to compare.")
        return

    names = ("both", "first only", "second only", "IoU")
    layers = _table("kept weights of each layer", *names)
    for name, counts in overlaps.items():
        layers.add_row(name, *_overlap(counts))
    layers.add_section()
    layers.add_row("all", *_overlap(sum(overlaps.values(), torch.zeros(3).long())), style="bold")
    console.print(layers)
    console.print(f"statistics, and weights that both keep, differ in {len(weights)} entries of θ")


def _overlaps(first: Ticket, second: Ticket) -> dict[str, torch.Tensor]:
    """How many weights both keep, and each alone, by parameter."""
    return {
        name: torch.stack([(a & b).sum(), (a & ~b).sum(), (b & ~a).sum()])
        for (name, a), b in zip(first.masks.items(), second.masks.values(), strict=True)
    }


def _differing_weights(first: Ticket, second: Ticket) -> list[str]:
    """The entries of θ that differ where both keep them."""

    def shared(ticket: Ticket, name: str) -> torch.Tensor:
        value = ticket.weights[name]
        if name not in first.masks:
            return value
        return value.masked_fill(~(first.masks[name] & second.masks[name]), 0)

    return [n for n in first.weights if not torch.equal(shared(first, n), shared(second, n))]


def _overlap(counts: torch.Tensor) -> list[str]:
    both, union = int(counts[0]), int(counts.sum())
    return [f"{int(count):,}" for count in counts] + [f"{both / union:.4f}" if union else "–"]


def import_(args: argparse.Namespace) -> None:
    _imported(args).save(args.output)
    _wrote(args.output)


def _imported(args: argparse.Namespace) -> Ticket:
    """Make a ticket of a checkpoint, and print what was recognised."""
    spec, stride_in_1x1 = PIXELS[args.pixels] if args.pixels else (_bands(args), False)
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


def _values_option(text: str) -> tuple[float, ...]:
    """Parse --mean and --std: numbers with commas between them."""
    try:
        return tuple(float(value) for value in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"expected one number, or one per band with commas between them, found {text!r:.60}"
        ) from None


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
    _wrote(args.output)


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


def _sparsity_option(text: str) -> float:
    """Parse --sparsity, a fraction; a percentage is refused with the fraction to write."""
    percent = text.strip().endswith("%")
    try:
        value = float(text.strip().rstrip("%"))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"expected a fraction of the weights, such as 0.59, found {text!r}"
        ) from None
    as_percent = percent or 1 <= value < 100
    meant = f"; for {value:g} % write {value / 100:g}" if as_percent else ""
    if meant or not 0 <= value < 1:
        raise argparse.ArgumentTypeError(
            f"expected a fraction of the weights from 0 to below 1, found {text}{meant}"
        )
    return value


def convert(args: argparse.Namespace) -> None:
    if args.to:
        to_checkpoint(Ticket.load(args.checkpoint), args.output, args.to)
        _wrote(args.output)
    elif args.output.suffix == SUFFIX:
        args.checkpoint = Path(args.checkpoint)
        import_(args)
    else:
        raise ConfigError(
            f"expected --to ({', '.join(FORMATS)}) to write a checkpoint, or an output that ends "
            f"in {SUFFIX} to make a ticket, found neither"
        )


def perturb(args: argparse.Namespace) -> None:
    changes = (args.weights, args.shuffle, args.unmask)
    if not any(changes) and args.swap is None and args.noise is None:
        raise ConfigError(
            "expected --weights, --shuffle, --swap, --unmask or --noise, found none of them"
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
    _wrote(args.output)


def structure(args: argparse.Namespace) -> None:
    options = {name: getattr(args, name) for name in STRUCTURE_OPTIONS}
    chosen = make_structure(args.kind, **options)
    ticket = Choice(args.ticket, args.weights).load()
    found = structured(ticket, chosen)
    args.output.parent.mkdir(parents=True, exist_ok=True)  # a study gives each a folder
    found.save(args.output)
    _wrote(args.output)
    print(f"density {100 * ticket.density:.2f} % before, {100 * found.density:.2f} % now")


STRUCTURE_OPTIONS = ("scope", "density", "surplus", "minimum", "multiple", "n", "m")


def export(args: argparse.Namespace) -> None:
    path = Path(args.ticket)
    if path.suffix != SUFFIX and (path.is_file() or path.is_dir()):
        state = read_checkpoint(path, args.skip_objects)
    else:
        if args.prefix is not None:
            raise ConfigError(
                f"--prefix says which trunk of a checkpoint to read, and {args.ticket} is a "
                "ticket, which has one: leave it out"
            )
        ticket = Ticket.load(args.ticket)
        if ticket.meta.stride_in_1x1:
            raise TicketError(
                f"{ticket!r} has its strides in 1x1 convolutions, and what is exported has them in "
                "3x3 ones (torchvision's): export a ticket of weights that were trained so"
            )
        check_full_width(ticket.arch)
        state = ticket.sparse_weights()
    whole = resnet(state, args.prefix)
    channels = next(whole.parameters()).shape[1]
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, channels, args.size, args.size, generator=generator)
    off = export_onnx(Trunk(compact(whole)), images, args.output, reference=Trunk(whole))
    _wrote(args.output)
    print(f"onnxruntime's outputs are within {off:.1g} of PyTorch's, relative to the largest")


def _wrote(path: Path) -> None:
    print(f"wrote {path} ({path.stat().st_size:,} bytes)")


def upload(args: argparse.Namespace) -> None:
    ticket = Ticket.load(args.ticket)
    ref = f"{HUB}{args.repo}" + (f"/{args.file}" if args.file else "")
    found = TicketCatalog.find(args.ticket)
    card = card_of(ticket, ref, found if isinstance(found, Path) else None)
    print(f"uploaded: {push(ticket, args.repo, args.file, card)} loads it")


def _import_options() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(add_help=False)
    group = options.add_argument_group("from a checkpoint to a ticket")
    group.add_argument(
        "--mask",
        metavar="FILE",
        help=f"a file of masks; or {ZEROS!r}: what is exactly zero is pruned",
    )
    group.add_argument(
        "--weights", type=Path, metavar="FILE", help="θ, where the checkpoint is only for its masks"
    )
    pixels = group.add_mutually_exclusive_group()
    pixels.add_argument(
        "--pixels",
        choices=PIXELS,
        help="the input that the network expects: RGB with ImageNet mean and standard deviation, "
        "RGB in 0 … 1 (Google's simCLR), or BGR minus the mean, with the stride in the first 1x1 "
        "convolution (weights from Caffe, as in detectron2's model zoo); default: by the source",
    )
    pixels.add_argument(
        "--bands",
        metavar="NAMES",
        help="instead of --pixels: the channels that the network reads in their order, as names "
        "with commas between them (B4,B3,B2,B8) or as their number (13)",
    )
    for name, what in (("mean", "mean"), ("std", "standard deviation")):
        group.add_argument(
            f"--{name}",
            type=_values_option,
            metavar="VALUES",
            help=f"the {what} of each of --bands, with commas between them, or one for all, in the "
            f"units of the images' files (--{name}=VALUES where the first is negative)",
        )
    group.add_argument(
        "--prefix",
        help="which trunk of the checkpoint, if it holds several: any part of its prefix, in whole "
        "segments, that no other trunk has",
    )
    group.add_argument(
        "--skip-objects",
        action="store_true",
        help="read a file that holds other objects than tensors and hosts' bookkeeping (such as a "
        "pruner), and leave those out; nothing in a file is ever run",
    )
    return options


def main() -> None:
    args = parse_args()
    logging.basicConfig(format="%(message)s")
    reading = logging.getLogger("lth_plugins.ticket")
    level = reading.level
    reading.setLevel(logging.INFO)  # what is left out of a file, and why, is for this person
    try:
        sys.exit(cli.run(lambda: obey(args), __file__, cli.NOTHING_WRITTEN))
    finally:
        reading.setLevel(level)


def obey(args: argparse.Namespace) -> None:
    """Run a command. Where a ticket lacks weights, the error names the option for them."""
    _check_output(args)
    try:
        args.run(args)
    except UnknownWeights:
        given = getattr(args, "weights", None)
        ref = given or getattr(args, "ticket", None) or args.checkpoint
        raise TicketError(
            f"the new masks keep weights that {ref} does not hold, because a ticket file stores "
            "surviving weights only: give the dense ticket that it was pruned from, of a search "
            "its round_00.ticket, as --weights FILE"
        ) from None


def _check_output(args: argparse.Namespace) -> None:
    """Refuse to overwrite an input: a ticket holds less than what it is made of."""
    output = getattr(args, "output", None)
    if output is None or not output.exists():
        return
    for name in ("ticket", "checkpoint", "weights", "mask"):
        given = getattr(args, name, None)
        if given and os.path.exists(given) and output.samefile(given):
            raise ConfigError(
                f"expected another file to write than those that are read, found {output} for "
                "both, which would be lost: name a new one"
            )


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True)

    def add(
        name: str, run: Callable[[argparse.Namespace], None], help: str, *parents: Any
    ) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=help, parents=parents)
        command.set_defaults(run=run)
        return command

    command = add("list", list_, "the tickets that come with the project")
    command.add_argument("--json", action="store_true", help="all of it, for programs")

    command = add("show", show, "what a ticket is, and how dense its layers are")
    command.add_argument("ticket", help="a path, or hf://owner/repo[/file]")
    command.add_argument("--json", action="store_true", help="all of it, for programs")

    command = add("diff", diff, "what two tickets share")
    command.add_argument("first")
    command.add_argument("second")
    command.add_argument("--json", action="store_true", help="all of it, for programs")

    options = _import_options()
    command = add("import", import_, "a checkpoint as a ticket", options)
    command.add_argument("checkpoint", type=Path, metavar="CKPT")
    command.add_argument(
        "--source", required=True, help="its pre-training: imagenet, moco, simclr, …"
    )
    command.add_argument("--out", type=Path, required=True, dest="output", help="the ticket")

    command = add("prune", prune, "prune a ticket or a checkpoint, in one shot", options)
    command.add_argument("checkpoint", metavar="IN", help="a ticket, or a checkpoint")
    command.add_argument("output", type=Path, metavar="OUT", help="the sparser ticket")
    command.add_argument(
        "--sparsity",
        type=_sparsity_option,
        required=True,
        help="the fraction of all prunable weights that is zero in OUT, from 0 to below 1",
    )
    command.add_argument(
        "--criterion",
        default="magnitude",
        help="what weights are ranked by: magnitude (the default), random, or another that needs "
        "no data; those that need data are for lth.prune in Python",
    )
    command.add_argument(
        "--allocation",
        choices=SCOPES,
        default="global",
        help="rank all weights together (global, the default), prune the same fraction of each "
        "layer (layer), or keep Erdős-Rényi-kernel densities (erk)",
    )
    command.add_argument("--seed", type=int, help="of --criterion random (default: 0)")
    command.add_argument("--source", help="the checkpoint's pre-training (default: unknown)")

    command = add("convert", convert, "to and from checkpoints", options)
    command.add_argument("checkpoint", metavar="IN", help="a ticket, or a checkpoint")
    command.add_argument("output", type=Path, metavar="OUT")
    command.add_argument("--to", choices=FORMATS, help="write the ticket in this format")
    command.add_argument("--source", default="unknown", help="the checkpoint's pre-training")

    command = add("perturb", perturb, "disturb its masks or its weights")
    command.add_argument("ticket", metavar="IN", help="a path, or hf://owner/repo")
    command.add_argument("output", type=Path, metavar="OUT")
    command.add_argument(
        "--weights",
        metavar="FILE",
        help="load θ from this ticket first; other masks than its own need the dense ticket that "
        "it was pruned from, because a file stores surviving weights only",
    )
    masks = command.add_mutually_exclusive_group()
    masks.add_argument("--shuffle", action="store_true", help="shuffle the masks of each layer")
    masks.add_argument(
        "--swap",
        type=float,
        metavar="FRACTION",
        help="of each layer's mask entries, 0 to 1, that change places",
    )
    masks.add_argument(
        "--unmask", action="store_true", help="keep all weights; those that IN prunes start at zero"
    )
    command.add_argument(
        "--noise",
        type=float,
        metavar="STRENGTH",
        help="Gaussian noise on kept weights; 1 has the standard deviation of the layer's",
    )
    command.add_argument("--seed", type=int, default=0, help="of what is random (default: 0)")

    command = add("structure", structure, "refill its masks by channels, kernels or N:M")
    command.add_argument("ticket", metavar="IN", help="a path, or hf://owner/repo")
    command.add_argument("output", type=Path, metavar="OUT")
    command.add_argument(
        "--kind",
        choices=STRUCTURES,
        required=True,
        help="channel: output channels inside blocks, which lth.compact removes; channel_l1: as "
        "many, but those with the largest weights, whatever the ticket kept of them; kernel: whole "
        "k×k kernels; nm: N of M consecutive input channels",
    )
    command.add_argument(
        "--weights",
        metavar="FILE",
        help="load θ from this ticket: the dense one that IN was pruned from, because refilling "
        "keeps weights that IN prunes, and a file stores surviving weights only",
    )
    group = command.add_argument_group("of channel, channel_l1 and kernel")
    group.add_argument(
        "--scope",
        choices=BUDGETS,
        help="the budget is what the ticket left in each block or convolution (layer, the "
        "default), or in all of them, which are ranked together (global)",
    )
    group.add_argument("--density", type=float, help="the budget, instead of the ticket's density")
    group.add_argument(
        "--surplus", type=float, help="keep that fraction more than the budget has (refill+)"
    )
    group = command.add_argument_group("of channel and channel_l1")
    group.add_argument("--minimum", type=int, help="channels each convolution keeps (default: 1)")
    group.add_argument("--multiple", type=int, help="keep channels in multiples of this, as of 8")
    group = command.add_argument_group("of nm")
    group.add_argument("-n", type=int, help="how many to keep (default: 2)")
    group.add_argument("-m", type=int, help="of how many (default: 4)")

    command = add("export", export, "the compacted trunk as an ONNX file")
    command.add_argument("ticket", metavar="IN", help="a ticket, or a checkpoint of any host")
    command.add_argument("output", type=Path, metavar="OUT.onnx")
    command.add_argument(
        "--size", type=int, default=224, help="of the images to check it with (default: 224)"
    )
    command.add_argument("--skip-objects", action="store_true", help="as in import")
    command.add_argument("--prefix", help="as in import")

    command = add("push", upload, "upload a ticket to the Hugging Face hub")
    command.add_argument("ticket", help="a path")
    command.add_argument("repo", metavar="OWNER/REPO")
    command.add_argument("--file", metavar="NAME", help="its name there (default: REPO.ticket)")

    return parser.parse_args()


if __name__ == "__main__":
    main()
