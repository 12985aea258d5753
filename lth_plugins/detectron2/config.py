"""The config node ``MODEL.TICKET``, the ticket it names, and what a config must not contradict.

The builders in `modeling` check a config before they build anything, so every script that builds a
model from a config checks it.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import yaml
from detectron2.config import CfgNode, get_cfg
from torch import nn

from lth_plugins.errors import ConfigError
from lth_plugins.masking.hosting import frozen_statistics, without_ticket
from lth_plugins.masking.input import ModelInput, contradiction
from lth_plugins.masking.loading import refuse_to_run, watch_loading
from lth_plugins.pruning.methods import METHODS, make_method, options_of
from lth_plugins.pruning.search.settings import TaskSettings
from lth_plugins.settings import setting_of
from lth_plugins.ticket import Choice, NotFound, Ticket, TicketError, Wording
from lth_plugins.ticket.meta import COLOURS

logger = logging.getLogger(__name__)

BACKBONES: Mapping[str, str] = {
    "build_resnet_backbone": "build_ticket_resnet_backbone",
    "build_resnet_fpn_backbone": "build_ticket_resnet_fpn_backbone",
    "build_retinanet_resnet_fpn_backbone": "build_ticket_retinanet_resnet_fpn_backbone",
}
"""detectron2's builders, and ours that put a ticket on what they build."""

_DENSE_WEIGHTS = "ImageNetPretrained"  # detectron2's folder of classifiers to start training from


def add_ticket_config(cfg: CfgNode) -> None:
    """Add ``MODEL.TICKET`` to a config, before any file or option is merged into it."""
    cfg.MODEL.TICKET = CfgNode()
    # The ticket: a path, a name in the TicketCatalog, or hf://owner/repo[/file][@sha256:…].
    cfg.MODEL.TICKET.PATH = ""
    # Another ticket whose weights to train under these masks; "" for the ticket's own. A ticket
    # file holds surviving weights only: REVERSE and RANDOM need the dense one it came from.
    cfg.MODEL.TICKET.WEIGHTS = ""
    # False keeps the random initialisation that detectron2 gives the model, masked.
    cfg.MODEL.TICKET.LOAD_WEIGHTS = True
    # False drops what a ticket prunes in the neck and heads of the model it was found in.
    cfg.MODEL.TICKET.REST = True
    # Train what the ticket left out: (1 - m, θ).
    cfg.MODEL.TICKET.REVERSE = False
    # Train a random mask of the same layer-wise densities, drawn with RANDOM_SEED.
    cfg.MODEL.TICKET.RANDOM = False
    cfg.MODEL.TICKET.RANDOM_SEED = 0
    # True accepts INPUT.FORMAT and PIXEL_MEAN/STD that are not what the ticket was trained on.
    cfg.MODEL.TICKET.KEEP_INPUT = False
    # True accepts FrozenBN, for a ticket whose statistics are those of the sub-network, such as
    # one that was fine-tuned. IMP rewinds them to those of the dense network.
    cfg.MODEL.TICKET.ALLOW_FROZEN_NORM = False
    # True loads a checkpoint (MODEL.WEIGHTS, --resume) that was trained with other masks, or dense,
    # under the ticket's; a warning says how many of its weights they zero.
    cfg.MODEL.TICKET.ALLOW_OTHER_CHECKPOINT = False

    # Find task-specific tickets: IMP, each round of which is a training by this very config. The
    # keys are those of `TaskSettings`, such as ROUNDS, FRACTION, SCOPE, REWIND, STRUCTURE.KIND.
    cfg.MODEL.TICKET.IMP = _node(TaskSettings())

    # Sparse training: what moves the masks inside one training, such as "rigl" or "gradual", and
    # its options (docs/methods.md), None where not given. tools/train_det.py gives them to
    # SparseTrainingHook; a script of your own does so with `method_of`.
    cfg.MODEL.TICKET.METHOD = ""
    known = (option for method in METHODS for option in options_of(method).values())
    options = {option.name.upper() for option in known if setting_of(option).recipe}
    cfg.MODEL.TICKET.METHOD_OPTIONS = CfgNode(dict.fromkeys(sorted(options)))
    for key in ("", ".TARGET", ".BEGIN", ".END", ".PERIOD", ".CRITERION", ".ALLOCATION"):
        cfg.register_renamed_key(
            f"MODEL.TICKET.GRADUAL{key}",
            f"MODEL.TICKET.METHOD_OPTIONS{key}",
            "MODEL.TICKET.METHOD gradual prunes gradually",
        )


WORDING = Wording(
    **{
        option: f"MODEL.TICKET.{option.upper()}"
        for option in ("path", "weights", "reverse", "random", "load_weights")
    },
    trunk_only="MODEL.TICKET.REST False",
    attach_outside="call lth_plugins.attach_rest(model) in the trainer's build_model",
    stride_in_1x1="MODEL.RESNETS.STRIDE_IN_1X1 True",
    stride_in_3x3="MODEL.RESNETS.STRIDE_IN_1X1 False",
    channels="MODEL.PIXEL_MEAN and PIXEL_STD of {} values",
    other_checkpoint="MODEL.TICKET.ALLOW_OTHER_CHECKPOINT True",
    load_compacted="tools/train_det.py --eval-only, in Python with "
    "lth_plugins.detectron2.CompactCheckpointer",
)
"""What the core's messages call the options of the node."""


def choice_of(cfg: CfgNode) -> Choice:
    """Which ticket ``cfg.MODEL.TICKET`` names.

    Raises:
        NotFound: if it names none.
        ConfigError: if its options contradict each other.
        TicketError: if `add_ticket_config` did not add the node.
    """
    node = cfg.MODEL.get("TICKET")
    if node is None:
        raise TicketError(
            "expected the config node MODEL.TICKET, found none: call "
            "lth_plugins.detectron2.add_ticket_config(cfg) right after get_cfg()"
        )
    return Choice(
        node.PATH,
        weights=node.WEIGHTS or None,
        reverse=node.REVERSE,
        random=node.RANDOM,
        seed=node.RANDOM_SEED,
        outside=node.REST,
        load_weights=node.LOAD_WEIGHTS,
        wording=WORDING,
    )


def method_of(cfg: CfgNode) -> tuple[str, dict[str, Any]] | None:
    """The method of sparse training that a config names, and its options; None where it does not.

    Raises:
        ConfigError: if there is no such method, or its options are invalid or of no method.
    """
    node = cfg.MODEL.TICKET
    options = {key: v for key, v in lowercase(node.METHOD_OPTIONS).items() if v is not None}
    if node.METHOD:
        make_method(node.METHOD, **options)
        return node.METHOD, options
    if options:
        raise ConfigError(
            f"found MODEL.TICKET.METHOD_OPTIONS.{min(options).upper()}, an option of a method, and "
            f"no MODEL.TICKET.METHOD: set it to {' or '.join(METHODS)}"
        )
    return None


def _node(settings: Any) -> CfgNode:
    """A node with the settings of a dataclass, names in capitals.

    detectron2 checks the types of values, and None has no type: "" and 0 stand for it.
    """
    node = CfgNode()
    for declared in fields(settings):
        value = getattr(settings, declared.name)
        if is_dataclass(value):
            value = _node(value)
        elif value is None:
            value = _EMPTY[declared.type]
        node[declared.name.upper()] = value
    return node


_EMPTY: Mapping[Any, Any] = {str | None: "", float | None: 0.0, int | None: 0}


def lowercase(node: CfgNode) -> dict[str, Any]:
    """The values of a node by the names of a dataclass."""
    return {
        key.lower(): lowercase(value) if isinstance(value, CfgNode) else value
        for key, value in node.items()
    }


def get_ticket(cfg: CfgNode) -> Ticket:
    """The ticket that ``cfg.MODEL.TICKET`` describes.

    Raises:
        NotFound: if the config names none, or it is not there.
        LthError: if it cannot be read, or the options contradict each other.
    """
    return choice_of(cfg).load()


def find_ticket(cfg: CfgNode, last: bool = True) -> tuple[Ticket | None, str]:
    """The ticket of a config, which may be missing to infer from a trained checkpoint.

    Args:
        cfg: the config.
        last: False if another part of the model needs the ticket, too.

    Returns:
        The ticket, and ""; or None, and why training is refused, where there is none and
        ``MODEL.WEIGHTS`` names a checkpoint.

    Raises:
        LthError: as `get_ticket`, and if the config contradicts the ticket.
    """
    try:
        choice = choice_of(cfg)
        ticket = choice.load() if last else choice.load_ahead()
    except NotFound as error:
        if not cfg.MODEL.WEIGHTS:
            raise
        return None, without_ticket(error)
    check(cfg, ticket)
    return ticket, ""


def watch(module: nn.Module, cfg: CfgNode, parts: Sequence[str], missing: str) -> None:
    """Have a part of a model check what is loaded into it, as its config says.

    Args:
        module: the backbone, or the ROI heads of a C4 model.
        cfg: the config.
        parts: of the trunk, in the module.
        missing: the second value of `find_ticket`.
    """
    watch_loading(
        module,
        wording=WORDING,
        allow_other_checkpoint=cfg.MODEL.TICKET.ALLOW_OTHER_CHECKPOINT,
        parts=parts,
        model_input=input_of_config(cfg),
    )
    if missing:
        logger.warning(missing)
        refuse_to_run(module, missing, parts)


def apply_ticket_input(cfg: CfgNode) -> None:
    """Give the model the input that its ticket was trained on, by editing a config in place.

    ``INPUT.FORMAT``, ``MODEL.PIXEL_MEAN`` and ``MODEL.PIXEL_STD`` become the ticket's where they
    still have detectron2's default. A value that was chosen stays, and is an error if it differs.

    Args:
        cfg: complete, and not frozen yet.

    Raises:
        NotFound: if there is no ticket. The config is unchanged.
        TicketError: if the config contradicts it. The config is unchanged.
    """
    ticket = choice_of(cfg).load_ahead()
    changes = {}
    if not cfg.MODEL.TICKET.KEEP_INPUT:
        ours, defaults = _values(input_of_config(cfg)), _values(input_of_config(get_cfg()))
        wanted = _wanted(ModelInput.of(ticket.meta.input))
        changes = {k: v for k, v in wanted.items() if ours[k] == defaults[k] != v}
    settings = [item for pair in changes.items() for item in pair]
    applied = cfg.clone()
    applied.merge_from_list(settings)
    check(applied, ticket)
    cfg.merge_from_list(settings)
    for key, value in changes.items():
        logger.info("%s is the ticket's: %s", key, value)


def check(cfg: CfgNode, ticket: Ticket) -> None:
    """Check everything in a config that shapes cannot show.

    Raises:
        TicketError: with all that contradicts the ticket, and the lines of YAML that fix it.
    """
    model, node = cfg.MODEL, cfg.MODEL.TICKET
    resnets, trained = model.RESNETS, ModelInput.of(ticket.meta.input)
    norm = str(resnets.NORM)
    trainable = {"MODEL.RESNETS.NORM": "BN" if model.DEVICE == "cpu" else "SyncBN"}
    wrong: list[tuple[str, dict[str, Any]]] = []
    other = contradiction("the ticket", trained, input_of_config(cfg), "the config has")
    if other and not node.KEEP_INPUT:
        wrong.append((f"{other} (MODEL.TICKET.KEEP_INPUT True accepts that)", _wanted(trained)))
    if "BN" not in norm:
        why = (
            f"the ticket holds BatchNorm statistics, RESNETS.NORM {norm or repr(norm)} builds a "
            "network without them"
        )
        wrong.append((why, trainable))
    sparse = ticket.sparsity or node.METHOD
    if norm == "FrozenBN" and sparse and not node.ALLOW_FROZEN_NORM:
        advice = (
            "train them (SyncBN, or BN on one device or the CPU; TEST.PRECISE_BN re-estimates them)"
        )
        accept = "set MODEL.TICKET.ALLOW_FROZEN_NORM True"
        wrong.append((frozen_statistics("RESNETS.NORM FrozenBN", advice, accept), trainable))
    stride = ticket.meta.stride_in_1x1
    if ticket.arch.bottleneck and stride != resnets.STRIDE_IN_1X1:
        why = (
            f"the ticket's bottlenecks have STRIDE_IN_1X1 {stride}, those of the config "
            f"{resnets.STRIDE_IN_1X1}"
        )
        wrong.append((why, {"MODEL.RESNETS.STRIDE_IN_1X1": stride}))
    if _DENSE_WEIGHTS in model.WEIGHTS:
        why = (
            f"MODEL.WEIGHTS {model.WEIGHTS} is a dense classifier, which would be loaded over the "
            "ticket's weights"
        )
        wrong.append((why, {"MODEL.WEIGHTS": ""}))
    if model.BACKBONE.NAME in BACKBONES:
        why = f"BACKBONE.NAME {model.BACKBONE.NAME} builds a backbone without the ticket"
        wrong.append((why, {"MODEL.BACKBONE.NAME": BACKBONES[model.BACKBONE.NAME]}))
    if is_c4(cfg) and model.ROI_HEADS.NAME == "Res5ROIHeads":
        why = "layer4 of the ticket lives in the ROI heads of a C4 model: Res5ROIHeads"
        wrong.append((why, {"MODEL.ROI_HEADS.NAME": "TicketRes5ROIHeads"}))
    if wrong:
        lines = {key: value for _, settings in wrong for key, value in settings.items()}
        raise TicketError(
            "the config contradicts its ticket:\n- "
            + "\n- ".join(why for why, _ in wrong)
            + "\nWrite in the config:\n"
            + _to_yaml(lines)
        )


def is_c4(cfg: CfgNode) -> bool:
    """Whether the last stage of the trunk lives in the ROI heads."""
    return (
        cfg.MODEL.META_ARCHITECTURE == "GeneralizedRCNN"
        and "res5" not in cfg.MODEL.RESNETS.OUT_FEATURES
    )


def input_of_config(cfg: CfgNode) -> ModelInput:
    """The input that a config gives its model."""
    mean = cfg.MODEL.PIXEL_MEAN
    return ModelInput(cfg.INPUT.FORMAT if len(mean) == 3 else None, mean, cfg.MODEL.PIXEL_STD)


def _values(model_input: ModelInput) -> dict[str, Any]:
    keys = ("INPUT.FORMAT", "MODEL.PIXEL_MEAN", "MODEL.PIXEL_STD")
    return dict(zip(keys, model_input.to_dict().values(), strict=True))


def _wanted(trained: ModelInput) -> dict[str, Any]:
    """The settings for a ticket's input. Bands are read by a mapper of the user's own."""
    values = _values(trained)
    return {k: v for k, v in values.items() if k != "INPUT.FORMAT" or v in COLOURS}


def _to_yaml(settings: Mapping[str, Any]) -> str:
    tree: dict[str, Any] = {}
    for key, value in settings.items():
        *path, name = key.split(".")
        node = tree
        for part in path:
            node = node.setdefault(part, {})
        node[name] = value
    return yaml.safe_dump(tree, default_flow_style=None, sort_keys=False)
