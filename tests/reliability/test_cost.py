"""What it costs to verify before each checkpoint: printed, not asserted, as clocks are no tests."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import pytest
import torch
import torchvision

import lth_plugins as lth


@pytest.mark.soak
def test_verifying_a_resnet50_beside_a_step_of_it(capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    model = torchvision.models.resnet50()
    ticket = lth.Ticket.dense(model)
    handle = lth.attach(model, ticket.with_masks(lth.prune(model, 0.8), {}))
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    pictures, labels = torch.randn(16, 3, 224, 224), torch.randint(0, 1000, (16,))

    def step() -> None:
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(pictures), labels).backward()
        optimizer.step()

    taken = seconds(step, 3)
    verified = seconds(handle.verify, 7)
    with capsys.disabled():
        print(
            f"\nverify {1000 * verified:.0f} ms, step of 16 pictures {taken:.2f} s: "
            f"{100 * verified / taken:.2f} %"
        )


def seconds(call: Callable[[], None], times: int) -> float:
    """The median of the processor time that it takes; the first call does not count."""
    call()
    taken = []
    for _ in range(times):
        started = time.process_time()
        call()
        taken.append(time.process_time() - started)
    return median(taken)
