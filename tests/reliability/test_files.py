"""Files from strangers: whatever they hold, they are read or refused, and nothing else happens."""

import contextlib
import io
import json
import os
import pickle
import subprocess
import sys
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from lth_plugins import Ticket, TicketCatalog, TicketError
from lth_plugins.pretrain.find import read_weights
from lth_plugins.ticket import Choice
from lth_plugins.ticket.file import read_digest
from lth_plugins.ticket.foreign.checkpoints import read_checkpoint
from lth_plugins.ticket.foreign.convert import from_checkpoint
from lth_plugins.transfer.run import read_model
from tests.reliability import targets
from tests.reliability.bombs import BOMBS, ORDERED, PAIRS
from tests.reliability.targets import TARGETS

SLOW = ("ticket", "ticket's description", "ticket's mask", "resnet", "masks", "weights")
EDITS = st.lists(
    st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 4), st.binary(max_size=4)),
    min_size=1,
    max_size=4,
)


def edited(content: bytes, edits: list[tuple[float, int, bytes]]) -> bytes:
    """Some bytes put in the place of some others; often in the first hundred."""
    for where, removed, put in edits:
        size = len(content) if where < 0.5 else min(len(content), 100)
        at = int(2 * where * size) % max(size, 1)
        content = content[:at] + put + content[at + removed :]
    return content


@pytest.mark.parametrize("target", TARGETS)
def test_whatever_is_changed_in_a_file_only_ticket_errors_come_out(target: str) -> None:
    read, make = TARGETS[target]
    seed = make()
    assert read(seed)

    @given(EDITS)
    @settings(max_examples=15 if target in SLOW else 100)
    def try_one(edits: list[tuple[float, int, bytes]]) -> None:
        read(edited(seed, edits))

    try_one()


@pytest.mark.parametrize("target", ["ticket", "zip", "old", "pkl", "safetensors"])
def test_a_file_that_ends_early_is_refused_wherever_it_ends(target: str) -> None:
    read, make = TARGETS[target]
    whole = make()
    header = 8 + int.from_bytes(whole[:8], "little") if target in ("ticket", "safetensors") else 64
    lengths = {*range(10), *range(header - 1, header + 2), len(whole) // 2, len(whole) - 1}
    accepted = [n for n in sorted(lengths) if n < len(whole) and read(whole[:n])]
    assert not accepted


def test_what_a_checkpoint_holds_is_what_pytorch_reads(tmp_path: Path) -> None:
    for new in (True, False):
        path = tmp_path / "a.pth"
        path.write_bytes(targets.torch_bytes(new))
        expected = torch.load(path, weights_only=False)
        read = read_checkpoint(path)
        names = {f"state_dict.{n}" for n, v in expected["state_dict"].items() if not v.is_complex()}
        assert read.keys() == names | {"arrays.a", "arrays.b", "optimizer.state.0.step"}
        for name in names:
            value = expected["state_dict"][name.removeprefix("state_dict.")].detach()
            assert torch.equal(read[name], value) and read[name].dtype == value.dtype
        for name, value in expected["arrays"].items():
            assert torch.equal(read[f"arrays.{name}"], torch.tensor(value.tolist()))


# --- no code runs


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.mark), "w")


def saved(new: bool) -> Callable[[Path], bytes]:
    def make(mark: Path) -> bytes:
        buffer = io.BytesIO()
        content = {"w": torch.ones(1), "payload": Payload(mark)}
        torch.save(content, buffer, _use_new_zipfile_serialization=new)
        return buffer.getvalue()

    return make


def pickled(protocol: int) -> Callable[[Path], bytes]:
    return lambda mark: pickle.dumps({"payload": Payload(mark)}, protocol=protocol)


def in_an_attribute(mark: Path) -> bytes:
    """A call that PyTorch's own function for tensors with attributes is asked to make."""
    call = f"ctorch._tensor\n_rebuild_from_type_v2\n(cio\nopen\nN(V{mark}\nVw\ntNtR."
    return call.encode()


def by_state(mark: Path) -> bytes:
    """An object whose class would make something of the state that it is given."""
    return f"cpathlib\nPath\n(V{mark}\ntR(dVtouch\ncio\nopen\nsb.".encode()


def by_instance(mark: Path) -> bytes:
    """The opcode of protocol 0 that names a class and calls it at once."""
    return f"(V{mark}\nVw\niio\nopen\n.".encode()


def in_a_tar(mark: Path) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        content = pickled(2)(mark)
        for name in ("pickle", "../escaped"):
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


PAYLOADS: dict[str, Callable[[Path], bytes]] = {
    "a new file of PyTorch's": saved(True),
    "an old one": saved(False),
    **{f"a pickle of protocol {n}": pickled(n) for n in range(pickle.HIGHEST_PROTOCOL + 1)},
    "a tensor's attribute": in_an_attribute,
    "a state": by_state,
    "an instance": by_instance,
    "a tar file": in_a_tar,
    "a pickle in a zip": lambda mark: targets.with_part(
        targets.torch_bytes(True), "archive/data.pkl", pickled(2)(mark)
    ),
}


def named(path: Path) -> Ticket:
    name = path.parent.name  # each test has a folder of its own
    TicketCatalog.register(name, path)
    return Ticket.load(name)


IMPORTERS: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "a ticket": (".ticket", Ticket.load),
    "a ticket by name": (".ticket", named),
    "a ticket's weights": (".ticket", lambda p: Choice(p.with_name("good.ticket"), p).load()),
    "a digest": (".ticket", read_digest),
    "a checkpoint": (".pth", from_checkpoint),
    "a checkpoint with objects": (".pth", lambda p: from_checkpoint(p, skip_objects=True)),
    "a pickle": (".pkl", from_checkpoint),
    "a pickle with objects": (".pkl", lambda p: from_checkpoint(p, skip_objects=True)),
    "safetensors": (".safetensors", from_checkpoint),
    "masks": (".pth", lambda p: from_checkpoint(p.with_name("good.pth"), masks=p)),
    "weights": (".pth", lambda p: from_checkpoint(p.with_name("good.pth"), weights=p)),
    "the start of a search": (".pth", lambda p: read_weights(p, "a source")),
    "the start of a transfer": (".safetensors", read_model),
}


@pytest.mark.parametrize("payload", PAYLOADS)
@pytest.mark.parametrize("importer", IMPORTERS)
def test_no_importer_runs_what_a_file_brings_along(
    importer: str, payload: str, good: Path, tmp_path: Path
) -> None:
    suffix, read = IMPORTERS[importer]
    for name in ("good.ticket", "good.pth"):
        os.link(good / name, tmp_path / name)
    path, mark = tmp_path / f"evil{suffix}", tmp_path / "ran"
    path.write_bytes(PAYLOADS[payload](mark))
    before = sorted(tmp_path.iterdir())
    with pytest.raises(TicketError):
        read(path)
    assert sorted(tmp_path.iterdir()) == before and not (tmp_path.parent / "escaped").exists()


def test_a_payload_would_run_if_it_were_unpickled(tmp_path: Path) -> None:
    for name in ("a pickle of protocol 2", "a tensor's attribute", "an instance"):
        mark = tmp_path / name.replace(" ", "_")
        with contextlib.suppress(AttributeError):  # of what comes after the call
            pickle.loads(PAYLOADS[name](mark))
        assert mark.exists(), name


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    """A folder with a ticket, and a checkpoint that has a number where others have many."""
    folder = tmp_path_factory.mktemp("good")
    (folder / "good.ticket").write_bytes(targets.ticket_bytes())
    state = {n: torch.ones(()).expand(s) for n, s in targets.ARCH.shapes.items()}
    torch.save(state, folder / "good.pth")
    return folder


# --- nothing is allocated that a file has no bytes for


def test_bombs_are_refused_with_100_mb_to_spare(tmp_path: Path, capfd) -> None:
    """In processes that the system gives no more; what they took is printed."""
    for name, (_, make) in BOMBS.items():
        (tmp_path / name).write_bytes(make())
    done = subprocess.run(
        [sys.executable, "-m", "tests.reliability.bombs", tmp_path],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    outcomes = [line.split("\t") for line in done.stdout.splitlines()]
    assert {name: outcome for outcome, name, *_ in outcomes} == dict.fromkeys(BOMBS, "refused"), (
        done.stdout + done.stderr
    )
    with capfd.disabled():
        print(f"\n{done.stdout}")


@pytest.mark.parametrize("shape", [[0, 1 << 63], [0, 1 << 62, 8], [0, 1 << 30, 1 << 30], [1] * 17])
@pytest.mark.parametrize("importer", ["safetensors", "masks", "the start of a transfer"])
def test_a_shape_that_no_tensor_has_is_refused(
    importer: str, shape: list[int], good: Path, tmp_path: Path
) -> None:
    os.link(good / "good.pth", tmp_path / "good.pth")
    header, data = targets.split(targets.mask_bytes())
    offsets = [len(data), len(data) + (0 if 0 in shape else 4)]
    header["fc.weight"] = {"dtype": "F32", "shape": shape, "data_offsets": offsets}
    path = tmp_path / "evil.safetensors"
    path.write_bytes(targets.joined(json.dumps(header).encode(), data.ljust(offsets[1], b"0")))
    with pytest.raises(TicketError, match="shape"):
        IMPORTERS[importer][1](path)


def test_old_pickles_that_use_each_list_once_are_read_whatever_they_copy(tmp_path: Path) -> None:
    """Python 2's dictionaries with their order, and bytes that Python 3 wrote for it."""
    path = tmp_path / "a.pkl"
    path.write_bytes(b"}X\1\0\0\0a" + ORDERED + PAIRS + b"\x85Rs.")
    with pytest.raises(TicketError, match="found dict without any"):
        read_checkpoint(path)
    array = pickle.dumps({"a": targets.np.zeros(10**5)}, protocol=2)
    path.write_bytes(array)
    assert read_checkpoint(path)["a"].shape == (10**5,)


def test_a_key_is_never_hashed_unless_it_is_text_or_a_number(tmp_path: Path) -> None:
    """A tuple in tuples, as a key, would overflow the stack, or be hashed for years."""
    path = tmp_path / "a.pkl"
    array = pickle.dumps(targets.np.ones(2), protocol=2)[2:-1]
    doubled = b")" + b"2\x86" * 60
    path.write_bytes(b"\x80\x02}(" + doubled + b"NX\1\0\0\0a" + array + b"u.")
    assert read_checkpoint(path).keys() == {"a"}


def test_long_names_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    torch.save({"n" * 256: torch.ones(1)}, path)
    with pytest.raises(TicketError, match="names of at most 255 characters, found more"):
        read_checkpoint(path)
    torch.save({"w": torch.ones(1), "vocabulary": {"n" * 256: {"a": 1}}}, path)
    assert read_checkpoint(path).keys() == {"w"}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("mean", "abc"),
        ("mean", [10**400, 0, 0]),
        ("mean", [float("nan")] * 3),
        ("std", [float("inf")] * 3),
        ("std", None),
        ("std", [1, 1]),
    ],
)
def test_a_description_of_the_input_that_is_none_is_refused(field: str, value: Any) -> None:
    text = json.loads(targets.split(targets.ticket_bytes())[0]["__metadata__"]["lth_plugins"])
    text["meta"]["input"][field] = value
    path = targets.folder() / "odd.ticket"
    path.write_bytes(targets.with_description(json.dumps(text).encode()))
    with pytest.raises(TicketError, match=f"expected input.{field} to be three"):
        Ticket.load(path)


# --- nor does it reach the terminal


def test_what_a_file_says_is_shown_as_text_and_not_obeyed(
    ticket_tool: Callable[..., Any], ticket18: Ticket, tmp_path: Path
) -> None:
    words = "[/red] [link=file:///]\x1b[2J\x07"
    meta = replace(ticket18.meta, recipe={"note": words})
    path = replace(ticket18, meta=meta).save(tmp_path / "odd.ticket")
    shown = "".join(ticket_tool("show", path).stdout.split())
    assert "[/red][link=file:///]\\x1b[2J\\x07" in shown and "\x1b" not in shown
    torch.save({"layer1.0.conv1.weight\x1b[2J": torch.ones(1)}, tmp_path / "odd.pth")
    with pytest.raises(TicketError, match=r"\\x1b\[2J"):
        from_checkpoint(tmp_path / "odd.pth")
    with pytest.raises(TicketError, match="expected source to be one line of text"):
        replace(ticket18.meta, source="imagenet\nERROR all is lost")
