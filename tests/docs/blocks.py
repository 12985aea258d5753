"""The blocks of code on the pages, and what checks a command that takes too long to run."""

from __future__ import annotations

import argparse
import ast
import importlib.util
import re
import runpy
import shlex
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import lth_plugins as lth
from lth_plugins.cli import COMMANDS
from lth_plugins.commands.main import main
from lth_plugins.shipped import configs, find_config

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
MARK = re.compile(r"not run: .{10,}|run by (?P<test>tests/\S+\.py)")

_FENCE = re.compile(
    r"(?:^<!-- (?P<mark>.*?) -->\n)?^```(?P<language>\w+)\n(?P<text>.*?)^```$", re.M | re.S
)


@dataclass(frozen=True)
class Block:
    """A block of code on a page.

    Attributes:
        mark: what the comment right above it says: "not run: WHY", "run by TEST", or nothing.
    """

    page: str
    line: int
    language: str
    text: str
    mark: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def is_run(self) -> bool:
        return not self.mark

    @property
    def commands(self) -> list[list[str]]:
        """The words of each command, with those that may be left out, without a … at the end."""
        text = self.text.replace("\\\n", " ")
        text = re.sub(r"\[(-[^\]]*)\]", r"\1", text)
        lines = (shlex.split(line, comments=True) for line in text.splitlines())
        return [line[:-1] if line[-1] == "…" else line for line in lines if line]


def blocks_of(path: Path) -> Iterator[Block]:
    text = path.read_text(encoding="utf-8")
    for found in _FENCE.finditer(text):
        yield Block(
            path.relative_to(ROOT).as_posix(),
            text[: found.start("language")].count("\n") + 1,
            found["language"],
            found["text"],
            found["mark"] or "",
        )


class _AboutToParse(Exception):
    """A tool has made its parser."""


def check_command(words: list[str], patch: pytest.MonkeyPatch) -> None:
    """Check a command without running it: options, keys, extras, targets and files exist."""
    if words[:2] == ["pip", "install"]:
        setup = (ROOT / "setup.py").read_text()
        for extra in re.findall(r"[\w-]+", "".join(re.findall(r"\[(.*?)\]", " ".join(words)))):
            assert f'"{extra}": [' in setup, f"no extra is called {extra}"
    elif words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.M), words
    elif words[0] == "lth":
        _check_lth(words[1:], patch)
    elif words[:2] == ["python", "-m"]:
        assert importlib.util.find_spec(words[2]), words
    elif words[0] == "python" and (ROOT / words[1]).exists():
        if words[1].startswith("tools/"):
            _check_tool(ROOT / words[1], words[2:], patch)
    else:
        assert words[:2] == ["python", "train.py"], f"what is {words[0]}, and does it take these?"


def _check_lth(words: list[str], patch: pytest.MonkeyPatch) -> None:
    """A command of `lth` that has a script is checked as that."""
    script = COMMANDS[words[0]]
    assert script is not None, f"{words} takes no time: run it"
    _check_tool(ROOT / "tools" / script, words[1:], patch)


def _check_tool(tool: Path, arguments: list[str], patch: pytest.MonkeyPatch) -> None:
    parser, parse = parser_of(tool, patch)
    try:
        args, rest = getattr(parser, parse)(arguments)
    except SystemExit as exit:
        raise AssertionError(f"{tool.name} refuses {arguments}") from exit
    assert [word for word in rest if not re.match(r"[\w.]+=", word)] == []
    config = getattr(args, "config", None) or getattr(args, "config_file", None)
    if config and (config.startswith("configs/") or config in configs()):
        config = find_config(config)  # refuses a name that is not there
        if load := _LOADS.get(tool.stem):
            module = importlib.import_module(load)
            ticket = ["ticket=F.ticket"] * bool(getattr(args, "ticket", None))
            module.load_config(config, [*args.overrides, *rest, *ticket])
    if tool.stem == "train_det":
        _detectron2_settings().merge_from_list(args.opts)


_LOADS = {
    "find_ticket": "lth_plugins.pretrain.config",
    "train_cls": "lth_plugins.transfer.config",
    "study": "lth_plugins.study.plan.config",
}


def parser_of(tool: Path, patch: pytest.MonkeyPatch) -> tuple[argparse.ArgumentParser, str]:
    """The parser of a tool, and the name of the method that the tool calls."""

    def stop_in(name: str) -> Callable[..., Any]:
        def parse(parser: argparse.ArgumentParser, *_: Any) -> Any:
            raise _AboutToParse(parser, name)

        return parse

    with patch.context() as patched:
        for name in ("parse_known_args", "parse_known_intermixed_args"):
            patched.setattr(argparse.ArgumentParser, name, stop_in(name))
        patched.setattr(sys, "argv", [tool.name])
        with pytest.raises(_AboutToParse) as stopped:
            runpy.run_path(str(tool), run_name="__main__")
    return stopped.value.args


def options_of(parser: argparse.ArgumentParser) -> set[str]:
    """The options of a parser and of its subcommands."""
    found: set[str] = set()
    for action in parser._actions:
        found |= set(action.option_strings)
        if isinstance(action, argparse._SubParsersAction):
            found |= {option for sub in action.choices.values() for option in options_of(sub)}
    return found


def _detectron2_settings() -> Any:
    from detectron2.config import get_cfg

    import lth_plugins.detectron2 as plugin

    cfg = get_cfg()
    for name in dir(plugin):
        if re.fullmatch(r"add_\w+_config", name):
            getattr(plugin, name)(cfg)
    return cfg


def check_names(script: str) -> None:
    """Check the syntax of a script, and that what it uses of this package exists."""
    for node in ast.walk(ast.parse(script)):
        if isinstance(node, ast.ImportFrom) and node.module.startswith("lth_plugins"):
            module = importlib.import_module(node.module)
            assert [one.name for one in node.names if not hasattr(module, one.name)] == []
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            assert node.value.id != "lth" or hasattr(lth, node.attr), f"lth.{node.attr}"


def run_commands(block: Block, ticket_tool: Callable[..., Any]) -> None:
    """Run a block of commands of tools/ticket.py, or of lth, in this process."""
    for words in block.commands:
        if words[0] == "lth":
            assert main(words[1:]) == 0, f"{block}: {words}"
            continue
        assert words[:2] == ["python", "tools/ticket.py"], f"{block} has others: write <!-- not run"
        done = ticket_tool(*words[2:])
        assert done.returncode == 0, f"{block}: {done.stderr}"
