"""Slimming inside one training: channels are zeroed step by step, and removed at its end.

What the hosts' hooks share. The schedule is that of gradual pruning, of a cost instead of weights.
"""

import logging
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lth_plugins.errors import ConfigError, TicketError
from lth_plugins.pruning.search.schedule import CubicSchedule
from lth_plugins.resilience.atomic import open_atomically
from lth_plugins.resilience.ranks import from_main, is_main
from lth_plugins.slimming import channels
from lth_plugins.slimming.cost import Cost
from lth_plugins.slimming.importance import IMPORTANCES
from lth_plugins.slimming.network import Network
from lth_plugins.slimming.one_shot import check_coupling, describe, narrowed
from lth_plugins.slimming.selection import Budget, budget_of, select, settle
from lth_plugins.slimming.tickets import check_carries, save_ticket
from lth_plugins.slimming.tracing import Forward, trace
from lth_plugins.slimming.widths import SLIMMED
from lth_plugins.ticket.keys import State

logger = logging.getLogger(__name__)


class Slimming:
    """Removes channels of a model while a trainer trains it.

    Until the training ends, removed channels are zeros: optimizers, checkpoints and DDP see the
    parameters that they know. What is removed is part of the state, so that a run that is resumed
    has the channels of the checkpoint.

    Args:
        budget: what to end with.
        begin, end, period: in iterations, as `CubicSchedule`'s; after ``end`` the model is
            fine-tuned.
        importance: what channels are ranked by; a name in `IMPORTANCES`.
        keep: names of modules whose output channels all stay.

    Attributes:
        done: how many iterations are done, once it was started.

    Raises:
        ConfigError: if a value is invalid.
    """

    def __init__(
        self,
        budget: Budget,
        begin: int,
        end: int,
        period: int,
        importance: str = "l2",
        keep: Iterable[str] = (),
    ) -> None:
        self.budget = budget
        self.schedule = CubicSchedule(1 - budget.share, begin, end, period)
        self.importance_name, self.keep = importance, tuple(keep)
        self.importance = IMPORTANCES[importance]()
        self.network: Network | None = None
        self.done = 0
        self.kept: dict[str, Tensor] = {}
        self._collected: Mapping[str, Tensor] = {}

    @property
    def recipe(self) -> dict[str, Any]:
        """What the channels that are left depend on."""
        chosen = {"importance": self.importance_name, "keep": list(self.keep)}
        return {"unit": self.budget.cost.unit, **asdict(self.schedule), **chosen}

    def start(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        forward: Forward,
        done: int,
        iterations: float,
        inference: Forward | None = None,
    ) -> None:
        """Trace a model, before the first step of a training, or of one that is resumed.

        Args:
            model: without wrappers such as DDP.
            optimizer: which trains it.
            forward, inference: as `trace`'s.
            done: how many iterations are done.
            iterations: how many the training has.

        Raises:
            ConfigError: if the schedule ends later, or so little cannot be reached.
            TicketError: if the coupling of the channels cannot be followed, or a part of a trunk
                has a sparse ticket.
            RunError: if torch-pruning is not installed.
        """
        if self.schedule.end > iterations:
            raise ConfigError(
                f"expected slimming to end within the training's {iterations} iterations, found "
                f"end {self.schedule.end}: the budget would not be reached"
            )
        check_carries(model)
        network = trace(model, forward, self.keep, inference)
        fresh = not self.kept
        everything = network.all_kept()
        if not fresh and {n: len(k) for n, k in self.kept.items()} != {
            n: len(k) for n, k in everything.items()
        }:
            raise TicketError(
                "the checkpoint was slimmed in other groups of channels than this model has: "
                "resume with the configuration that it was started with"
            )
        costed = inference or forward
        if fresh:
            self._cost_by(lambda cost: cost.of(model, network, costed))
        # Refuse now what would be refused after hours.
        alike = {name: torch.arange(len(k), dtype=torch.float64) for name, k in everything.items()}
        fewest = select(network, alike, everything, self.budget)
        if fresh:
            check_coupling(model, network, fewest, forward)
            # All removals but the last go by the cost as it is now.
            self._cost_by(lambda cost: cost.corrected(model, network, fewest, costed))
            select(network, alike, everything, self.budget)
            self.kept = everything
        self.network, self._forward, self.done = network, forward, done
        self._costed = costed
        self.importance.start(model, network)
        if self._collected:
            self.importance.load_state_dict(self._collected)
        channels.zero(model, network, self.kept)
        # There gradients are complete, averaged over processes and unscaled.
        self._hook = optimizer.register_step_pre_hook(self._before_step)

    def _before_step(self, *_: Any) -> None:
        if self.schedule.begin <= self.done < self.schedule.end:
            self.importance.after_backward()

    def _cost_by(self, find: Callable[[Cost], Cost]) -> None:
        """Take the cost that the main process finds: others would measure other times."""
        found = find(self.budget.cost) if is_main() else self.budget.cost
        self.budget = replace(self.budget, cost=from_main(found))

    def after_step(self, model: nn.Module, step: int) -> None:
        """Remove channels if that is due after so many iterations, before anything is saved."""
        assert self.network is not None, "start comes first"
        self.done = step
        if self.schedule.is_due(step):
            self.kept = self._choose(model, step)
            logger.info("After %d iterations %s", step, describe(self.network, self.kept))
        # Momentum moves what was zeroed, until it has died away.
        channels.zero(model, self.network, self.kept)
        if step == self.schedule.end:
            self.importance.stop()
            self._hook.remove()

    def _choose(self, model: nn.Module, step: int) -> dict[str, Tensor]:
        """The main process's choice: replicas may differ by a rounding, and measure other times."""
        assert self.network is not None
        scores, kept = self.importance.scores(), self.kept
        if is_main() and step < self.schedule.end:
            share = 1 - self.schedule.sparsity(step, 0.0)
            kept = select(self.network, scores, kept, replace(self.budget, share=share))
        elif is_main():
            kept = settle(model, self.network, scores, kept, self.budget, self._costed)
        return from_main(kept)

    def finish(self, model: nn.Module) -> nn.Module:
        """The narrower model, at the end of the training.

        Raises:
            TicketError: if it would compute something else.
        """
        assert self.network is not None, "start comes first"
        return narrowed(model, self.network, self.kept, self._forward)

    def write(
        self,
        model: nn.Module,
        folder: Path,
        wrap: Callable[[State], Mapping[str, Any]] = lambda state: state,  # with its metadata
    ) -> None:
        """Write the narrower model, and its ticket if it has one, at the end of the training.

        Args:
            model: what was trained.
            folder: gets ``slim.pth`` and ``slim.ticket``.
            wrap: makes the host's checkpoint of the narrower model's state dict.

        Raises:
            TicketError: as `finish`.
        """
        small = self.finish(model)
        save_ticket(small, folder)
        with open_atomically(folder / SLIMMED) as file:
            torch.save(wrap(small.state_dict()), file)
        logger.info("Wrote the narrower model to %s", folder / SLIMMED)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must hold; tensors and plain containers only."""
        return {
            "recipe": self.recipe,
            "kept": dict(self.kept),
            "collected": self.importance.state_dict() if self.network is not None else {},
            "cost": self.budget.cost.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up a checkpoint's channels, before `start`.

        Raises:
            TicketError: if it was saved in a training with another budget or schedule.
        """
        if state["recipe"] != self.recipe:
            raise TicketError(
                f"the checkpoint was slimmed by {state['recipe']}, now asked for is {self.recipe}: "
                "resume with the same, or start anew"
            )
        self.kept, self._collected = dict(state["kept"]), state["collected"]
        self.budget = replace(self.budget, cost=self.budget.cost.with_state(state["cost"]))


def default_end(begin: int, iterations: float) -> int:
    """The iteration after which removals end, where none is given: half of the training's."""
    return max(begin + 1, int(iterations) // 2)


class SlimmingHook:
    """What a host's hook of slimming is made of, whatever the host calls when.

    Args:
        flops: the share of the model's FLOPs to end with, in (0, 1).
        latency: instead, the share of its time of inference on this machine and the device that it
            is trained on.
        begin: the iteration after which removals begin.
        end: the iteration after which they end; None for half of the training. Then the narrower
            model is fine-tuned.
        period: iterations between two removals.
        importance: what channels are ranked by; a name in `IMPORTANCES`.
        keep: names of modules whose output channels all stay.

    Raises:
        ConfigError: if a value is invalid, or not one of ``flops`` and ``latency`` is given.
    """

    def __init__(
        self,
        flops: float | None = None,
        latency: float | None = None,
        begin: int = 0,
        end: int | None = None,
        period: int = 10,
        importance: str = "l2",
        keep: Iterable[str] = (),
    ) -> None:
        self._settings = (budget_of(flops, latency), begin, period, importance, tuple(keep))
        self._end = end
        self.slimming = self._make(begin + 1 if end is None else end)

    def _make(self, end: int) -> Slimming:
        budget, begin, period, importance, keep = self._settings
        return Slimming(budget, begin, end, period, importance, keep)

    def end_within(self, iterations: float) -> None:
        """Take half of a training of so many iterations as the end, where none was given.

        Raises:
            ConfigError: if the training has no end.
        """
        if self._end is None:
            if math.isinf(iterations):
                raise ConfigError(
                    "expected the end of slimming, found a training without an end: write end=…"
                )
            self.slimming = self._make(default_end(self._settings[1], iterations))
