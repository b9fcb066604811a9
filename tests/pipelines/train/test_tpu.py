"""Tests for TPUs without one: no call that only CUDA has, one program for every batch, Ray's scheduling of slices."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

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

# The hand-written kernel of GPUs.
NOT_ON_THE_PATH = {"simclr/kernels/nt_xent_triton.py", "pipelines/train/plan.py"}
ONLY_CUDA = {"cuda", "pin_memory", "record_stream"}
# `_after_copy` is called by `on_device` alone, which asks. A type's name is there in every build of torch.
ASKED_ELSEWHERE = [
    ("simclr/data/loader.py", "computing = torch.cuda.current_stream(device)"),
    ("simclr/data/loader.py", "part.record_stream(computing)"),
    ("simclr/evaluation/embedding.py", 'room = torch.empty((batch_size, *found.x.shape), pin_memory=device.type == "cuda")'),
    ("simclr/kernels/device.py", "found = torch.cuda.get_device_properties(device)"),  # asked for by `takes_triton`
    ("simclr/telemetry/device_time.py", "Timestamp = float | torch.cuda.Event"),
]


def asks(test: ast.expr, yes: bool) -> bool:
    """Whether it is CUDA where `test` is true (`yes`), or where it is false (not `yes`)."""
    if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        return asks(test.operand, not yes)
    if isinstance(test, ast.BoolOp):  # of `a and b` both hold where it is true, of `a or b` neither where it is false
        return isinstance(test.op, ast.And if yes else ast.Or) and any(asks(value, yes) for value in test.values)
    if isinstance(test, ast.Compare):
        named = any(isinstance(side, ast.Constant) and side.value == "cuda" for side in (test.left, *test.comparators))
        return named and isinstance(test.ops[0], ast.Eq if yes else ast.NotEq)
    return yes and ast.unparse(test).endswith((".is_cuda", "torch.cuda.is_available()"))


def unasked(node: ast.AST, asked: bool = False) -> list[ast.AST]:
    """Uses of what only CUDA has that no question for the device stands before; questions and annotations are no uses."""
    if isinstance(node, ast.If | ast.IfExp):
        body, orelse = (part if isinstance(part, list) else [part] for part in (node.body, node.orelse))
        return [
            *unasked(node.test, asked),
            *within_block(body, asked or asks(node.test, True)),
            *within_block(orelse, asked or asks(node.test, False)),
        ]
    if isinstance(node, ast.Call) and ast.unparse(node) == "torch.cuda.is_available()":
        return []
    if isinstance(node, ast.Attribute) and node.attr in ONLY_CUDA and not asked:
        return [node]
    if isinstance(node, ast.keyword) and node.arg in ONLY_CUDA and not asked:
        return [node]
    found: list[ast.AST] = []
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns"):
            continue
        found += within_block(value, asked) if isinstance(value, list) else unasked(value, asked) if isinstance(value, ast.AST) else []
    return found


def within_block(block: list[Any], asked: bool) -> list[ast.AST]:
    found = []
    for part in block:
        if isinstance(part, ast.AST):
            found += unasked(part, asked)
        if isinstance(part, ast.If) and isinstance(part.body[-1], ast.Return | ast.Raise):
            asked = asked or asks(part.test, False)  # behind it the device is there
    return found


def test_what_only_cuda_has_stands_behind_a_question_for_the_device() -> None:
    found, uses = [], 0
    for path in sorted(path for room in ("simclr", "pipelines/train") for path in (ROOT / room).rglob("*.py")):
        name, text = str(path.relative_to(ROOT)), path.read_text()
        if name not in NOT_ON_THE_PATH:
            tree = ast.parse(text)
            uses += sum(isinstance(node, ast.Attribute) and node.attr in ONLY_CUDA for node in ast.walk(tree))
            found += [(name, text.splitlines()[use.lineno - 1].strip()) for use in unasked(tree)]  # type: ignore[attr-defined]
    assert found == ASKED_ELSEWHERE and uses > 10
    functions = {f.name: f for f in ast.parse((ROOT / "simclr/data/loader.py").read_text()).body if isinstance(f, ast.FunctionDef)}
    calls = {name: ast.unparse(f).count("_after_copy(") for name, f in functions.items() if name != "_after_copy"}
    assert {name for name, count in calls.items() if count} == {"on_device"}


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("def f(x): torch.cuda.synchronize()", 1),
        ("def f(x):\n if x.type == 'cuda': torch.cuda.synchronize()", 0),
        ("def f(x):\n if x.type == 'cuda': pass\n else: torch.cuda.synchronize()", 1),
        ("def f(x):\n if x.type == 'cuda': torch.cuda.synchronize()\n torch.cuda.synchronize()", 1),
        ("def f(x):\n if x.type != 'cuda': return\n torch.cuda.synchronize()", 0),
        ("def f(x):\n if x.type != 'cuda': pass\n torch.cuda.synchronize()", 1),
        ("def f(x):\n if x.type != 'cpu': return\n torch.cuda.synchronize()", 1),
        ("def f(x, y):\n if y or not torch.cuda.is_available(): return\n empty(pin_memory=True)", 0),
        ("def f(x, y):\n if y and not torch.cuda.is_available(): return\n empty(pin_memory=True)", 1),
        ("def f(x, y): return torch.cuda.memory() if x.type == 'cuda' or y else 0", 1),
        ("def f(x, y): return torch.cuda.memory() if x.is_cuda and y else 0", 0),
        ("def f(x: torch.cuda.Event) -> torch.cuda.Event: y: torch.cuda.Event = g(x)", 0),
        ("def f(x):\n if x.type == 'cuda': pass\ndef g(x): x.cuda()", 1),
    ],
)
def test_a_question_is_told_from_none(code: str, expected: int) -> None:
    assert len(unasked(ast.parse(code))) == expected


def _drawn(n: int, seed: int) -> tuple[Tensor, draw.Drawn]:
    drawn = draw.draw_views(draw.Crop(views=Views(solarise_p=(0.0, 0.5))), seed, 0, np.arange(n))
    x = torch.tensor(np.random.default_rng(seed).random((2 * n, 3, 32, 32)), dtype=torch.float32)
    return x, drawn


def test_one_shape_for_every_draw_gives_the_same_pixels(within: Within) -> None:
    for seed in range(3):
        x, drawn = _drawn(64, seed)
        whole = ops.distort_all(x, drawn.block.flatten(0, 1))
        within("pixels of distort_all", float((whole - ops.distort(x.clone(), drawn.colours)).abs().max()), 1e-5)


def test_the_views_are_one_program() -> None:
    compiled = torch.compile(ops.distort_all, fullgraph=True, dynamic=False, backend="eager")
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):  # type: ignore[attr-defined]
        for seed in range(3):
            x, drawn = _drawn(8, seed)
            assert torch.equal(compiled(x, drawn.block.flatten(0, 1)), ops.distort_all(x, drawn.block.flatten(0, 1)))


class Step(torch.nn.Module):
    """Encoder, head and loss, as the method puts them together."""

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
