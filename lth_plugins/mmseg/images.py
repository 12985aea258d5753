"""Images of mmengine's datasets: which file cannot be read, before a run where that is cheap."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner

from lth_plugins.training.images import check_readable, check_small

_FILES = ("img_path", "seg_map_path")


@HOOKS.register_module()
class ImagesHook(Hook):
    """Name the image file that cannot be read.

    Those of small datasets are checked before a training or test; of large ones, each when it is
    read. What a run trains on is then named by `name_unreadable`, as its workers start before any
    hook.
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
    if pipeline is not None and not isinstance(pipeline, _Readable):
        dataset.pipeline = _Readable(pipeline)


def _inside(dataset: Any) -> list[Any]:
    """What a wrapper wraps, of mmengine's or ours."""
    inner = getattr(dataset, "dataset", None)
    return list(getattr(dataset, "datasets", [] if inner is None else [inner]))


class _Readable:
    """A pipeline; what else it has is the wrapped one's."""

    def __init__(self, pipeline: Callable[[dict[str, Any]], Any]) -> None:
        self._pipeline = pipeline

    def __call__(self, info: dict[str, Any]) -> Any:
        files = list(_files(info))  # the pipeline adds to it
        try:
            return self._pipeline(info)
        except Exception:
            check_readable(files, whole=True)
            raise

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "_pipeline":  # while it is copied or unpickled
            raise AttributeError(name)
        return getattr(self._pipeline, name)


def _files(info: Mapping[str, Any]) -> Iterator[str]:
    """The local files of an entry of a dataset."""
    for key in _FILES:
        if isinstance(info.get(key), str) and "://" not in info[key]:
            yield info[key]


def _check(dataset: Any) -> None:
    for inner in _inside(dataset):
        _check(inner)
    if hasattr(dataset, "get_data_info") and not _inside(dataset):
        dataset.full_init()
        infos = (dataset.get_data_info(index) for index in range(len(dataset)))
        check_small(path for info in infos for path in _files(info))
