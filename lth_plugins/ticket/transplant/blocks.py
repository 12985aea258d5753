"""Masks for a deeper or shallower network of the same family: blocks are replicated or dropped.

Chen et al., "The Elastic Lottery Ticket Hypothesis" (arXiv 2103.16547, section 3). The first block
of each stage, which changes resolution and width, stays the first; the others are its units.
"""

from collections.abc import Callable, Mapping, Sequence

from lth_plugins.ticket.arch import STAGES, ResNet
from lth_plugins.ticket.masks import Masks

ORDERS: Mapping[str, Callable[[int, int, int], int]] = {
    "append": lambda unit, given, wanted: unit % given,
    "interpolate": lambda unit, given, wanted: unit * given // wanted,
}
"""The source's unit for each of the target's, by how many the source has and the target wants.

"append" repeats the units as a sequence (1 2 3 1 2 3), and drops the last ones; "interpolate"
repeats each one where it is (1 1 2 2 3 3), and drops evenly.
"""


def of_depth(masks: Masks, source: ResNet, target: ResNet, order: str) -> Masks:
    """The masks of another depth.

    Args:
        masks: of a trunk.
        source: its architecture.
        target: one that differs in its depths alone.
        order: a key of `ORDERS`.
    """
    taken = {
        f"{stage}.{index}": f"{stage}.{block}"
        for stage, given, wanted in zip(STAGES, source.depths, target.depths, strict=True)
        for index, block in enumerate(_taken(given, wanted, order))
    }
    found = {}
    for name in target.prunable:
        stage, index, rest = name.split(".", 2)
        found[name] = masks[f"{taken[f'{stage}.{index}']}.{rest}"].clone()
    return Masks.adopt(found)


def _taken(given: int, wanted: int, order: str) -> Sequence[int]:
    """Of each block of a stage of so many, the block that it gets its masks from."""
    unit = ORDERS[order]
    return [0, *(1 + unit(k, given - 1, wanted - 1) for k in range(wanted - 1))]
