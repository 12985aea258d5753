"""`Assets`: the figures and tables of a page, and their files beside it."""

import itertools
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from urllib.parse import quote

from markupsafe import Markup
from matplotlib.figure import Figure

from lth_plugins.resilience.atomic import write_atomically
from lth_plugins.study.report import plots, tables, templates
from lth_plugins.study.report.tables import Table


@dataclass(frozen=True)
class Assets:
    """The figures and tables of a page.

    Attributes:
        path: of the page; ``figures/`` and ``tables/`` lie beside it.
    """

    path: Path
    _taken: set[Path] = field(default_factory=set, init=False)

    def figure(self, fig: Figure, name: str, alt: str, caption: str | Markup) -> Markup:
        """The figure for the page; ``figures/NAME.pdf`` is written.

        Args:
            fig: drawn under `plots.style`.
            name: of the file; what is not fit for one is replaced, and what is taken is numbered.
            alt: what it shows, for those who cannot see it.
            caption: below it.
        """
        path = self._free("figures", name, ".pdf")
        path.parent.mkdir(exist_ok=True)
        image = plots.to_svg(fig)
        fig.set_layout_engine("none")  # it is laid out now; to do so again takes half the time
        write_atomically(path, plots.to_pdf(fig))
        below = Markup("{} {}").format(caption, self.link("PDF", path))
        return templates.figure(image, alt, below)

    def table(
        self, table: Table, name: str, links: Mapping[tuple[int, str], str] | None = None
    ) -> Markup:
        """The table for the page, and files of it (see `files`).

        Args:
            table: the table.
            name: as for `figure`.
            links: see `tables.to_html`.
        """
        return tables.to_html(table, links) + self.files(table, name, "Also as")

    def files(self, table: Table, name: str, intro: str) -> Markup:
        """A line with links to ``tables/NAME.md``, ``.csv`` and ``.json``, which are written."""
        path = self._free("tables", name)
        paths = tables.write(table, path.parent, path.name)
        links = Markup(", ").join(self.link(path.name, path) for path in paths)
        return templates.paragraph(Markup("{} {}.").format(intro, links), "soft")

    def _free(self, folder: str, name: str, suffix: str = "") -> Path:
        """A path for something of that name, which this page has given to nothing else.

        ``MoCo`` and ``moco``, or ``a-b c`` and ``a b-c``, would be one file.
        """
        base = re.sub(r"[^A-Za-z0-9_.]+", "-", name).strip("-.").lower()
        names = itertools.chain([base], (f"{base}-{k}" for k in itertools.count(2)))
        paths = (self.path.parent / folder / f"{name}{suffix}" for name in names)
        path = next(path for path in paths if path not in self._taken)
        self._taken.add(path)
        return path

    def link(self, text: str | Markup, path: Path) -> Markup:
        """A link to a file or folder, relative to the page; the text alone if none can be seen."""
        if not os.path.exists(path):  # pathlib's raises where the folder cannot be read
            return Markup("{}").format(text)
        return templates.link(text, self.href(path))

    def href(self, path: Path) -> str:
        """Where a file is, relative to the page."""
        return quote(os.path.relpath(os.path.abspath(path), self._folder))

    @cached_property
    def _folder(self) -> str:
        return os.path.abspath(self.path.parent)
