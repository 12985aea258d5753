"""Distillation in mmsegmentation: the logits of a frozen, dense teacher that a segmentor learns.

`DistillHook` does it inside mmengine's Runner; `apply_teacher` and `check_teacher` are what
``tools/train_seg.py --teacher`` is.
"""

import ast
import copy
from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from typing import Any

import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.registry import HOOKS, MODELS, init_default_scope
from mmengine.runner import Runner
from torch import Tensor, nn

from lth_plugins.errors import ConfigError, TicketError
from lth_plugins.masking.input import ModelInput, check_input
from lth_plugins.mmseg.checkpoint import check_whole, first_checkpoint, read_checkpoint, state_of
from lth_plugins.mmseg.config import backbone_of, import_plugin
from lth_plugins.mmseg.hooks import holder, trained_on
from lth_plugins.mmseg.input import input_of, input_of_config, to_lines
from lth_plugins.resilience.recipe import file_digest
from lth_plugins.resilience.seeds import aside
from lth_plugins.training.distillation import (
    channel_wise,
    check_same_teacher,
    keep,
    loaded,
)

_STREAM = 2
_ENTRY = "distillation"  # in a checkpoint


@HOOKS.register_module()
class DistillHook(Hook):
    """Have a segmentor learn the logits of a dense teacher, channel by channel (CWD).

    See `lth_plugins.training.distillation.channel_wise`. While a Runner trains, the losses have one
    more entry, ``loss_distill``: of what ``conv_seg`` of the decode head returns, in the last of
    several heads. The model's state dict stays as it is. A checkpoint notes the teacher under
    ``distillation``, and a run that resumes with another one is refused.

    Args:
        teacher: a checkpoint of the dense training of the config.
        weight: of the loss.
        temperature: τ.
    """

    priority = "LOW"

    def __init__(self, teacher: str, weight: float = 5.0, temperature: float = 1.0) -> None:
        self.teacher, self.weight, self.temperature = teacher, weight, temperature
        self._distillation: Distillation | None = None

    @cached_property
    def _digest(self) -> str:
        return file_digest(self.teacher, "teacher")

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        if runner._resume:
            check_same_teacher(_noted_in(checkpoint), self._digest)

    def before_train(self, runner: Runner) -> None:
        student: Any = getattr(*holder(runner))
        teacher, classes = loaded(
            _key(runner.cfg, self._digest), lambda: load_teacher(runner.cfg, self.teacher)
        )
        _check_names(runner, classes, self.teacher)
        teacher.to(next(student.parameters()).device)
        self._distillation = Distillation(student, teacher, self.weight, self.temperature)
        runner.logger.info(f"Learns from teacher {self._digest[:12]}, {self.teacher}")

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        checkpoint[_ENTRY] = {"teacher": self._digest}

    def after_train(self, runner: Runner) -> None:
        assert self._distillation is not None
        self._distillation.leave()
        self._distillation = None


DISTILL_HOOKS = ("DistillHook", DistillHook)
"""What a config may give as the type."""


class Distillation:
    """The hooks on a student and its teacher that add the loss, until it is told to leave.

    Args:
        student: a segmentor of mmseg.
        teacher: of the same classes; in evaluation mode, without gradients.
        weight: of the loss.
        temperature: τ.

    Raises:
        ConfigError: if the decode head of one has no ``conv_seg``.
    """

    def __init__(self, student: Any, teacher: Any, weight: float, temperature: float) -> None:
        self._student, self._teacher = student, teacher
        self._weight, self._temperature = weight, temperature
        self._seen: dict[str, Tensor] = {}
        self._hooks = [
            student.backbone.register_forward_pre_hook(self._see_images),
            _classifier(student).register_forward_hook(partial(self._see_logits, "ours")),
            _classifier(teacher).register_forward_hook(partial(self._see_logits, "theirs")),
            student.register_forward_hook(self._add_loss),
        ]

    def leave(self) -> None:
        """Take the hooks off."""
        for hook in self._hooks:
            hook.remove()

    def _see_images(self, _: nn.Module, args: tuple[Any, ...]) -> None:
        self._seen["images"] = args[0]

    def _see_logits(self, whose: str, _: nn.Module, __: object, logits: Tensor) -> None:
        self._seen[whose] = logits

    def _add_loss(self, _: nn.Module, __: object, losses: Any) -> Any:
        seen, self._seen = self._seen, {}
        if not (isinstance(losses, dict) and torch.is_grad_enabled()):
            return None  # it predicts
        with torch.no_grad():
            self._teacher(seen["images"], mode="tensor")
        loss = channel_wise(seen["ours"], self._seen.pop("theirs"), self._temperature)
        return {**losses, "loss_distill": self._weight * loss}


def _classifier(model: Any) -> nn.Module:
    """The convolution that gives a segmentor's logits.

    Raises:
        ConfigError: if there is none.
    """
    head = getattr(model, "decode_head", None)
    last: Any = head[-1] if isinstance(head, nn.ModuleList) else head
    if not isinstance(getattr(last, "conv_seg", None), nn.Module):
        raise ConfigError(
            "expected a segmentor whose decode head has a conv_seg, the convolution that gives the "
            f"logits, found {type(model).__name__} with {type(last).__name__}: train it without a "
            "teacher"
        )
    return last.conv_seg


def apply_teacher(cfg: Config, path: str) -> None:
    """Make a training config learn from a teacher, in place: add a `DistillHook` or change its."""
    import_plugin(cfg)
    found = _hook_of(cfg)
    if found is not None:
        found["teacher"] = path
    else:
        hook = {"type": "DistillHook", "teacher": path}
        cfg.custom_hooks = [*(cfg.get("custom_hooks") or []), hook]


def _hook_of(cfg: Config) -> Any:
    hooks = cfg.get("custom_hooks") or []
    return next((hook for hook in hooks if hook["type"] in DISTILL_HOOKS), None)


def check_teacher(cfg: Config) -> None:
    """Check the teacher of a training config before anything is trained or written.

    Args:
        cfg: complete, with the input of its ticket; with or without a `DistillHook`.

    Raises:
        LthError: if the teacher cannot be read, is of another model or another input, does not go
            with another setting, or is not the one that the run to resume started with.
    """
    hook, digest = _hook_of(cfg), None
    if hook is not None:
        teacher = load_teacher(cfg, hook["teacher"])
        digest = file_digest(hook["teacher"], "teacher")
        keep(_key(cfg, digest), teacher)
    if cfg.get("resume"):
        resumed = first_checkpoint(cfg)
        if resumed:
            check_same_teacher(_noted_in(read_checkpoint(resumed)), digest)


def _noted_in(checkpoint: Mapping[str, Any]) -> str | None:
    """The digest of the teacher that a run had when it saved a checkpoint; None if it had none."""
    return checkpoint.get(_ENTRY, {}).get("teacher")


def load_teacher(cfg: Config, path: str) -> tuple[nn.Module, Sequence[str]]:
    """The teacher of a config: its model without a ticket, with the weights of a checkpoint.

    Returns:
        It, in evaluation mode and without gradients; and the names of its classes, if it says.

    Raises:
        LthError: if the checkpoint cannot be read, lacks parameters or has others, or was trained
            for another number of classes or on another input.
    """
    checkpoint = read_checkpoint(path)
    state, teacher = state_of(checkpoint), _build(cfg)
    classifier = _classifier(teacher)
    name = next(n for n, module in teacher.named_modules() if module is classifier)
    found = state.get(f"{name}.weight")
    if found is not None and len(found) != classifier.out_channels:
        raise TicketError(
            f"expected a teacher of {classifier.out_channels} classes, as the config has, found "
            f"one of {len(found)} in {path}: give one that was trained on the same classes"
        )
    trained = trained_on(checkpoint) or _configured_input(checkpoint)
    if trained is not None:
        preprocessor = teacher.data_preprocessor
        check_input("the teacher", trained, input_of(preprocessor), to_lines(trained, preprocessor))
    check_whole(teacher, state, path)
    own = teacher.state_dict()
    wrong = [key for key in state if key not in own or state[key].shape != own[key].shape]
    wrong = [key for key in wrong if not _unused(key)]
    if wrong:
        raise TicketError(
            f"expected a teacher that is the dense {type(teacher).__name__} of this config, found "
            f"{len(wrong)} parameters of another model in {path}, such as {wrong[0]}: give one "
            "that was trained with this config"
        )
    kept = {key: value for key, value in state.items() if not _unused(key)}
    teacher.load_state_dict(kept, strict=False)
    classes = checkpoint.get("meta", {}).get("dataset_meta", {}).get("classes") or ()
    return teacher.eval().requires_grad_(False), classes


def _key(cfg: Config, digest: str) -> str:
    """What a teacher depends on."""
    return f"{digest} {cfg.model} {cfg.get('data_preprocessor')}"


def _unused(key: str) -> bool:
    """Whether a teacher does without an entry: it has no auxiliary losses, nor counts batches."""
    return key.startswith("auxiliary_head.") or key.endswith("num_batches_tracked")


def _build(cfg: Config) -> Any:
    model = copy.deepcopy(cfg.model)
    backbone, _ = backbone_of(model)
    for part, key in ((model, "pretrained"), (backbone, "pretrained"), (backbone, "init_cfg")):
        if key in part:
            part[key] = None
    if cfg.get("data_preprocessor") is not None:
        model.setdefault("data_preprocessor", cfg.data_preprocessor)
    init_default_scope(cfg.get("default_scope", "mmseg"))
    with aside(_STREAM):  # the student draws what it draws without a teacher
        return MODELS.build(model)


def _configured_input(checkpoint: Mapping[str, Any]) -> ModelInput | None:
    """The input in the config that mmengine keeps in a checkpoint; it is read, and not run."""
    try:
        tree = ast.parse(checkpoint["meta"]["cfg"])
        keywords = (node for node in ast.walk(tree) if isinstance(node, ast.keyword))
        return input_of_config(
            next(_literal(k.value) for k in keywords if k.arg == "data_preprocessor")
        )
    except (KeyError, TypeError, ValueError, SyntaxError, StopIteration):
        return None


def _literal(node: ast.expr) -> Any:
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "dict":
        return {keyword.arg: _literal(keyword.value) for keyword in node.keywords}
    return ast.literal_eval(node)


def _check_names(runner: Runner, found: Sequence[str], path: str) -> None:
    expected = runner.train_dataloader.dataset.metainfo.get("classes") or ()
    if expected and found and list(expected) != list(found):
        raise TicketError(
            f"expected a teacher of the classes {', '.join(expected)}, found one of "
            f"{', '.join(found)} in {path}: give one that was trained on the same"
        )
