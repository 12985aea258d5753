"""Files are told by their content; what is left out of one is said; nothing in one is run."""

import collections
import enum
import functools
import logging
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import addict
import numpy as np
import omegaconf
import pytest
import safetensors.torch
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from mmengine.logging import HistoryBuffer
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from lth_plugins import TicketError
from lth_plugins.ticket.foreign.checkpoints import read_checkpoint
from lth_plugins.ticket.foreign.convert import from_checkpoint

STATE = {
    "layer.weight": torch.arange(24.0).view(2, 3, 4)[:, 1:],  # a view
    "layer.half": torch.ones(3, dtype=torch.float16),
    "layer.kept": torch.tensor([True, False]),
    "bn.num_batches_tracked": torch.tensor(7),
    "empty": torch.empty(0, 3),
}


def arrays() -> dict[str, np.ndarray]:
    return {name: value.numpy() for name, value in STATE.items()}


def by_torch(path: Path) -> None:
    torch.save(STATE, path)


def by_old_torch(path: Path) -> None:
    torch.save(STATE, path, _use_new_zipfile_serialization=False)


def by_pickle(content: Callable[[], Any], protocol: int, path: Path) -> None:
    path.write_bytes(pickle.dumps(content(), protocol=protocol))


def by_savez(path: Path) -> None:
    with path.open("wb") as file:
        np.savez(file, **arrays())


def by_safetensors(path: Path) -> None:
    safetensors.torch.save_file({name: v.contiguous() for name, v in STATE.items()}, path)


WRITERS: dict[str, Callable[[Path], None]] = {
    "torch": by_torch,
    "old torch": by_old_torch,
    "numpy": by_savez,
    "safetensors": by_safetensors,
    **{
        f"{what}, protocol {protocol}": functools.partial(by_pickle, content, protocol)
        for what, content in (
            ("pickled tensors", lambda: STATE),
            ("pickled parameters", lambda: {n: _parameter(v) for n, v in STATE.items()}),
            ("pickled arrays", arrays),
        )
        for protocol in (2, 4, 5)
    },
}


def _parameter(value: Tensor) -> Tensor:
    return nn.Parameter(value, requires_grad=False)


@pytest.mark.parametrize("suffix", [".pth", ".pkl", ".npz", ".safetensors", ".bin", ""])
@pytest.mark.parametrize("writer", WRITERS)
def test_a_file_is_told_by_its_content(writer: str, suffix: str, tmp_path) -> None:
    path = tmp_path / f"file{suffix}"
    WRITERS[writer](path)
    read = read_checkpoint(path)
    assert set(read) == set(STATE)
    for name, value in STATE.items():
        assert torch.equal(read[name], value) and read[name].dtype == value.dtype, name


@pytest.mark.parametrize(
    ("start", "said"),
    [
        (b"\x1f\x8b\x08", "compressed .gzip.: decompress it"),
        (b"\x89HDF\r\n", "HDF5 file, as Keras writes"),
        (b"\x93NUMPY\x01", "save a dictionary of arrays"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (b"<!DOCTYPE html>", "a web page"),
        (b"<?xml version='1.0'?>", "an answer of a server"),
        (b'{"weight_map": {}}', "it is JSON"),
        (b"Rar!\x1a\x07", "compressed .RAR."),
    ],
)
def test_another_kind_of_file_says_what_it_is(start: bytes, said: str, tmp_path) -> None:
    path = tmp_path / "a.pth"
    path.write_bytes(start + bytes(600))
    with pytest.raises(TicketError, match=f"cannot be read safely: .*{said}"):
        read_checkpoint(path)


@pytest.mark.parametrize(
    "name",
    [
        "model-00001-of-00002.safetensors",
        "pytorch_model.bin.index.json",
        "model.ckpt.data-00000-of-00002",
        "model.ckpt.index",
    ],
)
def test_a_part_of_a_checkpoint_in_shards_is_to_be_joined(name: str, tmp_path) -> None:
    by_safetensors(tmp_path / name)
    with pytest.raises(TicketError, match="in shards: join them first"):
        read_checkpoint(tmp_path / name)


def test_an_empty_file_is_said_to_be_empty(tmp_path) -> None:
    (tmp_path / "a.pth").touch()
    with pytest.raises(TicketError, match="an empty file"):
        read_checkpoint(tmp_path / "a.pth")


def test_a_ticket_needs_no_import(ticket18_file) -> None:
    with pytest.raises(TicketError, match="found a ticket"):
        from_checkpoint(ticket18_file)


def test_compressed_and_object_arrays_are_not_read(tmp_path) -> None:
    np.savez_compressed(tmp_path / "a.npz", a=np.zeros(1 << 20))
    with pytest.raises(TicketError, match=r"compressed: save them with numpy\.savez"):
        read_checkpoint(tmp_path / "a.npz")
    np.savez(tmp_path / "b.npz", a=np.array([print], dtype=object), b=np.ones(2))
    assert list(read_checkpoint(tmp_path / "b.npz")) == ["b"]


def test_a_tensor_inside_a_pickle_that_is_damaged_is_refused(tmp_path) -> None:
    path = tmp_path / "a.pkl"
    by_pickle(lambda: STATE, 4, path)
    content = path.read_bytes()
    for broken in (
        content[:-200],
        content.replace(b"\x8a\x0al\xfc\x9cF\xf9", b"\x8a\x0al\xfc\x9cF\xf8"),
    ):
        path.write_bytes(broken)
        with pytest.raises(TicketError, match="cannot be read safely"):
            read_checkpoint(path)


# --- objects


class Mode(enum.Enum):
    FAST = 1


@pytest.fixture
def lightning() -> dict[str, Any]:
    return {
        "state_dict": dict(STATE),
        "hyper_parameters": omegaconf.OmegaConf.create({"lr": 0.1, "augment": [1, 2]}),
        "callbacks": {"ModelCheckpoint": {"dirpath": Path("/tmp"), "mode": Mode.FAST}},
        "loops": {"fit": collections.defaultdict(list, {"a": [range(3), slice(1, 2)]})},
    }


def test_the_bookkeeping_of_hosts_is_left_out_with_a_line(lightning, tmp_path, caplog) -> None:
    torch.save(lightning, tmp_path / "last.ckpt")
    assert len(read_checkpoint(tmp_path / "last.ckpt")) == len(STATE)
    assert "what hyper_parameters holds besides tensors (omegaconf.dictconfig" in caplog.text
    assert "what callbacks holds besides tensors (" in caplog.text and "Mode" in caplog.text
    caplog.clear()
    log = {"log_scalars": collections.OrderedDict({"train/loss": HistoryBuffer([1.0], [1])})}
    torch.save({"state_dict": STATE, "message_hub": log, "meta": {"iter": 1}}, tmp_path / "a.pth")
    assert len(read_checkpoint(tmp_path / "a.pth")) == len(STATE)
    assert "message_hub holds besides tensors (mmengine.logging.history_buffer" in caplog.text


def test_other_objects_are_refused_until_they_may_be_left_out(tmp_path, caplog) -> None:
    content = {"state_dict": STATE, "make": functools.partial(torch.optim.SGD, lr=0.1)}
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(TicketError, match=r"holds functools\.partial.*say --skip-objects"):
        read_checkpoint(tmp_path / "a.pth")
    assert len(read_checkpoint(tmp_path / "a.pth", skip_objects=True)) == len(STATE)
    assert "what make holds besides tensors (functools.partial and 1 more)" in caplog.text


def test_dictionaries_of_other_classes_give_their_items(tmp_path) -> None:
    torch.save(collections.defaultdict(dict, STATE), tmp_path / "a.pth")
    assert set(read_checkpoint(tmp_path / "a.pth")) == set(STATE)
    torch.save({"model": addict.Dict(STATE)}, tmp_path / "b.pth")
    with pytest.raises(TicketError, match=r"holds addict\.addict\.Dict.*say --skip-objects"):
        read_checkpoint(tmp_path / "b.pth")
    read = read_checkpoint(tmp_path / "b.pth", skip_objects=True)
    assert set(read) == {f"model.{name}" for name in STATE}


WITH_MOMENTUM = {"model": nn.Linear(2, 2), "optimizer": {"state": {0: {"m": torch.ones(2, 2)}}}}


@pytest.mark.parametrize(
    "content", [nn.Linear(2, 2), {"model": nn.Linear(2, 2), "epoch": 3}, WITH_MOMENTUM]
)
def test_a_file_whose_weights_are_in_objects_is_to_be_saved_again(content, tmp_path) -> None:
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(TicketError, match=r"Linear.*no weights would be left.*state_dict") as error:
        read_checkpoint(tmp_path / "a.pth")
    assert "--skip-objects" not in str(error.value)


def test_a_whole_object_holds_nothing_to_read(tmp_path) -> None:
    torch.save(nn.Linear(2, 2), tmp_path / "a.pth")
    with pytest.raises(TicketError, match="found a whole object"):
        read_checkpoint(tmp_path / "a.pth", skip_objects=True)


def test_where_nothing_useful_is_left_it_is_said_what_was_left_out(tmp_path) -> None:
    torch.save(WITH_MOMENTUM, tmp_path / "a.pth")
    with pytest.raises(TicketError, match=r"Left out were model \(torch.*Linear\).*state_dict"):
        from_checkpoint(tmp_path / "a.pth", skip_objects=True)


@pytest.mark.parametrize("pack", [list, tuple, lambda masks: {"masks": masks}])
@pytest.mark.parametrize("numpy", [True, False])
def test_a_list_says_how_to_name_its_tensors(pack, numpy: bool, tmp_path) -> None:
    masks = [np.ones((2, 2)) if numpy else torch.ones(2, 2)] * 3
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(pack(masks)))
    with pytest.raises(TicketError, match=r"a list of 3 tensors.*zip.*named_parameters"):
        read_checkpoint(tmp_path / "a.pkl")


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a file of DTensors, and one of torch.distributed.checkpoint's in it."""
    folder = tmp_path_factory.mktemp("sharded")
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        part = distribute_tensor(torch.ones(4, 4), mesh, [Shard(0)])
        counter = {"bn.num_batches_tracked": torch.tensor(1)}
        torch.save({"layer.weight": part} | counter, folder / "dtensors.pth")
        torch.save({"state_dict": {"layer.weight": part} | counter}, folder / "nested.pth")
        dcp.save({"model": STATE}, checkpoint_id=str(folder / "dcp"))
    finally:
        dist.destroy_process_group()
    return folder


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("name", ["dtensors.pth", "nested.pth"])
def test_parts_of_tensors_are_to_be_gathered(name: str, skip: bool, sharded) -> None:
    with pytest.raises(TicketError, match="DTensor.*full_state_dict=True") as error:
        read_checkpoint(sharded / name, skip_objects=skip)
    assert "skip" not in str(error.value)


@pytest.mark.parametrize("inside", ["", "__0_0.distcp"])
def test_a_folder_of_parts_is_to_be_gathered(inside: str, sharded, tmp_path) -> None:
    with pytest.raises(TicketError, match=r"dcp_to_torch .*dcp OUT\.pth"):
        from_checkpoint(sharded / "dcp" / inside)
    with pytest.raises(TicketError, match="found a folder at .*give one of the files in it"):
        from_checkpoint(tmp_path)


def test_few_zeros_are_no_masks_and_many_are_mentioned(resnet18_state, tmp_path, caplog) -> None:
    """Half precision rounds a few weights to zero."""
    weight = resnet18_state["layer4.1.conv2.weight"]
    for count, said in ((11_000, False), (12_000, True)):  # a thousandth is 11,158
        weight.view(-1)[:count] = 0
        torch.save(resnet18_state, tmp_path / "a.pth")
        assert from_checkpoint(tmp_path / "a.pth").density == 1
        assert ("prunable weights are exactly zero: --mask zeros" in caplog.text) == said


def test_what_is_outside_the_trunk_is_named(resnet18_state, tmp_path, caplog) -> None:
    torch.save(resnet18_state, tmp_path / "a.pth")
    with caplog.at_level(logging.INFO, "lth_plugins.ticket"):
        from_checkpoint(tmp_path / "a.pth")
    assert "Left out fc.weight, fc.bias: outside the trunk" in caplog.text
