"""The tickets that come with the project, whichever they are."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lth_plugins import Ticket, TicketCatalog
from lth_plugins.ticket.card import About, card_of, facts, metadata
from lth_plugins.ticket.zoo import zoo

MB = 1_000_000


def test_tickets_come_with_the_project_and_stay_small(ticket_tool: Callable[..., Any]) -> None:
    sizes = {name: path.stat().st_size for name, path in zoo().items()}
    assert sizes and max(sizes.values()) <= 4 * MB and sum(sizes.values()) <= 20 * MB
    assert sizes.keys() <= {*TicketCatalog.names()}
    listed = json.loads(ticket_tool("list", "--json").stdout)
    assert {name: one["digest"] for name, one in listed.items()} == {
        name: Ticket.load(name).digest for name in sizes
    }


@pytest.mark.parametrize(("name", "path"), zoo().items())
def test_a_ticket_has_a_card_that_states_its_facts(name: str, path: Path) -> None:
    ticket = Ticket.load(name)
    assert name.endswith(f"-s{100 * ticket.sparsity:.0f}")
    card = card_of(ticket, name, path)
    assert card == path.with_suffix(".md").read_text(encoding="utf-8")
    made = card_of(ticket, name)  # of what the ticket states, without a file
    table = made.split("\n---\n")[1].split("```")[0]
    assert [line for line in table.splitlines() if line not in card] == []
    assert facts(ticket)["digest"] in card
    for part in ("## Metrics", "## Licence", "python tools/find_ticket.py configs/pretrain/"):
        assert part in card


@pytest.mark.parametrize(("name", "path"), zoo().items())
def test_the_hub_reads_from_a_card_what_the_card_says(name: str, path: Path) -> None:
    cards = pytest.importorskip("huggingface_hub")
    card = cards.ModelCard(path.with_suffix(".md").read_text(encoding="utf-8"))
    said = card.data.to_dict()
    made = metadata(Ticket.load(name), name, About(card.data.license, tuple(card.data.datasets)))
    assert {key: said[key] for key in made} == made
    assert card.data.model_name == name
    values = {f"| {result.metric_value:.1f}" for result in card.data.eval_results}
    assert card.data.eval_results and [v for v in values if v not in card.text] == []


@pytest.mark.parametrize("name", zoo())
def test_a_recipe_names_no_place_on_a_machine(name: str) -> None:
    assert "/" not in json.dumps(dict(Ticket.load(name).meta.recipe))
