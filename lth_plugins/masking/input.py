"""The input of a model, compared with the one that its weights were trained on.

Each host has its own settings for the input; `ModelInput` holds their values.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lth_plugins.errors import TicketError
from lth_plugins.ticket.meta import InputSpec


@dataclass(frozen=True)
class ModelInput:
    """The images that a host gives a model: ``(pixel - mean) / std`` with pixels in [0, 255], or
    as a sensor's files hold them.

    Attributes:
        format: order of the channels, such as "RGB"; None where the host does not say.
        mean: per channel.
        std: per channel.
    """

    format: str | None
    mean: Sequence[float]
    std: Sequence[float]

    @classmethod
    def of(cls, spec: InputSpec) -> "ModelInput":
        """The input that a ticket was trained on.

        Hosts have names for orders of three colours alone: those of bands are not compared.
        """
        return cls(spec.format if spec.channels == 3 else None, spec.mean_255, spec.std_255)

    def same_as(self, other: "ModelInput") -> bool:
        """Whether both agree, to a hundredth of a grey level.

        An unknown format agrees with any; a single mean or std is that of all channels.
        """
        known = {self.format, other.format} - {None}
        return len(known) <= 1 and _agree(self.mean, other.mean) and _agree(self.std, other.std)

    def to_dict(self) -> dict[str, Any]:
        """As plain values, for a checkpoint."""
        return {"format": self.format, "mean": list(self.mean), "std": list(self.std)}

    def __str__(self) -> str:
        what = self.format or ("some" if len(self.mean) == 3 else f"{len(self.mean)}-channel")
        return f"{what} input with mean {list(self.mean)} and std {list(self.std)}"


def _agree(ours: Sequence[float], theirs: Sequence[float]) -> bool:
    count = max(len(ours), len(theirs))
    pair = [list(values) * (count if len(values) == 1 else 1) for values in (ours, theirs)]
    return len(pair[0]) == len(pair[1]) and all(
        abs(one - two) <= 0.01 for one, two in zip(*pair, strict=True)
    )


def rounded(values: Tensor) -> list[float]:
    """The mean or std that a model's buffer holds, without the noise of single precision."""
    return [round(value, 4) for value in values.flatten().tolist()]


def contradiction(
    what: str, trained: ModelInput, found: ModelInput, host: str = "the model has"
) -> str:
    """Say how the input of a model differs from the one that its weights were trained on.

    Args:
        what: what was trained: "the ticket", "the checkpoint".
        trained: the input that it was trained on.
        found: the input that the host gives the model.
        host: subject and verb for the host, in the message.

    Returns:
        A sentence without its full stop; "" where both agree.
    """
    if trained.same_as(found):
        return ""
    return f"{what} was trained on {trained}, but {host} {found}"


def check_input(
    what: str, trained: ModelInput, found: ModelInput, advice: str, **host: str
) -> None:
    """Raise ``TicketError`` with this advice where `contradiction` finds one."""
    wrong = contradiction(what, trained, found, **host)
    if wrong:
        raise TicketError(f"{wrong}{advice}")


def check_rgb(spec: InputSpec, host: str) -> None:
    """Check that a ticket was trained on RGB, for hosts that feed nothing else.

    Args:
        spec: the ticket's input.
        host: says so in the message: "timm gives models RGB".

    Raises:
        TicketError: if it was not.
    """
    if spec.format != "RGB":
        raise TicketError(
            f"{host}, but this ticket wants {spec.format:.60}: use it in a host that has a setting "
            "for the channels and their order, or take a ticket of weights that were trained on RGB"
        )


def noted_in(entry: Mapping[str, Any] | None) -> ModelInput | None:
    """The input that a checkpoint notes, by `ModelInput.to_dict`; None where it notes none."""
    return None if entry is None else ModelInput(entry["format"], entry["mean"], entry["std"])
