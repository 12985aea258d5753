"""Fixtures of the tests of masking."""

import pytest
import torch
import torchvision
from torch import nn


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(1)
    return torchvision.models.resnet18(num_classes=4)
