"""Every method on a GPU: its first steps are those of the CPU, and it trains compiled in bfloat16."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch

from simclr.config import Config, Loss
from simclr.train import Start, train
from tests.conftest import Within
from tests.simclr.methods import test_byol, test_dino, test_mae, test_mocov3, test_swav
from tests.simclr.test_compile import MOCO, VIT
from tests.support.small import TINY

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

METHODS = {
    "SimCLR": TINY,
    "SimCLR with a queue": dataclasses.replace(TINY, loss=Loss(temperature=0.2, memory=96)),
    "MoCo": MOCO,
    "MoCo v3": test_mocov3.SMALL,
    "BYOL": test_byol.SMALL,
    "SwAV": test_swav.SMALL,
    "DINO": test_dino.SMALL,
    "DINO, ViT": dataclasses.replace(test_dino.SMALL, encoder=VIT),
    "MAE": test_mae.SMALL,
}


def losses(config: Config, data: Path, device: str) -> list[float]:
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, batch_size=24, steps=4, checkpoint_every_steps=4))
    return [report.metrics["train/loss"] for report in train(config, Start(data, torch.device(device)))]


@pytest.mark.parametrize("name", METHODS)
def test_the_first_steps_are_the_cpus(name: str, within: Within, patterns: Path) -> None:
    """In float64, behind views in float32, whose last bits differ: four steps make of 4e-6 somewhat more."""
    config = dataclasses.replace(METHODS[name], train=dataclasses.replace(METHODS[name].train, precision="float64"))
    there, here = losses(config, patterns, "cuda"), losses(config, patterns, "cpu")
    within("first loss", abs(there[0] - here[0]) / abs(here[0]), 1e-5)
    within("fourth loss", abs(there[3] - here[3]) / abs(here[3]), 1e-3)


@pytest.mark.parametrize("name", METHODS)
def test_it_trains_compiled_in_bfloat16(name: str, within: Within, patterns: Path) -> None:
    config = METHODS[name]
    settings = dataclasses.replace(config.train, precision="bfloat16", compile=True)
    there = losses(dataclasses.replace(config, train=settings), patterns, "cuda")
    exact = losses(dataclasses.replace(config, train=dataclasses.replace(config.train, precision="float32")), patterns, "cpu")
    assert all(math.isfinite(loss) for loss in there)
    within("first loss", abs(there[0] - exact[0]) / abs(exact[0]), 0.05)
