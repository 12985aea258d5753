"""Datasets in detectron2's catalogs: those that a config describes or names, and their files."""

import difflib
import os
import re
import runpy
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json

from lth_plugins.detectron2.voc import load_voc
from lth_plugins.errors import ConfigError, RunError, unknown
from lth_plugins.training.images import check_images, evenly_spaced
from lth_plugins.training.places import dataset_path

Entry = dict[str, Any]


@dataclass(frozen=True)
class Coco:
    """A dataset in COCO's format.

    Attributes:
        annotations: the JSON file.
        images: the folder that its ``file_name``s are in.
        classes: the names of its categories, in the order of their ids; by default the file's.
        subset: use this many images, evenly spaced; 0 for all.
    """

    annotations: str
    images: str
    classes: tuple[str, ...] = ()
    subset: int = 0

    def load(self, name: str) -> list[Entry]:
        annotations, images = _path(self.annotations), _path(self.images)
        for path, key in ((annotations, "ANNOTATIONS"), (images, "IMAGES")):
            if not path.exists():
                raise RunError(
                    f"expected {_key(name)}.{key} at {path}, found nothing: put it there, or give "
                    "another path"
                )
        try:
            entries = load_coco_json(str(annotations), str(images), name)
        except (KeyError, TypeError, IndexError, AttributeError, AssertionError, ValueError) as why:
            raise RunError(
                f"expected COCO's images, annotations and categories in {annotations}, found what "
                f"cannot be read as such ({type(why).__name__}: {why}): correct the file, or give "
                f"another as {_key(name)}.ANNOTATIONS"
            ) from None
        found = MetadataCatalog.get(name).thing_classes
        if self.classes and list(self.classes) != found:
            raise ConfigError(
                f"expected the categories of {annotations} as {_key(name)}.CLASSES, "
                f"{found}, found {list(self.classes)}: give the same in the same order, or none"
            )
        return entries

    def metadata(self) -> dict[str, Any]:
        # Without json_file the evaluator compares with what `load` returns.
        whole = {"json_file": str(_path(self.annotations)), "image_root": str(_path(self.images))}
        return {} if self.subset else whole


@dataclass(frozen=True)
class Voc:
    """A dataset in Pascal VOC's format; it is evaluated by COCO's metrics.

    Attributes:
        root: the folder that has ``Annotations``, ``ImageSets`` and ``JPEGImages``.
        split: the name of a file in ``ImageSets/Main``.
        classes: the names of its classes, in the order of their labels.
        subset: use this many images, evenly spaced; 0 for all.
    """

    root: str
    split: str
    classes: tuple[str, ...]
    subset: int = 0

    def load(self, name: str) -> list[Entry]:
        return load_voc(_path(self.root), self.split, self.classes, _key(name))

    def metadata(self) -> dict[str, Any]:
        return {"thing_classes": list(self.classes)}


TYPES: Mapping[str, type[Coco | Voc]] = {"coco": Coco, "voc": Voc}

_PATHS = ("ANNOTATIONS", "IMAGES", "ROOT")


def add_dataset_config(cfg: CfgNode) -> None:
    """Add the keys ``DATASETS.REGISTER`` and ``DATASETS.REGISTER_FILES`` to a config."""
    # Datasets of your own, by the names that TRAIN and TEST give them, each with a TYPE and the
    # settings of `Coco` or `Voc`:
    #   mine_train: {TYPE: coco, ANNOTATIONS: datasets/mine/train.json, IMAGES: datasets/mine/train}
    #   bccd_train: {TYPE: voc, ROOT: datasets/bccd, SPLIT: train, CLASSES: [RBC, WBC, Platelets]}
    cfg.DATASETS.REGISTER = CfgNode(new_allowed=True)
    # Python files that register other datasets; --register adds one.
    cfg.DATASETS.REGISTER_FILES = ()


def declare_options(cfg: CfgNode, options: Sequence[str]) -> None:
    """Let options on a command line describe datasets, ``DATASETS.REGISTER.NAME.SETTING VALUE``.

    yacs merges an option only into a key that exists.
    """
    register = cfg.DATASETS.REGISTER
    for key in options[::2]:
        group, _, rest = key.partition("DATASETS.REGISTER.")
        name, _, setting = rest.rpartition(".")
        if not group and name:
            register.setdefault(name, CfgNode()).setdefault(setting, None)


def register_datasets(datasets: Mapping[str, Mapping[str, Any]]) -> None:
    """Register datasets in detectron2's catalogs. They are read when they are used.

    Args:
        datasets: as ``DATASETS.REGISTER`` has them.

    Raises:
        ConfigError: if a setting is unknown, invalid or missing, or another dataset has the name.
    """
    read = {name: _read_dataset(name, settings) for name, settings in datasets.items()}
    for name, dataset in read.items():
        if registered_by_config(name) != dataset and name in DatasetCatalog.list():
            raise ConfigError(
                f"expected a new name in DATASETS.REGISTER, found {name!r}, under which another "
                "dataset is registered: rename yours"
            )
    for name, dataset in read.items():
        _register(name, dataset)


def register_digit_scenes(names: Sequence[str]) -> None:
    """Register those of these datasets that ``tools/make_digit_scenes.py`` draws.

    They are ``digit_scenes_train``, ``digit_scenes_test`` and those of ``digit_scenes_small`` and
    ``digit_scenes_calm``, the scenes of ``configs/study/digits.yaml`` and ``demo.yaml``: boxes and
    masks of ten digits, in the folder of that name in ``datasets/``.
    """
    for name in names:
        found = _DIGITS.fullmatch(name)
        if found and name not in DatasetCatalog.list():
            folder, split = f"datasets/{found[1]}", found[2]
            annotations = f"{folder}/annotations/instances_{split}.json"
            digits = tuple(str(digit) for digit in range(10))
            _register(name, Coco(annotations, f"{folder}/images/{split}", digits))
            MetadataCatalog.get(name).thing_classes = list(digits)


_DIGITS = re.compile(r"(digit_scenes(?:_small|_calm)?)_(train|test)")


def registered_by_config(name: str) -> Coco | Voc | None:
    """The dataset of this name that `register_datasets` registered."""
    return _registered.get(name) if name in DatasetCatalog.list() else None


_registered: dict[str, Coco | Voc] = {}


def _register(name: str, dataset: Coco | Voc) -> None:
    if registered_by_config(name) == dataset:
        return

    def load() -> list[Entry]:
        entries = dataset.load(name)
        count = dataset.subset or len(entries)
        return [entries[index] for index in evenly_spaced(len(entries), count)]

    DatasetCatalog.register(name, load)
    MetadataCatalog.get(name).set(evaluator_type="coco", **dataset.metadata())
    _registered[name] = dataset


def _read_dataset(name: str, settings: Mapping[str, Any]) -> Coco | Voc:
    if not isinstance(settings, Mapping):
        raise ConfigError(f"expected {_key(name)} to have a TYPE and its settings: {settings!r}")
    values = {str(key).lower(): value for key, value in settings.items()}
    kind = values.pop("type", None)
    if kind not in TYPES:
        raise unknown(f"{_key(name)}.TYPE", kind, TYPES)
    declared = {field.name: field.default is MISSING for field in fields(TYPES[kind])}
    for key in values:
        if key not in declared:
            raise unknown(f"key of {_key(name)}", key.upper(), [k.upper() for k in declared])
    lacking = [key.upper() for key, needed in declared.items() if needed and not values.get(key)]
    if lacking:
        raise ConfigError(f"expected {', '.join(lacking)} in {_key(name)}, found none: add them")
    classes, subset = values.get("classes", ()), values.get("subset", 0)
    if isinstance(classes, str) or not all(isinstance(item, str) for item in classes):
        raise ConfigError(f"expected names of classes as {_key(name)}.CLASSES, found {classes!r}")
    if len(set(classes)) < len(classes):
        raise ConfigError(f"expected each class once in {_key(name)}.CLASSES, found {classes}")
    if not isinstance(subset, int) or subset < 0:
        raise ConfigError(f"expected {_key(name)}.SUBSET to be 0 or more, found {subset!r}")
    return TYPES[kind](**{**values, "classes": tuple(classes)})


def _key(name: str) -> str:
    return f"DATASETS.REGISTER.{name}"


def _path(path: str) -> Path:
    return dataset_path(path, os.getenv("DETECTRON2_DATASETS"))


def import_files(paths: Sequence[str]) -> None:
    """Run Python files that register datasets, each once per process.

    Raises:
        ConfigError: if there is no such file, or one raises, with its traceback.
    """
    for path in paths:
        file = Path(path).expanduser().resolve()
        if file in _imported:
            continue
        if not file.is_file():
            raise ConfigError(f"expected a Python file to register datasets, found none at {path}")
        try:
            runpy.run_path(str(file), run_name=file.stem)
        except (Exception, SystemExit) as error:
            # The frames of ours and of runpy's come first, and say nothing about the file.
            frames = traceback.extract_tb(error.__traceback__)
            own = next((i for i, f in enumerate(frames) if f.filename == str(file)), len(frames))
            lines = traceback.format_list(frames[own:])
            lines += traceback.format_exception_only(type(error), error)
            raise ConfigError(
                f"expected {path} to register datasets, found that it raises "
                f"{type(error).__name__}: correct it\n{''.join(lines).rstrip()}"
            ) from None
        _imported.add(file)


_imported: set[Path] = set()


def recipe_of_datasets(cfg: CfgNode) -> dict[str, Any]:
    """What training depends on of the datasets that a config registers: not where they are."""
    register = cfg.DATASETS.get("REGISTER", {})
    used = {name: register[name] for name in cfg.DATASETS.TRAIN if name in register}
    recipe = {
        name: {key: value for key, value in settings.items() if key not in _PATHS}
        for name, settings in used.items()
    }
    return {"REGISTER": recipe} if recipe else {}


def check_classes(cfg: CfgNode, names: Sequence[str]) -> None:
    """Read the datasets of a config that it registers, and compare their classes with its heads.

    Raises:
        LthError: if a dataset cannot be read, two differ in their classes, or the heads predict
            another number of them.
    """
    classes: dict[str, list[str]] = {}
    for name in names:
        if name in cfg.DATASETS.get("REGISTER", {}):
            if not DatasetCatalog.get(name):
                raise RunError(f"expected images in {_key(name)}, found none")
            classes[name] = MetadataCatalog.get(name).thing_classes
    for name, found in classes.items():
        first, expected = next(iter(classes.items()))
        if found != expected:
            raise ConfigError(
                f"expected the same classes in the same order in {first} and {name}, found "
                f"{expected} and {found}"
            )
        key = "ROI_HEADS" if cfg.MODEL.META_ARCHITECTURE == "GeneralizedRCNN" else "RETINANET"
        counted = cfg.MODEL.META_ARCHITECTURE in ("GeneralizedRCNN", "RetinaNet")
        if counted and len(found) != cfg.MODEL[key].NUM_CLASSES:
            raise ConfigError(
                f"expected MODEL.{key}.NUM_CLASSES {len(found)}, as {name} has "
                f"{', '.join(found)}, found {cfg.MODEL[key].NUM_CLASSES}: write the former"
            )


def check_registered(names: Sequence[str], key: str) -> None:
    """Check that datasets of a config are in detectron2's catalog.

    Args:
        names: the datasets.
        key: of the config, for the message.

    Raises:
        ConfigError: naming the first that is not, similar ones, and how to register it.
    """
    registered = DatasetCatalog.list()
    for name in names:
        if name not in registered:
            close = difflib.get_close_matches(name, registered, n=3)
            raise ConfigError(
                f"expected registered datasets in {key}, found {name!r}"
                + (f"; did you mean {', '.join(close)}? " if close else ". ")
                + f"Describe your own in the config, as {_key(name)}, or register it in a Python "
                "file that --register names"
            )


_FILES = ("file_name", "sem_seg_file_name", "pan_seg_file_name")


def files_of(entry: Mapping[str, Any]) -> Iterator[str]:
    """The local image files of an entry of a dataset; not those of detectron2's own protocols."""
    for key in _FILES:
        if key in entry and "://" not in entry[key]:
            yield entry[key]


def check_files(entries: Sequence[Mapping[str, Any]]) -> None:
    """Check that the image files of a dataset can be read, as far as that is cheap.

    Raises:
        UnreadableImage: naming those that cannot.
    """
    check_images(path for entry in entries for path in files_of(entry))
