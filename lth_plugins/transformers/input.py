"""The input that an image processor gives a model (`ModelInput`), and its settings for one."""

from typing import Any

import numpy as np

from lth_plugins.errors import TicketError
from lth_plugins.masking.input import ModelInput, contradiction


def input_of(processor: Any) -> ModelInput:
    """The input that an image processor returns, of images in [0, 255]."""
    scale = processor.rescale_factor if processor.do_rescale else 1.0
    mean, std = processor.image_mean, processor.image_std
    if not processor.do_normalize or mean is None or std is None:
        mean, std = 0, 1
    order = "BGR" if getattr(processor, "do_flip_channel_order", False) else "RGB"
    channels = (np.broadcast_to(each, 3) if np.ndim(each) == 0 else each for each in (mean, std))
    return ModelInput(order, *([round(float(v) / scale, 4) for v in each] for each in channels))


def settings_for(
    processor: Any, wanted: ModelInput, keep: bool, before: ModelInput | None = None
) -> dict[str, Any]:
    """What to set in an image processor so that it returns the input that a ticket wants.

    Its defaults become the ticket's values. What was set by hand is not changed, nor is a processor
    that does not normalise: the rest of a trained model expects that.

    Args:
        processor: an image processor.
        wanted: the input of the ticket.
        keep: accept another input.
        before: what another ticket on the model has set in it, which is no choice of the user's.

    Raises:
        TicketError: if it returns another input than the ticket's, and that is not its default.
    """
    found = input_of(processor)
    wrong = contradiction("the ticket", wanted, found, host=f"{type(processor).__name__} returns")
    if not wrong or keep:
        return {}
    scaled = {"image_mean": wanted.mean, "image_std": wanted.std}
    settings = {name: [round(v / 255, 6) for v in values] for name, values in scaled.items()}
    default = all(
        _plain(getattr(processor, name)) == _plain(getattr(type(processor), name, None))
        for name in ("do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std")
    )
    default |= before is not None and before.same_as(found)
    if default and processor.do_normalize and found.format == wanted.format:
        return settings
    switches = dict.fromkeys(("do_rescale", "do_normalize"), True)
    written = ", ".join(f"{name}={value}" for name, value in {**switches, **settings}.items())
    advice = f"write AutoImageProcessor.from_pretrained(…, {written})"
    if found.format != wanted.format:
        advice = "take a ticket of weights that were trained on that order of channels"
    raise TicketError(
        f"{wrong}: {advice}, or keep_input=True in attach_ticket to train on that input anyway"
    )


def _plain(value: Any) -> Any:
    return np.asarray(value).tolist()  # a list, a tuple, an array, or one number
