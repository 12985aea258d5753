"""The project installed from a wheel, outside its checkout: what a user of pip has."""

from __future__ import annotations

import os
import site
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TINY = "data.size=16 data.subset=32 batch_size=16 pretrain.epochs=1 training.epochs=1 rounds=1"


def without_checkout() -> dict[str, str]:
    """The environment of a process that does not import the checkout."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("build")
    folder = tmp_path_factory.mktemp("wheel")
    # The build writes into the folder that it builds: links keep the checkout as it is.
    source = folder / "source"
    source.mkdir()
    for path in ROOT.iterdir():
        if path.name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
            (source / path.name).write_bytes(path.read_bytes())
    for name in ("lth_plugins", "configs", "zoo"):
        (source / name).symlink_to(ROOT / name)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "-o", folder, source]
    subprocess.run(command, check=True, capture_output=True)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of `lth` in an environment that has the wheel, and this one's other packages."""
    venv = tmp_path_factory.mktemp("venv")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
    pip = [sys.executable, "-m", "pip", "--python", venv / "bin/python", "install", "-q"]
    subprocess.run([*pip, "--no-deps", "--no-index", wheel], check=True, env=without_checkout())
    (packages,) = venv.glob("lib/*/site-packages")
    # Not a .pth of this environment's own, such as that of the checkout, is read there.
    (packages / "others.pth").write_text("\n".join(site.getsitepackages()) + "\n")
    return venv / "bin"


@pytest.fixture
def lth(installed: Path, tmp_path: Path):
    """Run `lth` in an empty folder, and return what it printed."""

    def run(*words: object) -> str:
        command = [installed / "lth", *map(str, words)]
        where = {"cwd": tmp_path, "env": without_checkout()}
        done = subprocess.run(command, **where, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def test_a_wheel_states_what_it_is_and_has_all_its_files(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as file:
        names = set(file.namelist())
        (metadata,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        stated = Parser().parsestr(file.read(metadata).decode())
    assert "lth_plugins/py.typed" in names
    for folder in ("configs", "zoo"):
        files = [path for path in (ROOT / folder).rglob("*.*") if "__pycache__" not in path.parts]
        shipped = [p for p in files if p.suffix in (".py", ".yaml", ".ticket", ".md")]
        wanted = {f"lth_plugins/{path.relative_to(ROOT)}" for path in shipped}
        assert wanted and wanted <= names
    assert stated["Requires-Python"] == ">=3.10"
    minors = [f"Programming Language :: Python :: 3.{minor}" for minor in (10, 11, 12, 13)]
    assert set(minors) <= set(stated.get_all("Classifier"))


@pytest.mark.slow
def test_lth_works_from_an_empty_folder(lth, tmp_path: Path) -> None:
    assert "usage: lth" in lth("--help")
    assert "cifar10-moco-r18-s93" in lth("ticket", "list")
    path = Path(lth("config", "path", "mmseg/fcn_r50_cityscapes_ticket.py").strip())
    assert path.is_file() and not path.is_relative_to(ROOT)
    said = lth("study", "run", "configs/study/demo.yaml", "--dry-run", "out=demo")
    assert "-m lth_plugins scenes --out datasets/digit_scenes_calm" in said
    assert not list(tmp_path.iterdir()), "nothing is written so far"
    lth("find", "configs/pretrain/digits_supervised.yaml", "out=runs/digits", *TINY.split())
    assert "round         1" in lth("ticket", "show", "runs/digits/round_01.ticket")
