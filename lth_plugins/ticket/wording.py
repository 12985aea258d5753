"""`Wording`: how the person who reads a message writes in their host what it advises."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Wording:
    """What messages call options, and what they advise to write; by default in a plain script.

    A host makes one, in the terms of its configuration, and passes it with each ticket. The core's
    sentences hold its parts, and so name no host.

    Attributes:
        path, weights, reverse, random, load_weights: names of the options of
            `lth_plugins.ticket.Choice`.
        trunk_only: what leaves out the masks outside the trunk.
        attach_outside: what attaches them, as a clause with a verb.
        stride_in_1x1, stride_in_3x3: what places the stride of bottlenecks in that convolution.
        channels: what builds a network for images of ``{}`` channels.
        other_checkpoint: what accepts a checkpoint of other masks.
        load_compacted: what loads a checkpoint that `lth_plugins.compact` made.
    """

    path: str = "path"
    weights: str = "weights"
    reverse: str = "reverse"
    random: str = "random"
    load_weights: str = "load_weights"
    trunk_only: str = "ticket.without_outside()"
    attach_outside: str = (
        "call lth_plugins.attach_rest(model) once the whole model is built, before a checkpoint is "
        "loaded"
    )
    stride_in_1x1: str = "stride in its 1x1 convolutions"
    stride_in_3x3: str = "stride in its 3x3 convolutions"
    channels: str = "in_channels={0} (or in_chans={0})"
    other_checkpoint: str = "allow_other_checkpoint=True"
    load_compacted: str = "narrow_to(model, state_dict) of lth_plugins.masking.narrowing"


SCRIPT = Wording()
"""For a script without a host."""
