"""Distillation in detectron2: the features and classes of a frozen, dense teacher.

`add_teacher` gives a model the teacher of its config; from then on its losses in training have more
entries, whatever trainer computes them. Nothing of it is in the model's state dict.
"""

import logging
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from detectron2.config import CfgNode
from detectron2.engine import HookBase
from detectron2.modeling import build_model
from detectron2.modeling.roi_heads import FastRCNNOutputLayers, Res5ROIHeads
from detectron2.structures import Boxes, pairwise_iou
from detectron2.utils.file_io import PathManager
from torch import Tensor, nn

from lth_plugins.detectron2.checkpoint import WholeCheckpointer, read_checkpoint
from lth_plugins.detectron2.config import BACKBONES, input_of_config
from lth_plugins.detectron2.hooks import model_of
from lth_plugins.errors import TicketError
from lth_plugins.masking.input import ModelInput, check_input, rounded
from lth_plugins.masking.loading import noted_input, reading
from lth_plugins.resilience.recipe import file_digest
from lth_plugins.resilience.seeds import aside
from lth_plugins.slimming.tracing import evaluating
from lth_plugins.training.distillation import (
    check_same_teacher,
    decoupled,
    decoupled_classes,
    inside,
    keep,
    loaded,
)

logger = logging.getLogger(__name__)

_STOCK = {ours: theirs for theirs, ours in BACKBONES.items()}
_STREAM = 2
LOSSES = {
    f"loss_distill_{setting.lower()}": setting
    for setting in ("FOREGROUND", "BACKGROUND", "CLASS_FOREGROUND", "CLASS_BACKGROUND")
}
"""Of each loss, the setting in the node that is its weight."""
_NAME = "distillation"
_SIDE = 64  # pixels of the image that shows how many channels features have


def add_distill_config(cfg: CfgNode) -> None:
    """Add the node ``DISTILL`` to a config."""
    cfg.DISTILL = CfgNode()
    # A checkpoint of the dense training of this config, which is learned from; "" for none.
    cfg.DISTILL.TEACHER = ""
    # The weights of the losses of features, where objects are and elsewhere, and of an R-CNN's
    # classes, of proposals that are objects and of others. The defaults are what the authors of
    # DeFeat published for Faster R-CNN.
    cfg.DISTILL.FOREGROUND = 3.0
    cfg.DISTILL.BACKGROUND = 12.0
    cfg.DISTILL.CLASS_FOREGROUND = 2.0
    cfg.DISTILL.CLASS_BACKGROUND = 2.0


def check_teacher(cfg: CfgNode, resumed: str | None = None) -> None:
    """Check the teacher of a config before anything is trained or written.

    Args:
        cfg: complete, with the input of its ticket.
        resumed: the checkpoint that the training resumes from; None if it starts.

    Raises:
        LthError: if the teacher cannot be read, is of another model or another input, does not go
            with another setting, or is not the one that the run started with.
    """
    digest = None
    if cfg.DISTILL.TEACHER:
        teacher, digest = load_teacher(cfg), digest_of(cfg)
        keep(_key(cfg, digest), teacher)
    if resumed is not None:
        hooks = read_checkpoint(resumed).get("trainer", {}).get("hooks", {})
        check_same_teacher(hooks.get(DistillHook.__qualname__, {}).get("teacher"), digest)


def load_teacher(cfg: CfgNode) -> nn.Module:
    """The teacher of a config: its model without a ticket, with the weights of the checkpoint.

    Returns:
        It, in evaluation mode and without gradients.

    Raises:
        LthError: if the checkpoint cannot be read, lacks parameters or has others, or was trained
            for other classes or on another input.
    """
    path, dense = cfg.DISTILL.TEACHER, cfg.clone()
    dense.defrost()
    dense.MODEL.BACKBONE.NAME = _STOCK.get(cfg.MODEL.BACKBONE.NAME, cfg.MODEL.BACKBONE.NAME)
    if cfg.MODEL.ROI_HEADS.NAME == "TicketRes5ROIHeads":
        dense.MODEL.ROI_HEADS.NAME = "Res5ROIHeads"
    with aside(_STREAM):  # the student draws what it draws without a teacher
        teacher = build_model(dense)
    with reading(path):
        _TeacherCheckpointer(teacher, cfg).load(path)
    return teacher.eval().requires_grad_(False)


class _TeacherCheckpointer(WholeCheckpointer):
    """Loads nothing but a checkpoint of the same model, with its classes and its input."""

    def __init__(self, model: nn.Module, cfg: CfgNode) -> None:
        super().__init__(model)
        self._cfg = cfg

    def _load_model(self, checkpoint: dict[str, Any]) -> Any:
        cfg, state = self._cfg, checkpoint["model"]
        self._check_classes(state)
        trained = noted_input(state) or _stored(state) or _configured(cfg.DISTILL.TEACHER)
        if trained is not None:
            check_input(
                "the teacher", trained, input_of_config(cfg), _SAME_INPUT, host="the config has"
            )
        found = super()._load_model(checkpoint)
        beyond = [key for key in found.unexpected_keys if not key.endswith(_HARMLESS)]
        if beyond:
            raise TicketError(
                f"expected a teacher that is the dense {type(self.model).__name__} of this config, "
                f"found {len(beyond)} parameters of another model in {cfg.DISTILL.TEACHER}, such "
                f"as {beyond[0]}: give one that was trained with this config"
            )
        return found

    def _check_classes(self, state: Mapping[str, Tensor]) -> None:
        for key, own in self.model.state_dict().items():
            if key.endswith("cls_score.bias") and key in state and len(state[key]) != len(own):
                # That of an R-CNN has the background, too; that of RetinaNet several anchors.
                rcnn = "box_predictor" in key
                node = self._cfg.MODEL["ROI_HEADS" if rcnn else "RETINANET"]
                classes = node.NUM_CLASSES
                found = len(state[key]) - 1 if rcnn else len(state[key]) * classes // len(own)
                raise TicketError(
                    f"expected a teacher of {classes} classes, as the config has, found one of "
                    f"{found} in {self._cfg.DISTILL.TEACHER}: give one that was trained on the "
                    "same classes"
                )


_SAME_INPUT = (
    ": give a teacher that was trained on the student's INPUT.FORMAT, MODEL.PIXEL_MEAN and "
    "MODEL.PIXEL_STD"
)


_PIXELS = ("pixel_mean", "pixel_std")
_HARMLESS = ("num_batches_tracked", *_PIXELS)  # what BN has and FrozenBN lacks, and is checked


def _stored(state: Mapping[str, Any]) -> ModelInput | None:
    """The input in a state dict of an older detectron2; None where there is none."""
    mean, std = (state.get(key) for key in _PIXELS)
    return None if mean is None or std is None else ModelInput(None, rounded(mean), rounded(std))


def _configured(path: str) -> ModelInput | None:
    """The input in the config that detectron2 wrote beside a checkpoint; None where it did not."""
    try:
        found = yaml.safe_load(Path(path).with_name("config.yaml").read_text())
        model = found["MODEL"]
        return ModelInput(found["INPUT"]["FORMAT"], model["PIXEL_MEAN"], model["PIXEL_STD"])
    except (OSError, yaml.YAMLError, KeyError, TypeError):
        return None


def digest_of(cfg: CfgNode) -> str:
    """The digest of the teacher's file.

    Raises:
        RunError: if there is none.
    """
    return file_digest(PathManager.get_local_path(cfg.DISTILL.TEACHER), "DISTILL.TEACHER")


def _key(cfg: CfgNode, digest: str) -> str:
    """What a teacher depends on."""
    return f"{digest} {cfg.MODEL.dump()} {cfg.INPUT.FORMAT}"


def add_teacher(model: nn.Module, cfg: CfgNode) -> None:
    """Have a model learn from the teacher of its config, if that names one.

    Call it where a trainer builds the model, after all that changes its widths, and before the
    optimizer and DistributedDataParallel: they must have the layers that adapt the features of a
    narrower student. `DistillHook` saves and resumes these.

    Args:
        model: with a ``backbone`` of detectron2; changed in place.
        cfg: with the node of `add_distill_config`, or without.

    Raises:
        LthError: as `load_teacher`. The model is unchanged then.
    """
    if teacher_of(cfg):
        weights = {loss: cfg.DISTILL[setting] for loss, setting in LOSSES.items()}
        digest = digest_of(cfg)
        teacher = loaded(_key(cfg, digest), lambda: load_teacher(cfg))
        with aside(_STREAM):
            added = Distillation(model, teacher, digest, weights)
        model.add_module(_NAME, added)


def teacher_of(cfg: CfgNode) -> str:
    """The checkpoint of the teacher that a config names; "" where it names none."""
    return cfg.get("DISTILL", {}).get("TEACHER", "")


class Distillation(nn.Module):
    """What `add_teacher` puts into a model: losses of its features, and layers that adapt them.

    The losses are ``loss_distill_foreground`` and ``loss_distill_background``; with the ROI heads
    of a Faster or Mask R-CNN also ``loss_distill_class_foreground`` and ``…_background``, of the
    classes that both give to the proposals that the student is trained on. Where teacher and
    student have another number of channels, a 1x1 convolution, which is trained, translates the
    student's features. It is a parameter of the model for optimizers and DistributedDataParallel,
    and absent from its state dict.

    Args:
        student: the model.
        teacher: of the same architecture; in evaluation mode, without gradients.
        digest: of the teacher's file.
        weights: of the losses, by their names.
    """

    def __init__(
        self, student: Any, teacher: Any, digest: str, weights: Mapping[str, float]
    ) -> None:
        super().__init__()
        self.digest, self._weights = digest, weights
        # No submodule: optimizers, DDP and state dicts do not see the teacher, nor does train().
        self.__dict__["_teacher"] = teacher
        self._strides = {n: s.stride for n, s in teacher.backbone.output_shape().items()}
        ours, theirs = _widths(student), _widths(teacher)
        self.adaptation = nn.ModuleDict(
            {n: nn.Conv2d(ours[n], theirs[n], 1) for n in ours if ours[n] != theirs[n]}
        ).to(student.device)
        self._seen: dict[str, Any] = {}
        self.register_load_state_dict_post_hook(_expect_none)
        student.backbone.register_forward_hook(self._remember)
        heads: Any = getattr(student, "roi_heads", None)
        if isinstance(getattr(heads, "box_predictor", None), FastRCNNOutputLayers):
            _pooler(heads).register_forward_pre_hook(self._remember_proposals)
            heads.box_predictor.register_forward_hook(self._remember_scores)
        student.register_forward_hook(self._add_losses)

    def state_dict(self, *_: Any, destination: Any = None, **__: Any) -> Any:
        """Nothing: stock code loads what is saved. `DistillHook` saves the layers."""
        return OrderedDict() if destination is None else destination

    def _remember(self, _: nn.Module, args: tuple[Any, ...], features: Any) -> None:
        if self.training and torch.is_grad_enabled():  # not in precise_bn, nor in evaluation
            self._seen = {"images": args[0], "features": features}

    def _remember_proposals(self, _: nn.Module, args: tuple[Any, ...]) -> None:
        if self._seen:
            self._seen["proposals"] = args[1]

    def _remember_scores(self, _: nn.Module, __: object, predictions: Any) -> None:
        if self._seen:
            self._seen["scores"] = predictions[0]

    def _add_losses(self, student: nn.Module, args: tuple[Any, ...], losses: Any) -> Any:
        if not self._seen:
            return None
        seen, self._seen = self._seen, {}
        features, images, teacher = seen["features"], seen["images"], self.__dict__["_teacher"]
        with torch.no_grad():
            wanted = teacher.backbone(images)
        boxes = [_boxes(entry).to(images.device) for entry in args[0]]
        ours = [self.adaptation[n](f) if n in self.adaptation else f for n, f in features.items()]
        objects = [inside(boxes, f.shape[2:], self._strides[n]) for n, f in features.items()]
        found = [*decoupled(ours, [wanted[n] for n in features], objects)]
        if "scores" in seen:
            with torch.no_grad():
                scores = _scores(teacher.roi_heads, wanted, seen["proposals"])
            are_objects = _matched(student, boxes, seen["proposals"])
            found += decoupled_classes(seen["scores"], scores, are_objects)
        added = zip(self._weights.items(), found, strict=False)
        return {**losses, **{name: weight * loss for (name, weight), loss in added}}


def _pooler(heads: Any) -> nn.Module:
    """What samples the features of proposals in the ROI heads of an R-CNN."""
    return heads.pooler if isinstance(heads, Res5ROIHeads) else heads.box_pooler


def _scores(heads: Any, features: Mapping[str, Tensor], proposals: Sequence[Boxes]) -> Tensor:
    """The logits of the classes that ROI heads give to proposals."""
    if isinstance(heads, Res5ROIHeads):
        sampled = heads.pooler([features[name] for name in heads.in_features], proposals)
        described = heads.res5(sampled).mean((2, 3))
    else:
        sampled = heads.box_pooler([features[name] for name in heads.box_in_features], proposals)
        described = heads.box_head(sampled)
    scores: Tensor = heads.box_predictor(described)[0]
    return scores


def _matched(student: Any, boxes: Sequence[Tensor], proposals: Sequence[Boxes]) -> Tensor:
    """Which proposals are objects, by the overlap that the student's ROI heads ask for."""
    matcher = student.roi_heads.proposal_matcher
    labels = [matcher(pairwise_iou(Boxes(b), p))[1] for b, p in zip(boxes, proposals, strict=True)]
    return torch.cat(labels) == 1


def _expect_none(_: nn.Module, incompatible: Any) -> None:
    """A checkpoint of the model need not have the layers."""
    absent = [key for key in incompatible.missing_keys if f"{_NAME}.adaptation." not in key]
    incompatible.missing_keys[:] = absent


def _boxes(entry: Mapping[str, Any]) -> Tensor:
    """The boxes of the objects in an image; none where its objects are not annotated."""
    return entry["instances"].gt_boxes.tensor if "instances" in entry else torch.zeros(0, 4)


def _widths(model: Any) -> dict[str, int]:
    """The channels of each of a backbone's features, as they are now."""
    side = max(_SIDE, model.backbone.size_divisibility)
    # In training the image would be in the statistics of normalisation.
    with torch.no_grad(), evaluating(model):
        features = model.backbone(torch.zeros(1, 3, side, side, device=model.device))
    return {name: feature.shape[1] for name, feature in features.items()}


class DistillHook(HookBase):
    """Save and resume what distillation trains, with a note of the teacher, in the checkpoints.

    For a trainer whose ``build_model`` calls `add_teacher`; anywhere in its hooks. A run that
    resumes with another teacher is refused.
    """

    def before_train(self) -> None:
        layers = ", ".join(self._distillation.adaptation) or "none"
        logger.info(
            "Learns from teacher %s; features that are adapted: %s",
            *(self._distillation.digest[:12], layers),
        )

    def state_dict(self) -> dict[str, Any]:
        distillation = self._distillation
        return {
            "teacher": distillation.digest,
            "adaptation": distillation.adaptation.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        check_same_teacher(state_dict["teacher"], self._distillation.digest)
        self._distillation.adaptation.load_state_dict(state_dict["adaptation"])

    @property
    def _distillation(self) -> Distillation:
        return model_of(self).get_submodule(_NAME)
