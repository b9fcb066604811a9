"""LARS and the schedule against the official code's numbers."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import nn

from simclr import optim
from simclr.config import Optim, SimCLR, Train
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


def steps(nesterov: bool, device: str = "cpu", dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    """Weights and momentum after four steps, of tensors of several shapes, a channels-last one and one of zeros among them."""
    random = torch.Generator().manual_seed(0)
    shapes = [(4, 3, 3, 3), (7, 5), (6,), (3, 2)]
    values = [torch.randn(shape, dtype=torch.float64, generator=random) for shape in shapes]
    values[3].zero_()
    params = [nn.Parameter(v.to(device, dtype)) for v in values]
    params[0].data = params[0].data.to(memory_format=torch.channels_last)
    optimizer = LARS([{"params": params[:2]}, {"params": params[2:], "adapt": False}], lr=0.0, weight_decay=1e-2, nesterov=nesterov)
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(3, 2, device=device, dtype=dtype))]})
    params.append(optimizer.param_groups[2]["params"][0])
    for lr in (0.5, 0.4, 0.3, 0.2):
        for group in optimizer.param_groups:
            group["lr"] = lr
        for p in params:
            p.grad = torch.empty_like(p).copy_(torch.randn(p.shape, dtype=torch.float64, generator=random))
        optimizer.step()
    return [*(p.detach().cpu() for p in params), *(optimizer.state[p]["momentum_buffer"].cpu() for p in params)]


@pytest.mark.parametrize("nesterov", [False, True])
def test_the_form_for_gpus_computes_the_same_step(within: Within, monkeypatch: pytest.MonkeyPatch, nesterov: bool) -> None:
    expected, called = steps(nesterov), []
    follow = optim._follow
    monkeypatch.setattr(optim, "_follow", lambda *a: (called.append(len(a[0])), follow(*a)))
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    found = steps(nesterov)
    monkeypatch.undo()
    assert called == [2, 1] * 4
    for ours, theirs in zip(found, expected, strict=True):
        within(f"weights and momentum, {'with' if nesterov else 'without'} Nesterov", float((ours - theirs).abs().max()), 1e-13)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("nesterov", [False, True])
def test_on_the_device_the_step_is_the_cpus_in_few_launches(within: Within, nesterov: bool) -> None:
    for dtype, bound in ((torch.float64, 1e-13), (torch.float32, 1e-5)):
        for ours, theirs in zip(steps(nesterov, "cuda", dtype), steps(nesterov), strict=True):
            within(f"{dtype}", float((ours.double() - theirs).abs().max()), bound)
    launches = []
    for count in (4, 54):
        params = [nn.Parameter(torch.randn(64, 33, device="cuda")) for _ in range(count)]
        optimizer = LARS(params, lr=0.1, nesterov=nesterov)
        for _ in range(2):  # the first step makes the momentum
            for p in params:
                p.grad = torch.randn_like(p)
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
                optimizer.step()
                torch.cuda.synchronize()
        launches.append(sum(event.count for event in seen.key_averages() if event.device_type == torch.autograd.DeviceType.CUDA))
    assert 0 < launches[1] <= launches[0] + 10, launches


def test_schedule_equals_the_official_table(within: Within) -> None:
    for row in json.loads((GOLDEN / "schedule.json").read_text()):
        n, examples = row["batch_size"], row["num_examples"]
        config = SimCLR(
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
    kernels, rest = parameter_groups(module, Optim(weight_decay=1e-4), lambda step: 0.1, 1)
    assert [p.ndim for p in kernels.params] == [4, 2] and kernels.settings["weight_decay"] == 1e-4 and kernels.settings["adapt"]
    assert [p.ndim for p in rest.params] == [1, 1, 1, 1] and rest.settings["weight_decay"] == 0 and not rest.settings["adapt"]


def test_a_classifiers_kernel_decays_and_does_not_adapt() -> None:
    """As in the official code for `head_supervised`."""
    module = nn.ModuleDict({"encoder": nn.Linear(4, 3), "classifier": nn.Linear(3, 2)})
    kernels, rest, classifier = parameter_groups(module, Optim(weight_decay=1e-4), lambda step: 0.1, 1)
    assert len(kernels.params) == 1 and len(rest.params) == 2
    assert classifier.params[0] is module["classifier"].weight
    assert classifier.settings["weight_decay"] == 1e-4 and not classifier.settings["adapt"]


def test_unknown_rule() -> None:
    with pytest.raises(ValueError, match="expected 'linear' or 'sqrt'"):
        lr_peak(0.3, 256, "cubic")  # type: ignore[arg-type]
