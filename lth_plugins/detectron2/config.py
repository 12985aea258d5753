"""The config node ``MODEL.TICKET``, the ticket it describes, and what the two must agree on.

The builders in `modeling` check a config before they build anything, so every script that builds a
model from a config checks it, whoever wrote the script.
"""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import yaml
from detectron2.config import CfgNode, get_cfg
from torch import nn

from lth_plugins.masking.loading import refuse_to_run, watch_loading
from lth_plugins.ticket import Choice, InputSpec, NotFound, Ticket, TicketError

logger = logging.getLogger(__name__)

BACKBONES: Mapping[str, str] = {
    "build_resnet_backbone": "build_ticket_resnet_backbone",
    "build_resnet_fpn_backbone": "build_ticket_resnet_fpn_backbone",
    "build_retinanet_resnet_fpn_backbone": "build_ticket_retinanet_resnet_fpn_backbone",
}
"""detectron2's builders, and ours that put a ticket on what they build."""

_DENSE_WEIGHTS = "ImageNetPretrained"  # detectron2's folder of classifiers to start training from


def add_ticket_config(cfg: CfgNode) -> None:
    """Add the node ``MODEL.TICKET`` to a config, before any file or option is merged into it."""
    cfg.MODEL.TICKET = CfgNode()
    # The ticket: a path, a name in the TicketCatalog, or hf://owner/repo[/file][@sha256:…].
    cfg.MODEL.TICKET.PATH = ""
    # Another ticket whose weights to train under these masks; "" for the ticket's own. A ticket
    # file holds surviving weights only: REVERSE and RANDOM need the dense one it came from.
    cfg.MODEL.TICKET.WEIGHTS = ""
    # False keeps the random initialisation that detectron2 gives the model, masked.
    cfg.MODEL.TICKET.LOAD_WEIGHTS = True
    # False leaves out what a ticket prunes in the neck and heads of the model it was found in.
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

    # Find task-specific tickets: IMP, each round of which is a training by this very config.
    cfg.MODEL.TICKET.IMP = CfgNode()
    # How many times to prune; 0 trains the ticket instead. tools/train_det.py --imp-rounds sets it.
    cfg.MODEL.TICKET.IMP.ROUNDS = 0
    # Of the weights kept so far, pruned in each round.
    cfg.MODEL.TICKET.IMP.FRACTION = 0.2
    # What trained weights are ranked by: magnitude or random.
    cfg.MODEL.TICKET.IMP.CRITERION = "magnitude"
    # Rank all weights together (global), or share out beforehand: layer (uniform) or erk.
    cfg.MODEL.TICKET.IMP.ALLOCATION = "global"
    # What to prune: backbone, backbone+neck (FPN), or all: the heads, too.
    cfg.MODEL.TICKET.IMP.SCOPE = "backbone"
    # Modules outside the trunk to leave dense, by patterns of their names (roi_heads.box_head, …);
    # "predictors" are the layers that heads end in.
    cfg.MODEL.TICKET.IMP.EXCLUDE = ("predictors",)
    # What each round starts from: pretrained (the ticket's weights), init (random), early (this
    # training after EARLY_ITER iterations), or the weights as trained, with the learning-rate
    # schedule from its start (learning_rate) or at its end (none).
    cfg.MODEL.TICKET.IMP.REWIND = "pretrained"
    cfg.MODEL.TICKET.IMP.EARLY_ITER = 0
    # Refill each round's masks of the backbone to whole channels (channel) or kernels (kernel).
    cfg.MODEL.TICKET.IMP.STRUCTURE = CfgNode()
    cfg.MODEL.TICKET.IMP.STRUCTURE.KIND = ""
    # As tools/ticket.py structure has them; "" and 0 are its defaults. The last two are of channel.
    cfg.MODEL.TICKET.IMP.STRUCTURE.SCOPE = ""
    cfg.MODEL.TICKET.IMP.STRUCTURE.SURPLUS = 0.0
    cfg.MODEL.TICKET.IMP.STRUCTURE.MINIMUM = 0
    cfg.MODEL.TICKET.IMP.STRUCTURE.MULTIPLE = 0

    # Prune inside one training instead, ever slower: what tools/train_det.py gives to
    # GradualPruningHook.
    cfg.MODEL.TICKET.GRADUAL = CfgNode()
    # The sparsity to end with; 0 does not prune.
    cfg.MODEL.TICKET.GRADUAL.TARGET = 0.0
    # The iterations to begin and to end after, and between two prunings.
    cfg.MODEL.TICKET.GRADUAL.BEGIN = 0
    cfg.MODEL.TICKET.GRADUAL.END = 0
    cfg.MODEL.TICKET.GRADUAL.PERIOD = 100
    # As IMP's.
    cfg.MODEL.TICKET.GRADUAL.CRITERION = "magnitude"
    cfg.MODEL.TICKET.GRADUAL.ALLOCATION = "global"


_NAMES = {
    "path": "MODEL.TICKET.PATH",
    "weights": "MODEL.TICKET.WEIGHTS",
    "reverse": "MODEL.TICKET.REVERSE",
    "random": "MODEL.TICKET.RANDOM",
    "load_weights": "MODEL.TICKET.LOAD_WEIGHTS",
}


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
        names=_NAMES,
    )


def get_ticket(cfg: CfgNode) -> Ticket:
    """The ticket that ``cfg.MODEL.TICKET`` describes.

    Raises:
        NotFound: if the config names none, or it is not there.
        LthError: if it cannot be read, or the options contradict each other.
    """
    return choice_of(cfg).load()


def find_ticket(cfg: CfgNode) -> tuple[Ticket | None, str]:
    """The ticket of a config, which need not be there to infer from a trained checkpoint.

    Returns:
        The ticket, and ""; or None, and why training is refused, where there is none and
        ``MODEL.WEIGHTS`` names a checkpoint.

    Raises:
        TicketError: as `get_ticket`, and if the config contradicts the ticket.
    """
    try:
        ticket = get_ticket(cfg)
    except NotFound as error:
        if not cfg.MODEL.WEIGHTS:
            raise
        return None, without_ticket(error)
    check(cfg, ticket)
    return ticket, ""


def without_ticket(error: NotFound) -> str:
    """Why a model whose ticket is not there refuses to train, for `refuse_to_run`."""
    return (
        f"{error}. Without its ticket the model infers from a trained checkpoint, but it is not "
        "trained, nor used before a checkpoint was loaded"
    )


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
        option="MODEL.TICKET.ALLOW_OTHER_CHECKPOINT True",
        allow_other_checkpoint=cfg.MODEL.TICKET.ALLOW_OTHER_CHECKPOINT,
        parts=parts,
        fed={
            "format": cfg.INPUT.FORMAT,
            "mean": list(cfg.MODEL.PIXEL_MEAN),
            "std": list(cfg.MODEL.PIXEL_STD),
        },
    )
    if missing:
        logger.warning(missing)
        refuse_to_run(module, missing, parts)


def apply_ticket_input(cfg: CfgNode) -> None:
    """Feed the model what its ticket was trained on, by editing a config in place.

    ``INPUT.FORMAT``, ``MODEL.PIXEL_MEAN`` and ``MODEL.PIXEL_STD`` become the ticket's where they
    still have detectron2's default. A value that was chosen stays, and is an error if it differs.

    Args:
        cfg: complete, and not frozen yet.

    Raises:
        NotFound: if there is no ticket. The config is unchanged.
        TicketError: if the config contradicts it. The config is unchanged.
    """
    ticket = get_ticket(cfg)
    applied = cfg.clone()
    if not cfg.MODEL.TICKET.KEEP_INPUT:
        defaults = get_cfg()
        for key, value in _input_settings(ticket.meta.input).items():
            if _get(cfg, key) == _get(defaults, key):
                applied.merge_from_list([key, value])
    check(applied, ticket)
    for key in _input_settings(ticket.meta.input):
        if _get(applied, key) != _get(cfg, key):
            cfg.merge_from_list([key, _get(applied, key)])
            logger.info("%s is the ticket's: %s", key, _get(cfg, key))


def check(cfg: CfgNode, ticket: Ticket) -> None:
    """Check everything in a config that shapes cannot show.

    Raises:
        TicketError: with all that contradicts the ticket, and the lines of YAML that mend it.
    """
    model, node = cfg.MODEL, cfg.MODEL.TICKET
    wanted = ticket.meta.input
    wrong: list[str] = []
    lines: dict[str, Any] = {}
    if not node.KEEP_INPUT and not wanted.matches(
        cfg.INPUT.FORMAT, model.PIXEL_MEAN, model.PIXEL_STD
    ):
        wrong.append(
            f"the ticket was trained on {describe(wanted)}, the config feeds {cfg.INPUT.FORMAT} "
            f"with mean {list(model.PIXEL_MEAN)} and std {list(model.PIXEL_STD)} "
            "(MODEL.TICKET.KEEP_INPUT True accepts that)"
        )
        lines |= _input_settings(wanted)
    if "BN" not in (norm := str(model.RESNETS.NORM)):
        wrong.append(
            f"the ticket holds BatchNorm statistics, RESNETS.NORM {norm or repr(norm)} builds a "
            "network without them"
        )
        lines["MODEL.RESNETS.NORM"] = "BN" if model.DEVICE == "cpu" else "SyncBN"
    sparse = ticket.sparsity or node.GRADUAL.TARGET
    if model.RESNETS.NORM == "FrozenBN" and sparse and not node.ALLOW_FROZEN_NORM:
        wrong.append(
            "RESNETS.NORM FrozenBN keeps the BN statistics of the dense network, which are wrong "
            "for the sub-network; train them (SyncBN, or BN on one device or the CPU; "
            "TEST.PRECISE_BN re-estimates them). If the ticket's statistics are its own, "
            "MODEL.TICKET.ALLOW_FROZEN_NORM True accepts them"
        )
        lines["MODEL.RESNETS.NORM"] = "BN" if model.DEVICE == "cpu" else "SyncBN"
    if ticket.arch.bottleneck and ticket.meta.stride_in_1x1 != model.RESNETS.STRIDE_IN_1X1:
        wrong.append(
            f"the ticket's bottlenecks have STRIDE_IN_1X1 {ticket.meta.stride_in_1x1}, those of "
            f"the config {model.RESNETS.STRIDE_IN_1X1}"
        )
        lines["MODEL.RESNETS.STRIDE_IN_1X1"] = ticket.meta.stride_in_1x1
    if _DENSE_WEIGHTS in model.WEIGHTS:
        wrong.append(
            f"MODEL.WEIGHTS {model.WEIGHTS} is a dense classifier, which would be loaded over the "
            "ticket's weights"
        )
        lines["MODEL.WEIGHTS"] = ""
    if model.BACKBONE.NAME in BACKBONES:
        wrong.append(f"BACKBONE.NAME {model.BACKBONE.NAME} builds a backbone without the ticket")
        lines["MODEL.BACKBONE.NAME"] = BACKBONES[model.BACKBONE.NAME]
    if _is_c4(cfg) and model.ROI_HEADS.NAME == "Res5ROIHeads":
        wrong.append("layer4 of the ticket lives in the ROI heads of a C4 model: Res5ROIHeads")
        lines["MODEL.ROI_HEADS.NAME"] = "TicketRes5ROIHeads"
    if wrong:
        raise TicketError(
            "the config contradicts its ticket:\n- "
            + "\n- ".join(wrong)
            + "\nWrite in the config:\n"
            + _to_yaml(lines)
        )


def describe(spec: InputSpec) -> str:
    """An input in the words of detectron2's configs."""
    return f"{spec.format} with mean {list(spec.mean_255)} and std {list(spec.std_255)}"


def _is_c4(cfg: CfgNode) -> bool:
    return (
        cfg.MODEL.META_ARCHITECTURE == "GeneralizedRCNN"
        and "res5" not in cfg.MODEL.RESNETS.OUT_FEATURES
    )


def _input_settings(spec: InputSpec) -> dict[str, Any]:
    return {
        "INPUT.FORMAT": spec.format,
        "MODEL.PIXEL_MEAN": list(spec.mean_255),
        "MODEL.PIXEL_STD": list(spec.std_255),
    }


def _get(cfg: CfgNode, key: str) -> Any:
    for part in key.split("."):
        cfg = cfg[part]
    return cfg


def _to_yaml(settings: Mapping[str, Any]) -> str:
    tree: dict[str, Any] = {}
    for key, value in settings.items():
        *path, name = key.split(".")
        node = tree
        for part in path:
            node = node.setdefault(part, {})
        node[name] = value
    return yaml.safe_dump(tree, default_flow_style=None, sort_keys=False)
