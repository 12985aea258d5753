"""`lth`: one name for all commands, which start without what they do not need."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from lth_plugins import cli
from lth_plugins.cli import COMMANDS
from lth_plugins.commands import find, main
from lth_plugins.errors import RunError

ROOT = Path(__file__).parents[2]

# Each command, and its exit code; `!` stands for one that argparse ends.
LIGHT = """
import contextlib, io, sys
from lth_plugins.commands.main import HELP, main

def runs(*words):
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        try:
            code = main(words)
        except SystemExit as end:
            code = end.code
    heavy = {"torch", "torchvision", "lightly", "mmengine", "detectron2", "submitit", "scipy.stats"}
    assert not heavy & set(sys.modules), (words, heavy & set(sys.modules))
    return code, out.getvalue()

assert runs("--help")[0] == 0
for name in HELP:
    code, said = runs(name, "--help")
    assert code == 0 and f"usage: lth {name}" in said, said
first, second = "cifar10-moco-r18-s93", "cifar10-moco-r18-s96"
for words in (("list",), ("show", first), ("show", "--json", first), ("diff", first, second)):
    code, said = runs("ticket", *words)
    assert code == 0 and ("s96" in said or "766,738" in said or "766738" in said), said
assert runs("ticket", "show", "nowhere")[0] == 2
assert runs("config", "path", "pretrain/digits_supervised.yaml")[0] == 0
for words in (
    ("find", "nowhere.yaml"),
    ("find", "pretrain/digits_supervised.yaml", "--rounds"),
    ("det", "--config-file", "nowhere.yaml"),
    ("det", "--eval-only"),
    ("seg", "nowhere.py"),
    ("seg", "mmseg/digits/fcn_r18_ticket.py", "--cfg-options", "no_value"),
    ("cls", "nowhere.yaml"),
    ("ticket", "prune", "a.ticket", "b.ticket", "--sparsity", "59"),
    ("ticket", "shwo"),
    ("study", "status", "nowhere"),
):
    assert runs(*words)[0] == 2, words
assert runs("study", "status", sys.argv[1])[0] == 0
"""


def test_what_needs_no_pytorch_and_no_framework_imports_none(tmp_path: Path) -> None:
    plan = "from lth_plugins.study.plan.runs import write_plan; from pathlib import Path; "
    plan += "write_plan(Path(sys.argv[1]), Path('study.yaml'), [], {})\n"
    code = f"import sys\n{plan}{LIGHT}"
    subprocess.run([sys.executable, "-c", code, tmp_path / "study"], check=True, cwd=tmp_path)


def test_an_unknown_command_is_told_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main.main(["stdy", "run"])
    assert ended.value.code == 2
    assert "unknown command 'stdy'" in (said := capsys.readouterr().err)
    assert "did you mean 'study'?" in said


def test_every_command_is_described_and_has_its_script() -> None:
    assert list(main.HELP) == list(COMMANDS)
    scripts = {path.name for path in (ROOT / "tools").glob("*.py")}
    assert scripts == {script for script in COMMANDS.values() if script}


@pytest.mark.parametrize("shell", main.SHELLS)
def test_shells_complete_subcommands_and_options(
    shell: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.main(["--print-completion", shell]) == 0
    printed = capsys.readouterr().out
    assert "perturb" in printed and "imp-rounds" in printed


def test_a_missing_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "pytorch_lightning", None)
    for name in [name for name in sys.modules if name.startswith("lth_plugins.training")]:
        monkeypatch.delitem(sys.modules, name)
    for name in ("lth_plugins.pretrain.find", "lth_plugins.pretrain.early_bird"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    assert find.main(["pretrain/digits_supervised.yaml", f"out={tmp_path / 'run'}"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error == (
        "lth find: error: expected the package pytorch_lightning, found none: "
        "pip install 'lth_plugins[pretrain]'"
    )
    assert not (tmp_path / "run").exists()


def test_a_module_of_ours_that_is_missing_is_no_extra() -> None:
    with pytest.raises(ModuleNotFoundError), cli.needing("nothing"):
        import lth_plugins.nowhere  # noqa: F401
    missing = "the package no_such_package, found none: install it"
    with pytest.raises(RunError, match=missing), cli.needing("install it"):
        import no_such_package  # noqa: F401
