"""What a ticket is: masks, the ticket, its file, the catalog of named tickets, naming dialects.

Names are imported when they are first used: a ticket's file is read without PyTorch.
"""

from typing import TYPE_CHECKING

from lth_plugins.lazy import attributes

if TYPE_CHECKING:  # for editors and type checkers
    from lth_plugins.errors import NotFound as NotFound
    from lth_plugins.errors import TicketError as TicketError
    from lth_plugins.ticket.arch import ARCHITECTURES as ARCHITECTURES
    from lth_plugins.ticket.arch import ResNet as ResNet
    from lth_plugins.ticket.catalog import TicketCatalog as TicketCatalog
    from lth_plugins.ticket.choice import Choice as Choice
    from lth_plugins.ticket.choice import Given as Given
    from lth_plugins.ticket.choice import load_given as load_given
    from lth_plugins.ticket.dialects import DIALECTS as DIALECTS
    from lth_plugins.ticket.dialects import Dialect as Dialect
    from lth_plugins.ticket.dialects import from_torchvision as from_torchvision
    from lth_plugins.ticket.layout import Layout as Layout
    from lth_plugins.ticket.locating import locate as locate
    from lth_plugins.ticket.masks import Masks as Masks
    from lth_plugins.ticket.meta import IMAGENET as IMAGENET
    from lth_plugins.ticket.meta import UNIT_RANGE as UNIT_RANGE
    from lth_plugins.ticket.meta import InputSpec as InputSpec
    from lth_plugins.ticket.meta import TicketMeta as TicketMeta
    from lth_plugins.ticket.outside import Outside as Outside
    from lth_plugins.ticket.ticket import Ticket as Ticket
    from lth_plugins.ticket.trunk import to_torchvision as to_torchvision
    from lth_plugins.ticket.wording import Wording as Wording

__getattr__, __dir__, __all__ = attributes(
    __name__,
    {
        ".errors": (
            "NotFound",
            "TicketError",
        ),
        "arch": (
            "ARCHITECTURES",
            "ResNet",
        ),
        "catalog": ("TicketCatalog",),
        "choice": (
            "Choice",
            "Given",
            "load_given",
        ),
        "dialects": (
            "DIALECTS",
            "Dialect",
            "from_torchvision",
        ),
        "layout": ("Layout",),
        "locating": ("locate",),
        "masks": ("Masks",),
        "meta": (
            "IMAGENET",
            "UNIT_RANGE",
            "InputSpec",
            "TicketMeta",
        ),
        "outside": ("Outside",),
        "ticket": ("Ticket",),
        "trunk": ("to_torchvision",),
        "wording": ("Wording",),
    },
)
