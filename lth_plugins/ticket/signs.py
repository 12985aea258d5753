"""Signs of other networks than plain ResNets, to name them in error messages."""

import re
from collections.abc import Iterable

from lth_plugins.ticket.keys import unwrapped

OTHERS: tuple[tuple[str, str], ...] = (
    (
        r"(^|\.)attnpool\.",
        "the attention pooling of CLIP's modified ResNets, whose stem and strides are others, too",
    ),
    (r"(^|\.)stage\d\.\d+\.branches\.", "HRNet's parallel branches"),
    (
        r"^conv2\.weight$|(^|\.)stem\.conv2\.(conv\.)?weight$",
        "a stem of several convolutions with a normalisation each (CLIP's modified ResNets have "
        "one, and some dilated ResNets)",
    ),
    (r"(^|\.)relative_position_bias_table$", "a Swin transformer"),
    (
        r"(^|\.)(cls_token|class_token|pos_embed|pos_embedding)$|(^|\.)blocks\.\d+\.attn\.qkv\.",
        "a vision transformer",
    ),
    (
        r"(^|\.)stages\.\d+\.(blocks\.)?\d+\.(gamma|conv_dw\.weight|dwconv\.weight)$|\.layer_scale$",
        "ConvNeXt's blocks",
    ),
    (r"(^|\.)s1\.b1\.conv1\.conv\.weight$|(^|\.)trunk_output\.block1\.", "a RegNet"),
    (
        r"(^|\.)conv_stem\.weight$|(^|\.)features\.\d+\.(\d+\.)?(block|conv)\.\d+\.\d+\.weight$",
        "inverted residuals (EfficientNet, MobileNet)",
    ),
    (r"\.(main_conv|mixing_conv)\.0\.|\.conv\d\.paths\.\d", "selective kernels (simCLR v2 'sk1')"),
    (r"\.conv2\.(fc[12]|bn[01])\.", "split attention (ResNeSt)"),
    (r"\.convs\.\d+\.weight$", "convolutions in several scales (Res2Net)"),
    (r"(^|\.)se(_module)?\.(fc|conv)", "squeeze-and-excitation blocks"),
    (r"(^|\.)attn\.mlp_(add|scale)\.", "global context blocks"),
    (r"\.conv2(_offset|\.conv_offset(_mask)?)\.weight$", "deformable convolutions"),
    (
        r"(^|\.)stages\.\d+\.blocks\.\d+\.norm3\.weight$|(^|\.)block\d\.unit\d+\.",
        "blocks that normalise first (ResNet v2, BiT)",
    ),
    (r"\.conv\d\.gain$", "normalised weights in the place of normalisation (NF-ResNet)"),
    (r"(^|\.)level\d\.(tree\d|\d+)\.", "DLA's trees"),
    (r"(^|\.)denseblock\d+[._]denselayer\d+", "a DenseNet"),
    (
        r"(^|\.)features\.(3|8|10)\.(weight|squeeze\.weight)$",
        "VGG's, AlexNet's or SqueezeNet's layers",
    ),
    (r"(^|\.)(Mixed_\d\w\.|inception\d\w\.)", "Inception's branches"),
    (r"(^|\.)stage\d\.\d+\.branch[12]\.", "ShuffleNet's branches"),
    (r"_gn_s$", "group normalisation"),
    (
        r"(^|[./])(kernel|kernel:0)$|/weights$",
        "convolutions as TensorFlow and JAX store them (height, width, in, out), to be converted "
        "to PyTorch first",
    ),
    (
        r"(^|[.:])(stage\d+_unit\d+_(conv|bn)\d|\w*resnetv\w+_layers?\d)",
        "MXNet's names, to be converted to PyTorch's first",
    ),
    (r"\.parametrizations\.", "parametrised weights: torch.nn.utils.parametrize can remove them"),
    (
        r"(^|\.)_?flat_param(_\d+)?$",
        "flattened parameters of FullyShardedDataParallel: gather them "
        "(StateDictType.FULL_STATE_DICT)",
    ),
    (r"\.(lora_[AB]|base_layer)\.", "adapters of PEFT: merge_and_unload() merges them"),
    (
        r"(^|\.)_packed_params(\.|$)|\.weight_fake_quant\.",
        "quantised weights, or is prepared for them: give the floating-point model",
    ),
    (r"\.weight_orig$", "weights that torch.nn.utils.prune holds (call its remove first)"),
    (r"\.weight_[guv]$", "weight or spectral normalisation (remove it first)"),
    (r"\.filt$", "the filters of an anti-aliased ResNet"),
)
"""Patterns of keys that no ticket has, and what they are a sign of, for error messages. A pattern
that begins with ^ is also tried on names inside the closest trunk."""


def signs_of_others(keys: Iterable[str]) -> str:
    """What else than a plain ResNet the keys are a sign of, to begin a message; "" if nothing."""
    keys = list(keys)
    for pattern, what in OTHERS:
        for key in keys:
            if re.search(pattern, unwrapped(key)):
                return f"it has {what} ({key}): only plain ResNets can be tickets; "
    return ""
