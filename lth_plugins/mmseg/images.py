"""Checks the files of mmengine's datasets, before a run as far as that is cheap.

Images that cannot be read are named, and label maps with values that no head predicts.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from PIL import Image
from torch import nn

from lth_plugins.errors import RunError
from lth_plugins.training.images import Readable, check_images, evenly_spaced


@HOOKS.register_module()
class ImagesHook(Hook):
    """Name the image file that cannot be read, or the label map that has an invalid value.

    Datasets are checked before a training or test, as far as that is cheap; other images when they
    are read. Those of a training are then named by `name_unreadable`, as its workers start before
    any hook.
    """

    def before_train(self, runner: Runner) -> None:
        _check(runner.train_dataloader.dataset, runner.model)
        if runner.val_loop is not None:  # not after hours of training
            _check(runner.val_dataloader.dataset, runner.model)

    def before_val(self, runner: Runner) -> None:
        name_unreadable(runner.val_dataloader.dataset)

    def before_test(self, runner: Runner) -> None:
        _check(runner.test_dataloader.dataset, runner.model)
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


def _check(dataset: Any, model: nn.Module) -> None:
    for inner in _inside(dataset):
        _check(inner, model)
    if hasattr(dataset, "get_data_info") and not _inside(dataset):
        dataset.full_init()
        infos = [dataset.get_data_info(index) for index in range(len(dataset))]
        check_images(path for info in infos for path in _files(info))
        if hasattr(dataset, "reduce_zero_label"):  # one of mmseg's
            _check_labels(dataset, infos, model)


LABEL_MAPS = 1000
"""Of larger datasets, this many label maps are checked before a run, evenly spaced."""


def _check_labels(dataset: Any, infos: Sequence[Mapping[str, Any]], model: nn.Module) -> None:
    """Check that label maps have only values that the heads predict or ignore.

    Raises:
        RunError: naming a file and its value. PyTorch names neither, and stops a GPU.
    """
    classes, ignored = len(dataset.metainfo["classes"]), {dataset.ignore_index}
    heads: list[Any] = [head for head in model.modules() if hasattr(head, "num_classes")]
    heads = [head for head in heads if isinstance(getattr(head, "ignore_index", None), int)]
    if heads:
        classes = min(head.num_classes for head in heads)
        ignored = set.intersection(*({head.ignore_index} for head in heads))
    paths = [path for info in infos for path in _label_maps(info)]
    for index in evenly_spaced(len(paths), LABEL_MAPS):
        with Image.open(paths[index]) as image:
            labels = np.asarray(image)
        if labels.ndim != 2:
            raise RunError(
                f"expected one label per pixel in {paths[index]}, found an image of colours: "
                "convert it to label indices"
            )
        for value in np.unique(labels):
            label = _trained(int(value), dataset)
            if not (0 <= label < classes or label in ignored):
                raise RunError(
                    f"expected labels from 0 to {classes - 1} in {paths[index]}, and "
                    f"{', '.join(map(str, ignored)) or 'none'} where a pixel is ignored, found "
                    f"{value}: correct the label maps, or the classes and ignore_index of the "
                    "dataset and the heads"
                )


def _label_maps(info: Mapping[str, Any]) -> Iterator[str]:
    path = info.get("seg_map_path")
    if isinstance(path, str) and "://" not in path:
        yield path


def _trained(value: int, dataset: Any) -> int:
    """What mmseg's LoadAnnotations makes of a value in a label map."""
    if dataset.reduce_zero_label:
        value = 255 if value in (0, 255) else value - 1
    return (dataset.label_map or {}).get(value, value)
