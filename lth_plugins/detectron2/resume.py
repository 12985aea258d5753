"""Runs of detectron2 that are stopped, for whatever reason, and resume bit for bit.

`ResumeHook` saves and restores what detectron2's checkpoints leave out; `resumable_train_loader`
is its train loader over a stream of images that can be entered anywhere. Neither changes the loop,
nor what is in a checkpoint.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetFromList, MapDataset, build_detection_train_loader
from detectron2.data.build import _train_loader_from_config
from detectron2.engine import HookBase
from detectron2.engine.hooks import EvalHook
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager
from fvcore.common.checkpoint import Checkpointer
from torch.utils.data import IterableDataset, Sampler, get_worker_info

from lth_plugins.detectron2.datasets import check_files, files_of
from lth_plugins.detectron2.hooks import model_of
from lth_plugins.masking.attachment import attached
from lth_plugins.resilience.atomic import open_atomically, write_atomically
from lth_plugins.resilience.seeds import Seeded, reseed, seed_of, seeded
from lth_plugins.resilience.sigterm import Sigterm, spare_workers
from lth_plugins.training.images import Readable, read_size

_NORMALIZER = "loss_normalizer"
"""What RetinaNet and FCOS average over steps, and keep in no state dict."""


class ResumeHook(HookBase):
    """Have a run that is stopped resume as if it had not been; on a CPU bit for bit.

    - A run that is resumed gets the images that come next, if its loader is a `ResumableLoader`.
      detectron2's own begin again with the first.
    - What is random in an iteration depends on the seed and its number alone.
    - The moving average that a dense detector normalises its loss by is resumed; in several
      processes, each of which has its own, that of the main one.
    - Checkpoints, and the note which is the last, are written atomically.
    - On SIGTERM or Ctrl-C the iteration ends, a checkpoint is saved, and the program exits with
      code 143 or 130.

    It is for a `DefaultTrainer`, at the place that `resumable` gives it::

        def build_hooks(self):
            return resumable(super().build_hooks(), self.cfg.SEED)

    Args:
        seed: of the run, ``cfg.SEED``; below 0 random numbers are left as they are.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._sigterm: Sigterm | None = None
        spare_workers(self)

    def before_train(self) -> None:
        checkpointer = self.trainer.checkpointer
        checkpointer.path_manager = _AtomicFiles(checkpointer.path_manager)
        if self.trainer.start_iter == self.trainer.max_iter and comm.is_main_process():
            _complete(checkpointer)
        trainer: Any = getattr(self.trainer, "_trainer", self.trainer)
        loader = trainer.data_loader
        if isinstance(loader, ResumableLoader):
            loader.start(self.trainer.start_iter)
        self._sigterm = Sigterm(in_step=False)

    def before_step(self) -> None:
        assert self._sigterm is not None
        self._sigterm.in_step = True
        if self._seed >= 0:
            reseed(seed_of(self._seed, comm.get_rank(), self.trainer.iter))

    def after_step(self) -> None:
        assert self._sigterm is not None
        self._sigterm.stop_if_asked(self._save)
        self._sigterm.in_step = False  # EvalHook, which comes next, does not ask

    def state_dict(self) -> dict[str, Any]:
        normalizer = getattr(model_of(self), _NORMALIZER, None)
        return {} if normalizer is None else {_NORMALIZER: normalizer}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for name, value in state_dict.items():
            setattr(model_of(self), name, value)

    def after_train(self) -> None:
        if self._sigterm is None:  # a hook before this one refused to train
            return
        self._sigterm.end(self._save)
        if self._sigterm.stopped is not None and self._is_complete:
            raise self._sigterm.stopped  # all is saved; EvalHook would evaluate now

    @property
    def _is_complete(self) -> bool:
        return self.trainer.iter + 1 >= self.trainer.max_iter

    def _save(self) -> str:
        if not self._is_complete:
            handle, iteration = attached(self.trainer.model), self.trainer.iter
            if handle is not None:
                handle.verify()
            self.trainer.checkpointer.save(f"model_{iteration:07d}", iteration=iteration)
        return self.trainer.checkpointer.get_checkpoint_file()


def resumable(hooks: Sequence[HookBase | None], seed: int) -> list[HookBase | None]:
    """Put a `ResumeHook` among the hooks of a trainer.

    It comes after those that change what is saved, such as the learning rate's, and before
    ``EvalHook``, which may take longer than a queue waits.
    """
    at = next(i for i, hook in enumerate(hooks) if isinstance(hook, EvalHook))
    return [*hooks[:at], ResumeHook(seed), *hooks[at:]]


def _complete(checkpointer: Checkpointer) -> None:
    """Write ``model_final.pth`` where a run was killed between its last two checkpoints.

    Both are of the last iteration, and detectron2 writes none when it has nothing left to train.
    """
    final = Path(checkpointer.save_dir) / "model_final.pth"
    if not final.exists():
        write_atomically(final, Path(checkpointer.get_checkpoint_file()).read_bytes())
        checkpointer.tag_last_checkpoint(final.name)


class _AtomicFiles:
    """A path manager that writes files atomically."""

    def __init__(self, manager: Any) -> None:
        self._manager = manager

    def __getattr__(self, name: str) -> Any:
        return getattr(self._manager, name)

    def open(self, path: str, mode: str = "r", **options: Any) -> Any:
        if "w" in mode:
            return open_atomically(Path(path), mode)
        return self._manager.open(path, mode, **options)


class ResumableLoader:
    """Batches of a train loader, from any batch on.

    Args:
        loader: detectron2's, of the stream.
        stream: what it loads.
    """

    def __init__(self, loader: Any, stream: "_Stream") -> None:
        self._loader, self._stream = loader, stream

    @property
    def images(self) -> int:
        """How many images there are; batches have no end."""
        return len(self._stream.images)

    def start(self, batches: int) -> None:
        """Skip that many batches in the next pass, which were trained on before."""
        self._stream.start(batches)

    def __iter__(self) -> Iterator[list[dict[str, Any]]]:
        batches = iter(self._loader)
        while True:  # the stream has no end
            with seeded(0):  # a loader that starts draws a number, and the step should not notice
                batch = next(batches)
            yield batch


def resumable_train_loader(
    cfg: CfgNode, mapper: Callable[[dict[str, Any]], Any] | None = None
) -> ResumableLoader:
    """detectron2's train loader for a config, which `ResumeHook` can enter anywhere.

    The order of the images is that of the config's sampler, whatever ``NUM_WORKERS`` is; what is
    random about each comes from ``SEED`` and its place in that order.

    Args:
        cfg: the config.
        mapper: as `build_detection_train_loader`'s.

    Raises:
        UnreadableImage: if an image cannot be read; of a large dataset when it is read.
    """
    parts = _train_loader_from_config(cfg, mapper)
    entries, sampler, mapper = (parts.pop(key) for key in ("dataset", "sampler", "mapper"))
    check_files(entries)
    grouped, batch_size = parts["aspect_ratio_grouping"], parts["total_batch_size"]
    stream = _Stream(
        MapDataset(DatasetFromList(entries, copy=False), Readable(mapper, files_of)),
        sampler,
        batch_size // comm.get_world_size(),
        [is_wide(entry) for entry in entries] if grouped else None,
        cfg.SEED if cfg.SEED >= 0 else comm.shared_random_seed(),
    )
    return ResumableLoader(build_detection_train_loader(stream, mapper=None, **parts), stream)


def is_wide(entry: dict[str, Any]) -> int:
    """Which of the two groups an image is in, by its file where the dataset does not say."""
    if "width" in entry and "height" in entry:
        return int(entry["width"] > entry["height"])
    width, height = read_size(PathManager.get_local_path(entry["file_name"]))
    return int(width > height)


class _Stream(IterableDataset):
    """An endless stream of images, shared out among the processes that load them.

    Args:
        images: by index.
        sampler: this rank's endless order of indices; the same each time it is iterated.
        batch_size: of this rank.
        groups: of each image, the others that may be in a batch with it; None if all may.
        seed: of the run.
    """

    def __init__(
        self,
        images: Any,
        sampler: Sampler[int],
        batch_size: int,
        groups: Sequence[int] | None,
        seed: int,
    ) -> None:
        self.images, self.sampler, self.batch_size = Seeded(images), sampler, batch_size
        self.groups, self.seed = groups, seed
        self.start(0)

    def start(self, batches: int) -> None:
        """Skip what that many batches are made of in the next pass."""
        self._skip, self._waiting = batches * self.batch_size, []
        if self.groups is None or batches == 0:
            return
        # A batch is full once a group has enough for it; what the other has by then still waits.
        waiting: tuple[list[tuple[int, int]], ...] = ([], [])
        for place, index in enumerate(self.sampler):
            group = waiting[self.groups[index]]
            group.append((place, index))
            if len(group) == self.batch_size:
                group.clear()
                batches -= 1
                if batches == 0:
                    self._skip, self._waiting = place + 1, [*waiting[0], *waiting[1]]
                    return

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = get_worker_info()
        mine, workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        # The loader takes from its processes in turn: an image where it groups them, else a batch.
        turn = self.batch_size if self.groups is None else 1
        for number, (place, index) in enumerate(self._places()):
            if number // turn % workers == mine:
                yield self.images[index, seed_of(self.seed, comm.get_rank(), place)]

    def _places(self) -> Iterator[tuple[int, int]]:
        yield from self._waiting
        yield from islice(enumerate(self.sampler), self._skip, None)
