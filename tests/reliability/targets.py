"""What reads foreign files, as functions of a file's bytes, for the fuzzer and for hypothesis.

Each target writes the bytes it is given, or something made of them, to a file and has the package
read it. It returns whether that was accepted; `TicketError` is a refusal, and anything else comes
out. Where a checksum or a length would make every mutation the same refusal, what is inside is
mutated instead and the shell around it is right.
"""

import collections
import functools
import io
import json
import pickle
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save as to_safetensors
from torch import nn

from lth_plugins import Masks, Ticket, TicketMeta
from lth_plugins.errors import LthError
from lth_plugins.ticket import ARCHITECTURES, Outside
from lth_plugins.ticket.file import read_digest
from lth_plugins.ticket.foreign.checkpoints import read_checkpoint
from lth_plugins.ticket.foreign.convert import ZEROS, from_checkpoint
from lth_plugins.ticket.hub import HUB, hub_names

ARCH = ARCHITECTURES["resnet18"]
LAYER = "layer1.0.conv1.weight"


@functools.cache
def ticket_bytes() -> bytes:
    """A ticket of a ResNet-18 and a classifier, so sparse that its file is mostly header."""
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: torch.zeros(shape, dtype=torch.long)
        if name.endswith("tracked")
        else torch.rand(shape, generator=generator)
        for name, shape in ARCH.shapes.items()
    }
    masks = Masks(
        {n: torch.rand(s, generator=generator) < 0.0005 for n, s in ARCH.prunable.items()}
    )
    rest = Outside(Masks({"fc.weight": torch.eye(9, 7)}), {"fc.weight": torch.ones(9, 7)})
    meta = TicketMeta(ARCH.name, "test", 5, recipe={"rate": 0.2, "steps": [1, 2]})
    path = Path(folder(), "seed.ticket")
    return Ticket(masks, weights, meta, outside=rest).save(path).read_bytes()


@functools.cache
def folder() -> Path:
    """Where files are written; one for each process."""
    return Path(tempfile.mkdtemp(prefix="targets"))


def checkpoint() -> dict[str, Any]:
    """One of everything that checkpoints hold."""
    weight = torch.arange(24.0).view(2, 3, 4)
    state = collections.OrderedDict(
        {
            "conv1.weight": weight,
            "conv1.view": weight[1, :, 1:],
            "conv1.spread": torch.ones(1).expand(5, 5),
            "conv1.half": torch.ones(3, dtype=torch.float16),
            "conv1.brain": torch.ones(3, dtype=torch.bfloat16),
            "conv1.mask": torch.tensor([True, False]),
            "bn1.num_batches_tracked": torch.tensor(7),
            "bn1.parameter": nn.Parameter(torch.ones(2)),
            "empty": torch.empty(0, 3),
            "complex": torch.ones(2, dtype=torch.complex64),
        }
    )
    state._metadata = collections.OrderedDict({"": {"version": 1}})  # as a module's has
    return {
        "state_dict": state,
        "epoch": 3,
        "best": np.float64(76.1),
        "arrays": {"a": np.arange(6, dtype=">f4").reshape(2, 3).T, "b": np.ones(2, dtype=bool)},
        "optimizer": {"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": [{"lr": 0.1}]},
    }


@functools.cache
def torch_bytes(new: bool) -> bytes:
    buffer = io.BytesIO()
    torch.save(checkpoint(), buffer, _use_new_zipfile_serialization=new)
    return buffer.getvalue()


def pickle_bytes() -> bytes:
    """As detectron2's model zoo has them."""
    arrays = {"stem.conv1.weight": np.ones((2, 3), dtype=np.float32), "n": np.int64(3)}
    return pickle.dumps({"model": arrays, "__author__": "test"}, protocol=2)


def pickled_tensors_bytes() -> bytes:
    """As Python pickles tensors by itself: each a PyTorch file inside."""
    return pickle.dumps(checkpoint()["state_dict"], protocol=4)


def npz_bytes() -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **{"conv1.weight": np.ones((2, 3), dtype=">f4"), "n": np.arange(3)})
    return buffer.getvalue()


def safetensors_bytes() -> bytes:
    tensors = {name: v.clone() for name, v in checkpoint()["state_dict"].items()}
    return to_safetensors(tensors, {"format": "pt"})


@functools.cache
def parts(archive: bytes) -> dict[str, bytes]:
    """The entries of a zip file."""
    with zipfile.ZipFile(io.BytesIO(archive)) as file:
        return {name: file.read(name) for name in file.namelist()}


def with_part(archive: bytes, name: str, content: bytes) -> bytes:
    """A zip file with one entry replaced, and all checksums right."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as file:
        for entry, data in (parts(archive) | {name: content}).items():
            file.writestr(entry, content if entry == name else data)
    return buffer.getvalue()


def split(file: bytes) -> tuple[dict[str, Any], bytes]:
    """The header of a safetensors file, and the data that follows."""
    size = int.from_bytes(file[:8], "little")
    return json.loads(file[8 : 8 + size]), file[8 + size :]


def joined(header: bytes, data: bytes) -> bytes:
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + data


def with_description(text: bytes) -> bytes:
    """The ticket with this in the place of its description."""
    header, data = split(ticket_bytes())
    header["__metadata__"]["lth_plugins"] = text.decode("utf-8", "replace")
    return joined(json.dumps(header).encode(), data)


def with_mask(packed: bytes) -> bytes:
    """The ticket with these bytes as the packed mask of one layer."""
    header, data = split(ticket_bytes())
    header[f"{LAYER}.mask"]["data_offsets"] = [len(data), len(data) + len(packed)]
    start, end = split(ticket_bytes())[0][f"{LAYER}.mask"]["data_offsets"]
    for entry in header.values():  # the data must have no gaps
        offsets = entry.get("data_offsets", [0, 0])
        if offsets[0] >= end:
            entry["data_offsets"] = [offset - (end - start) for offset in offsets]
    return joined(json.dumps(header).encode(), data[:start] + data[end:] + packed)


@functools.cache
def resnet_bytes() -> bytes:
    """An old file, which has no checksums, of a ResNet-18; a number stands for all of each."""
    state = {
        name: torch.tensor(7 if name.endswith("tracked") else 1.0).expand(shape)
        for name, shape in ARCH.shapes.items()
    }
    buffer = io.BytesIO()
    torch.save(state, buffer, _use_new_zipfile_serialization=False)
    return buffer.getvalue()


@functools.cache
def mask_bytes() -> bytes:
    return to_safetensors({LAYER: torch.ones(ARCH.shapes[LAYER], dtype=torch.bool)})


def with_masks(path: Path) -> Ticket:
    good = folder() / "good.pth"
    good.write_bytes(resnet_bytes())
    return from_checkpoint(good, masks=path)


def with_weights(path: Path) -> Ticket:
    good = folder() / "masks.safetensors"
    good.write_bytes(mask_bytes())
    return from_checkpoint(good, weights=path)


def read_as(suffix: str, read: Callable[[Path], Any], content: bytes) -> bool:
    path = folder() / f"mutated{suffix}"
    path.write_bytes(content)
    try:
        read(path)
    except LthError:
        return False
    return True


def resnet(script: bytes) -> bool:
    """A checkpoint of a ResNet-18 that is edited as the bytes say, made a ticket."""
    state: dict[str, Any] = {
        f"encoder_q.{name}": torch.tensor(7 if name.endswith("tracked") else 1.0).expand(shape)
        for name, shape in ARCH.shapes.items()
    }
    names, commands = list(state), iter(script)
    kept: dict[str, Any] = {"masks": None, "prefix": None}
    for what, which in zip(commands, commands, strict=False):
        name = names[which % len(names)]
        value = state.get(name, torch.ones(1))
        match what % 11:
            case 0:
                state.pop(name, None)
            case 1:
                state[name] = torch.ones(()).expand([1 << 20] * (which % 3))
            case 2:
                dtype = [torch.bool, torch.int8, torch.half, torch.double][which % 4]
                state[name] = torch.ones((), dtype=dtype).expand(value.shape)
            case 3:
                state[f"{name}_mask"] = torch.tensor(which % 2 == 0).expand(value.shape)
            case 4:
                state[f"{name}_mask"] = torch.ones(1, dtype=torch.uint8).expand(1 << 30)
            case 5:
                state[name.replace("encoder_q", "encoder_k")] = value
            case 6:
                state[name.removesuffix("weight") + "sparseThreshold"] = torch.full(
                    [which % 3] * 2, which / 64
                )
            case 7:
                state[f"{name}_orig"] = state.pop(name, value)
            case 8:
                state[name] = torch.full((), [float("nan"), 0.0, -1.0][which % 3]).expand(
                    value.shape
                )
            case 9:
                kept["masks"] = ZEROS
            case 10:
                kept["prefix"] = ["encoder_q", "", "state_dict.encoder_k."][which % 3]
    buffer = io.BytesIO()
    torch.save({"state_dict": state}, buffer)
    return read_as(".pth", lambda path: from_checkpoint(path, **kept), buffer.getvalue())


def hub_name(text: bytes) -> bool:
    """What a reference to the hub names stays inside the folder it is put into."""
    try:
        repo, file, pinned = hub_names(text.decode("utf-8", "replace").strip())
    except LthError:
        return False
    inside = Path("/cache", repo, file)
    assert inside.is_relative_to("/cache") and ".." not in inside.parts, inside
    assert pinned is None or len(bytes.fromhex(pinned)) == 32
    return True


def skipping(path: Path) -> Any:
    return read_checkpoint(path, skip_objects=True)


TARGETS: dict[str, tuple[Callable[[bytes], bool], Callable[[], bytes]]] = {
    "ticket": (functools.partial(read_as, ".ticket", Ticket.load), ticket_bytes),
    "ticket's description": (
        lambda data: read_as(".ticket", Ticket.load, with_description(data)),
        lambda: split(ticket_bytes())[0]["__metadata__"]["lth_plugins"].encode(),
    ),
    "ticket's mask": (
        lambda data: read_as(".ticket", Ticket.load, with_mask(data)),
        lambda: _mask_bytes(),
    ),
    "ticket's digest": (functools.partial(read_as, ".ticket", read_digest), ticket_bytes),
    "zip": (functools.partial(read_as, ".pth", read_checkpoint), lambda: torch_bytes(True)),
    "pickle in a zip": (
        lambda data: read_as(
            ".pth", skipping, with_part(torch_bytes(True), "archive/data.pkl", data)
        ),
        lambda: parts(torch_bytes(True))["archive/data.pkl"],
    ),
    "old": (functools.partial(read_as, ".pth", read_checkpoint), lambda: torch_bytes(False)),
    "pkl": (functools.partial(read_as, ".pkl", skipping), pickle_bytes),
    "pickled tensors": (functools.partial(read_as, ".pkl", skipping), pickled_tensors_bytes),
    "npz": (functools.partial(read_as, ".npz", read_checkpoint), npz_bytes),
    "array in an npz": (
        lambda data: read_as(".npz", read_checkpoint, with_part(npz_bytes(), "n.npy", data)),
        lambda: parts(npz_bytes())["n.npy"],
    ),
    "safetensors": (functools.partial(read_as, ".safetensors", read_checkpoint), safetensors_bytes),
    "resnet": (resnet, lambda: bytes([10, 0])),
    "masks": (functools.partial(read_as, ".safetensors", with_masks), mask_bytes),
    "weights": (functools.partial(read_as, ".pth", with_weights), resnet_bytes),
    "hub name": (hub_name, lambda: f"{HUB}owner/repo/a.ticket@sha256:{'0a' * 32}".encode()),
}
"""By name: what reads, and bytes that it accepts, to start from."""


def _mask_bytes() -> bytes:
    header, data = split(ticket_bytes())
    start, end = header[f"{LAYER}.mask"]["data_offsets"]
    return data[start:end]
