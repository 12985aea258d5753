"""Which ticket a configuration names: the options that all hosts share, as one value."""

from __future__ import annotations

from pathlib import Path

import pytest

import lth_plugins as lth
from lth_plugins.errors import ConfigError
from lth_plugins.ticket import Choice, NotFound, Wording


@pytest.fixture
def dense_file(ticket18: lth.Ticket, tmp_path: Path) -> Path:
    return lth.Ticket.dense(ticket18.weights, source="test").save(tmp_path / "dense.ticket")


def test_what_is_loaded_ahead_is_not_read_again_unless_its_file_was_written(
    ticket18: lth.Ticket, tmp_path: Path
) -> None:
    file = ticket18.save(tmp_path / "it.ticket")
    ahead = Choice(file).load_ahead()
    assert Choice(file).load_ahead() is ahead and ahead == ticket18
    assert Choice(file, load_weights=False).load() is ahead
    assert Choice(file).load() is not ahead, "who loads it, has it alone"

    Choice(file).load_ahead()
    ticket18.shuffled(1).save(file)
    assert Choice(file).load() == ticket18.shuffled(1)
    Choice(file).load_ahead()
    file.unlink()
    with pytest.raises(NotFound, match="found nothing at"):
        Choice(file).load()


def test_options_change_the_ticket(
    ticket18: lth.Ticket, ticket18_file: Path, whole18: lth.Ticket, tmp_path: Path, dense_file: Path
) -> None:
    masks = ticket18.masks
    assert Choice(ticket18_file, dense_file, reverse=True).load().masks == ~masks
    assert Choice(ticket18_file, dense_file, random=True, seed=3).load().masks == masks.shuffled(3)
    whole = whole18.save(tmp_path / "whole.ticket")
    assert Choice(whole).load().outside and not Choice(whole, outside=False).load().outside


def test_a_message_names_the_option_as_the_host_does(ticket18_file: Path) -> None:
    wording = Wording(path="MODEL.PATH", weights="MODEL.WEIGHTS", random="MODEL.RANDOM")
    with pytest.raises(NotFound, match=r"set MODEL\.PATH to a ticket file"):
        Choice("", wording=wording)
    with pytest.raises(ConfigError, match=r"at most one of reverse and MODEL\.RANDOM"):
        Choice(ticket18_file, reverse=True, random=True, wording=wording)
    with pytest.raises(lth.TicketError, match=r"MODEL\.RANDOM keeps .* as MODEL\.WEIGHTS"):
        Choice(ticket18_file, random=True, wording=wording).load()


@pytest.mark.parametrize("option", [{"reverse": True}, {"random": True}, {"load_weights": False}])
def test_a_search_starts_from_the_ticket_itself(dense_file: Path, option: dict[str, bool]) -> None:
    with pytest.raises(ConfigError, match=f"found {next(iter(option))}"):
        Choice("missing.ticket", **option).load_original()
    assert Choice(dense_file).load_original() == Choice(dense_file).load()
