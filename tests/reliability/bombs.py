"""Small files that ask for more memory than they have bytes for, or than there is.

Run as a script it reads each of them, with 100 MB to spare, and prints what came out, the
milliseconds of processor time, and the MB by which the process's largest size grew.
"""

import io
import json
import os
import pickle
import resource
import signal
import struct
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import zstandard

from lth_plugins import Ticket
from lth_plugins.errors import LthError
from lth_plugins.ticket.foreign.checkpoints import read_checkpoint
from lth_plugins.ticket.foreign.convert import from_checkpoint
from lth_plugins.ticket.on_disk import MOST_HEADER
from tests.reliability import targets

SPARE = 100 << 20
HUGE = 1 << 40


def packed(size: int, **options: Any) -> bytes:
    """A zstandard frame of zeros."""
    compressor = zstandard.ZstdCompressor(**options).compressobj()
    block = bytes(1 << 20)
    return b"".join(compressor.compress(block) for _ in range(size >> 20)) + compressor.flush()


def declared(size: int) -> bytes:
    """The beginning of a frame that says how large its content is (RFC 8878, section 3.1.1)."""
    return struct.pack("<IBBQ", zstandard.MAGIC_NUMBER, 0xC0, 0x58, size) + bytes(8)


def with_shape(file: bytes, name: str, shape: list[int]) -> bytes:
    header, data = targets.split(file)
    header[name]["shape"] = shape
    return targets.joined(json.dumps(header).encode(), data)


def large_rest(kept: int, stored: int) -> bytes:
    """As many weights outside the trunk as there may be, of which the first ones are kept."""
    header, data = targets.split(targets.ticket_bytes())
    description = json.loads(header["__metadata__"]["lth_plugins"])
    description["rest"] = [["fc.weight", [1 << 13, 1 << 14]]]
    header["__metadata__"]["lth_plugins"] = json.dumps(description)
    frame = zstandard.ZstdCompressor().compress(bytes(kept))
    header["rest.fc.weight.mask"] = {"dtype": "U8", "shape": [len(frame)]}
    header["rest.fc.weight"] |= {"shape": [stored]}
    parts, at = [], 0
    for name, entry in header.items():
        if name != "__metadata__":
            start, end = entry.get("data_offsets", (0, 0))
            content = {"rest.fc.weight.mask": frame, "rest.fc.weight": bytes(4 * stored)}
            part = content.get(name, data[start:end])
            entry["data_offsets"] = [at, at + len(part)]
            at += len(part)
            parts.append(part)
    return targets.joined(json.dumps(header).encode(), b"".join(parts))


def with_empty(name: str, shape: list[int]) -> bytes:
    """Safetensors of a tensor without elements."""
    entry = {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}
    return targets.joined(json.dumps({name: entry}).encode(), b"")


def zipped(pickled: bytes, method: int = zipfile.ZIP_STORED, storage: bytes = bytes(4)) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method, compresslevel=1) as file:
        file.writestr("archive/data.pkl", pickled)
        file.writestr("archive/data/0", storage)
    return buffer.getvalue()


def overlapping() -> bytes:
    """A zip file with a thousand storages that are all the same megabyte."""
    file = bytearray(zipped(tensor(1 << 18), storage=bytes(1 << 20)))
    end = file.rindex(b"PK\5\6")
    start = int.from_bytes(file[end + 16 : end + 20], "little")
    entry = file[file.rindex(b"PK\1\2") : end]
    more = b"".join(entry.replace(b"data/0", b"data/%x" % (n % 16)) for n in range(1000))
    size, count = end - start + len(more), 1002
    tail = file[end:]
    struct.pack_into("<HHII", tail, 8, count, count, size, start)
    return bytes(file[:end] + more + tail)


class Call:
    """Is pickled as a call."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


def hexed(depth: int) -> bytes:
    """A text that is encoded again and again, twice as long each time."""
    return (
        b"c_codecs\nencode\n" * depth + b"\x8e" + struct.pack("<Q", 1 << 10) + b"0" * (1 << 10)
    ) + b"\x8c\x03hex\x86R" * depth


def tensor(numel: int, shape: tuple[int, ...] = (4,), stride: tuple[int, ...] = (1,)) -> bytes:
    """A pickle of a tensor in a storage that is said to have so many elements."""
    buffer = io.BytesIO()
    pickler = Pickler(buffer, protocol=2)
    pickler.dump({"w": Call(torch._utils._rebuild_tensor_v2, Said(numel), 0, shape, stride)})
    return buffer.getvalue()


def again(argument: bytes, function: bytes, arguments: bytes, times: int) -> Callable[[], bytes]:
    """A list of what a function makes, each time anew, of one object, which is number 0."""
    call = b"h\1" + arguments + b"R"
    return lambda: argument + b"q\x000" + function + b"q\x010](" + call * times + b"e."


def arrays() -> bytes:
    """A list of arrays that have the same bytes, object 0."""
    made = b"h\1h\2K\0\x85C\1b\x87R"
    state = b"(K\1J" + struct.pack("<i", 10**5) + b"\x85h\3\x89h\0tb"
    begin = b"B" + struct.pack("<I", 10**5) + bytes(10**5) + b"q\x000"
    begin += b"cnumpy._core.multiarray\n_reconstruct\nq\x010cnumpy\nndarray\nq\x020"
    begin += b"cnumpy\ndtype\nX\2\0\0\0u1\x85Rq\x030"
    return begin + b"](" + (made + state) * 4000 + b"e."


def unicode(length: int) -> bytes:
    return b"X" + struct.pack("<I", length) + b"a" * length


PAIRS = b"](" + b"".join(b"X\6\0\0\0%06dN\x86" % n for n in range(10**4)) + b"e"
ORDERED, ENCODE = b"ccollections\nOrderedDict\n", b"c_codecs\nencode\n"


class Said:
    def __init__(self, numel: int) -> None:
        self.numel = numel


class Pickler(pickle.Pickler):
    def persistent_id(self, value: Any) -> Any:
        if isinstance(value, Said):
            return ("storage", torch.FloatStorage, "0", "cpu", value.numel)
        return None


def spread(edits: dict[str, torch.Tensor]) -> bytes:
    """A checkpoint of a ResNet-18 with more entries, that has a number where others have many."""
    state = {n: torch.ones(()).expand(s) for n, s in targets.ARCH.shapes.items()}
    buffer = io.BytesIO()
    torch.save(state | edits, buffer)
    return buffer.getvalue()


def old(pickled: bytes) -> bytes:
    """A file in PyTorch's old format with one storage of a byte."""
    first = torch.serialization.MAGIC_NUMBER, torch.serialization.PROTOCOL_VERSION, {}
    head = b"".join(pickle.dumps(part, protocol=2) for part in first)
    return head + pickled + pickle.dumps(["0"], protocol=2) + struct.pack("<q", HUGE) + b"0"


def nested(depth: int) -> bytes:
    """Dictionaries in each other, by a name of which there are many copies."""
    name = b"\x8c\xff" + b"n" * 255 + b"\x94"  # memo 0
    return name + b"0" + b"}" + b"h\0}" * depth + b"s" * depth + b"."


def shape(numel: int) -> torch.Tensor:
    return torch.ones(1).expand(numel)


BOMBS: dict[str, tuple[str, Callable[[], bytes]]] = {
    "a mask that says it is 1 TB": (".ticket", lambda: targets.with_mask(declared(HUGE))),
    "a mask of 256 MB that does not say so": (
        ".ticket",
        lambda: targets.with_mask(packed(1 << 28)),
    ),
    "a mask in a window of 2 GB": (
        ".ticket",
        lambda: targets.with_mask(struct.pack("<IBBH", zstandard.MAGIC_NUMBER, 0x40, 0xA8, 9)),
    ),
    "134 million weights kept, two stored": (".ticket", lambda: large_rest(1 << 27, 2)),
    "134 million weights, none kept": (".ticket", lambda: large_rest(0, 0)),
    "a ticket's header of 2^63 bytes": (".ticket", lambda: struct.pack("<Q", 1 << 63) + b"{}"),
    "a ticket's header of 9 MB": (
        ".ticket",
        lambda: struct.pack("<Q", MOST_HEADER + 1) + b'{"a":' + b"[" * MOST_HEADER,
    ),
    "a ticket's entry of 10^12 elements": (
        ".ticket",
        lambda: with_shape(targets.ticket_bytes(), "conv1.weight", [10**12]),
    ),
    "safetensors of 10^12 elements": (
        ".safetensors",
        lambda: with_shape(targets.safetensors_bytes(), "conv1.weight", [10**12]),
    ),
    "safetensors of 0 times 2^63 elements": (
        ".safetensors",
        lambda: with_empty("conv1.weight", [0, 1 << 63]),
    ),
    "a safetensors header of 2^63 bytes": (
        ".safetensors",
        lambda: struct.pack("<Q", 1 << 63) + b"{}",
    ),
    "a compressed pickle of 128 MB": (
        ".pth",
        lambda: zipped(b"N" * (1 << 27), zipfile.ZIP_DEFLATED),
    ),
    "a compressed storage of 128 MB": (
        ".pth",
        lambda: zipped(tensor(1 << 25), zipfile.ZIP_DEFLATED, bytes(1 << 27)),
    ),
    "a thousand entries that are the same": (".pth", overlapping),
    "a storage of 2^40 elements": (".pth", lambda: zipped(tensor(HUGE))),
    "a tensor beyond its storage": (".pth", lambda: zipped(tensor(1, (HUGE,)))),
    "an old storage of 2^40 elements": (".pth", lambda: old(tensor(HUGE))),
    "an old storage of 2^62 elements": (".pth", lambda: old(tensor(1 << 62))),
    "a list made a dictionary 700 times": (".pkl", again(PAIRS, ORDERED, b"h\0\x85", 700)),
    "a text made bytes 4,000 times": (
        ".pkl",
        again(unicode(10**5), ENCODE, b"h\0X\6\0\0\0latin1\x86", 4000),
    ),
    "bytes made an array 4,000 times": (".pkl", arrays),
    "a bytearray of 16 GB": (
        ".pkl",
        lambda: pickle.dumps({"a": Call(bytearray, 1 << 34)}, protocol=2),
    ),
    "a buffer of 16 GB": (".pkl", lambda: b"\x96" + struct.pack("<Q", 1 << 34) + b"."),
    "an array of 16 GB": (
        ".pkl",
        lambda: (
            b"}\x8c\1acnumpy._core.multiarray\n_reconstruct\n"
            b"cnumpy\nndarray\nJ\0\0\0\x7f\x85C\1b\x87Rs."
        ),
    ),
    "bytes that double 30 times": (".pkl", lambda: b"}\x8c\1a" + hexed(30) + b"s."),
    "an object with number 2^31 - 1": (".pkl", lambda: b"}r" + struct.pack("<I", (1 << 31) - 1)),
    "a key nested 100,000 times": (".pkl", lambda: b"})" + b"\x85" * 100_000 + b"Ns."),
    "a key that doubles 60 times": (".pkl", lambda: b"})" + b"2\x86" * 60 + b"Ns."),
    "dictionaries nested 30,000 times": (".pkl", lambda: nested(30_000)),
    "a mask spread over 2^40 weights": (
        ".pth",
        lambda: spread({"layer1.0.conv1.weight_mask": shape(HUGE)}),
    ),
    "a threshold spread over 2^40 weights": (
        ".pth",
        lambda: spread({"layer1.0.conv1.sparseThreshold": shape(HUGE)}),
    ),
}
"""By what they are: a suffix, and the content."""


def read(path: Path) -> None:
    if path.suffix == ".ticket":
        Ticket.load(path)
    elif path.suffix == ".pth":
        from_checkpoint(path)
    else:
        read_checkpoint(path)


def main(folder: Path) -> None:
    for name, (suffix, _) in BOMBS.items():
        child = os.fork()  # from a process that has imported everything and read nothing
        if child == 0:
            signal.alarm(120)  # what does not end is not refused
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            path = folder / f"bomb{suffix}"
            path.write_bytes((folder / name).read_bytes())
            limit = pages * resource.getpagesize() + SPARE
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            start = time.process_time()
            try:
                read(path)
                outcome = "accepted"
            except LthError:
                outcome = "refused"
            took = 1000 * (time.process_time() - start)
            grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
            print(f"{outcome}\t{name}\t{took:.0f} ms\t{grown:.0f} MB", flush=True)
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        if status:
            print(f"ended with status {status}\t{name}", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
