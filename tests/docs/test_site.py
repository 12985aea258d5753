"""The documentation as a site: it builds strictly, needs no other server, and leads everywhere."""

from __future__ import annotations

import ast
import pkgutil
import re
from pathlib import Path

import pytest

import lth_plugins as lth

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
HEADINGS = [
    "In one script",
    "What it checks",
    "Search, prune, slim",
    "Compact and export",
    "Limits",
]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built as `make docs` does; a link or an anchor that leads nowhere is an error."""
    pytest.importorskip("mkdocs", reason="pip install -e '.[docs]' -c constraints.txt")
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    folder = tmp_path_factory.mktemp("site")
    config = load_config(str(ROOT / "mkdocs.yml"), strict=True, site_dir=str(folder))
    build(config)
    return folder


def test_the_site_loads_nothing_from_another_server(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) > len(list(DOCS.rglob("*.md")))
    loaded = re.compile(r'<(?:script|img|iframe|link rel="stylesheet")[^>]+(?:src|href)="?https?:')
    assert [page for page in pages if loaded.search(page.read_text())] == []
    assert [css for css in site.rglob("*.css") if "@import" in css.read_text()] == []


def test_pages_that_lie_elsewhere_are_there_with_their_links(site: Path) -> None:
    home = (site / "index.html").read_text()
    assert 'href="hosts/detectron2/"' in home and 'src="photos.png"' in home
    assert 'href="../results/"' in (site / "structured/index.html").read_text()
    assert "lth.attach" in (site / "quickstart/index.html").read_text()
    assert (site / "zoo/cifar10-moco-r18-s93/index.html").exists()


def test_llms_txt_names_every_page_on_the_forge_and_on_the_site(site: Path) -> None:
    def linked(index: Path) -> set[str]:
        return {*re.findall(r"\]\(([^)#]+)\)", index.read_text())}

    pages = {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")}
    assert pages - linked(DOCS / "llms.txt") == set()
    assert [one for one in linked(DOCS / "llms.txt") if not (DOCS / one).exists()] == []
    assert [one for one in linked(site / "llms.txt") if not (site / one).exists()] == []
    assert (site / "structured.md").read_text().count("](results.md)")


def test_the_reference_has_every_public_name(site: Path) -> None:
    reference = (site / "api/index.html").read_text()
    assert [name for name in lth.__all__ if f'id="lth_plugins.{name}"' not in reference] == []
    plugins = (site / "api/plugins/index.html").read_text()
    for module in ("detectron2", "mmseg", "transformers"):
        source = (ROOT / "lth_plugins" / module / "__init__.py").read_text()
        names = ast.literal_eval(re.search(r"__all__ = (\[.*?\])", source, re.DOTALL)[1])
        assert [n for n in names if f'id="lth_plugins.{module}.{n}"' not in plugins] == []


def test_what_pages_call_by_its_path_is_in_the_reference(site: Path) -> None:
    pages = [ROOT / "README.md", *DOCS.glob("*.md"), *DOCS.glob("hosts/*.md")]
    path = re.compile(r"`(lth_plugins(?:\.[a-z]\w*)*\.\w+)[`(]")
    named = {name for page in pages for name in path.findall(page.read_text())}
    sources = "".join(file.read_text() for file in (ROOT / "lth_plugins").rglob("*.py"))
    reference = "".join(page.read_text() for page in site.glob("api/**/*.html"))
    for name in named:
        is_group = f'"{name}"' in sources  # of entry points
        is_registry = name.removesuffix(".register").rpartition(".")[2].isupper()
        if not is_group and not is_registry and not is_module(name):
            assert f'id="{name}"' in reference, f"{name} is not in docs/api"
        elif not is_group:
            pkgutil.resolve_name(name)


def is_module(name: str) -> bool:
    path = ROOT / name.replace(".", "/")
    return path.is_dir() or path.with_suffix(".py").is_file()


@pytest.mark.parametrize("page", sorted(DOCS.glob("hosts/[!R]*.md")), ids=lambda page: page.stem)
def test_pages_of_hosts_have_the_same_parts(page: Path) -> None:
    assert re.findall(r"^## (.*)$", page.read_text(), re.MULTILINE) == HEADINGS
