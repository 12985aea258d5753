"""The input that a data preprocessor gives a network (`ModelInput`), and the settings for one.

mmcv loads images as BGR, so a preprocessor that converts the channels returns RGB.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from lth_plugins.masking.input import ModelInput, rounded


def input_of(preprocessor: nn.Module) -> ModelInput:
    """The input that a data preprocessor of mmengine, mmseg, mmdet or mmpretrain returns."""
    # mmpretrain calls it `to_rgb`; the others keep the setting under this name only.
    converts = getattr(preprocessor, "to_rgb", getattr(preprocessor, "_channel_conversion", False))
    mean, std = (getattr(preprocessor, name, None) for name in ("mean", "std"))
    return _input(converts, *(v if v is None else rounded(v) for v in (mean, std)))


def input_of_config(cfg: Mapping[str, Any]) -> ModelInput:
    """The input that a data preprocessor built from this config returns."""
    return _input(cfg.get("bgr_to_rgb", False), cfg.get("mean"), cfg.get("std"))


def _input(converts: bool, mean: Sequence[float] | None, std: Sequence[float] | None) -> ModelInput:
    # One value stands for all channels; none at all leaves pixels in [0, 255] as they are.
    return ModelInput("RGB" if converts else "BGR", list(mean or [0]), list(std or [1]))


def to_config(wanted: ModelInput) -> dict[str, Any] | None:
    """The settings of a data preprocessor that returns this input.

    None where it cannot: mmengine's have statistics of three channels, or one for all.
    """
    mean, std = (_shared(values) for values in (wanted.mean, wanted.std))
    if not {len(mean), len(std)} <= {1, 3}:
        return None
    return {"mean": mean, "std": std, "bgr_to_rgb": wanted.format == "RGB"}


def _shared(values: Sequence[float]) -> list[float]:
    """The one value of all bands, if they share it."""
    return [values[0]] if len(values) != 3 and len(set(values)) == 1 else list(values)


def to_lines(wanted: ModelInput, preprocessor: nn.Module) -> str:
    """What to write in a config so that this data preprocessor returns that input."""
    settings = to_config(wanted)
    if settings is None:
        return (
            ". Normalise the bands in the pipeline, since a data preprocessor has statistics of "
            "three channels only (mean=None, std=None leaves images as they are),"
        )
    at_top = hasattr(preprocessor, "to_rgb")  # mmpretrain's, and its configs have it at the top
    if at_top:
        settings["to_rgb"] = settings.pop("bgr_to_rgb")
    code = f"dict({', '.join(f'{name}={value}' for name, value in settings.items())})"
    line = f"data_preprocessor = {code}" if at_top else f"model = dict(data_preprocessor={code})"
    return f". Write in the config\n    {line}"
