"""What a page leaves beside itself has files of its own, whatever it is called."""

import json
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from lth_plugins.study.report.assets import Assets
from lth_plugins.study.report.tables import Column, Table


@pytest.mark.parametrize(
    ("names", "files"),
    [
        (("layers MoCo", "layers moco"), ["layers-moco", "layers-moco-2"]),
        (("means a b-c", "means a-b c"), ["means-a-b-c", "means-a-b-c-2"]),
        (("v 2", "V", "v"), ["v-2", "v", "v-3"]),
        (("layers v1.5",), ["layers-v1.5"]),
    ],
)
def test_names_that_are_alike_as_files_are_numbered(
    tmp_path: Path, names: tuple[str, ...], files: list[str]
) -> None:
    show = Assets(tmp_path / "report.html")
    for name, file in zip(names, files, strict=True):
        html = show.table(Table(name, (Column("key", "Key"),), ()), name)
        assert f"tables/{file}.json" in html
        assert json.loads((tmp_path / f"tables/{file}.json").read_text())["caption"] == name
        assert f"figures/{file}.pdf" in show.figure(Figure((1, 1)), name, "nothing", name)
    assert len(list((tmp_path / "figures").iterdir())) == len(names)
