"""Look at tickets, make, convert and disturb them.

lth ticket list                      the tickets that come with the project
lth ticket show F                    what a ticket is, and how dense each of its layers
lth ticket diff A B                  what two tickets share
lth ticket import CKPT --source moco --out F
                                    a checkpoint as a ticket: pre-trained weights, sparse models,
                                    masks (docs/import.md)
lth ticket prune IN OUT --sparsity 0.59
                                    a sparser ticket of a ticket or a checkpoint, in one shot
lth ticket convert IN OUT --to …     a ticket as another framework's checkpoint (--to), or a
                                    checkpoint as a ticket, as import does (OUT ends in .ticket)
lth ticket transplant IN OUT --weights OTHER
                                    its masks over another network's weights: with the channels
                                    aligned (--align), or of another depth (--blocks)
lth ticket perturb IN OUT --swap 0.3 a ticket with swapped mask entries, or noise on its weights:
                                    is the metric sensitive to it?
lth ticket structure IN OUT --kind channel --weights round_00.ticket
                                    masks whose zeros can be skipped, by refilling
                                    (docs/structured.md)
lth ticket pool IN OUT --with A B    a trained ticket (keep=trained), interpolated with neighbouring
                                    rounds' (docs/pools.md)
lth ticket export IN OUT.onnx        the trunk of a ticket or of any host's checkpoint as an ONNX
                                    file, without its dead channels
lth ticket push F OWNER/REPO         upload a ticket to the Hugging Face hub
"""

import argparse
import importlib
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lth_plugins import cli
from lth_plugins.errors import ConfigError, TicketError, UnknownWeights


def values_option(text: str) -> tuple[float, ...]:
    """Parse --mean and --std: numbers with commas between them."""
    try:
        return tuple(float(value) for value in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"expected one number, or one per band with commas between them, found {text!r:.60}"
        ) from None


def sparsity_option(text: str) -> float:
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


def _import_options() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(add_help=False)
    group = options.add_argument_group("from a checkpoint to a ticket")
    group.add_argument(
        "--mask",
        metavar="FILE",
        help="a file of masks; or 'zeros': what is exactly zero is pruned",
    )
    group.add_argument(
        "--weights", type=Path, metavar="FILE", help="θ, where the checkpoint is only for its masks"
    )
    pixels = group.add_mutually_exclusive_group()
    pixels.add_argument(
        "--pixels",
        metavar="INPUT",
        help="the input that the network expects: imagenet, RGB with ImageNet mean and standard "
        "deviation; unit-range, RGB in 0 … 1 (Google's simCLR); or caffe, BGR minus the mean, with "
        "the stride in the first 1x1 convolution (weights from Caffe, as in detectron2's model "
        "zoo); default: by the source",
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
            type=values_option,
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


def _align_options() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(add_help=False)
    group = options.add_argument_group("whose channels are in another order")
    group.add_argument(
        "--align",
        action="store_true",
        help="permute the first network's channels to the order of the second's, in which its "
        "weights, or with --images its activations, are most alike",
    )
    group.add_argument(
        "--between",
        nargs=2,
        metavar=("FIRST", "SECOND"),
        help="the networks to compare for it, by default the two tickets: the dense tickets that "
        "they were pruned from, because a file stores surviving weights only",
    )
    group.add_argument(
        "--images",
        type=Path,
        metavar="FOLDER",
        help="compare activations over images of this folder instead of weights",
    )
    group.add_argument("--size", type=int, help="of the images, pixels (default: 224)")
    return options


def main(argv: Sequence[str] | None = None, prog: str = "lth ticket") -> int:
    args = make_parser(prog).parse_args(argv)
    logging.basicConfig(format="%(message)s")
    reading = logging.getLogger("lth_plugins.ticket")
    level = reading.level
    reading.setLevel(logging.INFO)  # what is left out of a file, and why, is for this person
    try:
        return cli.run(lambda: obey(args), prog, cli.NOTHING_WRITTEN)
    finally:
        reading.setLevel(level)


def obey(args: argparse.Namespace) -> None:
    """Run a command. Where a ticket lacks weights, the error names the option for them."""
    _check_output(args)
    module, _, function = args.run.partition(".")
    try:
        getattr(importlib.import_module(f"{__name__}.{module}"), function)(args)
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
    read = [getattr(args, name, None) for name in ("ticket", "checkpoint", "weights", "mask")]
    for name in ("neighbours", "between"):
        read += getattr(args, name, None) or ()
    for given in read:
        if given and os.path.exists(given) and output.samefile(given):
            raise ConfigError(
                f"expected another file to write than those that are read, found {output} for "
                "both, which would be lost: name a new one"
            )


def make_parser(prog: str) -> argparse.ArgumentParser:
    parser = cli.command_parser(__doc__, "lth ticket", prog)
    commands = parser.add_subparsers(required=True)

    def add(name: str, run: str, help: str, *parents: Any) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=help, parents=parents)
        command.set_defaults(run=run)
        return command

    def add_files(command: argparse.ArgumentParser) -> None:
        command.add_argument("ticket", metavar="IN", help="a path, or hf://owner/repo")
        command.add_argument("output", type=Path, metavar="OUT")

    command = add("list", "show.list_", "the tickets that come with the project")
    command.add_argument("--json", action="store_true", help="all of it, for programs")

    command = add("show", "show.show", "what a ticket is, and how dense its layers are")
    command.add_argument("ticket", help="a path, or hf://owner/repo[/file]")
    command.add_argument("--json", action="store_true", help="all of it, for programs")

    align_options = _align_options()
    command = add("diff", "show.diff", "what two tickets share", align_options)
    command.add_argument("first")
    command.add_argument("second")
    command.add_argument("--json", action="store_true", help="all of it, for programs")

    options = _import_options()
    command = add("import", "make.import_", "a checkpoint as a ticket", options)
    command.add_argument("checkpoint", type=Path, metavar="CKPT")
    command.add_argument(
        "--source", required=True, help="its pre-training: imagenet, moco, simclr, …"
    )
    command.add_argument("--out", type=Path, required=True, dest="output", help="the ticket")

    command = add("prune", "make.prune", "prune a ticket or a checkpoint, in one shot", options)
    command.add_argument("checkpoint", metavar="IN", help="a ticket, or a checkpoint")
    command.add_argument("output", type=Path, metavar="OUT", help="the sparser ticket")
    command.add_argument(
        "--sparsity",
        type=sparsity_option,
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
        metavar="HOW",
        default="global",
        help="rank all weights together (global, the default), prune the same fraction of each "
        "layer (layer), or keep Erdős-Rényi-kernel densities (erk)",
    )
    command.add_argument("--seed", type=int, help="of --criterion random (default: 0)")
    command.add_argument("--source", help="the checkpoint's pre-training (default: unknown)")

    command = add("convert", "make.convert", "to and from checkpoints", options)
    command.add_argument("checkpoint", metavar="IN", help="a ticket, or a checkpoint")
    command.add_argument("output", type=Path, metavar="OUT")
    command.add_argument(
        "--to",
        metavar="FORMAT",
        help="write the ticket for torchvision, timm, mmseg, detectron2 or torch-prune",
    )
    command.add_argument("--source", default="unknown", help="the checkpoint's pre-training")

    command = add(
        "transplant",
        "transplant.transplant",
        "lay its masks over another network's weights",
        align_options,
    )
    add_files(command)
    command.add_argument(
        "--weights",
        required=True,
        metavar="OTHER",
        help="the ticket of the other network, as a rule a dense one",
    )
    command.add_argument(
        "--blocks",
        metavar="ORDER",
        help="for another depth of the same architecture, how the blocks of a stage but its first "
        "are replicated or dropped: as a sequence (append: 1 2 1 2) or each where it is "
        "(interpolate: 1 1 2 2)",
    )

    command = add("perturb", "change.perturb", "disturb its masks or its weights")
    add_files(command)
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

    command = add("structure", "change.structure", "refill its masks by channels, kernels or N:M")
    add_files(command)
    command.add_argument(
        "--kind",
        metavar="KIND",
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
        metavar="WHERE",
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

    command = add(
        "pool", "pool.pool", "interpolate a trained ticket with those of neighbouring rounds"
    )
    command.add_argument(
        "ticket", type=Path, metavar="IN", help="the round_KK.trained.ticket in a search's folder"
    )
    command.add_argument("output", type=Path, metavar="OUT", help="as sparse, and no worse")
    command.add_argument(
        "--with",
        type=Path,
        nargs="+",
        required=True,
        dest="neighbours",
        metavar="FILE",
        help="trained tickets of other rounds of the same search; the nearest are tried first",
    )

    command = add("export", "deploy.export", "the compacted trunk as an ONNX file")
    command.add_argument("ticket", metavar="IN", help="a ticket, or a checkpoint of any host")
    command.add_argument("output", type=Path, metavar="OUT.onnx")
    command.add_argument(
        "--size", type=int, default=224, help="of the images to check it with (default: 224)"
    )
    command.add_argument("--skip-objects", action="store_true", help="as in import")
    command.add_argument("--prefix", help="as in import")

    command = add("push", "deploy.upload", "upload a ticket to the Hugging Face hub")
    command.add_argument("ticket", help="a path")
    command.add_argument("repo", metavar="OWNER/REPO")
    command.add_argument("--file", metavar="NAME", help="its name there (default: REPO.ticket)")
    command.add_argument("--dry-run", action="store_true", help="only print its card")
    group = command.add_argument_group("of a card that is made, where none is beside the ticket")
    group.add_argument("--license", metavar="ID", help="the hub's identifier, such as apache-2.0")
    group.add_argument(
        "--dataset",
        action="append",
        default=[],
        metavar="NAME",
        help="what it was found on, by its name on the hub; may be given again",
    )
    group.add_argument(
        "--base-model", metavar="OWNER/REPO", help="the model on the hub that it was pruned from"
    )

    return parser
