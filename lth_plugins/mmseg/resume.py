"""Runs of mmengine that are stopped, for whatever reason, and resume bit for bit.

`make_resumable` edits a config so that they do: what is random then depends on where a run is.
"""

from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.dataset import InfiniteSampler
from mmengine.dist import get_rank
from mmengine.hooks import EMAHook, Hook
from mmengine.registry import DATA_SAMPLERS, DATASETS, HOOKS
from mmengine.runner import IterBasedTrainLoop, Runner

from lth_plugins.mmseg.config import import_plugin
from lth_plugins.mmseg.images import name_unreadable
from lth_plugins.resilience.atomic import write_atomically
from lth_plugins.resilience.seeds import Seeded, reseed, seed_of
from lth_plugins.resilience.sigterm import Sigterm, spare_workers


def make_resumable(cfg: Config) -> None:
    """Have a training config's run, when it is stopped, resume bit for bit; edits it in place.

    It gets a `ResumeHook`. Where its train loader takes from an ``InfiniteSampler``, as mmseg's do,
    what is random about an image comes from the seed and its place in the order, too.
    """
    import_plugin(cfg)
    loader = cfg.train_dataloader
    sampler: Any = loader.get("sampler") or {}
    infinite = sampler.get("type") in ("InfiniteSampler", InfiniteSampler)
    if infinite and not loader.get("batch_sampler"):
        sampler.type = "ResumableSampler"
        loader.dataset = {"type": "SeededDataset", "dataset": loader.dataset}
    cfg.custom_hooks = [*(cfg.get("custom_hooks") or []), {"type": "ResumeHook"}]


@DATA_SAMPLERS.register_module()
class ResumableSampler(InfiniteSampler):
    """mmengine's ``InfiniteSampler``, which gives each index a seed, for a `SeededDataset`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._place = 0

    def __iter__(self) -> Any:
        for index in super().__iter__():
            yield index, seed_of(self.seed, self.rank, self._place)
            self._place += 1

    def skip(self, num_samples: int) -> None:
        super().skip(num_samples)
        self._place = num_samples


@DATASETS.register_module()
class SeededDataset(Seeded):
    """A dataset whose random numbers come from the seed that `ResumableSampler` gives.

    Args:
        dataset: the config of one.
    """

    def __init__(self, dataset: dict[str, Any]) -> None:
        super().__init__(DATASETS.build(dataset))
        name_unreadable(self.dataset)

    @property
    def metainfo(self) -> dict[str, Any]:
        return self.dataset.metainfo

    def full_init(self) -> None:
        self.dataset.full_init()


@HOOKS.register_module()
class ResumeHook(Hook):
    """Have a run that is stopped resume as if it had not been; on a CPU bit for bit.

    - What is random in an iteration depends on the seed and its number alone.
    - On SIGTERM or Ctrl-C the iteration, or the image that is evaluated, ends, a checkpoint is
      saved, and the program exits with code 143 or 130.
    - A run that was stopped in a validation repeats it when it is resumed. mmengine skips it, so
      that a run stopped in the last one would never have a result.
    - ``last_checkpoint``, which mmengine does not write atomically, is mended if it is empty.

    It acts in runs of iterations (``IterBasedTrainLoop``), not of epochs, inside which mmengine
    cannot resume.

    Priority: "LOWEST", after ``CheckpointHook``.
    """

    priority = "LOWEST"
    _stopping: int | None = None
    """The iterations that the checkpoint of a stop has, while it is saved."""

    def __init__(self) -> None:
        self._sigterm: Sigterm | None = None
        spare_workers(self)  # mmengine starts them before it calls a hook

    def before_run(self, runner: Runner) -> None:
        note = _note(runner)
        if note.exists() and not note.read_text().strip():
            saved = Path(runner.work_dir).glob("iter_*.pth")
            newest = max(saved, key=lambda path: int(path.stem.removeprefix("iter_")), default=None)
            if newest is not None:  # in a run of epochs, or before the first checkpoint
                write_atomically(note, str(newest).encode())

    def before_train(self, runner: Runner) -> None:
        loop = runner.train_loop
        if not isinstance(loop, IterBasedTrainLoop):
            return
        self._sigterm = Sigterm()
        due = runner.iter % loop.val_interval == 0 or runner.iter == loop.max_iters
        if runner.val_loop is not None and runner.iter >= max(1, loop.val_begin) and due:
            runner.val_loop.run()

    def before_train_iter(self, runner: Runner, *_: Any, **__: Any) -> None:
        reseed(seed_of(runner.seed, get_rank(), runner.iter))

    def after_train_iter(self, runner: Runner, *_: Any, **__: Any) -> None:
        if self._sigterm is not None:
            self._sigterm.stop_if_asked(lambda: self._save(runner, runner.iter + 1))

    def after_val_iter(self, runner: Runner, *_: Any, **__: Any) -> None:
        if self._sigterm is not None:  # processes may have different numbers of images
            self._sigterm.stop_if_asked(lambda: self._save_validating(runner), alone=True)

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        # mmengine assumes that it saves inside an iteration.
        checkpoint["meta"]["iter"] = self._stopping or checkpoint["meta"]["iter"]

    def after_train(self, runner: Runner) -> None:
        if self._sigterm is not None:  # after the last image of the last validation
            self._sigterm.stop_if_asked(lambda: _last(runner))
            self._sigterm.close()

    def _save(self, runner: Runner, iterations: int) -> Path | None:
        """Save, unless that is done."""
        name, last = f"iter_{iterations}.pth", _last(runner)
        if last is None or last.name != name:
            self._stopping = iterations
            runner.save_checkpoint(runner.work_dir, name, by_epoch=False)
            if get_rank() == 0:
                write_atomically(_note(runner), str(Path(runner.work_dir, name)).encode())
        return _last(runner)

    def _save_validating(self, runner: Runner) -> Path | None:
        for hook in runner.hooks:
            if isinstance(hook, EMAHook):  # its averages are in the model while it validates
                hook.after_val_epoch(runner)
        return self._save(runner, runner.iter)


def _last(runner: Runner) -> Path | None:
    """The latest checkpoint."""
    note = _note(runner)
    return Path(note.read_text().strip()) if note.exists() else None


def _note(runner: Runner) -> Path:
    return Path(runner.work_dir) / "last_checkpoint"
