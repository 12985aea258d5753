"""`SparseTraining`: a method on a model that some trainer trains. What the hosts' hooks share."""

import logging
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lth_plugins.errors import ConfigError, TicketError
from lth_plugins.masking.attachment import Attachment, attached
from lth_plugins.pruning.lazy_tensors import Computed
from lth_plugins.pruning.methods.method import Method, Snapshot
from lth_plugins.pruning.methods.table import make_method
from lth_plugins.resilience.ranks import from_main, is_main, mean_over_ranks
from lth_plugins.ticket.masks import Masks, packed, unpacked
from lth_plugins.ticket.meta import TicketMeta

logger = logging.getLogger(__name__)


class SparseTraining:
    """Moves the masks of the ticket on a model while a trainer trains it.

    ::

        training = lth.SparseTraining("rigl", sparsity=0.9)
        training.start(model, iterations)
        for step in range(iterations):
            ...  # one step of any torch.optim optimizer
            training.after_step(model, step + 1)
        lth.attached(model).ticket().save("sparse.ticket")

    The masks are part of its state: after a run was resumed, they are those of the checkpoint. The
    model may be loaded before or after it. In several processes all of them make all calls, and get
    the masks of the main one.

    Args:
        method: a name in `METHODS`, or a method.
        options: of the method of this name.

    Raises:
        ConfigError: if there is no such method, or an option is unknown, missing or invalid.
    """

    def __init__(self, method: str | Method, **options: Any) -> None:
        self.method = make_method(method, **options)
        self._iterations: float | None = None
        self._ticket: tuple[str, float] | None = None  # digest and sparsity of its masks
        self._meta: TicketMeta | None = None  # of the masks as they were set last
        self._done = 0
        self._postponed = False

    @property
    def recipe(self) -> dict[str, Any]:
        """What the final masks depend on: what the ticket says of it."""
        return {self.method.name: self.method.recipe}

    def start(self, model: nn.Module, iterations: float) -> None:
        """Check that the method fits a training of so many iterations; before its first step.

        Raises:
            ConfigError: if it fits neither that nor the ticket. The model is unchanged then.
            TicketError: if there is no ticket on the model, or a resumed training has another
                length.
        """
        handle = _handle(model)
        if self._ticket is None:
            before, masks = handle.all_masks, self.check(model, iterations)
            self._iterations = iterations
            self._collect(handle)
            self._ticket = before.digest, before.sparsity
            self._put_on(handle, from_main(masks))
        elif self._iterations != iterations and self.method.relative:
            raise TicketError(
                f"expected to resume {self.method.name} in a training of {self._iterations} "
                f"iterations, on which its schedule depends, found one of {iterations}: train as "
                "long, or start anew"
            )
        else:
            self._iterations = iterations
            self._collect(handle)

    def check(self, model: nn.Module, iterations: float) -> Masks:
        """The masks that a training of so many iterations would begin with.

        Raises:
            LthError: as `start`.
        """
        handle = _handle(model)
        if self.method.relative and not math.isfinite(iterations):
            raise ConfigError(
                f"expected a training of known length for {self.method.name}, whose schedule "
                f"depends on it, found {iterations} iterations: set its length"
            )
        now = _snapshot(model, handle, 0, iterations, handle.all_masks.sparsity, {})
        return self.method.start(now)

    def after_step(self, model: nn.Module, step: int) -> None:
        """Move the masks if that is due after so many iterations. Call it before anything is saved.

        A step that a `torch.amp.GradScaler` skips postpones what is due to the next one.

        Raises:
            TicketError: if a gradient is not finite, or something else has changed the masks. They
                are unchanged then.
        """
        assert self._iterations is not None, "start comes first"
        self._done = step
        if self._postponed or self.method.is_due(step, self._iterations):
            handle = _handle(model)
            self._postponed = not self._update(model, handle, step)
            self._collect(handle)
        elif self._collects_next:
            self._collect(_handle(model))

    def _update(self, model: nn.Module, handle: Attachment, step: int) -> bool:
        """Move the masks; False if the step was skipped."""
        if self._meta is not handle.meta:
            raise TicketError(
                f"expected the masks that {self.method.name} has set, found others: something else "
                "changes them in the same training. Choose one method"
            )
        gradients = handle.collected_gradients()
        if gradients is None:
            return False
        gradients = {name: mean_over_ranks(one).cpu() for name, one in gradients.items()}
        for name, gradient in gradients.items():
            if not gradient.isfinite().all():
                raise TicketError(
                    f"expected finite gradients to move the masks by after {step} iterations, "
                    f"found others in {name}: did training diverge? Lower the learning rate, or "
                    "clip gradients"
                )
        assert self._iterations is not None and self._ticket is not None
        before, update = handle.all_masks, None
        if is_main():
            initial = self._ticket[1]
            now = _snapshot(model, handle, step, self._iterations, initial, gradients)
            update = self.method.update(now)
        # Replicas may differ by a rounding, and must not come to differ by a mask.
        update = from_main(update)
        assert update is not None
        self._put_on(handle, update.masks, update.resets_momentum)
        with torch.no_grad():
            for name, value in update.weights.items():
                handle.weights[name].copy_(value)
        masks = update.masks
        logger.info(
            "%s: %d weights dropped, %d grown, density %.2f %% after %d iterations",
            *(self.method.name, (before & ~masks).kept, (masks & ~before).kept),
            *(100 * masks.density, step),
        )
        return True

    @property
    def _collects_next(self) -> bool:
        """Whether the next step's gradients are needed."""
        assert self._iterations is not None
        due = self._postponed or self.method.is_due(self._done + 1, self._iterations)
        return due and self.method.needs_gradients

    def _collect(self, handle: Attachment) -> None:
        if self._collects_next:
            handle.collect_gradients()

    def _put_on(self, handle: Attachment, masks: Masks, reset_all_momentum: bool = False) -> None:
        handle.replace(masks, reset_all_momentum, **self.recipe)
        self._meta = handle.meta

    def state_dict(self, model: nn.Module) -> dict[str, Any]:
        """What a checkpoint must hold; tensors and plain containers only."""
        bits = {name: packed(mask) for name, mask in _handle(model).all_masks.items()}
        return {
            "recipe": self.recipe,
            "ticket": self._ticket,
            "iterations": self._iterations,
            "done": self._done,
            "postponed": self._postponed,
            "masks": bits,
        }

    def load_state_dict(self, model: nn.Module, state: Mapping[str, Any]) -> None:
        """Take up a checkpoint's masks.

        Raises:
            TicketError: if it was saved in a training by another method, or on another ticket.
        """
        if state["recipe"] != self.recipe:
            raise TicketError(
                f"the checkpoint was trained by {state['recipe']}, now asked for is {self.recipe}: "
                "resume with the same, or start anew"
            )
        handle = _handle(model)
        own = handle.all_masks
        if state["masks"].keys() != own.keys():
            raise TicketError(
                "the checkpoint was trained on another ticket: "
                f"{min(state['masks'].keys() ^ own.keys())} is masked in one of the two only. "
                "Resume with the ticket, and the modules, that it was started with"
            )
        shapes = {name: mask.shape for name, mask in own.items()}
        masks = Masks({name: unpacked(bits, shapes[name]) for name, bits in state["masks"].items()})
        digest, sparsity = state["ticket"]
        if own.digest != digest and own != masks:
            raise TicketError(
                f"the checkpoint was trained on another ticket, with masks {digest[:12]}, not "
                f"{own.digest[:12]}: resume with the ticket that it was started with"
            )
        self._put_on(handle, masks)
        self._ticket = digest, sparsity
        self._iterations, self._done = state["iterations"], state["done"]
        self._postponed = state["postponed"]


class GradualOptions:
    """What a host's hook of gradual pruning adds to that of sparse training: its own arguments.

    Args:
        target, begin, end, period, criterion, allocation: as those of `Gradual`.

    Raises:
        ConfigError: if a value is invalid; before training, if the schedule does not fit it.
    """

    def __init__(
        self,
        target: float,
        begin: int,
        end: int,
        period: int,
        criterion: str = "magnitude",
        allocation: str = "global",
    ) -> None:
        schedule = {"target": target, "begin": begin, "end": end, "period": period}
        chosen = {"criterion": criterion, "allocation": allocation}
        super().__init__("gradual", **schedule, **chosen)  # type: ignore[call-arg]


def check_alone(hook: str, found: int) -> None:
    """Refuse several methods in one training.

    Args:
        hook: what the host calls a hook of sparse training.
        found: how many it has.

    Raises:
        ConfigError: if it has more than one.
    """
    if found > 1:
        raise ConfigError(
            f"expected one {hook}, as each method moves the masks of the whole ticket, found "
            f"{found}, gradual pruning included: choose one method"
        )


def _snapshot(
    model: nn.Module,
    handle: Attachment,
    step: int,
    steps: float,
    initial: float,
    gradients: Mapping[str, Tensor],
) -> Snapshot:
    masks, weights = handle.all_masks, handle.weights
    return Snapshot(
        step=step,
        steps=steps,
        masks=masks,
        weights=Computed(masks, lambda name: weights[name].detach().cpu().float()),
        trained=frozenset(handle.trained),
        gradients=gradients,
        initial=initial,
        model=model,
    )


def _handle(model: nn.Module) -> Attachment:
    handle = attached(model)
    if handle is None:
        raise TicketError(
            "sparse training found no ticket on the model: attach a dense one, or one to start from"
        )
    return handle
