"""A ticket is found by path, by catalog name, or on the hub."""

import pytest

from lth_plugins import Ticket, TicketCatalog, TicketError


@pytest.fixture(autouse=True)
def empty_catalog(monkeypatch) -> None:
    monkeypatch.setattr(TicketCatalog, "_entries", {})


def test_a_name_stands_for_a_path_or_a_function(ticket18, ticket18_file) -> None:
    TicketCatalog.register("r18", ticket18_file)
    TicketCatalog.register("made", lambda: ticket18)
    assert Ticket.load("r18") == Ticket.load("made") == Ticket.load(ticket18_file) == ticket18
    assert TicketCatalog.names() == ["made", "r18"]


def test_an_unknown_name_shows_close_ones(ticket18_file) -> None:
    TicketCatalog.register("moco_r50_s79", ticket18_file)
    with pytest.raises(TicketError, match=r"found 'moco_r50_s97'; did you mean moco_r50_s79\?"):
        Ticket.load("moco_r50_s97")


def test_a_path_that_does_not_exist_is_called_one(tmp_path) -> None:
    with pytest.raises(TicketError, match="found nothing at .*round_03.ticket: check the path"):
        Ticket.load(str(tmp_path / "round_03.ticket"))


def test_a_name_cannot_look_like_a_path_or_change_its_meaning(ticket18_file) -> None:
    for name in ("", "a/b", "a.ticket", "hf://a/b"):
        with pytest.raises(TicketError, match="must not look like a path"):
            TicketCatalog.register(name, ticket18_file)
    TicketCatalog.register("r18", ticket18_file)
    TicketCatalog.register("r18", ticket18_file)
    with pytest.raises(TicketError, match="already names"):
        TicketCatalog.register("r18", "other.ticket")


def test_a_malformed_hub_reference_is_refused() -> None:
    for ref in ("hf://", "hf://owner", "hf://owner//x"):
        with pytest.raises(TicketError, match="expected hf://owner/repo"):
            Ticket.load(ref)
