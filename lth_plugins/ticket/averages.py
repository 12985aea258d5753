"""Moving averages: which of several trunks in a checkpoint is trained, and which is an average."""

import re
from collections.abc import Iterable

from lth_plugins.ticket.keys import segments_of, unwrapped

_AVERAGE = "a moving average of it"
_AVERAGED_MODELS = "(?:ema|(?:model|net|state_dict)_ema|ema_(?:model|net)|swa_model|average_model)"

MOVING_AVERAGES: tuple[tuple[str, str, str], ...] = (
    (r"([^.]+)_k", r"\1_q", _AVERAGE),  # MoCo v1, v2: encoder_k
    (r"([^.]+)_k", r"\1", _AVERAGE),  # PixPro
    (r"([^.]+)_m", r"\1", _AVERAGE),  # ALBEF
    (r"key_([^.]+)", r"query_\1", _AVERAGE),
    (r"momentum_([^.]+)", r"base_\1", _AVERAGE),  # MoCo v3
    (r"momentum_([^.]+)", r"\1", _AVERAGE),  # solo-learn
    (r"([^.]+)_momentum", r"\1", _AVERAGE),  # lightly's examples
    (r"target_([^.]+)", r"online_\1", _AVERAGE),  # BYOL
    (r"target_([^.]+)", r"\1", _AVERAGE),
    (r"target", "online", _AVERAGE),
    (r"backbone", "query_backbone", _AVERAGE),  # lightly's MoCo benchmark
    (r"encoder_k\.0", "backbone", _AVERAGE),  # mmselfsup, mmpretrain
    (r"target_net\.0", "backbone", _AVERAGE),  # their BYOL
    (
        "ema_state_dict",
        "state_dict",
        "a moving average of it, or, where a hook swapped the two while saving, the "
        "weights that it is the average of",
    ),
    (
        "current_model_state",
        "state_dict",
        "the weights that it is the average of: Lightning's WeightAveraging swaps the two while "
        "saving",
    ),
    (r"([^.]+)_ema", r"\1", _AVERAGE),  # timm: state_dict_ema; torchvision: model_ema
    (r"ema_([^.]+)", r"\1", _AVERAGE),
    *(
        (_AVERAGED_MODELS, trained, _AVERAGE)
        for trained in ("model", "state_dict", "model_state_dict", "net", "")
    ),
)
"""Names in a trunk's prefix (regular expressions of whole segments), what stands in their place in
the prefix of a trunk that is preferred, and what the former is to the latter. Wrappers do not
count, and "" is nothing in their place."""


def prefer_trained(prefixes: Iterable[str]) -> list[str]:
    """These prefixes without those of moving averages of other trunks among them."""
    prefixes = list(prefixes)
    averages = averages_among(prefixes)
    return [prefix for prefix in prefixes if prefix not in averages]


def averages_among(prefixes: Iterable[str]) -> dict[str, str]:
    """Those of these trunks' prefixes that `MOVING_AVERAGES` is about, and what they are."""
    plain = {prefix: segments_of(unwrapped(prefix)) for prefix in prefixes}
    averages: dict[str, str] = {}
    for prefix, segments in plain.items():
        others = [other for p, other in plain.items() if p != prefix]
        name = ".".join(segments)
        for pattern, trained, what in MOVING_AVERAGES:
            for match in re.finditer(rf"(?<![^.])(?:{pattern})(?![^.])", name):
                instead = name[: match.start()] + match.expand(trained) + name[match.end() :]
                if segments_of(unwrapped(instead)) in others:
                    averages.setdefault(prefix, what)
    return averages
