"""Moving masks to another network: transplant, and the alignment that diff reports, too."""

import argparse
from pathlib import Path

import torch
from torch import Tensor
from torchvision import transforms as T
from torchvision.datasets.folder import IMG_EXTENSIONS

from lth_plugins import ConfigError, RunError, Ticket
from lth_plugins.commands.ticket.written import wrote
from lth_plugins.ticket import InputSpec
from lth_plugins.ticket.transplant import Alignment, align
from lth_plugins.ticket.transplant import transplant as transplanted
from lth_plugins.training.images import evenly_spaced, read_image
from lth_plugins.training.loader import input_transform

IMAGES = 64
"""How many of the images are looked at: their activations are in memory together."""


def transplant(args: argparse.Namespace) -> None:
    ticket, onto = Ticket.load(args.ticket), Ticket.load(args.weights)
    alignment = alignment_of(args, ticket, onto)
    found = transplanted(ticket, onto, alignment, args.blocks)
    found.save(args.output)
    if alignment is not None:
        print(f"aligned     {told(alignment)}")
    wrote(args.output)


def alignment_of(args: argparse.Namespace, first: Ticket, second: Ticket) -> Alignment | None:
    """The alignment that --align asks for, of two tickets or of those --between names."""
    if not args.align:
        for option in ("between", "images", "size"):
            if getattr(args, option) is not None:
                raise ConfigError(f"--{option} says how to align: add --align, or leave it out")
        return None
    if args.size is not None and args.images is None:
        raise ConfigError("--size is of the --images: add them, or leave it out")
    if args.size is not None and args.size < 32:
        raise ConfigError(f"expected --size of 32 pixels or more, found {args.size}")
    if args.between is not None:
        first, second = (Ticket.load(ref) for ref in args.between)
    images = None
    if args.images is not None:
        folder, size = args.images, args.size or 224
        images = (_images(folder, size, first.meta.input), _images(folder, size, second.meta.input))
    return align(first, second, images)


def told(alignment: Alignment) -> str:
    """In a line, how an alignment went."""
    match = alignment.match
    measure = "cosine of the weights" if match.by == "weights" else "mean correlation"
    return (
        f"by {match.by}: {measure} {match.before:.3f} before, {match.after:.3f} after; "
        f"{100 * alignment.moved:.0f} % of the channels change places"
    )


def _images(folder: Path, size: int, spec: InputSpec) -> Tensor:
    """Images of a folder as a network expects them, [N, 3, size, size]."""
    paths = sorted(
        p for p in folder.rglob("*") if p.suffix.lower() in IMG_EXTENSIONS and p.is_file()
    )
    if not paths:
        raise RunError(f"expected images in {folder}, found none: give another folder")
    change = T.Compose([T.Resize(size), T.CenterCrop(size), input_transform(spec)])
    return torch.stack([change(read_image(paths[k])) for k in evenly_spaced(len(paths), IMAGES)])
