"""What a model is fed, compared with what its weights were trained on.

Hosts state it in configs of their own; `Fed` is the value that all of them mean.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lth_plugins.errors import TicketError
from lth_plugins.ticket.meta import InputSpec


@dataclass(frozen=True)
class Fed:
    """What a host feeds a model: ``(pixel - mean) / std`` with pixels in [0, 255].

    Attributes:
        format: order of the channels, such as "RGB"; None where the host does not say.
        mean: per channel.
        std: per channel.
    """

    format: str | None
    mean: Sequence[float]
    std: Sequence[float]

    @classmethod
    def of(cls, spec: InputSpec) -> "Fed":
        """The input that a ticket was trained on."""
        return cls(spec.format, spec.mean_255, spec.std_255)

    def same_as(self, other: "Fed") -> bool:
        """Whether both agree, to a hundredth of a grey level; an unknown format agrees with any."""
        known = {self.format, other.format} - {None}
        ours, theirs = (*self.mean, *self.std), (*other.mean, *other.std)
        return (
            len(known) <= 1
            and len(ours) == len(theirs)
            and all(abs(one - two) <= 0.01 for one, two in zip(ours, theirs, strict=True))
        )

    def to_dict(self) -> dict[str, Any]:
        """As plain values, for a checkpoint."""
        return {"format": self.format, "mean": list(self.mean), "std": list(self.std)}

    def __str__(self) -> str:
        return f"{self.format or 'some'} input with mean {list(self.mean)} and std {list(self.std)}"


def rounded(values: Tensor) -> list[float]:
    """The mean or std that a model's buffer holds, without the noise of single precision."""
    return [round(value, 4) for value in values.flatten().tolist()]


def contradiction(what: str, trained: Fed, found: Fed, feeds: str = "the model is fed") -> str:
    """What is wrong where a model is fed something else than its weights were trained on.

    Args:
        what: was trained: "the ticket", "the checkpoint".
        trained: on this.
        found: what the host feeds.
        feeds: subject and verb for the host.

    Returns:
        A sentence without its full stop; "" where both agree.
    """
    if trained.same_as(found):
        return ""
    return f"{what} was trained on {trained}, but {feeds} {found}"


def check_input(what: str, trained: Fed, found: Fed, advice: str, **feeds: str) -> None:
    """Raise ``TicketError`` with this advice where `contradiction` finds one."""
    wrong = contradiction(what, trained, found, **feeds)
    if wrong:
        raise TicketError(f"{wrong}{advice}")


def noted_in(entry: Mapping[str, Any] | None) -> Fed | None:
    """The input that a checkpoint notes, as `Fed.to_dict` wrote it; None where it notes none."""
    return None if entry is None else Fed(entry["format"], entry["mean"], entry["std"])
