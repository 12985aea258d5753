"""What a data preprocessor feeds the network (`Fed`), and the settings of one that feeds it.

mmcv loads images as BGR, so a preprocessor that converts the channels feeds RGB.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from lth_plugins.masking.input import Fed, rounded


def fed_by(preprocessor: nn.Module) -> Fed:
    """What a data preprocessor of mmengine, mmseg, mmdet or mmpretrain feeds."""
    # mmpretrain calls it `to_rgb`; the others keep the setting under this name only.
    converts = getattr(preprocessor, "to_rgb", getattr(preprocessor, "_channel_conversion", False))
    mean, std = (getattr(preprocessor, name, None) for name in ("mean", "std"))
    return _fed(converts, *(v if v is None else rounded(v) for v in (mean, std)))


def fed_by_config(cfg: Mapping[str, Any]) -> Fed:
    """What a data preprocessor built from this config feeds."""
    return _fed(cfg.get("bgr_to_rgb", False), cfg.get("mean"), cfg.get("std"))


def _fed(converts: bool, mean: Sequence[float] | None, std: Sequence[float] | None) -> Fed:
    # One value stands for all channels; none at all leaves pixels in [0, 255] as they are.
    channels = [list(values) * (3 // len(values)) for values in (mean or [0], std or [1])]
    return Fed("RGB" if converts else "BGR", *channels)


def to_config(fed: Fed) -> dict[str, Any]:
    """The settings of a data preprocessor that feeds this."""
    return {"mean": list(fed.mean), "std": list(fed.std), "bgr_to_rgb": fed.format == "RGB"}


def to_lines(fed: Fed, preprocessor: nn.Module) -> str:
    """What to write in a config so that this data preprocessor feeds that."""
    settings = to_config(fed)
    at_top = hasattr(preprocessor, "to_rgb")  # mmpretrain's, and its configs have it at the top
    if at_top:
        settings["to_rgb"] = settings.pop("bgr_to_rgb")
    code = f"dict({', '.join(f'{name}={value}' for name, value in settings.items())})"
    line = f"data_preprocessor = {code}" if at_top else f"model = dict(data_preprocessor={code})"
    return f". Write in the config\n    {line}"
