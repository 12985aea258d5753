"""Kernels and channels of what masks leave."""

from lth_plugins.study.analyse.structure import dead_channels, kernel_map
from lth_plugins.ticket import ARCHITECTURES, Masks

R18 = ARCHITECTURES["resnet18"]
NAME = "layer2.0.conv2.weight"  # 128 x 128 x 3 x 3


def masks_but(name: str, *pruned: tuple[object, ...], arch: str = "resnet18") -> Masks:
    """All ones, but for what these indices of one parameter select."""
    masks = dict(Masks.ones(ARCHITECTURES[arch].prunable))
    mask = masks[name].clone()
    for index in pruned:
        mask[index] = False
    return Masks(masks | {name: mask})


def test_a_kernel_is_dead_when_its_last_weight_is() -> None:
    found = kernel_map(masks_but(NAME, (3, 5), (4, 5, slice(2))))
    assert found.dead.sum() == 1
    # layer1: 4 convolutions of 64 x 64; layer2.0.conv1: 128 x 64; then row 3, column 5.
    assert found.dead[4 * 64 * 64 + 128 * 64 + 3 * 128 + 5]


def test_kernels_lie_in_network_order_without_the_1x1_convolutions() -> None:
    found = kernel_map(Masks.ones(R18.prunable))
    layer2 = 128 * 64 + 3 * 128 * 128
    assert len(found.dead) == sum(s[0] * s[1] for s in R18.prunable.values() if s[-1] == 3)
    assert found.starts["layer1"] == 0 and found.starts["layer2"] == 4 * 64 * 64
    assert found.starts["layer3"] == 4 * 64 * 64 + layer2


def test_dead_channels_are_counted() -> None:
    channels = dead_channels(masks_but(NAME, (slice(None), slice(7)), (slice(2),)), R18)
    found = channels.pop(NAME)
    assert (found.inputs, found.of_inputs, found.outputs, found.of_outputs) == (7, 128, 2, 128)
    assert all(c.inputs == c.outputs == 0 for c in channels.values())


def test_dead_input_channels_of_groups_are_those_of_each_group() -> None:
    name = "layer1.0.conv2.weight"  # 128 x 4 x 3 x 3, 32 groups of 4 outputs
    masks = masks_but(name, (slice(4), 1), arch="resnext50_32x4d")
    found = dead_channels(masks, ARCHITECTURES["resnext50_32x4d"])[name]
    assert (found.inputs, found.of_inputs, found.outputs) == (1, 128, 0)
