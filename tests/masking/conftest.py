"""Fixtures of the tests of masking."""

import pytest
import torch
import torchvision
from torch import Tensor, nn


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(1)
    return torchvision.models.resnet18(num_classes=4)


@pytest.fixture
def stock(resnet18_state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A checkpoint of the trunk of a dense model."""
    return {name: v for name, v in resnet18_state.items() if not name.startswith("fc")}
