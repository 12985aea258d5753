"""The card of a ticket: what it is and how to use it, as the Hugging Face hub shows it.

A card is Markdown below YAML metadata, as the hub's model cards are. The file ``NAME.md`` beside
``NAME.ticket`` is that ticket's card; a ticket without one gets the card that is made here, of what
the ticket states, what its search measured, and what its owner says of it (`About`).
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import yaml

from lth_plugins.errors import ConfigError, printable
from lth_plugins.ticket.counts import Counted, Counts
from lth_plugins.ticket.meta import InputSpec, TicketMeta

_LICENCE = r"[a-z0-9][a-z0-9.-]*"
_NAME = r"[A-Za-z0-9][\w.-]*"
_REPOSITORY = rf"{_NAME}/{_NAME}"
_DATASET = rf"(?:{_NAME}/)?{_NAME}"


@dataclass(frozen=True)
class About:
    """What a ticket does not state about itself, in the hub's terms.

    Attributes:
        license: the licence's identifier on the hub, such as ``apache-2.0``.
        datasets: what it was found on, by their names on the hub.
        base_model: the model on the hub that it was pruned from, ``owner/repo``.

    Raises:
        ConfigError: if the hub would not understand one.
    """

    license: str | None = None
    datasets: tuple[str, ...] = ()
    base_model: str | None = None

    def __post_init__(self) -> None:
        _check("a licence such as apache-2.0, cc-by-4.0 or other", _LICENCE, self.license)
        for name in self.datasets:
            _check("a dataset of the hub, owner/name or name", _DATASET, name)
        _check("a model of the hub, owner/name", _REPOSITORY, self.base_model)


def _check(what: str, pattern: str, value: str | None) -> None:
    if value is not None and not re.fullmatch(pattern, value, re.ASCII):
        raise ConfigError(f"expected {what}, found {value!r:.300}: write its identifier there")


@dataclass(frozen=True)
class Measured:
    """A metric of a ticket, as its search measured it after training it.

    Attributes:
        task: the task's identifier on the hub.
        name: what was measured, in words.
        value: in percent.
    """

    task: str
    name: str
    value: float


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


_METRICS = {
    "val_top1": ("image-classification", "top-1 in percent"),
    "val_knn_top1": ("image-feature-extraction", "top-1 of the nearest neighbours in percent"),
}


def measured(ticket: Described, path: Path) -> list[Measured]:
    """What the search that wrote a ticket measured of it: its line in ``metrics.jsonl`` beside it.

    A line of another round or density is not this ticket's.
    """
    try:
        lines = (path.parent / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines]
    except (OSError, ValueError):
        return []
    for row in rows:
        if not isinstance(row, dict) or row.get("round") != ticket.meta.round:
            continue
        if abs(row.get("density", -1) - ticket.counts.density) < 1e-6:
            known = [(key, *_METRICS[key]) for key in _METRICS if key in row]
            return [Measured(task, name, round(100 * row[key], 2)) for key, task, name in known]
    return []


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


def has_card(path: Path | None) -> bool:
    """Whether a card lies beside a ticket's file."""
    return path is not None and path.with_suffix(".md").is_file()


def card_of(
    ticket: Described, ref: str, path: Path | None = None, about: About | None = None
) -> str:
    """The card of a ticket: the one beside its file, or one that is made here.

    Args:
        ticket: the ticket.
        ref: what loads it: a catalog name, or ``hf://owner/repo``.
        path: its file, if it has one; ``NAME.md`` beside ``NAME.ticket`` is its card.
        about: what its owner says of it.

    Raises:
        ConfigError: if the card beside it would hide what its owner says.
    """
    if path is not None and has_card(path):
        card = path.with_suffix(".md")
        if about not in (None, About()):
            raise ConfigError(
                "licence, datasets and base model are for a card that is made, and "
                f"{path.name} has one: state them at the top of {card}, or remove that file"
            )
        return card.read_text(encoding="utf-8")
    about = about or About()
    metrics = measured(ticket, path) if path is not None else []
    head = yaml.safe_dump(
        metadata(ticket, ref, about, metrics), sort_keys=False, allow_unicode=True
    )
    return "\n\n".join([f"---\n{head}---\n# {ref}", *_body(ticket, ref, about, metrics)]) + "\n"


def metadata(
    ticket: Described, ref: str, about: About, metrics: list[Measured] | None = None
) -> dict[str, Any]:
    """What the hub reads at the top of a card."""
    given = {
        "license": about.license,
        "datasets": list(about.datasets),
        "base_model": about.base_model,
        "model-index": [_results(ticket, ref, about, metrics)] if metrics else None,
    }
    return {
        "library_name": "lth_plugins",
        "pipeline_tag": "image-feature-extraction",
        "tags": ["lottery-ticket", "sparsity", "pruning", ticket.meta.arch],
        **{key: value for key, value in given.items() if value},
    }


def _results(ticket: Described, ref: str, about: About, metrics: list[Measured]) -> dict[str, Any]:
    found_on = dict(ticket.meta.recipe).get("data")
    name = found_on.get("name") if isinstance(found_on, dict) else None
    data = about.datasets[0] if about.datasets else str(name or ticket.meta.source)
    return {
        "name": ref,
        "results": [
            {
                "task": {"type": one.task},
                "dataset": {"type": data, "name": data},
                "metrics": [{"type": "accuracy", "name": one.name, "value": one.value}],
            }
            for one in metrics
        ],
    }


def _body(ticket: Described, ref: str, about: About, metrics: list[Measured]) -> list[str]:
    rows = [(k, _cell(v)) for k, v in facts(ticket).items() if k not in ("recipe", "parent")]
    recipe = printable(json.dumps(dict(ticket.meta.recipe), indent=1, sort_keys=True))
    parts = [
        f"A lottery ticket: a binary mask of a {ticket.meta.network.title} with its pre-trained "
        "weights, as a backbone for classification, detection and segmentation.",
        _table(rows),
        f'```python\nimport lth_plugins as lth\n\nticket = lth.Ticket.load("{ref}")\n```',
    ]
    if metrics:
        what = "Measured by its search, after training the sub-network; of round 0, the dense one."
        parts += ["## Metrics", what, _table([(one.name, f"{one.value:.2f}") for one in metrics])]
    if about.license:
        parts += ["## Licence", f"The ticket is under the licence `{about.license}`."]
    return [*parts, "## Recipe", f"```json\n{recipe}\n```"]


def _table(rows: list[tuple[str, str]]) -> str:
    return "\n".join(["| | |", "| --- | --- |", *(f"| {k} | {v} |" for k, v in rows)])


def _cell(text: str) -> str:
    return printable(text).replace("|", "\\|")
