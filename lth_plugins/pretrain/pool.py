"""Pools of a search's trained tickets, which its own validation images choose between."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor
from torch.optim.swa_utils import update_bn
from torch.utils.data import DataLoader

from lth_plugins.errors import RunError, TicketError
from lth_plugins.pretrain.config import load_config
from lth_plugins.pretrain.data import open_images
from lth_plugins.pretrain.find import CONFIG, head_beside, pretraining
from lth_plugins.pruning.pools import Member, Pool, check_pool, pool
from lth_plugins.pruning.search.imp import round_path
from lth_plugins.pruning.search.search import TRAINED_FROM
from lth_plugins.ticket import Ticket
from lth_plugins.ticket.file import read_digest
from lth_plugins.training.callbacks import write_state
from lth_plugins.training.fit import Validator
from lth_plugins.training.loader import length, spread

STATISTICS_IMAGES = 1024
"""Training images that BatchNorm's statistics are re-estimated on, at most."""


@dataclass(frozen=True)
class Pooled:
    """What `pool_tickets` did.

    Attributes:
        pool: its result.
        metric: the name of what was improved.
        seconds: of the whole.
        evaluating: the part of it that the evaluations alone took, in seconds.
    """

    pool: Pool
    metric: str
    seconds: float
    evaluating: float


def pool_tickets(ticket: Path, neighbours: Sequence[Path], out: Path) -> Pooled:
    """Interpolate a trained ticket with others of its search, and write the best.

    The folder of the ticket is that of its search, whose configuration says what is validated on.
    ``out`` gets the ticket, and its head beside it.

    Args:
        ticket: ``round_KK.trained.ticket`` of a search with ``keep=trained``.
        neighbours: others of it.
        out: the file to write.

    Raises:
        LthError: before anything is computed, if the tickets do not belong together, or something
            of the search is missing.
    """
    started = time.perf_counter()
    tickets = [Ticket.load(path) for path in (ticket, *neighbours)]
    check_pool(tickets)
    heads = [_head(path) for path in (ticket, *neighbours)]
    validation = Validation(ticket.parent, tickets[0], heads)
    base, *others = map(Member, tickets, heads)
    found = pool(base, validation.metric_of(base), others, validation.measure)
    write_state(found.member.head, head_beside(out))
    found.member.ticket.save(out)
    seconds = time.perf_counter() - started
    return Pooled(found, validation.metric, seconds, validation.seconds)


class Validation:
    """The validation of a search, for networks other than those that it trained.

    Args:
        folder: of the search.
        ticket: one of its tickets, whose input the images have.
        heads: those of all networks.

    Raises:
        LthError: if the folder is another search's, or its data or a head does not fit.

    Attributes:
        metric: what is measured: an accuracy.
        seconds: that evaluations took so far.
    """

    def __init__(self, folder: Path, ticket: Ticket, heads: Sequence[dict[str, Tensor]]) -> None:
        config = load_config(_searched(folder, ticket))
        config = replace(config, trainer=replace(config.trainer, devices=1))
        spec = ticket.meta.input
        kind = pretraining(config.task)
        images = open_images(config.data, kind.views(config, spec), spec)
        self.task = kind(config, config.training, len(images.classes), stream=0)
        expected = {n: value.shape for n, value in kind.head_of(self.task.state_dict()).items()}
        for head in heads:
            if {name: value.shape for name, value in head.items()} != expected:
                raise RunError(
                    f"expected heads for task={config.task} on {len(images.classes)} classes, "
                    f"found others beside the tickets: give those of the search in {folder}"
                )
        self._validator = Validator(self.task, images)
        plain = images.train if images.bank is None else images.bank
        count = min(STATISTICS_IMAGES, length(images.val) // 2, length(plain))
        self._batches = DataLoader(spread(plain, count), config.batch_size)
        self.metric = "val_knn_top1" if self.task.uses_bank else "val_top1"
        self.seconds = 0.0

    def metric_of(self, member: Member) -> float:
        """The metric of a network as it is."""
        started = time.perf_counter()
        self._load(member)
        metrics = self._validator()
        if self.metric not in metrics:
            raise RunError(
                f"expected the metric {self.metric} of the search's validation, found "
                f"{', '.join(metrics)}: pools are for tasks that have it"
            )
        self.seconds += time.perf_counter() - started
        return metrics[self.metric]

    def measure(self, member: Member) -> tuple[Member, float]:
        """The network with BatchNorm's statistics of its own, and its metric."""
        self._load(member)
        update_bn(self._batches, self.task.trunk)
        own = replace(member.ticket, weights=self.task.trunk.state_dict())
        member = replace(member, ticket=own)
        metric = self.metric_of(member)
        return member, metric

    def _load(self, member: Member) -> None:
        self.task.trunk.load_state_dict(member.ticket.sparse_weights())
        self.task.load_state_dict(member.head, strict=False)  # it is a part


def _searched(folder: Path, ticket: Ticket) -> Path:
    """The configuration of the search in a folder, which is the ticket's."""
    path, dense = folder / CONFIG, round_path(folder, 0)
    if not (path.is_file() and dense.is_file()):
        raise RunError(
            f"expected the folder of a search, with {CONFIG} and {dense.name}, found none in "
            f"{folder}: leave trained tickets where tools/find_ticket.py wrote them"
        )
    if read_digest(dense) != ticket.meta.recipe[TRAINED_FROM]:
        raise RunError(
            f"expected the folder of the search that {ticket!r} is from, found another round 0 in "
            f"{folder}: move the ticket back to its own"
        )
    return path


def _head(path: Path) -> dict[str, Tensor]:
    beside = head_beside(path)
    if not beside.is_file():
        raise TicketError(
            f"expected the head that was trained with {path.name} beside it, found no "
            f"{beside.name}: copy both files, or run tools/find_ticket.py with keep=trained again"
        )
    return load_file(beside)
