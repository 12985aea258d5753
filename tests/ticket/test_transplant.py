"""Transplants: networks that are aligned, masks that follow, and blocks that are replicated."""

import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from PIL import Image
from torch import Tensor, nn

import lth_plugins as lth
from lth_plugins.study.analyse.similarity import compare, pack
from lth_plugins.ticket.arch import ARCHITECTURES, ResNet
from lth_plugins.ticket.perturb import noisy
from lth_plugins.ticket.transplant import align, transplant
from lth_plugins.ticket.transplant.blocks import of_depth
from lth_plugins.ticket.transplant.forward import activations
from tests.ticket.networks import network, shuffled
from tests.ticket.states import full


def images(count: int = 8, size: int = 64) -> Tensor:
    return torch.randn((count, 3, size, size), generator=torch.Generator().manual_seed(0))


def iou(first: lth.Masks, second: lth.Masks) -> float:
    return float(compare({"first": pack(first), "second": pack(second)}).iou()[0, 1])


@pytest.mark.parametrize("by", ["weights", "activations"])
@pytest.mark.parametrize("name", ["resnet18", "resnet50d"])
def test_a_permuted_copy_of_a_network_is_recognised_and_computes_the_same(
    name: str, by: str
) -> None:
    ticket = network(name, 0)
    copy, orders = shuffled(ticket)
    found = align(ticket, copy, (images(), images()) if by == "activations" else None)
    assert found.match.by == by and 0.5 < found.moved < 1
    assert found.match.before < 0.5 and found.match.after == pytest.approx(1, abs=1e-4)
    assert {n: o.tolist() for n, o in found.match.orders.items()} == {
        n: o.tolist() for n, o in orders.items()
    }
    *_, before = activations(ticket, images())
    *_, after = activations(copy, images())
    expected = before.values[:, orders["layer4"]]
    assert float((after.values - expected).abs().max() / expected.abs().max()) <= 1e-5

    # A mask goes the same way, and so lies over the same weights.
    masks = lth.prune(ticket.weights, 0.8, ticket.masks)
    moved = transplant(replace(ticket, masks=masks), copy, found)
    assert moved.masks == lth.prune(copy.weights, 0.8, copy.masks)
    assert torch.equal(
        moved.weights["layer1.0.conv1.weight"], copy.weights["layer1.0.conv1.weight"]
    )
    assert moved.meta.recipe["aligned"] == {
        "by": by,
        "source": ticket.digest,
        "target": copy.digest,
    }


def test_masks_of_two_networks_that_learned_alike_are_more_alike_once_aligned() -> None:
    common = network("resnet18", 0, width=24)
    first, (second, _) = noisy(common, 0.3, seed=1), shuffled(noisy(common, 0.3, seed=2))
    masks = [lth.prune(t.weights, 0.8, t.masks, scope="layer") for t in (first, second)]
    chance = 0.2 / 1.8
    assert iou(*masks) == pytest.approx(chance, abs=0.01)
    assert iou(align(first, second).masks(masks[0]), masks[1]) > 4 * chance
    assert iou(align(first, second, (images(), images())).masks(masks[0]), masks[1]) > 1.5 * chance
    assert align(first, first).moved == 0


@pytest.mark.parametrize(
    ("arch", "model"),
    [
        ("resnet18", torchvision.models.resnet18),
        ("resnet50", torchvision.models.resnet50),
        ("resnet50d", lambda: timm.create_model("resnet50d", num_classes=0)),
    ],
)
def test_activations_are_those_of_the_frameworks_networks(arch: str, model: nn.Module) -> None:
    stock = model().eval()
    stock.fc = nn.Identity()
    *_, last = activations(lth.Ticket.dense(stock), images(2))
    with torch.no_grad():
        assert torch.allclose(last.values.mean((2, 3)), stock(images(2)), atol=1e-6)


def test_strides_are_where_the_ticket_says() -> None:
    stock = torchvision.models.resnet50().eval()
    stock.fc = nn.Identity()
    for stage in (stock.layer2, stock.layer3, stock.layer4):
        stage[0].conv1.stride, stage[0].conv2.stride = (2, 2), (1, 1)
    ticket = lth.Ticket.dense(stock)
    assert ticket.meta.stride_in_1x1
    *_, last = activations(ticket, images(2))
    with torch.no_grad():
        assert torch.allclose(last.values.mean((2, 3)), stock(images(2)), atol=1e-6)


def test_constant_channels_count_as_uncorrelated_and_are_named(
    caplog: pytest.LogCaptureFixture,
) -> None:
    ticket = network("resnet18", 0)
    weights = dict(ticket.weights)
    weights["layer2.0.bn1.weight"] = weights["layer2.0.bn1.weight"].clone()
    weights["layer2.0.bn1.weight"][3] = 0
    dead = replace(ticket, weights=weights)
    copy, orders = shuffled(dead)
    with caplog.at_level(logging.INFO):
        found = align(dead, copy, (images(), images()))
    assert "layer2.0.bn1 (2)" in caplog.text
    # The others leave it the one place that is free.
    assert found.match.orders["layer2.0.conv1"].tolist() == orders["layer2.0.conv1"].tolist()


def test_images_that_are_too_few_or_others_are_refused() -> None:
    ticket, other = network("resnet18", 0), network("resnet18", 1)
    with pytest.raises(lth.RunError, match=r"over which layer4.0.bn1 varies.*1 images.*1x1 pos"):
        align(ticket, other, (images(1, 32), images(1, 32)))
    with pytest.raises(lth.RunError, match="over which bn1 varies.*is constant"):
        align(ticket, other, (torch.zeros(8, 3, 64, 64), torch.zeros(8, 3, 64, 64)))
    with pytest.raises(lth.TicketError, match=r"the same images.*\(8, 3, 64, 64\) and \(4, 3"):
        align(ticket, other, (images(), images(4)))


def test_networks_that_have_no_common_channels_are_refused(ticket18: lth.Ticket) -> None:
    ticket = network("resnet18", 0)
    for other in (network("resnet18", 0, width=6), network("resnet34", 0), ticket18):
        with pytest.raises(lth.TicketError, match="one architecture and one width.*slimmed resnet"):
            align(ticket, other)
    bands = lth.InputSpec("4 bands", (0.0,) * 4, (1.0,) * 4)
    with pytest.raises(lth.TicketError, match="for 4 channels and .* for 3 channels"):
        align(network("resnet18", 0, input=bands), ticket)
    name = "resnext50_32x4d"
    state = {n: full(1.0, *shape) for n, shape in ARCHITECTURES[name].shapes.items()}
    resnext = lth.Ticket.dense(state)
    with pytest.raises(lth.TicketError, match="resnext50_32x4d cannot be aligned.*32 groups"):
        align(resnext, resnext)
    found = align(ticket, ticket)
    with pytest.raises(lth.TicketError, match="layer1.0.conv1.weight of a slimmed resnet18"):
        found.masks(ticket18.masks)


def test_networks_that_read_other_orders_of_the_same_colours_are_aligned() -> None:
    ticket = network("resnet18", 0)
    copy, orders = shuffled(ticket)
    flipped = {**copy.weights, "conv1.weight": copy.weights["conv1.weight"].flip(1)}
    bgr = replace(copy, weights=flipped, meta=replace(copy.meta, input=lth.InputSpec("BGR")))
    found = align(ticket, bgr).match.orders
    assert all(torch.equal(found[width], order) for width, order in orders.items())
    bands = [lth.InputSpec(names, (0.0,) * 3, (1.0,) * 3) for names in ("B4,B3,B2", "B2,B3,B4")]
    others = [replace(ticket, meta=replace(ticket.meta, input=spec)) for spec in bands]
    with pytest.raises(lth.TicketError, match="the same channels in the same order.*give images"):
        align(*others)


def marked(arch: ResNet) -> lth.Masks:
    """Masks of which each says by its count which block of its stage it is in."""
    masks = {}
    for name, shape in arch.prunable.items():
        mask = torch.zeros(shape, dtype=torch.bool)
        mask.view(-1)[: 1 + int(name.split(".")[1])] = True
        masks[name] = mask
    return lth.Masks.adopt(masks)


@pytest.mark.parametrize(
    ("source", "target", "order", "stage", "blocks"),
    [
        ("resnet18", "resnet34", "append", "layer3", [0, 1, 1, 1, 1, 1]),
        ("resnet34", "resnet18", "append", "layer3", [0, 1]),
        ("resnet34", "resnet18", "interpolate", "layer3", [0, 1]),
        ("resnet50", "resnet101", "append", "layer2", [0, 1, 2, 3]),
        ("resnet50", "resnet101", "append", "layer3", [0, *[1, 2, 3, 4, 5] * 4, 1, 2]),
        (
            *("resnet50", "resnet101", "interpolate", "layer3"),
            [0, *[1] * 5, *[2] * 4, *[3] * 5, *[4] * 4, *[5] * 4],
        ),
        ("resnet101", "resnet50", "append", "layer3", [0, 1, 2, 3, 4, 5]),
        ("resnet101", "resnet50", "interpolate", "layer3", [0, 1, 5, 9, 14, 18]),
    ],
)
def test_blocks_are_replicated_or_dropped_and_the_first_of_a_stage_stays(
    source: str, target: str, order: str, stage: str, blocks: list[int]
) -> None:
    archs = [ARCHITECTURES[name] for name in (source, target)]
    found = of_depth(marked(archs[0]), *archs, order)
    found.check_shapes(archs[1].prunable, target)
    assert [int(found[f"{stage}.{k}.conv1.weight"].sum()) - 1 for k in range(len(blocks))] == blocks
    assert int(found[f"{stage}.0.downsample.0.weight"].sum() if stage != "layer1" else 1) == 1


def test_a_transplant_has_the_masks_of_one_network_and_the_rest_of_another(
    ticket18: lth.Ticket,
) -> None:
    deep = lth.Ticket.dense(torchvision.models.resnet34(), input=lth.InputSpec("BGR"))
    found = transplant(ticket18, deep, blocks="append")
    assert found.meta.arch == "resnet34" and found.meta.input.format == "BGR"
    assert (found.meta.source, found.meta.round) == (ticket18.meta.source, ticket18.meta.round)
    assert found.meta.parent == ticket18.digest
    assert found.meta.recipe["blocks"] == "append" and found.meta.recipe["weights"] == deep.digest
    assert all(torch.equal(found.weights[n], value) for n, value in deep.weights.items())
    shallow = ticket18.with_masks(lth.Masks.ones(ticket18.arch.prunable), {})
    back = transplant(found, shallow, blocks="append")
    assert back.masks == ticket18.masks


def test_options_that_contradict_the_networks_are_refused(ticket18: lth.Ticket) -> None:
    deep = lth.Ticket.dense(torchvision.models.resnet34())
    with pytest.raises(lth.ConfigError, match="3-4-6-3 blocks of 2-2-2-2.*append or interpolate"):
        transplant(ticket18, deep)
    with pytest.raises(lth.ConfigError, match="unknown order of blocks 'apend'.*'append'"):
        transplant(ticket18, deep, blocks="apend")
    with pytest.raises(lth.ConfigError, match="another depth to append blocks for"):
        transplant(ticket18, ticket18, blocks="append")
    ticket = network("resnet18", 0)
    alignment = align(ticket, ticket)
    with pytest.raises(lth.ConfigError, match="one depth to align"):
        transplant(ticket18, deep, alignment, "append")
    stem = lth.Ticket.dense(timm.create_model("resnet18d"))
    with pytest.raises(lth.TicketError, match="not in stem.*resnet18d with a deep stem"):
        transplant(ticket18, stem)
    with pytest.raises(lth.TicketError, match="found a resnet34 .* a slimmed resnet18"):
        transplant(ticket, deep, blocks="append")


def test_the_tool_transplants_and_compares_with_channels_aligned(
    ticket_tool: Callable[..., Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    dense = network("resnet18", 0)
    copy, _ = shuffled(dense)
    sparse = dense.with_masks(lth.prune(dense.weights, 0.8, dense.masks), {})
    files = [tmp_path / f"{name}.ticket" for name in ("dense", "copy", "sparse", "sparse copy")]
    of_copy = copy.with_masks(lth.prune(copy.weights, 0.8, copy.masks), {})
    for ticket, path in zip((dense, copy, sparse, of_copy), files, strict=True):
        ticket.save(path)
    between = ["--align", "--between", *files[:2]]
    out = tmp_path / "out.ticket"
    done = ticket_tool("transplant", files[2], out, "--weights", files[1], *between)
    assert done.returncode == 0 and "by weights: cosine" in done.stdout, done.stderr
    assert "1.000 after" in done.stdout
    found = lth.Ticket.load(out)
    assert found.masks == of_copy.masks and found.meta.parent == sparse.digest

    for size in range(2):
        Image.effect_noise((70, 80), 60 + size).convert("RGB").save(tmp_path / f"{size}.png")
    done = ticket_tool("diff", files[2], files[3], "--align")
    assert caplog.text.count("only the surviving weights are known") == 2
    images = ["--images", tmp_path, "--size", 64]
    done = ticket_tool("diff", files[2], files[3], *between, *images)
    assert done.returncode == 0 and "by activations: mean correlation" in done.stdout, done.stderr
    (total,) = (line for line in done.stdout.splitlines() if line.startswith("all "))
    assert float(total.split()[-2]) < 0.5 < 0.9 < float(total.split()[-1])
    done = ticket_tool("diff", files[2], files[3], *between, "--json")
    layer = json.loads(done.stdout)["aligned_layers"]["layer1.0.conv1.weight"]
    assert layer["first_only"] == layer["second_only"] == 0

    for options, said in (
        (["--size", 64], "--size says how to align: add --align"),
        (["--align", "--size", 64], "--size is of the --images"),
        (["--align", "--images", tmp_path / "none"], "expected images in"),
        (["--align", "--images", tmp_path, "--size", 0], "--size of 32 pixels or more, found 0"),
        (["--blocks", "append"], "another depth to append blocks for"),
    ):
        none = tmp_path / "none.ticket"
        done = ticket_tool("transplant", files[2], none, "--weights", files[1], *options)
        assert done.returncode == 2 and said in done.stderr and not none.exists(), done.stderr
    done = ticket_tool("transplant", files[2], files[1], "--weights", files[0], *between)
    assert "another file to write" in done.stderr
