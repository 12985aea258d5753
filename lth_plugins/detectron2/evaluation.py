"""How the datasets of a config are evaluated: by detectron2's evaluator of their type."""

from collections.abc import Callable

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import (
    CityscapesInstanceEvaluator,
    CityscapesSemSegEvaluator,
    COCOEvaluator,
    COCOPanopticEvaluator,
    DatasetEvaluator,
    LVISEvaluator,
    PascalVOCDetectionEvaluator,
    SemSegEvaluator,
)

from lth_plugins.detectron2.datasets import check_classes, check_files, check_registered
from lth_plugins.errors import ConfigError

EVALUATORS: dict[str, Callable[[str, str], list[DatasetEvaluator]]] = {
    "coco": lambda name, folder: [
        # A file that an earlier evaluation made of the annotations may be outdated.
        COCOEvaluator(name, output_dir=folder, allow_cached_coco=False)
    ],
    "coco_panoptic_seg": lambda name, folder: [
        SemSegEvaluator(name, output_dir=folder),
        COCOEvaluator(name, output_dir=folder),
        COCOPanopticEvaluator(name, folder),
    ],
    "sem_seg": lambda name, folder: [SemSegEvaluator(name, output_dir=folder)],
    "lvis": lambda name, folder: [LVISEvaluator(name, output_dir=folder)],
    "pascal_voc": lambda name, _: [PascalVOCDetectionEvaluator(name)],
    "cityscapes_instance": lambda name, _: [CityscapesInstanceEvaluator(name)],
    "cityscapes_sem_seg": lambda name, _: [CityscapesSemSegEvaluator(name)],
}
"""By ``evaluator_type`` of the dataset. Each is called with its name and an output folder."""


def evaluators_of(dataset_name: str) -> Callable[[str, str], list[DatasetEvaluator]]:
    """The entry of `EVALUATORS` for a dataset.

    Raises:
        ConfigError: if there is none.
    """
    kind = MetadataCatalog.get(dataset_name).get("evaluator_type")
    if kind is None:
        raise ConfigError(
            f"expected datasets in DATASETS.TEST that say how they are evaluated, found "
            f"{dataset_name}, which does not. Write where it is registered:\n"
            f'    MetadataCatalog.get("{dataset_name}").evaluator_type = "coco"\n'
            f"or another of {', '.join(EVALUATORS)}; or evaluate on none (DATASETS.TEST '()')"
        )
    if kind not in EVALUATORS:
        raise ConfigError(
            f"expected datasets in DATASETS.TEST of the types {', '.join(EVALUATORS)}, found "
            f"{dataset_name}, of type {kind}: name others, or none (DATASETS.TEST '()')"
        )
    return EVALUATORS[kind]


def check_datasets(cfg: CfgNode, train: bool) -> None:
    """Check that the datasets of a config are registered and evaluated, before they are loaded.

    Raises:
        LthError: if one is not, or an image that a training is evaluated on cannot be read.
    """
    if train:
        check_registered(cfg.DATASETS.TRAIN, "DATASETS.TRAIN")
        if not cfg.DATASETS.TRAIN:
            raise ConfigError(
                "expected datasets to train on, found an empty DATASETS.TRAIN: name one, such as "
                "DATASETS.TRAIN \"('coco_2017_train',)\""
            )
    check_registered(cfg.DATASETS.TEST, "DATASETS.TEST")
    check_classes(cfg, [*(cfg.DATASETS.TRAIN if train else ()), *cfg.DATASETS.TEST])
    for name in cfg.DATASETS.TEST:
        evaluators_of(name)
        if train:  # before it, not after hours of it
            check_files(DatasetCatalog.get(name))
