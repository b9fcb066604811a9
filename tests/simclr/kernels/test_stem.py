"""The stem's kernels against the plain functions that define them, and these against max-pool itself."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from simclr.kernels import norm, stem
from tests.conftest import Within
from tests.support import ahead

# Channels that fill no tile, windows that are cells of more than one tile, one window.
SHAPES = [(3, 64, 6, 10), (2, 24, 8, 4), (2, 130, 4, 4), (1, 16, 2, 2)]
DEFINED, LAUNCHED, OPERATIONS = (
    SimpleNamespace(pool=pool, sums=sums, gradient=gradient)
    for pool, sums, gradient in (
        (stem.pool, stem.pool_gradient_sums, stem.pool_gradient),
        (stem.launch_pool, stem.launch_pool_gradient_sums, stem.launch_pool_gradient),
        (stem.pool_operation, stem.pool_gradient_sums_operation, stem.pool_gradient_operation),
    )
)


def inputs(shape: tuple[int, ...], dtype: torch.dtype, device: str = "cpu", last: bool = True) -> tuple[list[Tensor], list[Tensor]]:
    """x, of few different values, so that windows have equal ones, and the pooled gradient; five numbers per channel."""
    random = torch.Generator().manual_seed(0)
    n, c, h, w = shape
    x, grad = (2 * torch.randn(shape, generator=random)).round() / 2, torch.randn(n, c, h // 2, w // 2, generator=random)
    numbers = [torch.randn(c, generator=random) for _ in range(5)]
    layout = torch.channels_last if last else torch.contiguous_format
    return [t.to(device, dtype, memory_format=layout) for t in (x, grad)], [n.to(device) for n in numbers]


def every_pass(of: Any, tensors: list[Tensor], numbers: list[Tensor], which: Tensor | None = None) -> dict[str, Tensor]:
    """Backward with this forward's choices, or with those given."""
    (x, grad), (mean, scale, level, slope, offset) = tensors, numbers
    pooled, own = of.pool(x, scale, level)
    which = own if which is None else which
    gradient = of.gradient(grad, which, x, scale, slope, offset)
    return {"pooled": pooled, "which": own, "sums": of.sums(grad, which, x, mean), "gradient": gradient}


def differences(of: Any, dtype: torch.dtype, device: str = "cpu", last: bool = True) -> list[tuple[str, float, float]]:
    """(what, difference from the definition in float64 of the same numbers, bound), each relative to the largest entry. The choice is
    that of `dtype`, by whose rounding it is defined."""
    found = []
    for shape in SHAPES:
        tensors, numbers = inputs(shape, dtype, device, last)
        which = stem.pool(tensors[0].cpu(), *(n.cpu() for n in numbers[1:3]))[1]
        ours = every_pass(of, tensors, numbers)
        exact = every_pass(DEFINED, [t.double().cpu() for t in tensors], [n.double().cpu() for n in numbers], which)
        found.append((f"{dtype}, which", float((ours["which"].cpu() != which).sum()), 0.5))
        for name in ("pooled", "sums", "gradient"):
            bound = 1e-6 if ours[name].dtype == torch.float32 else {torch.float16: 2**-11, torch.bfloat16: 2**-8}[dtype]
            off = float((ours[name].cpu().double() - exact[name]).abs().max() / exact[name].abs().max())
            found.append((f"{dtype}, {name}", off, bound))
    return found


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_definition_is_torchs_pooling_of_the_map(within: Within, dtype: torch.dtype) -> None:
    for shape in SHAPES:
        (x, grad), (_, scale, level, _, _) = inputs(shape, dtype)
        others = torch.float64 if dtype == torch.float64 else torch.float32
        scale, level, zeros = scale.to(others), level.to(others), torch.zeros_like(level, dtype=others)
        y = norm.affine(x, scale, level, None, None, True).requires_grad_()
        pooled = F.max_pool2d(y, 3, 2, 0, ceil_mode=True)
        (expected,) = torch.autograd.grad(pooled, y, grad)
        ours, which = stem.pool(x, scale, level)
        assert torch.equal(ours, pooled) and which.dtype == torch.uint8
        # The map's ReLU then cuts where y is 0. torch adds up to four gradients in bfloat16.
        found = stem.pool_gradient(grad, which, x, torch.ones_like(scale), zeros, zeros)
        expected = torch.where(y > 0, expected, 0.0)
        within(f"gradient, {dtype}", float((found - expected).detach().abs().max()), 2**-4 if dtype == torch.bfloat16 else 1e-6)


def interpreted() -> list[tuple[str, float, float]]:
    # The interpreter truncates bfloat16. float16, which takes the same way through the kernels, replaces it here.
    return differences(LAUNCHED, torch.float32) + differences(LAUNCHED, torch.float16, last=False)


def test_kernels_equal_the_definition(within: Within) -> None:
    found = ahead.interpreted(__name__)
    assert len(found) == 2 * 4 * len(SHAPES)
    for what, deviation, bound in found:
        within(what, deviation, bound)


def test_operations_give_what_they_promise() -> None:
    """torch's own check of shapes, dtypes and strides; and on a CPU they are the definition."""
    (x, grad), (mean, scale, level, slope, offset) = inputs(SHAPES[0], torch.bfloat16)
    _, which = stem.pool(x, scale, level)
    for operation, arguments in (
        (stem.pool_operation, (x, scale, level)),
        (stem.pool_gradient_sums_operation, (grad, which, x, mean)),
        (stem.pool_gradient_operation, (grad, which, x, scale, slope, offset)),
    ):
        torch.library.opcheck(operation, arguments, test_utils=("test_schema", "test_faketensor"))
    tensors, numbers = inputs(SHAPES[1], torch.float32, last=False)
    for ours, theirs in zip(*(every_pass(of, tensors, numbers).values() for of in (OPERATIONS, DEFINED)), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(("capability", "dtype"), [(80, "bf16"), (90, "fp32"), (90, "bf16"), (100, "bf16")])
def test_the_assembler_spills_nothing(capability: int, dtype: str) -> None:
    """For a stem of 64 channels; four blocks of 128 threads fit a multiprocessor's 65,536 registers."""
    pytest.importorskip("triton")
    from simclr.kernels import stem_triton as t

    _, _, tile = stem._grid(torch.empty(1024, 64, 112, 112, device="meta"))
    kinds = dict.fromkeys(("cells", "per", "H", "W", "C"), "i32") | dict.fromkeys(("x", "grad", "out"), f"*{dtype}") | {"which": "*u8"}
    kinds |= dict.fromkeys(("partial", "mean", "scale", "level", "slope", "offset"), "*fp32")
    for kernel in (t.pool_kernel, t.pool_gradient_sums_kernel, t.pool_gradient_kernel):
        given: dict[str, Any] = {name: tile.get(name, kinds.get(name)) for name in kernel.arg_names}
        report = ahead.compiled(kernel, given, capability, aligned=("C", "per", "H", "W", "cells"))
        print(report.line(f"{kernel.__name__} {dtype} sm_{capability}"))
        assert ahead.fits(report, registers=128, shared=8 * 1024)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_on_the_device_kernels_equal_the_definition(within: Within, dtype: torch.dtype) -> None:
    for what, deviation, bound in differences(OPERATIONS, dtype, "cuda") + differences(OPERATIONS, dtype, "cuda", last=False):
        if "which" in what:  # the map is rounded once there and twice on a CPU, which may decide between two neighbours of 8 bits
            continue
        within(what, deviation, bound)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_the_device_the_stem_of_resnet_50_gives_the_same_bits_twice() -> None:
    tensors, numbers = inputs((64, 64, 112, 112), torch.bfloat16, "cuda")
    once, again = (every_pass(OPERATIONS, tensors, numbers) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(once.values(), again.values(), strict=True))
