"""Self-contained HTML: one file, pictures inside, no script and nothing fetched.

Everything that is not `Markup` is escaped where it enters the page.
"""

import base64
from collections.abc import Iterable, Sequence

from markupsafe import Markup

_MEDIA_TYPES = {b"\x89PNG": "image/png", b"<?xm": "image/svg+xml", b"<svg": "image/svg+xml"}

WIDE = 8
"""Tables of more columns than this have smaller letters."""

_STYLE = """
:root { color-scheme: light dark; --ink: #1a1a1a; --soft: #5a5f66; --line: #d5d9de;
  --paper: #fff; --panel: #f6f7f9; --accent: #0072b2; --alarm: #d55e00; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8e8e8; --soft: #a5abb3; --line: #3b4148;
  --paper: #15181c; --panel: #1f242a; --accent: #56b4e9; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.2rem 1rem 4rem; max-width: 68rem; color: var(--ink);
  background: var(--paper); font: 1rem/1.55 system-ui, sans-serif; overflow-wrap: break-word; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0.5rem 0 0.3rem; }
h2 { font-size: 1.25rem; margin: 2.6rem 0 0.4rem; padding-top: 0.7rem;
  border-top: 2px solid var(--line); }
h3 { font-size: 1rem; margin: 1.4rem 0 0.4rem; }
p, li { max-width: 46rem; }
.soft, .caption, figcaption { color: var(--soft); font-size: 0.88rem; }
figure { margin: 0.8rem 0; max-width: 40rem; }
figure img { display: block; width: 100%; height: auto; background: #fff; border-radius: 4px; }
figcaption { margin-top: 0.3rem; }
.figures { display: grid; gap: 0.5rem 1.5rem; grid-template-columns: repeat(auto-fit,
  minmax(min(100%, 25rem), 1fr)); align-items: start; }
.panels { display: grid; gap: 0.5rem; grid-template-columns: repeat(auto-fill,
  minmax(min(45%, 11rem), 1fr)); margin: 0.4rem 0 1.2rem; }
.panels figure { margin: 0; }
.panels figcaption { line-height: 1.25; margin-top: 0.15rem; }
/* Shadows where a table goes on beyond its box; they scroll away with what covers them. */
.scroll { overflow-x: auto; background: linear-gradient(to right, var(--paper) 30%, transparent),
  linear-gradient(to left, var(--paper) 30%, transparent) 100% 0,
  linear-gradient(to right, var(--line), transparent),
  linear-gradient(to left, var(--line), transparent) 100% 0;
  background-size: 3rem 100%, 3rem 100%, 1rem 100%, 1rem 100%; background-repeat: no-repeat;
  background-attachment: local, local, scroll, scroll; }
.caption { margin: 0 0 0.3rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
table.wide { font-size: 0.85rem; line-height: 1.4; }
table.wide th, table.wide td { padding-right: 0.5rem; }
th, td { padding: 0.35rem 0.75rem 0.35rem 0; border-bottom: 1px solid var(--line);
  text-align: right; vertical-align: top; }
th:first-child, td:first-child { text-align: left; }
thead th { border-bottom: 2px solid var(--soft); font-weight: 600; }
td:last-child { min-width: 7rem; }
.runs td:last-child { text-align: left; }
.runs summary { white-space: nowrap; }
.runs th[scope=rowgroup] { text-align: left; padding-top: 1rem; font-weight: 600; }
.runs th[scope=row] { font-weight: 400; }
code, pre { font: 0.82rem/1.45 ui-monospace, monospace; }
pre { background: var(--panel); padding: 0.5rem 0.7rem; border-radius: 4px; margin: 0.3rem 0;
  white-space: pre-wrap; overflow-wrap: anywhere; }
details { margin: 0.5rem 0; }
summary { cursor: pointer; color: var(--accent); }
a { color: var(--accent); text-underline-offset: 0.15em; }
:target { outline: 3px solid var(--accent); }
.note { border-left: 4px solid var(--accent); background: var(--panel); padding: 0.5rem 0.8rem;
  max-width: 46rem; }
.alarm { border-left: 4px solid var(--alarm); background: var(--panel); padding: 0.5rem 0.8rem;
  max-width: 46rem; }
.step { margin: 0 0 1rem; }
@media (max-width: 40rem) { table { font-size: 0.85rem; line-height: 1.4; }
  th, td { padding-right: 0.5rem; } }
@media print { body { max-width: none; padding: 0; font-size: 10pt; }
  :root { --ink: #000; --soft: #444; --line: #bbb; --paper: #fff; --panel: #f3f3f3;
    --accent: #000; }
  h2, h3, summary { break-after: avoid; } figure, tr, .step { break-inside: avoid; }
  .figures { grid-template-columns: 1fr 1fr; } figure { max-width: 13cm; }
  .panels { grid-template-columns: repeat(5, 1fr); }
  /* Paper does not scroll: wide tables have to fit. */
  .scroll { overflow: visible; } table { font-size: 7pt; } td:last-child { min-width: 0; }
  th, td { padding: 0.15rem 0.35rem 0.15rem 0; } }
"""


def page(title: str, body: Iterable[Markup]) -> str:
    """A whole HTML document."""
    # The policy is a promise that a browser keeps: no script runs and nothing is fetched.
    return Markup(
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
        "img-src data:; style-src 'unsafe-inline'\">\n"
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<link rel="icon" href="data:,">\n'
        "<title>{}</title>\n<style>{}</style>\n</head>\n<body>\n{}\n</body>\n</html>\n"
    ).format(title, Markup(_STYLE), join(body))


def join(parts: Iterable[Markup]) -> Markup:
    return Markup("\n").join(parts)


def heading(text: str, level: int = 2) -> Markup:
    return Markup("<h{0}>{1}</h{0}>").format(level, text)


def paragraph(text: str | Markup, style: str = "") -> Markup:
    """A paragraph; ``style`` is "", "soft" (less important) or "note" (set off)."""
    return Markup('<p class="{}">{}</p>' if style else "<p>{1}</p>").format(style, text)


def bullets(items: Iterable[str | Markup]) -> Markup:
    return Markup("<ul>{}</ul>").format(join(Markup("<li>{}</li>").format(i) for i in items))


def code(text: object) -> Markup:
    return Markup("<code>{}</code>").format(text)


def link(text: str | Markup, target: str) -> Markup:
    """A link to another part of the page (``#id``) or to a file, relative to the page's folder."""
    return Markup('<a href="{}">{}</a>').format(target, text)


def command(text: str) -> Markup:
    """A command to copy."""
    return Markup("<pre>{}</pre>").format(text)


def details(summary: str, *body: Markup) -> Markup:
    """Something to unfold."""
    return Markup("<details><summary>{}</summary>{}</details>").format(summary, join(body))


def table(header: Sequence[str], rows: Iterable[Sequence[object]], caption: str = "") -> Markup:
    """A table whose first column names the rows.

    It scrolls in a box of its own where it is too wide; the caption stays above that, and wraps.
    """
    head = join(Markup('<th scope="col">{}</th>').format(cell) for cell in header)
    lines = join(
        Markup('<tr><th scope="row">{}</th>{}</tr>').format(
            first, join(Markup("<td>{}</td>").format(cell) for cell in rest)
        )
        for first, *rest in rows
    )
    wide = Markup(' class="wide"') if len(header) > WIDE else ""
    body = Markup("<table{}><thead><tr>{}</tr></thead><tbody>{}</tbody></table>").format(
        wide, head, lines
    )
    above = Markup('<p class="caption">{}</p>').format(caption) if caption else Markup()
    return above + scrolling(body, caption)


def scrolling(table: Markup, name: str) -> Markup:
    """A box in which a table that is too wide scrolls, by the keyboard, too."""
    return Markup('<div class="scroll" role="region" tabindex="0" aria-label="{}">{}</div>').format(
        name or "Table", table
    )


def picture(image: bytes, alt: str, caption: str | Markup = "") -> Markup:
    """A PNG or SVG picture, inside the page.

    Args:
        image: the content of the file.
        alt: what it shows, for those who cannot see it.
        caption: below it.
    """
    data = base64.b64encode(image).decode("ascii")
    below = Markup("<figcaption>{}</figcaption>").format(caption) if caption else ""
    return Markup('<figure><img src="data:{};base64,{}" alt="{}">{}</figure>').format(
        _MEDIA_TYPES[image[:4]], data, alt, below
    )


def figures(pictures: Iterable[Markup]) -> Markup:
    """Figures side by side, as far as the window is wide enough."""
    return Markup('<div class="figures">{}</div>').format(join(pictures))


def panels(pictures: Iterable[Markup]) -> Markup:
    """Small pictures to compare, in a row or, on a phone, in pairs."""
    return Markup('<div class="panels">{}</div>').format(join(pictures))
