"""mmsegmentation's ResNets, as backbones that do not train without a ticket.

Otherwise they are the stock classes: same parameters, same checkpoints. A stock ``ResNet`` with
``init_cfg=dict(type='Ticket', …)`` trains just the same.
"""

from typing import Any

from mmengine.model import BaseModule
from mmengine.registry import MODELS
from mmseg.models.backbones import ResNet, ResNetV1c, ResNetV1d

from lth_plugins.errors import ConfigError, NotFound
from lth_plugins.mmseg.init import ticket_options, watch


class _NeedsTicket(BaseModule):
    """Refuses to be initialised with anything but a ticket."""

    def __init__(self, *args: Any, pretrained: str | None = None, **kwargs: Any) -> None:
        if pretrained is not None:
            raise ConfigError(
                f"{type(self).__name__} takes its weights from a ticket, but the config also has "
                f"pretrained={pretrained!r}: write model=dict(pretrained=None, …)"
            )
        super().__init__(*args, **kwargs)
        watch(self)

    def init_weights(self) -> None:
        # Not while it is built: to test a trained checkpoint, mmseg builds it without init_cfg.
        if ticket_options(self.init_cfg) is None:
            raise NotFound(
                f"{type(self).__name__} needs a ticket: write backbone=dict("
                "init_cfg=dict(type='Ticket', checkpoint='FILE.ticket'), …)"
            )
        super().init_weights()


# In mmengine's root registry, not in mmseg's: mmdet and mmpretrain find them there, too.
@MODELS.register_module()
class TicketResNet(_NeedsTicket, ResNet):
    """ResNet as in torchvision, with one 7x7 convolution in the stem."""


@MODELS.register_module()
class TicketResNetV1c(_NeedsTicket, ResNetV1c):
    """ResNet-C: a deep stem of three 3x3 convolutions (``resnet50c`` in timm)."""


@MODELS.register_module()
class TicketResNetV1d(_NeedsTicket, ResNetV1d):
    """ResNet-D: ResNet-C with average-pooled shortcuts (``resnet50d`` in timm)."""
