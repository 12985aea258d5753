"""Hooks of mkdocs: the pages that are not in docs/, links between them, and Markdown beside HTML.

A file is where a forge looks for it, and its links are relative to that place. Here the README
becomes the home page, the notebook the quick start, and each link leads to the page of its target.
"""

from __future__ import annotations

import json
import re
from fnmatch import fnmatch
from pathlib import Path
from posixpath import dirname, join, normpath, relpath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
PAGES = {
    "README.md": "index.md",
    "docs/quickstart.ipynb": "quickstart.md",
    "benchmarks/RESULTS.md": "results.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    **{f"zoo/{card.name}": f"zoo/{card.name}" for card in sorted(ROOT.glob("zoo/*.md"))},
}
"""Pages by the files that they are made of."""

FILES = {page: file for file, page in PAGES.items()}
LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#|/)(?P<target>[^)#\s]+)(?=[#)])")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for file, page in PAGES.items():
        content = (ROOT / file).read_text(encoding="utf-8")
        if file.endswith(".ipynb"):
            content = notebook(content)
        files.append(File.generated(config, page, content=content))
    config.nav = expanded(config.nav, [file.src_uri for file in files.documentation_pages()])
    return files


def notebook(text: str) -> str:
    """A notebook as Markdown."""
    cells = []
    for cell in json.loads(text)["cells"]:
        source = "".join(cell["source"])
        cells.append(f"```python\n{source}\n```" if cell["cell_type"] == "code" else source)
    return "\n\n".join(cells)


def expanded(nav: list, pages: list[str]) -> list:
    """A navigation with each pattern as the pages of that folder that have no other place in it."""
    named = {*re.findall(r"[^'\"]+\.(?:md|ipynb)", json.dumps(nav))}

    def expand(item: object) -> object:
        if isinstance(item, dict):
            return {title: expand(below) for title, below in item.items()}
        if isinstance(item, list):
            below = map(expand, item)
            return [one for one in below if not isinstance(one, dict) or all(one.values())]
        if isinstance(item, str) and "*" in item:
            return [
                page
                for page in sorted(pages)
                if page not in named and dirname(page) == dirname(item) and fnmatch(page, item)
            ]
        return item

    return expand(nav)


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    if page.file.src_uri == "api/index.md":
        markdown = with_all_names(markdown)
    return linked(markdown, page.file.src_uri)


def with_all_names(markdown: str) -> str:
    """The reference, with the public names that have no place in it at its end."""
    source = (ROOT / "lth_plugins/__init__.py").read_text(encoding="utf-8")
    names = re.findall(r"^    from \S+ import (\w+) as \1$", source, re.M)
    entries = (f"::: lth_plugins.{name}\n" for name in names)
    missing = [entry for entry in entries if entry not in f"{markdown}\n"]
    return "\n".join([markdown, *(["## Others", *missing] if missing else [])])


def linked(markdown: str, page: str) -> str:
    """The text of a page with its links as between pages."""
    file = FILES.get(page, f"docs/{page}")

    def link(match: re.Match[str]) -> str:
        target = normpath(join(dirname(file), match["target"]))
        place = PAGES.get(target, target.removeprefix("docs/"))
        return relpath(place, dirname(page) or ".")

    return LINK.sub(link, markdown)


def on_post_page(output: str, page: Page, config: MkDocsConfig) -> str:
    """Write the text of a page beside it, for programs that read llms.txt."""
    path = Path(config.site_dir, page.file.src_uri)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page.markdown, encoding="utf-8")
    return output


def on_post_build(config: MkDocsConfig) -> None:
    index = Path(config.site_dir, "llms.txt")
    index.write_text(linked(index.read_text(encoding="utf-8"), "llms.txt"), encoding="utf-8")
