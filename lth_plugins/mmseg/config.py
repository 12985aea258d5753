"""Config edits and command-line options that ``tools/train_seg.py`` and ``test_seg.py`` share."""

import argparse
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mmengine.config import Config, DictAction
from mmengine.dist import init_dist, is_distributed
from mmengine.logging import print_log

from lth_plugins.errors import ConfigError, NotFound, RunError
from lth_plugins.masking.input import ModelInput
from lth_plugins.mmseg.hooks import TicketHook
from lth_plugins.mmseg.init import TICKET_OPTIONS, choice_of, ticket_options
from lth_plugins.mmseg.input import input_of_config, to_config
from lth_plugins.ticket import IMAGENET, TicketError
from lth_plugins.training.places import LAYOUTS, check_layout, dataset_path

PLUGIN = "lth_plugins.mmseg"

_TYPES = {name: f"Ticket{name}" for name in ("ResNet", "ResNetV1c", "ResNetV1d")}
"""mmseg's backbones, and ours of the same parameters, which check what is loaded into them."""


def apply_ticket(cfg: Config, ref: str | None = None) -> None:
    """Make a training config train a ticket, in place.

    The ``init_cfg`` of the backbone (see `backbone_of`) names it, the data preprocessor returns the
    ticket's input (see `apply_input`), and `TicketHook` is among the hooks. The config imports this
    package, so that any script runs what is dumped of it, and names ``TicketResNet`` where it named
    mmseg's ``ResNet``, so that no script loads into it what does not fit. A config that did not
    have a ticket, such as one that mmseg ships, loses its ``pretrained`` weights; options of a
    ticket that its ``init_cfg`` was given all the same, as on the command line, stay.

    Args:
        cfg: the config of a model with a ``backbone``.
        ref: the ticket; by default the one that the config names.

    Raises:
        TicketError: if the config has no backbone or no ticket, or it cannot be read.
    """
    backbone, where = backbone_of(cfg.model)
    found = backbone.get("init_cfg")
    if ref is not None and ticket_options(found) is None:
        given = found if isinstance(found, Mapping) else {}
        # Keep the options that a ticket has, too; options without a type can only be a ticket's.
        kept = {k: v for k, v in given.items() if "type" not in given or k in TICKET_OPTIONS}
        backbone.init_cfg = {**kept, "type": "Ticket"}
        cfg.model.pretrained = None
        if backbone.get("pretrained") is not None:
            backbone.pretrained = None
    options = ticket_options(backbone.get("init_cfg"))
    if options is not None and ref is not None:
        options["checkpoint"] = ref
    if options is None or options.get("checkpoint") is None:
        raise NotFound(
            "expected a ticket, found none: give --ticket FILE, or write in the config "
            + where.format("init_cfg=dict(type='Ticket', checkpoint='FILE')")
        )
    if cfg.get("default_scope") == "mmseg":  # other packages have ResNets of their own
        kind = str(backbone.get("type")).removeprefix("mmseg.")
        if kind in _TYPES:
            backbone.type = _TYPES[kind]
    if not options.get("keep_input"):
        apply_input(cfg, ModelInput.of(choice_of(options).load_ahead().meta.input))
    hooks = cfg.setdefault("custom_hooks", None) or []
    if not any(hook["type"] in ("TicketHook", TicketHook) for hook in hooks):
        cfg.custom_hooks = [*hooks, {"type": "TicketHook"}]
    import_plugin(cfg)


def drop_ticket(cfg: Config) -> None:
    """Make the model of a config one without a ticket, in place; its input stays."""
    backbone, _ = backbone_of(cfg.model)
    backbone.init_cfg = None
    kind = str(backbone.get("type")).removeprefix("mmseg.")
    stock = {ours: theirs for theirs, ours in _TYPES.items()}
    backbone.type = stock.get(kind, backbone.get("type"))
    hooks = cfg.get("custom_hooks") or []
    cfg.custom_hooks = [hook for hook in hooks if hook["type"] not in ("TicketHook", TicketHook)]


def backbone_of(model: Mapping[str, Any]) -> tuple[Any, str]:
    """The config of the ResNet in the config of a model.

    It is the ``backbone``, or the ``backbone_cfg`` in that, as BiSeNetV1 and ICNet have one.

    Returns:
        The config, and how to write something into it, with ``{}`` in that place.

    Raises:
        TicketError: if the model has no backbone.
    """
    backbone, where = model.get("backbone"), "backbone=dict({}, …)"
    if backbone is None:
        raise TicketError(f"expected a model with a backbone, found {model.get('type')}")
    while isinstance(backbone.get("backbone_cfg"), Mapping):
        backbone, where = backbone["backbone_cfg"], where.format("backbone_cfg=dict({}, …)")
    return backbone, where


def import_plugin(cfg: Config) -> None:
    """Have a config import this package, in place, whose names it uses."""
    found = cfg.get("custom_imports") or {}
    imports = found.get("imports") or []
    imports = [imports] if isinstance(imports, str) else list(imports)
    if PLUGIN not in imports:
        cfg.custom_imports = {"allow_failed_imports": False, **found, "imports": [*imports, PLUGIN]}


def apply_input(cfg: Config, wanted: ModelInput) -> None:
    """Make the data preprocessor of a config return this input, in place.

    Only where the config leaves the normalisation unset or at mmseg's default, ImageNet's. One
    that was chosen stays, and `TicketInit` says what is wrong with it.
    """
    settings = to_config(wanted)
    for section in (cfg, cfg.model) if settings is not None else ():
        found = section.get("data_preprocessor")
        if found is None or input_of_config(found).same_as(wanted):
            continue
        if found.get("mean") is None or input_of_config(found).same_as(ModelInput.of(IMAGENET)):
            found.update(settings)
            print_log(f"The input is that of the ticket: {settings}", logger="current")


def join_processes(cfg: Config) -> None:
    """Join the processes of a distributed training, as the Runner does, unless that is done."""
    if cfg.launcher != "none" and not is_distributed():
        init_dist(cfg.launcher, **cfg.get("env_cfg", {}).get("dist_cfg", {}))


def load_config(args: argparse.Namespace) -> Config:
    """The config that a command line of mmseg's own scripts describes.

    Args:
        args: with ``config``, ``work_dir``, ``cfg_options`` (texts KEY=VALUE), ``launcher`` and
            ``local_rank``.

    Raises:
        ConfigError: if the file or a setting cannot be read.
    """
    os.environ.setdefault("LOCAL_RANK", str(args.local_rank))
    if not Path(args.config).is_file():
        raise ConfigError(f"expected a config, found none at {args.config}: check the path")
    try:
        cfg = Config.fromfile(args.config)
        cfg.merge_from_dict(_parsed(args.cfg_options))
    except Exception as error:  # a config is a program, and may fail like any other
        changes = f" with {args.cfg_options}" if args.cfg_options else ""
        raise ConfigError(
            f"{args.config}{changes} cannot be read as a config of mmengine: "
            f"{type(error).__name__}: {error}"
        ) from error
    for dataset, _ in _datasets({key: cfg[key] for key in cfg}):
        if (root := dataset_path(dataset["data_root"])) != Path(dataset["data_root"]):
            dataset["data_root"] = str(root)
    cfg.launcher = args.launcher
    name = Path(args.config).stem
    cfg.work_dir = args.work_dir or cfg.get("work_dir") or os.path.join("work_dirs", name)
    return cfg


def _parsed(options: Sequence[str]) -> dict[str, Any]:
    """Settings KEY=VALUE, parsed as mmengine's own command lines are."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--options", nargs="*", action=DictAction)
    return parser.parse_args(["--options", *options]).options or {}


def check_data(cfg: Config, *splits: str) -> None:
    """Check that the folders of datasets are there.

    Args:
        cfg: the config.
        splits: "train", "val" or "test".

    Raises:
        RunError: naming the first that is not, and what to put there.
    """
    loaders = {key: cfg.get(key) for key in (f"{split}_dataloader" for split in splits)}
    for dataset, key in _datasets(loaders):
        root = Path(dataset["data_root"])
        if root.name in LAYOUTS:
            check_layout(root, LAYOUTS[root.name], key)
        prefixes = dataset.get("data_prefix") or {}
        for prefix in prefixes.values() if isinstance(prefixes, Mapping) else [prefixes]:
            folder = root / str(prefix)
            if "://" not in str(prefix) and not folder.exists():
                raise RunError(
                    f"expected data in {folder}, found nothing: put them there, or give another "
                    f"{key}"
                )


def _datasets(node: Any, key: str = "") -> Iterator[tuple[Any, str]]:
    """The configs of datasets in a config that have a ``data_root``, each with the key of that."""
    if isinstance(node, Mapping):
        if isinstance(node.get("data_root"), str) and "://" not in node["data_root"]:
            yield node, f"{key}.data_root".lstrip(".")
        for name, value in node.items():
            yield from _datasets(value, f"{key}.{name}")
    elif isinstance(node, list | tuple):
        for index, value in enumerate(node):
            yield from _datasets(value, f"{key}.{index}")
