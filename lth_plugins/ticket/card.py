"""The card of a ticket: what it is and how to use it, as the Hugging Face hub shows it.

A card is Markdown below YAML metadata, as the hub's model cards are. The file ``NAME.md`` beside
``NAME.ticket`` is that ticket's card; a ticket without one gets the card that is made here.
"""

import json
from pathlib import Path
from typing import Protocol

from lth_plugins.errors import printable
from lth_plugins.ticket.counts import Counted, Counts
from lth_plugins.ticket.meta import InputSpec, TicketMeta


class Described(Protocol):
    """A ticket, or what its file says of it."""

    @property
    def meta(self) -> TicketMeta: ...
    @property
    def digest(self) -> str: ...
    @property
    def counts(self) -> Counts: ...
    @property
    def outside_counts(self) -> Counts: ...


def facts(ticket: Described) -> dict[str, str]:
    """What a ticket is, by name, each as text for a person."""
    meta, outside = ticket.meta, ticket.outside_counts
    found = meta.round > 0 or ticket.counts.density == 1
    return {
        "architecture": meta.network.title,
        "source": meta.source,
        "round": str(meta.round) if found else "none: its masks come from elsewhere",
        "sparsity": sparsity(ticket.counts),
        "outside": sparsity(outside) if outside.numel else "nothing is pruned",
        "input": described(meta.input),
        "1x1 stride": str(meta.stride_in_1x1),
        "recipe": ", ".join(f"{k}={v}" for k, v in meta.recipe.items()) or "none given",
        "parent": meta.parent or "none",
        "digest": ticket.digest,
    }


def sparsity(masks: Counted) -> str:
    """How much masks prune, in percent and in weights."""
    return f"{100 * masks.sparsity:.2f} % of {masks.numel:,} prunable weights ({masks.kept:,} kept)"


def described(spec: InputSpec) -> str:
    """An input in a few words."""
    mean, std = (" ".join(f"{v:g}" for v in values) for values in (spec.mean, spec.std))
    pixels = {255.0: "in 0 to 1", 1.0: "as stored"}.get(spec.scale, f"over {spec.scale:g}")
    return f"{spec.format}, mean {mean}, std {std} (pixels {pixels})"


def card_of(ticket: Described, ref: str, path: Path | None = None) -> str:
    """The card of a ticket: the one beside its file, or one that states its facts.

    The latter has no metrics and no licence of weights and data: a ticket does not hold them.

    Args:
        ticket: the ticket.
        ref: what loads it: a catalog name, or ``hf://owner/repo``.
        path: its file, if it has one; ``NAME.md`` beside ``NAME.ticket`` is its card.
    """
    own = path.with_suffix(".md") if path else None
    if own is not None and own.is_file():
        return own.read_text(encoding="utf-8")
    rows = [(k, _cell(v)) for k, v in facts(ticket).items() if k not in ("recipe", "parent")]
    return "\n".join(
        [
            "---",
            "library_name: lth_plugins",
            "tags:",
            *(f"- {tag}" for tag in ("lottery-ticket", "sparsity", "pruning", ticket.meta.arch)),
            "---",
            f"# {ref}",
            "",
            f"A lottery ticket: a binary mask of a {ticket.meta.network.title} with its "
            "pre-trained weights, as a backbone for classification, detection and segmentation.",
            "",
            "| | |",
            "| --- | --- |",
            *(f"| {name} | {value} |" for name, value in rows),
            "",
            "```python",
            "import lth_plugins as lth",
            "",
            f'ticket = lth.Ticket.load("{ref}")',
            "```",
            "",
            "## Recipe",
            "",
            "```json",
            printable(json.dumps(dict(ticket.meta.recipe), indent=1, sort_keys=True)),
            "```",
            "",
        ]
    )


def _cell(text: str) -> str:
    return printable(text).replace("|", "\\|")
