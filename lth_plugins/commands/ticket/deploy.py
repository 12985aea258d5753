"""Handing a ticket on: export and push."""

import argparse
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from lth_plugins import ConfigError, Ticket, TicketCatalog, TicketError, compact
from lth_plugins.commands.ticket.written import wrote
from lth_plugins.deploy.onnx import Trunk, check_full_width, export_onnx, resnet
from lth_plugins.ticket.card import About, card_of
from lth_plugins.ticket.foreign.checkpoints import read_checkpoint
from lth_plugins.ticket.hub import HUB, SUFFIX, push


def export(args: argparse.Namespace) -> None:
    path = Path(args.ticket)
    if path.suffix != SUFFIX and (path.is_file() or path.is_dir()):
        state: Mapping[str, Tensor] = read_checkpoint(path, args.skip_objects)
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
    wrote(args.output)
    print(f"onnxruntime's outputs are within {off:.1g} of PyTorch's, relative to the largest")


def upload(args: argparse.Namespace) -> None:
    about = About(args.license, tuple(args.dataset), args.base_model)
    ticket = Ticket.load(args.ticket)
    ref = f"{HUB}{args.repo}" + (f"/{args.file}" if args.file else "")
    found = TicketCatalog.find(args.ticket)
    card = card_of(ticket, ref, found if isinstance(found, Path) else None, about)
    if args.dry_run:
        print(card)
        return
    print(f"uploaded: {push(ticket, args.repo, args.file, card)} loads it")
