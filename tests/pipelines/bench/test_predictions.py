"""The arithmetic of docs/benchmarks.md's predictions: bytes that BatchNorm's kernels move in a step, from the shapes of the network."""

from __future__ import annotations

import pytest
import torch

from simclr.networks.batchnorm import BatchNorm
from simclr.networks.resnet import resnet
from tests.support.paths import ROOT


def gigabytes(views: int, size_px: int, bytes_each: int) -> dict[str, float]:
    """10⁹ bytes of the activations of ResNet-50's norms: the stem's, those that ReLU follows, at the ends of blocks, and shortcuts'."""
    found = {"stem": 0.0, "inner": 0.0, "ends": 0.0, "shortcuts": 0.0}
    with torch.device("meta"):
        network = resnet(50).eval()
        for name, module in network.named_modules():
            if isinstance(module, BatchNorm):
                kind = "ends" if name.endswith("body.7") else "shortcuts" if "shortcut" in name else "inner"
                kind = "stem" if name.startswith("stem") else kind

                def add(_: object, __: object, y: torch.Tensor, kind: str = kind) -> None:
                    found[kind] += y.numel() * views * bytes_each / 1e9

                module.register_forward_hook(add)
        network(torch.empty(1, 3, size_px, size_px))
    return found


def test_the_kernels_move_218_gb_in_a_step_of_1024_views() -> None:
    of = gigabytes(1024, 224, 2)
    assert of == pytest.approx({"stem": 1.64, "inner": 6.73, "ends": 11.30, "shortcuts": 3.08}, abs=0.01)
    pooled = of["stem"] * (1 + 1 / 2) / 4  # a quarter of the pixels, and a byte for each
    # Sums read x; the map reads x and writes y, at an end it reads x and what comes beside, which a shortcut's sums read too.
    forward = (1 + 2) * of["inner"] + (1 + 3) * of["ends"] + 1 * of["shortcuts"] + (1 + 1) * of["stem"] + pooled
    # Sums read x and the gradient, and the last pass writes the input's; at an end two gradients, x and y are read, one gradient is stored.
    backward = (2 + 3) * of["inner"] + (5 + 3) * of["ends"] + (2 + 3) * of["shortcuts"] + (1 + 2) * of["stem"] + 2 * pooled
    assert (forward, backward) == pytest.approx((72.4, 145.7), abs=0.05)
    page = (ROOT / "docs" / "benchmarks.md").read_text()
    assert f"{forward:.1f} + {backward:.1f} = {forward + backward:.1f} GB" in page
