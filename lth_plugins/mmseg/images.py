"""Names the image file of mmengine's datasets that cannot be read, before a run where it can."""

from collections.abc import Iterator, Mapping
from typing import Any

from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner

from lth_plugins.training.images import Readable, check_images


@HOOKS.register_module()
class ImagesHook(Hook):
    """Name the image file that cannot be read.

    Datasets are checked before a training or test, as far as that is cheap; other images when they
    are read. Those of a training are then named by `name_unreadable`, as its workers start before
    any hook.
    """

    def before_train(self, runner: Runner) -> None:
        _check(runner.train_dataloader.dataset)
        if runner.val_loop is not None:  # not after hours of training
            _check(runner.val_dataloader.dataset)

    def before_val(self, runner: Runner) -> None:
        name_unreadable(runner.val_dataloader.dataset)

    def before_test(self, runner: Runner) -> None:
        _check(runner.test_dataloader.dataset)
        name_unreadable(runner.test_dataloader.dataset)


def name_unreadable(dataset: Any) -> None:
    """Have a dataset of mmengine, also a wrapped one, name the image file that cannot be read."""
    for inner in _inside(dataset):
        name_unreadable(inner)
    pipeline = getattr(dataset, "pipeline", None)
    if pipeline is not None and not isinstance(pipeline, Readable):
        dataset.pipeline = Readable(pipeline, _files)


def _inside(dataset: Any) -> list[Any]:
    """The datasets that a wrapper wraps, of mmengine's or ours."""
    inner = getattr(dataset, "dataset", None)
    return list(getattr(dataset, "datasets", [] if inner is None else [inner]))


def _files(info: Mapping[str, Any]) -> Iterator[str]:
    """The local files of an entry of a dataset."""
    for key in ("img_path", "seg_map_path"):
        if isinstance(info.get(key), str) and "://" not in info[key]:
            yield info[key]


def _check(dataset: Any) -> None:
    for inner in _inside(dataset):
        _check(inner)
    if hasattr(dataset, "get_data_info") and not _inside(dataset):
        dataset.full_init()
        infos = (dataset.get_data_info(index) for index in range(len(dataset)))
        check_images(path for info in infos for path in _files(info))
