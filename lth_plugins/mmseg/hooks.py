"""Hooks for mmengine's Runner. A masked model needs none of them to stay masked."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmengine.dist import is_main_process
from mmengine.hooks import EMAHook, Hook
from mmengine.model import BaseTTAModel, is_model_wrapper
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from torch import Tensor

from lth_plugins.masking.attachment import Attachment, attach_rest, attached
from lth_plugins.masking.loading import why_refused
from lth_plugins.mmseg.input import fed_by, same_input, to_lines
from lth_plugins.pruning.search.gradual import GradualPruning
from lth_plugins.ticket import InputSpec, TicketError, locate


@HOOKS.register_module()
class TicketHook(Hook):
    """Watch over the ticket of a model, and write the fine-tuned ticket when training ends.

    - It attaches what the ticket prunes in neck and heads, once they are initialised and before a
      checkpoint is loaded (`lth_plugins.attach_rest`).
    - Before training it logs the ticket's density.
    - Before a checkpoint is written, whoever asked for it, it verifies that every pruned weight is
      zero, in the model and in what will be saved. A leak stops the run with the parameter's name,
      and the older checkpoints stay.
    - A checkpoint also tells what input the model was trained on, under ``meta.ticket_input``.
      Loaded into a model that is fed something else, it is refused; resumed with a ticket whose
      masks outside the backbone it does not fit, too. (The backbone itself refuses a checkpoint of
      other masks, see `lth_plugins.masking.loading`.)
    - After training it verifies again, and writes ``final.ticket`` into the work dir: the masks
      and the weights the model has then (those the optimizer trained, not an EMA's).

    Priority: "LOW", after ``EMAHook`` ("NORMAL"), which puts its averages into a checkpoint first,
    and before ``CheckpointHook`` ("VERY_LOW").

    Args:
        source: what ``final.ticket`` names as its source; the config's file name by default.
    """

    priority = "LOW"

    def __init__(self, source: str | None = None) -> None:
        self.source = source

    def before_train(self, runner: Runner) -> None:
        attach_rest(_model(runner))
        masks = _handle(runner).masks
        runner.logger.info(
            f"Ticket: {masks.kept:,} of {masks.numel:,} prunable weights, density "
            f"{100 * masks.density:.2f} %"
        )

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        handle = _handle(runner)
        handle.verify()
        masks = handle.all_masks
        _check_masked(checkpoint["state_dict"], masks, "the checkpoint to be saved")
        spec = fed_by(_model(runner).data_preprocessor)
        checkpoint["meta"]["ticket_input"] = {
            "format": spec.format,
            "mean": list(spec.mean),
            "std": list(spec.std),
        }

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        attach_rest(_model(runner))  # what is loaded next is masked, too
        spec = trained_on(checkpoint)
        preprocessor = _model(runner).data_preprocessor
        found = fed_by(preprocessor)
        if spec is not None and not same_input(spec, found):
            raise TicketError(
                f"the checkpoint was trained on {spec.format} input with mean {spec.mean_255} and "
                f"std {spec.std_255}, but the model is fed {found.format} with mean "
                f"{found.mean_255} and std {found.std_255}. Write in the config\n"
                f"    {to_lines(spec, preprocessor)}"
            )
        handle = attached(runner.model)
        if runner._resume and handle is not None:  # the backbone itself checks what it loads
            outside = {n: m for n, m in handle.all_masks.items() if n not in handle.masks}
            _check_masked(checkpoint["state_dict"], outside, "the checkpoint to resume from")

    def after_train(self, runner: Runner) -> None:
        handle = _handle(runner)
        handle.verify()
        if is_main_process():
            source = self.source or Path(runner.cfg.filename or type(_model(runner)).__name__).stem
            path = handle.ticket(source=source).save(Path(runner.work_dir) / "final.ticket")
            runner.logger.info(f"Wrote the fine-tuned ticket to {path}")


@HOOKS.register_module()
class GradualPruningHook(Hook):
    """Prune the ticket on a model while it trains, ever slower (Zhu & Gupta, arXiv 1710.01878).

    It starts from a ticket of any density, such as a dense one. The masks are in the checkpoints,
    under ``ticket_pruning``: a run that is resumed goes on with them. `TicketHook` writes the
    ticket it ends with.

    Priority: "LOW", before ``CheckpointHook`` ("VERY_LOW"): what is saved is pruned. Not together
    with ``EMAHook``, whose averages remember what was pruned.

    Args:
        target: the sparsity after ``end`` iterations.
        begin, end, period: in iterations; see `lth_plugins.pruning.search.schedule.CubicSchedule`.
        criterion: what the weights are ranked by: "magnitude" or "random".
        allocation: "global", "layer" or "erk".

    Raises:
        TicketError: if a value is not one; before training, if the schedule does not fit it.
    """

    priority = "LOW"

    def __init__(
        self,
        target: float,
        begin: int,
        end: int,
        period: int,
        criterion: str = "magnitude",
        allocation: str = "global",
    ) -> None:
        self._pruning = GradualPruning(target, begin, end, period, criterion, allocation)

    def before_train(self, runner: Runner) -> None:
        if any(isinstance(hook, EMAHook) for hook in runner.hooks):
            raise TicketError(
                "expected GradualPruningHook without EMAHook, found both: averages of the weights "
                "remember what was pruned. Leave out EMAHook"
            )
        attach_rest(_model(runner))
        self._pruning.start(_model(runner), runner.max_iters)

    def after_train_iter(self, runner: Runner, *_: Any, **__: Any) -> None:
        self._pruning.after_step(_model(runner), runner.iter + 1)

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        checkpoint["ticket_pruning"] = self._pruning.state_dict(_model(runner))

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        if runner._resume and "ticket_pruning" in checkpoint:
            attach_rest(_model(runner))
            self._pruning.load_state_dict(_model(runner), checkpoint["ticket_pruning"])


def trained_on(checkpoint: dict[str, Any]) -> InputSpec | None:
    """What `TicketHook` noted in a checkpoint about its input; None where it noted nothing."""
    noted = checkpoint.get("meta", {}).get("ticket_input")
    return None if noted is None else InputSpec(**noted)


def holder(runner: Runner) -> tuple[Any, str]:
    """Where the model itself is, inside what wraps it for DDP or test-time augmentation.

    Returns:
        An object, and the name of its attribute.
    """
    owner, name = runner, "model"
    while is_model_wrapper(getattr(owner, name)) or isinstance(getattr(owner, name), BaseTTAModel):
        owner, name = getattr(owner, name), "module"
    return owner, name


def _model(runner: Runner) -> Any:
    return getattr(*holder(runner))


def _handle(runner: Runner) -> Attachment:
    handle = attached(runner.model)
    if handle is None:
        raise TicketError(
            why_refused(runner.model)
            or "TicketHook found no ticket on the model: write backbone=dict("
            "init_cfg=dict(type='Ticket', checkpoint='FILE.ticket'), …)"
        )
    return handle


def _check_masked(state: dict[str, Tensor], masks: Mapping[str, Tensor], what: str) -> None:
    keys = locate(state).keys
    for name, mask in masks.items():
        key = keys.get(name, name)
        leaked = int(state[key].cpu()[~mask].count_nonzero())
        if leaked:
            raise TicketError(
                f"expected the pruned weights of {key} to be zero in {what}, found {leaked} "
                "that are not: it was trained with other masks, or something wrote to it outside "
                "of an optimizer step"
            )
