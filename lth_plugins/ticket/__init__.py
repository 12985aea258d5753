"""What a ticket is: masks, the ticket, its file, the catalog of named tickets, naming dialects."""

from lth_plugins.errors import NotFound, TicketError
from lth_plugins.ticket.arch import ARCHITECTURES, ResNet
from lth_plugins.ticket.catalog import TicketCatalog
from lth_plugins.ticket.choice import Choice, Given, load_given
from lth_plugins.ticket.dialects import DIALECTS, Dialect, from_torchvision
from lth_plugins.ticket.layout import Layout
from lth_plugins.ticket.locating import locate
from lth_plugins.ticket.masks import Masks
from lth_plugins.ticket.meta import IMAGENET, UNIT_RANGE, InputSpec, TicketMeta
from lth_plugins.ticket.outside import Outside
from lth_plugins.ticket.ticket import Ticket
from lth_plugins.ticket.trunk import to_torchvision
from lth_plugins.ticket.wording import Wording

__all__ = [
    "ARCHITECTURES",
    "DIALECTS",
    "IMAGENET",
    "UNIT_RANGE",
    "Choice",
    "Dialect",
    "Given",
    "InputSpec",
    "Layout",
    "Masks",
    "NotFound",
    "Outside",
    "ResNet",
    "Ticket",
    "TicketCatalog",
    "TicketError",
    "TicketMeta",
    "Wording",
    "from_torchvision",
    "load_given",
    "locate",
    "to_torchvision",
]
