"""Hooks for mmengine's Runner. A masked model needs none of them to stay masked."""

from pathlib import Path
from typing import Any

from mmengine.dist import get_world_size, is_main_process
from mmengine.hooks import EMAHook, Hook
from mmengine.model import BaseTTAModel, is_model_wrapper
from mmengine.registry import HOOKS
from mmengine.runner import Runner

from lth_plugins.errors import ConfigError
from lth_plugins.masking.attachment import Attachment, attach_rest, attached
from lth_plugins.masking.hosting import check_zeros, describe, require_ticket
from lth_plugins.masking.input import ModelInput, check_input, noted_in
from lth_plugins.mmseg.input import input_of, to_lines
from lth_plugins.progress import Ticker, intent
from lth_plugins.pruning.methods import SparseTraining
from lth_plugins.pruning.methods.training import GradualOptions, check_alone


@HOOKS.register_module()
class TicketHook(Hook):
    """Watch over the ticket of a model, and write the fine-tuned ticket when training ends.

    - It attaches what the ticket prunes in neck and heads, once they are initialised and before a
      checkpoint is loaded (`lth_plugins.attach_rest`).
    - Before training it logs the ticket's density.
    - Before any checkpoint is written, it verifies that every pruned weight is
      zero, in the model and in the checkpoint. A leak stops the run with the parameter's name, and
      the older checkpoints stay.
    - A checkpoint notes the model's input under ``meta.ticket_input``. A model with
      another input refuses to load it; resumed with a ticket whose masks outside the backbone it
      does not fit, it is refused, too. (The backbone itself refuses a checkpoint of other masks,
      see `lth_plugins.masking.loading`.)
    - After training it verifies again, and writes the final masks and weights to ``final.ticket``
      in the work dir (the weights that the optimizer trained, not an EMA's).

    Priority: "LOW", after ``EMAHook`` ("NORMAL"), which puts its averages into a checkpoint first,
    and before ``CheckpointHook`` ("VERY_LOW").

    Args:
        source: what ``final.ticket`` names as its source; the config's file name by default.
    """

    priority = "LOW"

    def __init__(self, source: str | None = None) -> None:
        self.source = source

    def before_train(self, runner: Runner) -> None:
        attach_rest(model_of(runner))
        runner.logger.info(describe(_handle(runner)))

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        handle = _handle(runner)
        handle.verify()
        check_zeros(checkpoint["state_dict"], handle.all_masks, "the checkpoint to be saved")
        checkpoint["meta"]["ticket_input"] = input_of(model_of(runner).data_preprocessor).to_dict()

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        attach_rest(model_of(runner))  # what is loaded next is masked, too
        trained, preprocessor = trained_on(checkpoint), model_of(runner).data_preprocessor
        if trained is not None:
            lines = to_lines(trained, preprocessor)
            check_input("the checkpoint", trained, input_of(preprocessor), lines)
        handle = attached(runner.model)
        if runner._resume and handle is not None:  # the backbone itself checks what it loads
            outside = {n: m for n, m in handle.all_masks.items() if n not in handle.masks}
            check_zeros(checkpoint["state_dict"], outside, "the checkpoint to resume from")

    def after_train(self, runner: Runner) -> None:
        handle = _handle(runner)
        handle.verify()
        if is_main_process():
            source = (
                self.source or Path(runner.cfg.filename or type(model_of(runner)).__name__).stem
            )
            path = handle.ticket(source=source).save(Path(runner.work_dir) / "final.ticket")
            runner.logger.info(f"Wrote the fine-tuned ticket to {path}")


class ProgressHook(Hook):
    """Logs what a training is about to do, and every few seconds how far it is.

    mmengine says how far every 50 iterations. Priority: "VERY_LOW", after the step is made.
    """

    priority = "VERY_LOW"

    def before_train(self, runner: Runner) -> None:
        loader, cfg = runner.train_dataloader, runner.cfg
        dataset = loader.dataset
        while hasattr(dataset, "dataset"):  # what repeats it, or seeds it
            dataset = dataset.dataset
        data = getattr(dataset, "data_root", None) or type(dataset).__name__
        name = Path(cfg.filename or type(model_of(runner)).__name__).stem
        batch = loader.batch_size * get_world_size()
        images, steps = len(dataset), runner.max_iters
        trains = f"{name} on {data}"
        if runner.val_loop is not None:
            trains += f" (validates on {len(runner.val_dataloader.dataset):,})"
        runner.logger.info(intent(trains, images, steps, batch, runner.work_dir))
        self._ticker = Ticker(runner.logger.info, runner.iter, steps)

    def after_train_iter(self, runner: Runner, *_: Any, **__: Any) -> None:
        self._ticker.after(runner.iter + 1)

    def after_val_iter(self, runner: Runner, batch_idx: int, *_: Any, **__: Any) -> None:
        batches = len(runner.val_dataloader)
        self._ticker.say(lambda: f"validates, batch {batch_idx + 1} of {batches}")


@HOOKS.register_module()
class SparseTrainingHook(Hook):
    """Move the masks of the ticket on a model while it trains, by a method such as RigL.

    ``dict(type="SparseTrainingHook", method="rigl", sparsity=0.9)`` among ``custom_hooks``.
    Checkpoints hold the masks under ``ticket_pruning``, and a resumed run restores them.
    `TicketHook` writes the final ticket.

    Priority: "BELOW_NORMAL", before `TicketHook` ("LOW"), which checks what a resumed run loads,
    and ``CheckpointHook`` ("VERY_LOW"): what is saved is masked. Not together with ``EMAHook``,
    whose averages remember what was pruned.

    Its arguments are those of `lth_plugins.SparseTraining`.
    """

    priority = "BELOW_NORMAL"

    def __init__(self, method: str, **options: Any) -> None:
        self.training = SparseTraining(method, **options)

    def before_train(self, runner: Runner) -> None:
        if any(isinstance(hook, EMAHook) for hook in runner.hooks):
            raise ConfigError(
                f"expected {type(self).__name__} without EMAHook, found both: averages of the "
                "weights remember what was pruned. Leave out EMAHook"
            )
        found = sum(isinstance(hook, SparseTrainingHook) for hook in runner.hooks)
        check_alone("SparseTrainingHook", found)
        attach_rest(model_of(runner))
        self.training.start(model_of(runner), runner.max_iters)

    def after_train_iter(self, runner: Runner, *_: Any, **__: Any) -> None:
        self.training.after_step(model_of(runner), runner.iter + 1)

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        checkpoint["ticket_pruning"] = self.training.state_dict(model_of(runner))

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        if runner._resume and "ticket_pruning" in checkpoint:
            attach_rest(model_of(runner))
            self.training.load_state_dict(model_of(runner), checkpoint["ticket_pruning"])


@HOOKS.register_module()
class GradualPruningHook(GradualOptions, SparseTrainingHook):
    """Prune the ticket on a model while it trains, ever slower (Zhu & Gupta, arXiv 1710.01878).

    A `SparseTrainingHook` of the method "gradual". It starts from a ticket of any density, such as
    a dense one.
    """


def trained_on(checkpoint: dict[str, Any]) -> ModelInput | None:
    """The input that `TicketHook` noted in a checkpoint; None where it noted none."""
    return noted_in(checkpoint.get("meta", {}).get("ticket_input"))


def holder(runner: Runner) -> tuple[Any, str]:
    """Where the model itself is, inside what wraps it for DDP or test-time augmentation.

    Returns:
        An object, and the name of its attribute.
    """
    owner, name = runner, "model"
    while is_model_wrapper(getattr(owner, name)) or isinstance(getattr(owner, name), BaseTTAModel):
        owner, name = getattr(owner, name), "module"
    return owner, name


def model_of(runner: Runner) -> Any:
    """The model itself."""
    return getattr(*holder(runner))


def _handle(runner: Runner) -> Attachment:
    return require_ticket(
        runner.model,
        "TicketHook found no ticket on the model: write backbone=dict("
        "init_cfg=dict(type='Ticket', checkpoint='FILE.ticket'), …)",
    )
