"""What a page shows and leaves beside itself: figures as PDF; tables as Markdown, CSV and JSON."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from urllib.parse import quote

from markupsafe import Markup
from matplotlib.figure import Figure

from lth_plugins.study import page, plots, tables
from lth_plugins.study.tables import Table
from lth_plugins.ticket.file import replace_file


@dataclass(frozen=True)
class Exhibits:
    """The figures and tables of a page.

    Attributes:
        path: of the page; ``figures/`` and ``tables/`` lie beside it.
    """

    path: Path

    def figure(self, fig: Figure, name: str, alt: str, caption: str | Markup) -> Markup:
        """The figure for the page; ``figures/NAME.pdf`` is written.

        Args:
            fig: drawn under `plots.style`.
            name: unique; what is not fit for a file name is replaced.
            alt: what it shows, for those who cannot see it.
            caption: below it.
        """
        path = self.path.parent / "figures" / f"{_file_name(name)}.pdf"
        path.parent.mkdir(exist_ok=True)
        picture = plots.to_svg(fig)
        fig.set_layout_engine("none")  # it is laid out now; to do so again takes half the time
        replace_file(path, plots.to_pdf(fig))
        below = Markup("{} {}").format(caption, self.link("PDF", path))
        return page.picture(picture, alt, below)

    def table(
        self, table: Table, name: str, links: Mapping[tuple[int, str], str] | None = None
    ) -> Markup:
        """The table for the page, and files of it (see `files`).

        Args:
            table: the table.
            name: unique; what is not fit for a file name is replaced.
            links: see `tables.to_html`.
        """
        return page.join([tables.to_html(table, links), self.files(table, name, "Also as")])

    def files(self, table: Table, name: str, intro: str) -> Markup:
        """A line with links to ``tables/NAME.md``, ``.csv`` and ``.json``, which are written."""
        paths = tables.write(table, self.path.parent / "tables", _file_name(name))
        links = Markup(", ").join(self.link(path.name, path) for path in paths)
        return page.paragraph(Markup("{} {}.").format(intro, links), "soft")

    def link(self, text: str | Markup, path: Path) -> Markup:
        """A link to a file or folder, relative to the page; the text alone if it is not there."""
        if not path.exists():
            return Markup("{}").format(text)
        return page.link(text, self.href(path))

    def href(self, path: Path) -> str:
        """Where a file is, relative to the page."""
        return quote(os.path.relpath(os.path.abspath(path), self._folder))

    @cached_property
    def _folder(self) -> str:
        return os.path.abspath(self.path.parent)


def _file_name(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.]+", "-", text).strip("-.").lower()
