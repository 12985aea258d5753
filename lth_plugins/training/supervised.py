"""Supervised training: a linear classifier on the trunk, cross-entropy."""

from typing import ClassVar

from torch import Tensor, nn
from torch.nn import functional as F

from lth_plugins.ticket import TicketError
from lth_plugins.ticket.keys import State
from lth_plugins.training.module import LOGITS, Task, misfit


class Supervised(Task):
    """Classification. The head is ``fc``, as in torchvision; it is never pruned."""

    distils: ClassVar[str] = LOGITS

    def build_head(self, classes: int) -> None:
        self.fc = nn.Linear(self.features, classes)

    def take_head(self, state: State) -> bool:
        found = {
            key.rpartition("fc.")[2]: value
            for key, value in state.items()
            if f".{key}".rpartition(".fc.")[1]
        }
        own = self.fc.state_dict()
        if not found:
            return False
        wrong = misfit(own, found)
        if wrong is not None:
            raise TicketError(
                f"expected a classifier of {self.fc.out_features} classes in init, as the data "
                f"has: fc.{wrong[0]} {wrong[1]}. Give weights trained on the same classes, or a "
                "ticket or checkpoint without a classifier"
            )
        self.fc.load_state_dict({name: found[name] for name in own})
        return True

    def outputs(self, images: Tensor) -> Tensor:
        return self.fc(self.trunk(images))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return self._step(batch, "train")

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._step(batch, "val")

    def _step(self, batch: tuple[Tensor, Tensor], stage: str) -> Tensor:
        images, labels = batch  # [N, 3, H, W] float, [N] long
        logits = self.outputs(images)
        loss = F.cross_entropy(logits, labels)
        best = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
        accuracy = {f"{stage}_top1": best[:, :1], f"{stage}_top5": best}
        means = {name: hit.any(1).float().mean() for name, hit in accuracy.items()}
        self.tally(len(labels), **{f"{stage}_loss": loss}, **means)
        return loss + self.taught(images, logits) if stage == "train" else loss
