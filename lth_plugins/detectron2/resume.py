"""Runs of detectron2 that are stopped, by whatever, and go on as if they had not been.

`ResumeHook` saves and restores what detectron2's checkpoints leave out; `resumable_train_loader`
is its train loader with a stream of pictures that can be entered anywhere. Neither changes the
loop, nor what is in a checkpoint.
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
from PIL import ExifTags, Image
from torch.utils.data import IterableDataset, Sampler, get_worker_info

from lth_plugins.detectron2.datasets import ReadableMapper, check_files
from lth_plugins.masking.attachment import attached
from lth_plugins.resilience.atomic import open_atomically, write_atomically
from lth_plugins.resilience.seeds import Seeded, reseed, seed_of, seeded
from lth_plugins.resilience.sigterm import Sigterm, spare_workers


class ResumeHook(HookBase):
    """Have a run that is stopped go on as if it had not been; on a CPU bit for bit.

    - A run that is resumed gets the pictures that come next, if its loader is a
      `ResumableLoader`. detectron2's own begin again with the first.
    - What is random in an iteration depends on the seed and its number alone.
    - A checkpoint is on the disk in whole or not at all, and so is the note which is the last.
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
        self.trainer.checkpointer.path_manager = _WholeFiles(self.trainer.checkpointer.path_manager)
        if self.trainer.start_iter == self.trainer.max_iter and comm.is_main_process():
            _complete(self.trainer.checkpointer)
        loader = getattr(self.trainer, "_trainer", self.trainer).data_loader
        if isinstance(loader, ResumableLoader):
            loader.start(self.trainer.start_iter)
        self._sigterm = Sigterm()

    def before_step(self) -> None:
        assert self._sigterm is not None
        self._sigterm.in_step = True
        if self._seed >= 0:
            reseed(seed_of(self._seed, comm.get_rank(), self.trainer.iter))

    def after_step(self) -> None:
        assert self._sigterm is not None
        if self._sigterm.heard_by_any():
            self._sigterm.in_step = False
            self._sigterm.stop()
        self._sigterm.in_step = False

    def after_train(self) -> None:
        sigterm, iteration = self._sigterm, self.trainer.iter
        if sigterm is None:  # a hook before this one refused to train
            return
        stopped = sigterm.heard and not sigterm.in_step  # in a step if that failed by itself
        complete = iteration + 1 >= self.trainer.max_iter
        if stopped and not complete:
            attachment = attached(self.trainer.model)
            if attachment is not None:
                attachment.verify()
            self.trainer.checkpointer.save(f"model_{iteration:07d}", iteration=iteration)
        sigterm.close()
        if stopped:
            assert sigterm.stopped is not None
            sigterm.stopped.saved = self.trainer.checkpointer.get_checkpoint_file()
        if stopped and complete:
            raise sigterm.stopped  # all is saved; EvalHook would evaluate now


def resumable(hooks: Sequence[HookBase | None], seed: int) -> list[HookBase | None]:
    """The hooks of a trainer with a `ResumeHook` among them.

    It comes after those that change what is saved, such as the learning rate's, and before
    ``EvalHook``, which may take longer than a queue waits.
    """
    at = next(i for i, hook in enumerate(hooks) if isinstance(hook, EvalHook))
    return [*hooks[:at], ResumeHook(seed), *hooks[at:]]


def _complete(checkpointer: Checkpointer) -> None:
    """Have ``model_final.pth`` where a run was killed between its last two checkpoints.

    Both are of the last iteration, and detectron2 writes none when it has nothing left to train.
    """
    final = Path(checkpointer.save_dir) / "model_final.pth"
    if not final.exists():
        write_atomically(final, Path(checkpointer.get_checkpoint_file()).read_bytes())
        checkpointer.tag_last_checkpoint(final.name)


class _WholeFiles:
    """A path manager whose files are written in whole or not at all."""

    def __init__(self, manager: Any) -> None:
        self._manager = manager

    def __getattr__(self, name: str) -> Any:
        return getattr(self._manager, name)

    def open(self, path: str, mode: str = "r", **options: Any) -> Any:
        if "w" in mode:
            return open_atomically(Path(path), mode)
        return self._manager.open(path, mode, **options)


class ResumableLoader:
    """Batches of a train loader, from any one on.

    Args:
        loader: detectron2's, of the stream.
        stream: what it loads.
    """

    def __init__(self, loader: Any, stream: "_Stream") -> None:
        self._loader, self._stream = loader, stream

    def start(self, batches: int) -> None:
        """Have the next pass leave out that many batches, which were trained on before."""
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

    The order of the pictures is that of the config's sampler, whatever ``NUM_WORKERS`` is; what is
    random about each comes from ``SEED`` and its place in that order.

    Args:
        cfg: the config.
        mapper: as `build_detection_train_loader`'s.

    Raises:
        UnreadableImage: if a file of a small dataset is not there or no image; of a large one when
            it is read.
    """
    parts = _train_loader_from_config(cfg, mapper)
    pictures, sampler, mapper = (parts.pop(key) for key in ("dataset", "sampler", "mapper"))
    check_files(pictures)
    grouped, batch_size = parts["aspect_ratio_grouping"], parts["total_batch_size"]
    stream = _Stream(
        MapDataset(DatasetFromList(pictures, copy=False), ReadableMapper(mapper)),
        sampler,
        batch_size // comm.get_world_size(),
        [_is_wide(entry) for entry in pictures] if grouped else None,
        cfg.SEED if cfg.SEED >= 0 else comm.shared_random_seed(),
    )
    return ResumableLoader(build_detection_train_loader(stream, mapper=None, **parts), stream)


def _is_wide(entry: dict[str, Any]) -> int:
    """Which of the two groups a picture is in, by its file where the data set does not say."""
    if "width" in entry and "height" in entry:
        return int(entry["width"] > entry["height"])
    with PathManager.open(entry["file_name"], "rb") as file, Image.open(file) as picture:
        width, height = picture.size
        turned = picture.getexif().get(ExifTags.Base.Orientation, 1) >= 5  # read_image turns it
    return int(height > width if turned else width > height)


class _Stream(IterableDataset):
    """An endless stream of pictures, shared out among the processes that load them.

    Args:
        pictures: by index.
        sampler: this rank's endless order of indices; the same each time it is iterated.
        batch_size: of this rank.
        groups: of each picture, which others may be in a batch with it; None if all may.
        seed: of the run.
    """

    def __init__(
        self,
        pictures: Any,
        sampler: Sampler[int],
        batch_size: int,
        groups: Sequence[int] | None,
        seed: int,
    ) -> None:
        self.pictures, self.sampler, self.batch_size = Seeded(pictures), sampler, batch_size
        self.groups, self.seed = groups, seed
        self.start(0)

    def start(self, batches: int) -> None:
        """Have the next pass leave out what that many batches are made of."""
        self._skip, self._waiting = batches * self.batch_size, []
        if self.groups is None or batches == 0:
            return
        # A batch is there once a group has enough for it; what the other has by then, still waits.
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
        # The loader takes from its processes in turn: a picture where it groups them, else a batch.
        turn = self.batch_size if self.groups is None else 1
        for number, (place, index) in enumerate(self._places()):
            if number // turn % workers == mine:
                yield self.pictures[index, seed_of(self.seed, comm.get_rank(), place)]

    def _places(self) -> Iterator[tuple[int, int]]:
        yield from self._waiting
        yield from islice(enumerate(self.sampler), self._skip, None)
