"""A configuration of ours is data: no tag and no value of it names code that runs."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lth_plugins.errors import ConfigError
from lth_plugins.pretrain import load_config as load_search
from lth_plugins.study.plan.config import load_config as load_study
from lth_plugins.transfer.config import load_config as load_transfer

LOADERS: dict[str, Callable[[Path], Any]] = {
    "a search": load_search,
    "a transfer": load_transfer,
    "a study": load_study,
}
TAGS = (
    "!!python/object/apply:builtins.open [{mark}, w]",
    "!!python/object/new:pathlib.Path [{mark}]",
    "!!python/object/apply:subprocess.check_call [[touch, {mark}]]",
    "!!python/name:os.system",
    "!!python/module:this",
)


@pytest.mark.parametrize("tag", TAGS, ids=lambda tag: tag.split()[0])
@pytest.mark.parametrize("loader", LOADERS)
def test_a_tag_that_names_code_is_refused(loader: str, tag: str, tmp_path: Path) -> None:
    path, mark = tmp_path / "evil.yaml", tmp_path / "ran"
    for text in (f"seed: {tag}", f"{tag}: 1", f"? {tag}\n: 1", f"a: &a {tag}\nb: *a"):
        path.write_text(text.format(mark=mark))
        with pytest.raises(ConfigError):
            LOADERS[loader](path)
        assert not mark.exists()


@pytest.mark.parametrize("value", ["os:system", "os.system", "lth_plugins.pretrain.find:find"])
def test_a_task_is_one_of_a_list_and_never_a_name_that_is_imported(value: str) -> None:
    config = Path(__file__).parents[2] / "configs/pretrain/digits_supervised.yaml"
    with pytest.raises(ConfigError, match="unknown task"):
        load_search(config, [f"task={value}"])
