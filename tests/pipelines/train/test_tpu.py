"""Tests for TPUs without one: no call that only CUDA has, one program for every batch, Ray's scheduling of slices."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from simclr.config import Views
from simclr.data.loader import Batch
from simclr.loss import nt_xent
from simclr.methods.method import Start
from simclr.methods.simclr import build_model, simclr
from simclr.optim import build_optimizer
from simclr.recipes import patterns_tiny
from simclr.train import take_step
from simclr.views import draw, ops
from tests.conftest import Within
from tests.support.paths import ROOT

# torch.cuda on the training path: each use is behind a check of the device; the check is the value.
GUARDED = {
    "simclr/telemetry/guards.py": 'device.type == "cuda"',
    "simclr/telemetry/device_time.py": 'device.type != "cuda"',
    "simclr/data/loader.py": 'device.type != "cuda"',
    "simclr/data/memory.py": "not torch.cuda.is_available()",
    "simclr/precision.py": 'device.type != "cuda"',
}
# The hand-written kernel of GPUs, and measurements.
NOT_ON_THE_PATH = {"simclr/kernels/nt_xent_triton.py"}


def test_only_guarded_places_name_cuda() -> None:
    found = set()
    for path in (ROOT / "simclr").rglob("*.py"):
        name = str(path.relative_to(ROOT))
        if name in NOT_ON_THE_PATH:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and node.attr == "cuda":
                found.add(name)
    assert found <= set(GUARDED)
    for name, question in GUARDED.items():
        assert question in (ROOT / name).read_text()


def _colours(n: int, seed: int) -> tuple[Tensor, draw.Colours]:
    drawn = draw.draw_colours(Views(), seed, 0, np.arange(n))
    x = torch.tensor(np.random.default_rng(seed).random((2 * n, 3, 32, 32)), dtype=torch.float32)
    return x, drawn


def _tensors(c: draw.Colours) -> list[Tensor]:
    return [torch.as_tensor(part) for part in (c.jitter, c.order, c.factors.astype(np.float32), c.grey, c.blur_sigma.astype(np.float32))]


def test_one_shape_for_every_draw_gives_the_same_pixels(within: Within) -> None:
    for seed in range(3):
        x, drawn = _colours(64, seed)
        whole = ops.distort_all(x, *_tensors(drawn))
        within("pixels of distort_all", float((whole - ops.distort(x.clone(), drawn)).abs().max()), 1e-5)


def test_the_views_are_one_program() -> None:
    compiled = torch.compile(ops.distort_all, fullgraph=True, dynamic=False, backend="eager")
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):  # type: ignore[attr-defined]
        for seed in range(3):
            x, drawn = _colours(8, seed)
            assert torch.equal(compiled(x, *_tensors(drawn)), ops.distort_all(x, *_tensors(drawn)))


class Step(torch.nn.Module):
    """Encoder, head and loss, as `pretrain` puts them together."""

    def __init__(self) -> None:
        super().__init__()
        self.model, self.temperature = build_model(patterns_tiny()).train(), 0.2

    def forward(self, x: Tensor) -> Tensor:
        return nt_xent(self.model({"views": x.unflatten(0, (2, -1))})["z"].flatten(0, 1), self.temperature)


def test_encoder_head_and_loss_are_one_graph_forward_and_backward(within: Within) -> None:
    torch._dynamo.reset()
    step = Step()
    x = torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    plain = step(x)
    plain.backward()
    before = {name: p.grad.clone() for name, p in step.named_parameters() if p.grad is not None}
    step.zero_grad()
    with torch._dynamo.config.patch(error_on_recompile=True):  # type: ignore[attr-defined]
        whole = torch.compile(step, fullgraph=True, dynamic=False, backend="aot_eager")
        loss = whole(x)
        loss.backward()
        whole(x + 1)
    within("loss in one graph", abs(float(loss.detach() - plain.detach())), 1e-6)
    for name, p in step.named_parameters():
        if p.grad is not None:
            within("gradient in one graph", float((p.grad - before[name]).abs().max()), 1e-5)


def test_the_step_can_be_exported() -> None:
    exported = torch.export.export(Step(), (torch.randn(16, 3, 32, 32),))
    shapes = [tuple(node.meta["val"].shape) for node in exported.graph.nodes if isinstance(node.meta.get("val"), Tensor)]
    assert shapes and all(isinstance(size, int) for shape in shapes for size in shape)
    waits = {"nonzero", "item", "_local_scalar_dense", "masked_select", "unique"}
    assert not waits & {str(node.target).removeprefix("aten.").partition(".")[0] for node in exported.graph.nodes}


def test_the_whole_step_takes_its_device_as_it_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a device that is neither CPU nor CUDA (meta: shapes without numbers) a step runs to the optimizer's end."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())  # the one call that meta lacks
    config, device = patterns_tiny(), torch.device("meta")
    method = simclr(config, Start(Path(), device))
    images = torch.zeros((8, 2, 32, 32, 3), dtype=torch.uint8)
    batch = Batch(0, 0, (images,), torch.arange(8), torch.full((8,), -1))
    assert method.inputs(batch, slice(0, 8))["views"].shape == (2, 8, 3, 32, 32)
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, micro_batch=None))
    _, _, loss, _ = take_step(method, method.network, build_optimizer(method.groups, config.optim), config, batch, 0)
    assert loss.device.type == "meta" and all(p.grad is not None for p in method.network.parameters())


def test_libtpu_compiles_network_and_loss_for_a_v5e() -> None:
    """Needs jax, libtpu and torchax, which the lock does not have: see tests/support/tpu_compile.py."""
    for module in ("jax", "libtpu", "torchax"):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed; pip install jax libtpu torchax")
    done = subprocess.run([sys.executable, "-m", "tests.support.tpu_compile"], cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert "loss: compiled for TPU v5 lite" in done.stdout, done.stderr[-3000:]
