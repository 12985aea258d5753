"""The widths of a trunk: finding it in a model, and giving it those of a compacted state dict.

Only widths inside blocks change (`ResNet.inner`), so shapes say all there is to know about a
compacted model. `lth_plugins.compact` makes one.
"""

from collections.abc import Sequence
from typing import Any

from torch import nn

from lth_plugins.errors import LthError
from lth_plugins.masking.attachment import attached
from lth_plugins.masking.record import masked_in
from lth_plugins.ticket.arch import ARCHITECTURES, NORM_ENTRIES, PARTS, Inner
from lth_plugins.ticket.keys import State, unwrapped
from lth_plugins.ticket.layout import Layout
from lth_plugins.ticket.locating import locate
from lth_plugins.ticket.obstacles import check_not_replaced


def narrow_to(model: nn.Module, state: State, parts: Sequence[str] | None = None) -> None:
    """Give a freshly built model the widths of a compacted state dict, so that it loads.

    It does nothing where both have the same. A ticket on the model is detached: its masks are of
    the full width. Other shapes that differ are left for the loader to find.

    Args:
        model: as wide as its configuration makes it; changed in place, its weights cut off.
        state: under the model's own names.
        parts: as `find_trunk`'s.
    """
    own = model.state_dict(keep_vars=True)
    if any(state[key].shape != value.shape for key, value in own.items() if key in state):
        narrow(model, find_trunk(model, parts), state)


def narrow(model: nn.Module, layout: Layout, state: State) -> None:
    """`narrow_to` for a trunk that was located before."""
    own = model.state_dict(keep_vars=True)
    for inner in inner_convolutions(layout):
        key = layout.keys[f"{inner.conv}.weight"]
        width = len(state.get(key, own[key]))
        if width == len(own[key]):
            continue
        handle = attached(model)
        if handle is not None:
            handle.detach()
        conv, norm, reader = (
            module_of(model, layout, name) for name in (inner.conv, inner.norm, inner.reader)
        )
        _cut(conv, "weight", slice(width))
        _cut(reader, "weight", (slice(None), slice(width)))
        for entry in NORM_ENTRIES:
            _cut(norm, entry, slice(width))
        conv.out_channels = norm.num_features = reader.in_channels = width


def find_trunk(model: nn.Module, parts: Sequence[str] | None = None) -> Layout:
    """The trunk of a model, compacted or not.

    Args:
        model: of any known dialect.
        parts: the parts of the trunk that it has, of `PARTS`; by default all up to the last stage
            that is there, as hosts build it up to the last whose features they use.

    Raises:
        TicketError: as `locate`.
    """
    masked = next(iter(masked_in(model).values()), None)
    archs = ARCHITECTURES.values() if masked is None else [masked.meta.network]
    if parts is not None:
        return locate(model, parts, archs, compacted=True)
    for end in range(len(PARTS), 1, -1):
        try:
            layout = locate(model, PARTS[:end], archs, compacted=True)
        except LthError as error:
            if end == len(PARTS):
                of_the_whole = error
            continue
        # A stage that is there and does not fit is no reason to leave it out.
        spelled = layout.dialect.table(layout.arch)
        where = unwrapped(layout.prefix)
        beyond = {where + spelled[f"{stage}.0.conv1.weight"] for stage in PARTS[end:]}
        if not beyond & {unwrapped(key) for key in model.state_dict(keep_vars=True)}:
            return layout
    check_not_replaced(model.named_modules())
    raise of_the_whole


def inner_convolutions(layout: Layout) -> list[Inner]:
    """The convolutions inside blocks of the stages that the model has."""
    return [inner for inner in layout.arch.inner if f"{inner.conv}.weight" in layout.keys]


def module_of(model: nn.Module, layout: Layout, name: str) -> Any:
    """The module of a trunk's layer, by its torchvision name."""
    return layout.modules(model)[f"{name}.weight"]


def _cut(module: nn.Module, name: str, kept: slice | tuple[slice, ...]) -> None:
    """Leave this part of a parameter or buffer."""
    value = getattr(module, name)
    part = value.detach()[kept].clone()
    if isinstance(value, nn.Parameter):
        part = nn.Parameter(part, requires_grad=value.requires_grad)
    setattr(module, name, part)
