"""`lth config`: the configurations that come with the project, by name and from anywhere."""

from __future__ import annotations

from pathlib import Path

import pytest

import lth_plugins as lth
from lth_plugins.commands import config
from lth_plugins.errors import ConfigError
from lth_plugins.shipped import configs, find_config

ROOT = Path(__file__).parents[2]


def test_all_are_listed_and_a_folder_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert config.main(["list"]) == 0
    names = capsys.readouterr().out.split()
    files = [path for end in ("py", "yaml") for path in (ROOT / "configs").rglob(f"*.{end}")]
    assert len(names) == len(files) == len(configs())
    assert config.main(["list", "transfer/"]) == 0
    assert set(capsys.readouterr().out.split()) == {n for n in names if n.startswith("transfer/")}
    assert config.main(["list", "tranfser"]) == 2
    assert "expected one of the folders detectron2," in capsys.readouterr().err


def test_a_path_is_printed_with_and_without_the_folder(capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("study/demo.yaml", "configs/study/demo.yaml"):
        assert config.main(["path", name]) == 0
        assert capsys.readouterr().out == f"{ROOT / 'configs/study/demo.yaml'}\n"
        assert lth.config_path(name) == f"{ROOT / 'configs/study/demo.yaml'}"


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("study/deemo.yaml", "study/demo.yaml"),
        ("fcn_r50_cityscapes_ticket.py", "mmseg/fcn_r50_cityscapes_ticket.py"),
    ],
)
def test_a_name_that_is_not_there_is_told_the_nearest(
    name: str, meant: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert config.main(["path", name]) == 2
    assert f"found none named {name}: " in (said := capsys.readouterr().err)
    assert f"Did you mean {meant}" in said
    with pytest.raises(ConfigError, match=f"found none at {name}.* Did you mean {meant}"):
        find_config(name)


def test_a_file_goes_before_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    name = "study/demo.yaml"
    assert find_config(name) == ROOT / "configs" / name
    Path("study").mkdir()
    Path(name).write_text("out: mine\n")
    assert find_config(name) == Path(name)


def test_a_copy_has_what_it_inherits_and_overwrites_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = ["copy", "mmseg/digits/calm_fcn_r18_ticket.py", f"{tmp_path / 'mine'}"]
    assert config.main(copy) == 0
    written = [Path(line) for line in capsys.readouterr().out.split()]
    assert [path.relative_to(tmp_path / "mine").as_posix() for path in written] == [
        "mmseg/digits/calm_fcn_r18_ticket.py",
        "mmseg/digits/fcn_r18_ticket.py",
        "mmseg/_base_/fcn_r18.py",
        "mmseg/_base_/schedule_1k.py",
    ]
    for path in written:
        source = ROOT / "configs" / path.relative_to(tmp_path / "mine")
        assert path.read_bytes() == source.read_bytes()
    assert config.main(copy) == 0, "the same again changes nothing"
    written[2].write_text("# edited\n")
    written[0].unlink()
    assert config.main(copy) == 2
    assert "found one of other content" in capsys.readouterr().err
    assert written[2].read_text() == "# edited\n" and not written[0].exists()
