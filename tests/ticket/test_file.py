"""C6: the file is as small as the ticket is sparse, and a damaged one is refused."""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
import torchvision
import zstandard
from hypothesis import HealthCheck, given, settings
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from safetensors.torch import save as tensors_as_bytes

from benchmarks.files import entropy_bound
from lth_plugins import Masks, RunError, Ticket, TicketError, TicketMeta, prune
from lth_plugins.ticket import Outside


def test_round_trip(ticket18, tmp_path) -> None:
    loaded = Ticket.load(ticket18.save(tmp_path / "a.ticket"))
    assert loaded == ticket18
    assert loaded.masks == ticket18.masks and loaded.meta == ticket18.meta
    assert all(torch.equal(loaded.weights[n], w) for n, w in ticket18.sparse_weights().items())


def test_the_same_ticket_gives_the_same_bytes(ticket18, tmp_path) -> None:
    first, second = ticket18.save(tmp_path / "a.ticket"), ticket18.save(tmp_path / "b.ticket")
    again = Ticket.load(first).save(tmp_path / "c.ticket")
    assert first.read_bytes() == second.read_bytes() == again.read_bytes()


def test_size_of_resnet50_tickets_is_within_5_percent_of_the_bound(tmp_path) -> None:
    torch.manual_seed(0)
    dense = Ticket.dense(torchvision.models.resnet50())
    for rounds in (7, 15, 18):
        ticket = Ticket(prune(dense.weights, 1 - 0.8**rounds), dense.weights, dense.meta)
        size = ticket.save(tmp_path / "a.ticket").stat().st_size
        assert size <= 1.05 * entropy_bound(ticket)


SAMPLES = {
    1: "2a9a6a7ff0a9bf651c399bdb4ff184f125040daf88f61c505484faece67f5a30",
    2: "aebd4d2083ea1aaad36b07e743e1461485748738801bba1c5cebc19085f1abaf",
    3: "ddfb488818d3a4c29f4fb93f6eff6c7068f6407f7ffcac6e6535374490e6a09a",
}
"""The digest of a file that a release wrote in each version of the format; 3 has the two channels
of Sentinel-1, and a convolution outside the trunk."""


@pytest.mark.parametrize("version", SAMPLES)
def test_a_file_of_every_version_is_read_and_written_as_ever(version: int, tmp_path) -> None:
    sample = Path(__file__).parent / f"samples/version_{version}.ticket"
    ticket = Ticket.load(sample)
    assert header_of(sample)["version"] == version and ticket.digest == SAMPLES[version]
    computed = replace(ticket)  # from the content, not from the header
    assert computed.digest == SAMPLES[version]
    assert computed.save(tmp_path / "a.ticket").read_bytes() == sample.read_bytes()


def test_a_later_field_of_the_description_changes_no_older_ticket(ticket18) -> None:
    @dataclass(frozen=True)
    class LaterMeta(TicketMeta):
        license: str = field(default="", metadata={"kind": str, "words": "text"})

    older = ticket18.meta.to_dict()
    meta = LaterMeta.from_dict(older)
    assert meta.license == "" and meta.to_dict() == older
    assert replace(ticket18, meta=meta).digest == ticket18.digest
    stated = replace(meta, license="MIT").to_dict()
    assert stated == older | {"license": "MIT"} and LaterMeta.from_dict(stated).license == "MIT"
    with pytest.raises(TicketError, match="unknown field 'license'.*: a newer release wrote it"):
        TicketMeta.from_dict(stated)


DAMAGED: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda whole: b"", "the file is empty"),
    "truncated": (lambda whole: whole[: len(whole) // 2], "truncated or damaged: copy it again"),
    "one byte short": (lambda whole: whole[:-1], "truncated or damaged: copy it again"),
    "edited": (
        lambda whole: whole[:-1000] + bytes([whole[-1000] ^ 1]) + whole[-999:],
        "does not match its digest",
    ),
    "with another description": (
        lambda whole: whole.replace(b'\\"round\\": 5', b'\\"round\\": 6', 1),
        "does not match its digest",
    ),
    "a text": (lambda whole: b"not a ticket", "not a whole safetensors file"),
    "another safetensors": (
        lambda whole: tensors_as_bytes({"a": torch.zeros(1)}),
        "a safetensors file, but not a ticket",
    ),
}


@pytest.mark.parametrize("how", DAMAGED)
def test_a_damaged_or_other_file_is_refused(ticket18, tmp_path, how: str) -> None:
    change, message = DAMAGED[how]
    path = ticket18.save(tmp_path / "a.ticket")
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(TicketError, match=message):
        Ticket.load(path)


def test_a_checkpoint_or_folder_is_refused(tmp_path) -> None:
    torch.save({"a": torch.zeros(1)}, tmp_path / "model.ticket")
    with pytest.raises(TicketError, match="make a ticket of it first"):
        Ticket.load(tmp_path / "model.ticket")
    with pytest.raises(TicketError, match="found nothing at"):
        Ticket.load(tmp_path)


def rewrite(path: Path, tensors=None, **header) -> None:
    """Change a ticket file the way a person with an editor could: consistent as safetensors."""
    stored = json.dumps(header_of(path) | header)
    save_file(load_file(path) | (tensors or {}), path, {"lth_plugins": stored})


@pytest.mark.parametrize(
    ("version", "message"),
    [
        (4, "format version 4, this release reads versions up to 3: upgrade"),
        (0, "header is damaged: 0 is not a format version"),
        ("2", "header is damaged: '2' is not a format version"),
        ([], r"header is damaged: \[\] is not a format version"),
    ],
)
def test_a_version_that_is_newer_or_none_is_refused(version, message, ticket18, tmp_path) -> None:
    path = ticket18.save(tmp_path / "a.ticket")
    rewrite(path, version=version)
    with pytest.raises(TicketError, match=message):
        Ticket.load(path)


def test_a_mask_that_claims_to_be_huge_is_refused_before_it_is_unpacked(ticket18, tmp_path) -> None:
    bomb = zstandard.ZstdCompressor().compress(bytes(10**8))
    path = ticket18.save(tmp_path / "a.ticket")
    rewrite(
        path, {"layer1.0.conv1.weight.mask": torch.frombuffer(bytearray(bomb), dtype=torch.uint8)}
    )
    with pytest.raises(TicketError, match="claims 100000000 bytes, expected at most"):
        Ticket.load(path)


def test_extra_missing_and_misshapen_entries_are_refused(ticket18, tmp_path) -> None:
    path = ticket18.save(tmp_path / "a.ticket")
    rewrite(path, {"layer9.weight": torch.zeros(1)})
    with pytest.raises(TicketError, match=r"layer9\.weight is not one of them"):
        Ticket.load(path)
    ticket18.save(path)
    rewrite(path, {"bn1.weight": torch.zeros(65)})
    with pytest.raises(TicketError, match=r"bn1\.weight is F32 \(65,\), expected F32 \(64,\)"):
        Ticket.load(path)


def test_a_path_that_cannot_be_written_leaves_nothing_behind(ticket18, tmp_path) -> None:
    with pytest.raises(RunError, match="cannot write .*ticket"):
        ticket18.save(tmp_path / "missing" / "a.ticket")
    (tmp_path / "folder.ticket").mkdir()
    with pytest.raises(RunError, match="cannot write .*ticket"):
        ticket18.save(tmp_path / "folder.ticket")
    assert os.listdir(tmp_path) == ["folder.ticket"]


def test_a_failed_write_leaves_the_older_file_whole(ticket18, tmp_path, monkeypatch) -> None:
    path = ticket18.save(tmp_path / "a.ticket")

    def no_space(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(RunError, match="No space left on device"):
        ticket18.reversed().save(path)
    assert Ticket.load(path) == ticket18
    assert os.listdir(tmp_path) == ["a.ticket"]


def test_a_signal_once_the_file_is_there_is_not_taken_for_a_failed_write(
    ticket18, tmp_path, monkeypatch
) -> None:
    rename = os.replace

    def stopped(*paths: str) -> None:
        rename(*paths)
        raise SystemExit(143)

    monkeypatch.setattr(os, "replace", stopped)
    with pytest.raises(SystemExit):
        ticket18.save(tmp_path / "a.ticket")
    assert Ticket.load(tmp_path / "a.ticket") == ticket18


def test_the_file_is_flushed_and_then_the_name_it_was_given(
    ticket18, tmp_path, monkeypatch
) -> None:
    flushed, fsync = [], os.fsync

    def noted(handle: int) -> None:
        fsync(handle)
        flushed.append(os.fstat(handle).st_ino)

    monkeypatch.setattr(os, "fsync", noted)
    path = ticket18.save(tmp_path / "a.ticket")
    assert flushed == [path.stat().st_ino, tmp_path.stat().st_ino]


def test_an_empty_and_a_full_mask_survive(resnet18_state, tmp_path) -> None:
    dense = Ticket.dense(resnet18_state)
    empty = Ticket(~dense.masks, resnet18_state, dense.meta)
    for ticket in (dense, empty):
        loaded = Ticket.load(ticket.save(tmp_path / "a.ticket"))
        assert loaded.masks == ticket.masks and loaded == ticket
    assert isinstance(loaded.masks, Masks)


def header_of(path: Path) -> dict:
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["lth_plugins"])


def test_a_ticket_of_a_whole_model_round_trips(whole18, tmp_path) -> None:
    path = whole18.save(tmp_path / "a.ticket")
    loaded = Ticket.load(path)
    assert loaded == whole18 and loaded.all_masks == whole18.all_masks
    expected = whole18.outside.weights["fc.weight"] * whole18.outside.masks["fc.weight"]
    assert torch.equal(loaded.outside.weights["fc.weight"], expected)
    assert loaded.save(tmp_path / "b.ticket").read_bytes() == path.read_bytes()
    assert header_of(path)["version"] == 2 and header_of(path)["rest"] == [
        ["fc.weight", [1000, 512]]
    ]


def test_a_ticket_of_a_trunk_is_written_as_ever(whole18, ticket18, tmp_path) -> None:
    alone = header_of(whole18.without_outside().save(tmp_path / "a.ticket"))
    assert alone["version"] == 1 and "rest" not in alone
    assert whole18.without_outside().digest != whole18.digest


SHAPES = st.one_of(
    st.tuples(st.integers(1, 60), st.integers(1, 60)),
    st.tuples(st.integers(1, 5), st.integers(1, 5), st.integers(1, 3), st.integers(1, 3)),
)
NAMES = st.text(st.characters(codec="utf-8"), max_size=9).map(lambda text: f"head.{text}.weight")


@given(
    shapes=st.dictionaries(NAMES, SHAPES, min_size=1, max_size=4),
    seed=st.integers(0, 99),
    density=st.floats(0, 1).map(lambda d: d**3),  # also with more than 255 zeros in a row
)
@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_is_outside_the_trunk_round_trips_in_its_order(
    sparse18: Ticket, tmp_path, shapes, seed, density
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weights = {n: torch.randn(shape, generator=generator) for n, shape in shapes.items()}
    masks = Masks({n: torch.rand(s, generator=generator) < density for n, s in shapes.items()})
    ticket = replace(sparse18, outside=Outside(masks, weights))
    loaded = Ticket.load(ticket.save(tmp_path / "a.ticket"))
    assert loaded == ticket and loaded.outside.masks == masks
    assert list(loaded.outside.masks) == list(shapes)
    assert all(torch.equal(loaded.outside.weights[n], weights[n] * masks[n]) for n in shapes)


@pytest.fixture(scope="module")
def sparse18(_resnet18_weights) -> Ticket:
    """So sparse that its file is small."""
    dense = Ticket.dense(_resnet18_weights)
    return dense.with_masks(prune(dense.weights, 0.999), {})


@pytest.mark.parametrize(
    ("rest", "message"),
    [
        (None, "header is damaged: None under rest"),
        ("fc.weight", "header is damaged: 'fc.weight' under rest"),
        ([["fc.weight"]], "header is damaged"),
        ([["fc.weight", [1000, 512.0]]], "header is damaged"),
        ([["fc.weight", [True, 512]]], "header is damaged"),
        ([["fc.weight", 1000]], "header is damaged"),
        ([[1, [1000, 512]]], "header is damaged"),
        ([["fc.weight", [1000, 512]], ["a.weight", [1 << 14, 1 << 14]]], "at most 134,217,728"),
        ([["fc.weight", [10**30, 10**30]]], "at most 134,217,728 weights outside the trunk"),
        ([["fc.weight", [-1000, -512]]], "found fc.weight of shape"),
        ([["fc.weight", [1000]]], "found fc.weight of shape"),
        ([["fc.bias", [1000, 512]]], "found fc.bias of shape"),
        ([["fc.weight", [1000, 511]]], "reaches beyond its 511000 weights|bytes, expected at most"),
        ([["gc.weight", [1000, 512]]], "rest.(fc|gc).weight.* is (missing|not one of them)"),
        ([], "is not one of them"),
    ],
)
def test_a_hostile_header_is_refused(rest, message: str, whole18, tmp_path) -> None:
    path = whole18.save(tmp_path / "a.ticket")
    rewrite(path, rest=rest)
    with pytest.raises(TicketError, match=message):
        Ticket.load(path)
