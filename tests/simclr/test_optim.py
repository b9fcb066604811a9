"""LARS and the schedule against the official code's numbers."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import nn

from simclr.config import Config, Optim, Train
from simclr.optim import LARS, lr_peak, parameter_groups, warmup_cosine
from tests.conftest import Within
from tests.support.paths import GOLDEN


@pytest.mark.parametrize(("tag", "decay", "nesterov"), [("classic", 1e-4, False), ("classic_wd6", 1e-6, False), ("nesterov", 1e-4, True)])
def test_lars_follows_the_official_trajectory(within: Within, tag: str, decay: float, nesterov: bool) -> None:
    data = np.load(GOLDEN / "lars.npz")
    names = [key.split("|")[1] for key in data.files if key.startswith(f"{tag}|") and key.endswith("|init")]
    assert len(names) >= 7
    plain = [n for n in names if any(skip in n for skip in ("batch_normalization", "bias", "head_supervised"))]
    params = {n: nn.Parameter(torch.tensor(data[f"{tag}|{n}|init"])) for n in names}
    optimizer = LARS(
        [
            {"params": [params[n] for n in names if n not in plain], "weight_decay": decay},
            {"params": [params[n] for n in plain], "weight_decay": 0.0, "adapt": False},
        ],
        lr=0.0,
        nesterov=nesterov,
    )
    for step in range(6):
        for group in optimizer.param_groups:
            group["lr"] = float(data[f"{tag}|lr{step}"])
        for n in names:
            params[n].grad = torch.tensor(data[f"{tag}|{n}|grad{step}"])
        optimizer.step()
        for n in names:
            expected = data[f"{tag}|{n}|after{step}"]
            scale = max(float(np.abs(expected).max()), 1e-3)  # float32, relative to the tensor's scale
            within(tag, float(np.abs(params[n].detach().numpy() - expected).max()) / scale, 1e-6)


def test_schedule_equals_the_official_table(within: Within) -> None:
    for row in json.loads((GOLDEN / "schedule.json").read_text()):
        n, examples = row["batch_size"], row["num_examples"]
        config = Config(
            train=Train(batch_size=n, epochs=row["epochs"]),
            optim=Optim(base_lr=row["base_lr"], scaling=row["rule"], warmup_epochs=row["warmup_epochs"]),
        )
        assert (config.total_steps(examples), config.warmup_steps(examples)) == (row["total_steps"], row["warmup_steps"])
        peak = lr_peak(row["base_lr"], n, row["rule"])
        ours = [warmup_cosine(s, peak, row["warmup_steps"], row["total_steps"]) for s in row["steps"]]
        # float32 rounds the last cosines to 0: relative to the peak there.
        theirs = np.array(row["lr"])
        within("learning rate", float((np.abs(ours - theirs) / np.maximum(np.abs(theirs), 0.1 * peak)).max()), 1e-6)


def test_only_kernels_decay_and_adapt() -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2))
    kernels, rest = parameter_groups(module, 1e-4, lambda step: 0.1)
    assert [p.ndim for p in kernels.params] == [4, 2] and kernels.settings["weight_decay"] == 1e-4 and kernels.settings["adapt"]
    assert [p.ndim for p in rest.params] == [1, 1, 1, 1] and rest.settings["weight_decay"] == 0 and not rest.settings["adapt"]


def test_a_classifiers_kernel_decays_and_does_not_adapt() -> None:
    """As in the official code for `head_supervised`."""
    module = nn.ModuleDict({"encoder": nn.Linear(4, 3), "classifier": nn.Linear(3, 2)})
    kernels, rest, classifier = parameter_groups(module, 1e-4, lambda step: 0.1)
    assert len(kernels.params) == 1 and len(rest.params) == 2
    assert classifier.params[0] is module["classifier"].weight
    assert classifier.settings["weight_decay"] == 1e-4 and not classifier.settings["adapt"]


def test_unknown_rule() -> None:
    with pytest.raises(ValueError, match="expected 'linear' or 'sqrt'"):
        lr_peak(0.3, 256, "cubic")  # type: ignore[arg-type]
