"""What a data preprocessor feeds the network, in a ticket's terms (`InputSpec`), and back.

mmcv loads images as BGR, so a preprocessor that converts the channels feeds RGB.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from lth_plugins.ticket import InputSpec


def fed_by(preprocessor: nn.Module) -> InputSpec:
    """What a data preprocessor of mmengine, mmseg, mmdet or mmpretrain feeds."""
    # mmpretrain calls it `to_rgb`; the others keep what they were told under this name only.
    converts = getattr(preprocessor, "to_rgb", getattr(preprocessor, "_channel_conversion", False))
    mean, std = (getattr(preprocessor, name, None) for name in ("mean", "std"))
    return _spec(converts, *(v if v is None else v.flatten().tolist() for v in (mean, std)))


def fed_by_config(cfg: Mapping[str, Any]) -> InputSpec:
    """What a data preprocessor built from this config feeds."""
    return _spec(cfg.get("bgr_to_rgb", False), cfg.get("mean"), cfg.get("std"))


def to_config(spec: InputSpec) -> dict[str, Any]:
    """The settings of a data preprocessor that feeds this."""
    return {
        "mean": list(spec.mean_255),
        "std": list(spec.std_255),
        "bgr_to_rgb": spec.format == "RGB",
    }


def to_lines(spec: InputSpec, preprocessor: nn.Module) -> str:
    """What to write in a config so that this data preprocessor feeds that."""
    settings = to_config(spec)
    if hasattr(preprocessor, "to_rgb"):  # mmpretrain's, and its configs have it at the top
        settings["to_rgb"] = settings.pop("bgr_to_rgb")
        return f"data_preprocessor = {_as_code(settings)}"
    return f"model = dict(data_preprocessor={_as_code(settings)})"


def _as_code(settings: Mapping[str, Any]) -> str:
    return f"dict({', '.join(f'{name}={value}' for name, value in settings.items())})"


def same_input(one: InputSpec, other: InputSpec) -> bool:
    """Whether two inputs agree, to a hundredth of a grey level."""
    return one.matches(other.format, other.mean_255, other.std_255)


def _spec(converts: bool, mean: Sequence[float] | None, std: Sequence[float] | None) -> InputSpec:
    # One value stands for all channels; none at all leaves pixels in [0, 255] as they are.
    mean, std = (tuple(v / 255 for v in values) for values in (mean or [0], std or [1]))
    return InputSpec(
        "RGB" if converts else "BGR",
        mean * 3 if len(mean) == 1 else mean,
        std * 3 if len(std) == 1 else std,
    )
