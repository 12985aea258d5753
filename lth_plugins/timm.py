"""Ticket backbones for timm.

``import lth_plugins.timm``, then ``timm.create_model('ticket_resnet50', ticket=…)`` with what else
timm's own ``resnet50`` takes; ``in_chans`` is the ticket's. Each architecture that timm and tickets
share has one.
"""

from collections.abc import Callable
from typing import Any

import timm
from timm.models import register_model
from torch import nn

from lth_plugins.masking.attachment import attach
from lth_plugins.masking.input import ModelInput, check_rgb
from lth_plugins.masking.loading import watch_loading
from lth_plugins.ticket import ARCHITECTURES, Given, TicketError, Wording, load_given
from lth_plugins.ticket.arch import PARTS, part_of
from lth_plugins.ticket.meta import COLOURS

WORDING = Wording(path="ticket", channels="in_chans={}")


def _entrypoint(arch: str) -> Callable[..., nn.Module]:
    def create(
        pretrained: bool = False,
        ticket: Given = "",
        allow_other_checkpoint: bool = False,
        **options: Any,
    ) -> nn.Module:
        if pretrained or not ticket:
            raise TicketError(
                f"ticket_{arch} takes its weights from a ticket: give ticket=… (a path, a catalog "
                f"name or a Ticket) and not pretrained=True; for a dense model use {arch!r}"
            )
        ticket, load_weights = load_given(ticket, WORDING)
        spec = ticket.meta.input.of_unit_range
        if spec.format in COLOURS:  # bands have an order of their own
            check_rgb(spec, "timm gives models RGB")
        model: Any = timm.create_model(arch, **{"in_chans": spec.channels, **_given(options)})
        there = {part_of(name) for name, _ in model.named_parameters()}
        parts = [part for part in PARTS if part in there]
        attach(model, ticket.without_outside(), load_weights, parts=parts, wording=WORDING)
        watch_loading(
            model,
            allow_other_checkpoint=allow_other_checkpoint,
            parts=parts,
            model_input=ModelInput.of(spec),
        )
        # timm's data pipelines read the normalisation from here (timm.data.resolve_data_config).
        size = (spec.channels, *model.pretrained_cfg["input_size"][1:])
        wanted = {"mean": spec.mean, "std": spec.std, "input_size": size}
        model.pretrained_cfg = {**model.pretrained_cfg, **wanted}
        model.default_cfg = model.pretrained_cfg
        return model

    create.__name__ = create.__qualname__ = f"ticket_{arch}"
    create.__doc__ = (
        f"timm's {arch} on a ticket; raises `TicketError` if the ticket does not fit. It refuses "
        "checkpoints of other tickets, unless allow_other_checkpoint."
    )
    return create


def _given(options: dict[str, Any]) -> dict[str, Any]:
    """Drop these two where they are unset: timm passes them to every entry point."""
    return {
        name: value
        for name, value in options.items()
        if name not in ("pretrained_cfg", "pretrained_cfg_overlay") or value is not None
    }


for _arch in filter(timm.is_model, ARCHITECTURES):
    register_model(_entrypoint(_arch))
