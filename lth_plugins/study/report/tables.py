"""One table, written as Markdown, CSV, JSON and HTML.

A table holds values as they are; how a person sees them, rounded and in words, is up to its
columns. CSV and JSON have the values, Markdown and HTML what a person sees.
"""

import csv
import io
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup

from lth_plugins.resilience.atomic import write_atomically
from lth_plugins.study.report import templates

Value = str | int | float | bool | None


@dataclass(frozen=True)
class Column:
    """A column.

    Attributes:
        key: its name for programs.
        title: its name for people.
        show: a value for people.
    """

    key: str
    title: str
    show: Callable[[Value], str] = str


@dataclass(frozen=True)
class Table:
    """A table; its first column names the rows.

    Attributes:
        caption: what it shows.
        columns: in order.
        rows: the values, one for each column.
    """

    caption: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Value, ...], ...]

    def shown(self) -> list[list[str]]:
        """The rows, for people."""
        return [
            [column.show(value) for column, value in zip(self.columns, row, strict=True)]
            for row in self.rows
        ]

    def only(self, keys: Sequence[str], caption: str) -> "Table":
        """Some of its columns."""
        at = {column.key: k for k, column in enumerate(self.columns)}
        columns = tuple(self.columns[at[key]] for key in keys)
        return Table(caption, columns, tuple(tuple(row[at[k]] for k in keys) for row in self.rows))

    def records(self) -> list[dict[str, Value]]:
        """The rows by column keys, for programs; what is not finite is None."""
        keys = [column.key for column in self.columns]
        return [dict(zip(keys, map(_finite, row), strict=True)) for row in self.rows]


def number(digits: int) -> Callable[[Value], str]:
    """Shows a number with so many digits after the point; "–" where there is none."""
    return lambda value: "–" if _finite(value) is None else f"{value:,.{digits}f}"


def span(least: float, most: float, form: str) -> str:
    """Shows a range, or one number where both ends look alike: "5 to 8", "5"."""
    ends = (format(least, form), format(most, form))
    return " to ".join(dict.fromkeys(ends))


def counted(count: int, what: str) -> str:
    """Shows how many there are of something: "1 run", "2 runs"."""
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def answer(value: Value) -> str:
    """Shows whether something is so; None is not known."""
    return "not known" if value is None else "yes" if value else "no"


def to_markdown(table: Table) -> str:
    lines = [[column.title for column in table.columns], ["---"] * len(table.columns)]
    lines += table.shown()
    cells = [[cell.replace("|", "\\|").replace("\n", " ") for cell in line] for line in lines]
    body = "\n".join(f"| {' | '.join(line)} |" for line in cells)
    return f"{body}\n\n{table.caption}\n"


def to_csv(table: Table) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, [column.key for column in table.columns], lineterminator="\n")
    writer.writeheader()
    writer.writerows(table.records())
    return text.getvalue()


def to_json(table: Table) -> str:
    titles = {column.key: column.title for column in table.columns}
    content = {"caption": table.caption, "columns": titles, "rows": table.records()}
    return json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def to_html(table: Table, links: Mapping[tuple[int, str], str] | None = None) -> Markup:
    """The table as part of a page.

    Args:
        table: the table.
        links: where a cell leads to, by the number of its row and the key of its column.
    """
    rows = [
        [
            templates.link(cell, links[k, column.key])
            if links and (k, column.key) in links
            else cell
            for column, cell in zip(table.columns, row, strict=True)
        ]
        for k, row in enumerate(table.shown())
    ]
    return templates.table([column.title for column in table.columns], rows, table.caption)


FORMATS: Mapping[str, Callable[[Table], str]] = {
    "md": to_markdown,
    "csv": to_csv,
    "json": to_json,
}


def write(table: Table, folder: Path, name: str) -> list[Path]:
    """Write a table to ``folder/name.md``, ``.csv`` and ``.json``."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.{suffix}" for suffix in FORMATS]
    for path, form in zip(paths, FORMATS.values(), strict=True):
        write_atomically(path, form(table).encode())
    return paths


def _finite(value: Value) -> Value:
    return None if isinstance(value, float) and not math.isfinite(value) else value
