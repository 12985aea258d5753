"""The ticket file: its size beside the masks' entropy and the paper's files, and its speed."""

import math
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
import torchvision
from torch import Tensor, nn

import lth_plugins as lth
from benchmarks.measure import Run, in_turns
from benchmarks.peers import mask_as_torch, save_pair, zipped
from benchmarks.report import Row, at_least, at_most
from benchmarks.setting import BYTES, Setting, make_ticket
from lth_plugins import Ticket

PEER = "torch.load and prune.custom_from_mask"


def sizes(setting: Setting) -> Iterator[Row]:
    """Bytes of tickets of a network as it is initialised."""
    state = _state(setting.arch)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for rounds in setting.stored:
            ticket = _ticket(state, rounds, setting.arch)
            size = ticket.save(folder / "a.ticket").stat().st_size
            pair = save_pair(state, ticket.masks, folder)
            both = sum(path.stat().st_size for path in pair)
            sparse = save_pair(ticket.sparse_weights(), ticket.masks, folder)
            deflated = zipped(sparse, folder / "pair.zip")
            what = f"{setting.arch} at {100 * ticket.sparsity:.2f} %"
            bound = entropy_bound(ticket)
            yield Row(
                f"file of {what} / its bound",
                f"{size / 1e6:.3f} MB",
                f"{bound / 1e6:.3f} MB (entropy of the masks, 4 B per survivor, BN, stem)",
                size / bound,
                at_most(1.05),
                f"{size - bound:.0f} B above it",
            )
            yield Row(
                f"the paper's pair of files / file of {what}",
                f"{size / 1e6:.3f} MB",
                f"{both / 1e6:.1f} MB; zipped, pruned weights at zero: {deflated / 1e6:.2f} MB "
                f"= {deflated / size:.2f} ×",
                both / size,
                at_least(25) if rounds == 15 else None,
            )


def entropy_bound(ticket: Ticket) -> float:
    """Layer-wise entropy of the masks, 4 bytes per survivor, stem and BN; in bytes."""
    bits = 0.0
    for name, density in ticket.masks.densities().items():
        if 0 < density < 1:
            entropy = -density * math.log2(density) - (1 - density) * math.log2(1 - density)
            bits += entropy * ticket.masks[name].numel()
    others = sum(v.numel() for name, v in ticket.weights.items() if name not in ticket.masks)
    return bits / 8 + BYTES * (ticket.masks.kept + others)


def loading(setting: Setting) -> Iterator[Row]:
    """Save, load, and load onto a model."""
    state = _state(setting.arch)
    for rounds in setting.stored[:2]:
        with tempfile.TemporaryDirectory() as name:
            yield from _loading(_ticket(state, rounds, setting.arch), state, Path(name), setting)


def _loading(
    ticket: Ticket, state: Mapping[str, Tensor], folder: Path, setting: Setting
) -> Iterator[Row]:
    path, pair = folder / "a.ticket", save_pair(state, ticket.masks, folder)
    ticket.save(path)

    def model() -> nn.Module:
        return torchvision.models.get_model(setting.arch)

    def load_and_attach() -> Run:
        fresh = model()
        return lambda: lth.attach(fresh, Ticket.load(path))

    def load_as_torch() -> Run:
        fresh = model()

        def run() -> None:
            weights, masks = (torch.load(file, weights_only=True) for file in pair)
            fresh.load_state_dict(weights)
            mask_as_torch(fresh, masks)

        return run

    def save() -> Run:
        unsaved = make_ticket(ticket.weights, ticket.masks, setting.arch)  # without a digest yet
        return lambda: unsaved.save(folder / "b.ticket")

    at = f"{setting.arch} at {100 * ticket.sparsity:.2f} %"
    peers = {
        "save": (
            "torch.save of both files",
            lambda: lambda: save_pair(state, ticket.masks, folder),
        ),
        "load": ("torch.load of both files", lambda: lambda: [torch.load(f) for f in pair]),
        "load + attach": (PEER, load_as_torch),
    }
    ways = {
        "save": save,
        "load": lambda: lambda: Ticket.load(path),
        "load + attach": load_and_attach,
    }
    written = path.stat().st_size
    dense = sum(value.nbytes for value in ticket.weights.values())
    for name, way in ways.items():
        peer, theirs = peers[name]
        times = in_turns({"ours": way, peer: theirs}, setting.repeats)
        ours = times["ours"]
        # The least that goes through memory: the file and its tensors.
        limit = setting.against_moving(written + dense, ours.median)
        target = at_least(1) if name == "load + attach" else None
        yield Row(
            f"{name}, {at}",
            str(ours),
            f"{times[peer]} ({peer})",
            times[peer].over(ours),
            target,
            limit,
            "survivors are decoded and put in their places; the peer's file has them there",
        )
        if target is not None:
            half = at_most(0.5)
            yield Row(f"{name}, {at}, seconds", str(ours), "–", ours.median, half, limit, unit="s")


def _state(arch: str) -> dict[str, Tensor]:
    torch.manual_seed(0)
    return dict(torchvision.models.get_model(arch).state_dict())


def _ticket(state: Mapping[str, Tensor], rounds: int, arch: str) -> Ticket:
    return make_ticket(state, lth.prune(state, 1 - 0.8**rounds), arch)
