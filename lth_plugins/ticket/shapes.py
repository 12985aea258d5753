"""Which parameters outside a trunk a ticket may prune."""

import math
from collections.abc import Mapping

from lth_plugins.errors import TicketError
from lth_plugins.ticket.arch import Shape

LARGEST = 1 << 27
"""How many weights there may be, so that no file can ask for more: 512 MiB of float32."""


def check_outside_shapes(shapes: Mapping[str, Shape]) -> None:
    """Raise ``TicketError`` unless these can be parameters outside a trunk; allocates nothing."""
    total = 0
    for name, shape in shapes.items():
        if not name.endswith(".weight") or len(shape) not in (2, 4) or min(shape) < 1:
            raise TicketError(
                f"expected the weight of a convolution or linear layer, found {name:.80} of shape "
                f"{tuple(shape)}"
            )
        total += math.prod(shape)
    if total > LARGEST:
        raise TicketError(
            f"expected at most {LARGEST:,} weights outside the trunk, found {total:,}: leave out "
            "modules by name"
        )
