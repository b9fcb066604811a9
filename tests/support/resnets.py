"""The official code's networks: their golden numbers."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from tests.support.paths import GOLDEN

RESNET = GOLDEN / "resnet"


CASES: dict[str, dict[str, float]] = {
    "resnet18_cifar": {"depth": 18, "cifar_stem": True},
    "resnet18_2x_cifar": {"depth": 18, "width": 2, "cifar_stem": True},
    "resnet18_se_cifar": {"depth": 18, "se_ratio": 0.0625, "cifar_stem": True},
    "resnet50_imagenet": {"depth": 50},
    "resnet50_2x_imagenet": {"depth": 50, "width": 2},
    "resnet50_sk_imagenet": {"depth": 50, "sk_ratio": 0.0625},
}


def deviation(ours: Tensor, golden: np.ndarray) -> float:
    """Largest difference, relative to the golden array's largest entry."""
    return float((ours.detach() - torch.tensor(golden).double()).abs().max() / np.abs(golden).max())
