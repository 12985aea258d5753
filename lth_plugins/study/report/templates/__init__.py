"""Self-contained HTML: one file, images inside, no script, and nothing is fetched.

The templates beside this module hold all HTML, and ``style.css`` all CSS. Whatever is not `Markup`
is escaped by them.
"""

import base64
from collections.abc import Iterable, Sequence
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

WIDE = 8
"""Tables of more columns than this have smaller letters."""

_MEDIA_TYPES = {b"\x89PNG": "image/png", b"<?xm": "image/svg+xml", b"<svg": "image/svg+xml"}
_ENVIRONMENT = Environment(
    loader=PackageLoader("lth_plugins.study.report"),
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
    undefined=StrictUndefined,
)
_PARTS: Any = _ENVIRONMENT.get_template("parts.html").module


def page(title: str, body: Iterable[Markup]) -> str:
    """A whole HTML document."""
    return _ENVIRONMENT.get_template("page.html").render(title=title, body=list(body))


def heading(text: str, level: int = 2) -> Markup:
    return _PARTS.heading(text, level)


def paragraph(text: str | Markup, style: str = "") -> Markup:
    """A paragraph; ``style`` is "", "soft" (less important) or "note" (set off)."""
    return _PARTS.paragraph(text, style)


def bullets(items: Iterable[str | Markup]) -> Markup:
    return _PARTS.bullets(list(items))


def code(text: object) -> Markup:
    return _PARTS.code(text)


def link(text: str | Markup, target: str) -> Markup:
    """A link to another part of the page (``#id``) or to a file, relative to the page's folder."""
    return _PARTS.link(text, target)


def command(text: str) -> Markup:
    """A command to copy."""
    return _PARTS.command(text)


def details(summary: str, *body: Markup) -> Markup:
    """A part that can be unfolded."""
    return _PARTS.details(summary, body)


def alarm(title: str, *body: Markup) -> Markup:
    """A part that stands out."""
    return _PARTS.alarm(title, body)


def table(header: Sequence[str], rows: Iterable[Sequence[object]], caption: str = "") -> Markup:
    """A table whose first column names the rows."""
    return _PARTS.table(header, list(rows), caption, len(header) > WIDE)


def grouped(
    header: Sequence[str], groups: Sequence[tuple[str, str, Sequence[Sequence[object]]]], name: str
) -> Markup:
    """A table of groups of rows, each with the ``id`` to link to, a title and its rows."""
    return _PARTS.grouped(header, groups, name)


def figure(image: bytes, alt: str, caption: str | Markup = "") -> Markup:
    """A PNG or SVG image, inside the page.

    Args:
        image: the content of the file.
        alt: what it shows, for those who cannot see it.
        caption: below it.
    """
    data = base64.b64encode(image).decode("ascii")
    return _PARTS.figure(_MEDIA_TYPES[image[:4]], data, alt, caption)


def figures(figures: Iterable[Markup]) -> Markup:
    """Figures side by side, as far as the window is wide enough."""
    return _PARTS.side_by_side(list(figures), "figures")


def panels(figures: Iterable[Markup]) -> Markup:
    """Small images to compare, in a row or, on a phone, in pairs."""
    return _PARTS.side_by_side(list(figures), "panels")
