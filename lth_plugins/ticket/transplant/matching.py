"""Which channel of one network does what a channel of another does: by weights, or by activations.

Each width of the network has one order (`ResNet.coupled`): of the residual stream one for each
stage, and one inside each block. The best order is a linear assignment.
"""

import logging
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from lth_plugins.errors import RunError
from lth_plugins.ticket.arch import ResNet
from lth_plugins.ticket.keys import State, some
from lth_plugins.ticket.ticket import Ticket
from lth_plugins.ticket.transplant.forward import activations

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Match:
    """Which channels of two networks belong together.

    Attributes:
        orders: by width, [channels], long: the source's channel for each place of the target.
        by: what was compared, "weights" or "activations".
        before: how alike the networks are as they are: the cosine of their convolutions' weights,
            or the mean correlation of their channels' activations.
        after: the same, in these orders.
    """

    orders: Mapping[str, Tensor]
    by: str
    before: float
    after: float


_GAIN = 1e-3
"""An order is better if its similarity is higher by more than this part of it. With a millionth a
ResNet-50 took four times as long, and masks of two seeds were no more alike."""


def match_weights(source: State, target: State, arch: ResNet) -> Match:
    """Match channels by their weights (Ainsworth et al., "Git Re-Basin", arXiv 2209.04836, alg. 1).

    The orders maximise the inner product of the target's and the permuted source's weights, scales
    and shifts. Each width in turn gets the best order given all others, until none gets better. The
    first orders are found from the image on, and compare only what reads channels that are matched
    already, so that a permuted copy of a network is recognised whole.

    Args:
        source: θ of one network.
        target: θ of the other.
        arch: of both.
    """
    coupled = {
        width: {n: axis for n, axis in axes.items() if n.endswith((".weight", ".bias"))}
        for width, axes in arch.coupled.items()
    }
    sharing: dict[str, list[str]] = defaultdict(list)  # the widths that an entry has channels of
    for width, axes in coupled.items():
        for entry in axes:
            sharing[entry].append(width)
    orders: dict[str, Tensor] = {}

    def similarity(width: str) -> Tensor:
        total = torch.zeros(())
        for entry, axis in coupled[width].items():
            others = [other for other in sharing[entry] if other != width]
            if all(other in orders for other in others):
                theirs = source[entry]
                for other in others:
                    theirs = theirs.index_select(coupled[other][entry], orders[other])
                total = total + _rows(target[entry], axis) @ _rows(theirs, axis).T
        return total

    for width in coupled:
        orders[width] = _best(similarity(width))
    pending = list(coupled)
    while pending:
        width = pending.pop(0)
        found = similarity(width)
        order, rows = _best(found), torch.arange(len(found))
        before, after = (float(found[rows, o].sum()) for o in (orders[width], order))
        if after - before > _GAIN * abs(before):
            orders[width] = order
            near = set(chain.from_iterable(sharing[entry] for entry in coupled[width])) - {width}
            pending += [other for other in coupled if other in near and other not in pending]
    convolutions = {name: source[name] for name in sharing if source[name].ndim == 4}
    before = _cosine(target, convolutions)
    after = _cosine(target, permuted_by(orders, coupled, convolutions))
    return Match(orders, "weights", before, after)


def permuted_by(
    orders: Mapping[str, Tensor],
    coupled: Mapping[str, Mapping[str, int]],
    entries: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """Entries of a trunk with their channels in these orders.

    Args:
        orders: of each width, as `Match.orders`.
        coupled: as `ResNet.coupled`.
        entries: some of the trunk's, by name.
    """
    result = dict(entries)
    for width, axes in coupled.items():
        for name in result.keys() & axes.keys():
            result[name] = result[name].index_select(axes[name], orders[width])
    return result


def match_activations(
    source: Ticket, target: Ticket, images: tuple[Tensor, Tensor], arch: ResNet
) -> Match:
    """Match channels by how their activations correlate over images and positions.

    As in "Sparse Training from Random Initialization: Aligning Lottery Ticket Masks using Weight
    Symmetry" (arXiv 2505.05143). Correlations are added over the blocks of a stage. A channel
    that is constant over the images correlates with none.

    Args:
        source: one network: its θ, without its masks.
        target: the other.
        images: the same for both, [N, channels, H, W] each, as either network's input says.
        arch: of both.

    Raises:
        RunError: if the images are too few: a layer is seen at one position, or all of it is
            constant; or activations are not finite.
    """
    found: dict[str, Tensor] = {}
    places: Counter[str] = Counter()
    constant: Counter[str] = Counter()
    with torch.no_grad():
        both = (activations(t, i) for t, i in zip((source, target), images, strict=True))
        for (width, place, theirs), (_, _, ours) in zip(*both, strict=True):
            ours, theirs = (_standardised(place, values) for values in (ours, theirs))
            constant[place] += sum(int((~rows.any(1)).sum()) for rows in (ours, theirs))
            found[width] = found.get(width, 0) + ours @ theirs.T
            places[width] += 1
    if sum(constant.values()):
        layers = [f"{place} ({count})" for place, count in constant.items() if count]
        logger.info(
            "Channels that are constant over the images count as uncorrelated: in %s", some(layers)
        )
    orders = {width: _best(found[width]) for width in arch.coupled}
    correlations = {width: total / places[width] for width, total in found.items()}
    before = torch.cat([each.diagonal() for each in correlations.values()]).mean()
    after = torch.cat([correlations[width][range(len(o)), o] for width, o in orders.items()]).mean()
    return Match(orders, "activations", float(before), float(after))


def _standardised(place: str, values: Tensor) -> Tensor:
    """The activations of each channel, [C, N·H·W], centred and of length 1; of a constant one 0."""
    rows = _rows(values, 1)
    if not bool(torch.isfinite(rows.sum())):
        raise RunError(
            f"expected finite activations, found others in {place}: the network overflows on these "
            "images; without images, weights are compared"
        )
    centred = rows - rows.mean(1, keepdim=True)
    length = centred.norm(dim=1, keepdim=True)
    varies = length > 1e-5 * rows.norm(dim=1, keepdim=True)
    if rows.shape[1] < 2 or not varies.any():
        raise RunError(
            f"expected images over which {place} varies, found {len(values)} images in which it "
            f"has {values.shape[2]}x{values.shape[3]} positions and is constant: give more images, "
            "or larger ones; without images, weights are compared"
        )
    return torch.where(varies, centred / length.clamp(min=1e-30), 0)


def _cosine(first: State, second: State) -> float:
    """Of all weights in the second, as one vector each."""
    sums = torch.zeros(3, dtype=torch.float64)
    for name, value in second.items():
        pairs = ((first[name], value), (first[name], first[name]), (value, value))
        sums += torch.stack([torch.dot(a.flatten(), b.flatten()) for a, b in pairs])
    return float(sums[0] / (sums[1] * sums[2]).sqrt())


def _rows(values: Tensor, axis: int) -> Tensor:
    return values.movedim(axis, 0).reshape(values.shape[axis], -1)


def _best(similarity: Tensor) -> Tensor:
    """The order with the largest sum: of each row, the column that is assigned to it."""
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError:
        raise RunError("aligning networks needs scipy: pip install scipy") from None
    return torch.from_numpy(linear_sum_assignment(similarity.numpy(), maximize=True)[1])
