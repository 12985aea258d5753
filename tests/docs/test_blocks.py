"""Every block of code on a page runs, or says why not; commands that do not run are parsed."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.docs.blocks import (
    MARK,
    PAGES,
    ROOT,
    blocks_of,
    check_command,
    check_names,
    options_of,
    parser_of,
    run_commands,
)
from tests.docs.pages import PREPARED, Page

LANGUAGES = {"bash", "python", "yaml"}
FRAMEWORKS = {
    "detectron2": "detectron2",
    "distill": "detectron2",
    "photos": "detectron2",
    "mmseg": "mmseg",
    "mmdet": "mmseg",
    "transformers": "transformers",
    "smp": "segmentation_models_pytorch",
}
"""What the blocks of a page need."""

BLOCKS = [block for page in PAGES for block in blocks_of(page)]


def named(path: Path) -> Any:
    marks = [getattr(pytest.mark, FRAMEWORKS[path.stem])] if path.stem in FRAMEWORKS else []
    return pytest.param(path, id=path.relative_to(ROOT).as_posix(), marks=marks)


def test_each_block_is_run_or_says_why_not() -> None:
    assert [str(b) for b in BLOCKS if b.language not in LANGUAGES] == []
    marks = {str(block): MARK.fullmatch(block.mark) for block in BLOCKS if block.mark}
    assert [block for block, mark in marks.items() if mark is None] == []
    tests = {mark["test"] for mark in marks.values() if mark["test"]}
    assert {test for test in tests if not (ROOT / test).exists()} == set()
    comments = sum(page.read_text().count("<!--") for page in PAGES)
    assert comments == sum(bool(block.mark) for block in BLOCKS), "a comment that is above no block"


@pytest.mark.parametrize(
    "path", [named(page) for page in PAGES if any(b.is_run for b in blocks_of(page))]
)
def test_the_blocks_of_a_page_run_one_after_another(
    path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
    ticket_tool: Callable[..., Any],
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("configs", "tools"):
        (tmp_path / name).symlink_to(ROOT / name)
    prepare = PREPARED.get(path.relative_to(ROOT).as_posix(), Page)
    page = prepare(request)
    for block in filter(lambda block: block.is_run, blocks_of(path)):
        if block.language == "bash":
            run_commands(block, ticket_tool)
        elif block.language == "yaml":
            page.read(yaml.safe_load(block.text), block.text)
        else:
            exec(compile("\n" * block.line + block.text, str(path), "exec"), page.names)
            page.ran(block.text)
    page.end()


@pytest.mark.parametrize(
    "path", [named(page) for page in PAGES if not all(b.is_run for b in blocks_of(page))]
)
def test_what_is_not_run_has_options_and_names_that_exist(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for block in filter(lambda block: not block.is_run, blocks_of(path)):
        if block.language == "python":
            check_names(block.text)
        for words in block.commands if block.language == "bash" else ():
            check_command(words, monkeypatch)


def test_files_that_pages_name_exist() -> None:
    names = re.compile(
        r"(?<![\w/{.-])(?:configs|tools|benchmarks|tests|\.ci)/[\w./-]+\.(?:py|yaml|md)\b"
    )
    of_hosts = {"tools/train.py", "tools/test.py", "tools/train_net.py"}
    named = {(page.name, name) for page in PAGES for name in names.findall(page.read_text())}
    missing = [(page, name) for page, name in sorted(named) if not (ROOT / name).exists()]
    assert [(page, name) for page, name in missing if name not in of_hosts] == []


@pytest.mark.detectron2
@pytest.mark.mmseg
def test_options_that_pages_name_beside_a_tool_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    spans = re.compile(r"`(?:python )?(?:tools/)?(\w+)\.py ([^`]*--[^`]*)`")
    named: dict[str, set[tuple[str, str]]] = {}
    for page in PAGES:
        for tool, words in spans.findall(page.read_text()):
            words = words.split(".py")[0]  # what follows a script of one's own is its own
            options = {(page.name, option) for option in re.findall(r"--[a-z][\w-]*", words)}
            named.setdefault(tool, set()).update(options)
    known = {
        tool: options_of(parser_of(ROOT / f"tools/{tool}.py", monkeypatch)[0])
        for tool in named
        if (ROOT / f"tools/{tool}.py").exists()
    }
    assert known
    stale = [(tool, *one) for tool in known for one in named[tool] if one[1] not in known[tool]]
    assert stale == []
