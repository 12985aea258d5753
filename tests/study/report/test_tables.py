"""A table is the same in every format: values for programs, words for people."""

import csv
import io
import json
import math

from lth_plugins.study.report.tables import (
    Column,
    Table,
    answer,
    number,
    to_csv,
    to_html,
    to_json,
    to_markdown,
)

TABLE = Table(
    "A caption.",
    (Column("name", "Name"), Column("p", "p", number(2)), Column("yes", "Yes?", answer)),
    (("a|b <c>", 0.12345, True), ("d", math.nan, None), ("e, f", 1234.5, False)),
)


def test_markdown_is_for_people() -> None:
    assert to_markdown(TABLE).splitlines() == [
        "| Name | p | Yes? |",
        "| --- | --- | --- |",
        "| a\\|b <c> | 0.12 | yes |",
        "| d | – | not known |",
        "| e, f | 1,234.50 | no |",
        "",
        "A caption.",
    ]


def test_csv_and_json_have_the_values() -> None:
    rows = list(csv.reader(io.StringIO(to_csv(TABLE))))
    assert rows[0] == ["name", "p", "yes"]
    assert rows[1:] == [["a|b <c>", "0.12345", "True"], ["d", "", ""], ["e, f", "1234.5", "False"]]
    found = json.loads(to_json(TABLE))
    assert found["rows"][0] == {"name": "a|b <c>", "p": 0.12345, "yes": True}
    assert found["rows"][1] == {"name": "d", "p": None, "yes": None}
    assert found["columns"]["yes"] == "Yes?"


def test_html_is_escaped_and_linked() -> None:
    html = to_html(TABLE, {(0, "p"): "#there"})
    assert "a|b &lt;c&gt;" in html
    assert '<a href="#there">0.12</a>' in html and html.count("<a ") == 1
