"""BatchNorm's kernels against the plain functions that define them, in float64: through Triton's interpreter, and on a GPU where there is
one; and what the assembler says of them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from simclr.kernels import norm as kernels
from tests.conftest import Within
from tests.support import ahead

# Rows that fill no slab, more slabs than one, channels that fill no tile, a matrix, single pixels.
SHAPES = [(9, 64, 5, 5), (17, 24, 3, 4), (40, 200), (3, 16, 1, 1)]
DEFINED = SimpleNamespace(
    sums=kernels.sums,
    affine=kernels.affine,
    gradient_sums=kernels.gradient_sums,
    end_gradient_sums=kernels.end_gradient_sums,
    gradient=kernels.gradient,
)
LAUNCHED = SimpleNamespace(
    sums=kernels.launch_sums,
    affine=kernels.launch_affine,
    gradient_sums=kernels.launch_gradient_sums,
    end_gradient_sums=kernels.launch_end_gradient_sums,
    gradient=kernels.launch_gradient,
)


def inputs(shape: tuple[int, ...], dtype: torch.dtype, device: str = "cpu", last: bool = True) -> tuple[list[Tensor], list[Tensor]]:
    """x, an incoming gradient, a residual (or another gradient), a block's end; and five numbers per channel. Not channels last, they are
    copied into the order that the kernels read."""
    random = torch.Generator().manual_seed(0)
    tensors = [torch.randn(shape, generator=random) for _ in range(4)]
    tensors[0] += 0.5
    tensors[3] = tensors[3].relu()
    if last and len(shape) == 4:
        tensors = [t.to(memory_format=torch.channels_last) for t in tensors]
    numbers = [torch.randn(shape[1], generator=random) for _ in range(5)]
    return [t.to(device, dtype) for t in tensors], [n.to(device) for n in numbers]


def every_pass(of: Any, tensors: list[Tensor], numbers: list[Tensor]) -> dict[str, Tensor]:
    x, grad, residual, end = tensors
    mean, scale, level, slope, offset = numbers
    masked, end_sums = of.end_gradient_sums(grad, residual, x, mean, end)
    found = {"sums": of.sums(x, mean), "end's sums": end_sums, "masked": masked}
    for relu in (False, True):
        found |= {
            f"affine, ReLU {relu}": of.affine(x, scale, level, None, None, relu),
            f"affine with residual, ReLU {relu}": of.affine(x, scale, level, residual, None, relu),
            f"affine with a multiple of it, ReLU {relu}": of.affine(x, scale, level, residual, slope, relu),
            f"gradient's sums, ReLU {relu}": of.gradient_sums(grad, x, mean, scale, level, relu),
            f"gradient, ReLU {relu}": of.gradient(grad, x, scale, level, slope, offset, relu),
        }
    return found


def differences(of: Any, dtype: torch.dtype, device: str = "cpu", last: bool = True) -> list[tuple[str, float, float]]:
    """(what, difference from the definition in float64 of the same numbers, bound), each relative to the largest entry."""
    found = []
    for shape in SHAPES:
        tensors, numbers = inputs(shape, dtype, device, last)
        exact = every_pass(DEFINED, [t.double().cpu() for t in tensors], [n.double().cpu() for n in numbers])
        for name, ours in every_pass(of, tensors, numbers).items():
            theirs = exact[name]
            # The sum of two gradients is rounded, and its rounded values are added up.
            whole = ours.dtype == torch.float32 and (dtype == torch.float32 or name != "end's sums")
            bound = 1e-6 if whole else {torch.float16: 2**-11, torch.bfloat16: 2**-8}[dtype]
            found.append((f"{dtype}, {name}", float((ours.cpu().double() - theirs).abs().max() / theirs.abs().max()), bound))
    return found


def interpreted() -> list[tuple[str, float, float]]:
    # The interpreter truncates bfloat16. float16, which takes the same way through the kernels, replaces it here.
    return differences(LAUNCHED, torch.float32) + differences(LAUNCHED, torch.float16, last=False)


def test_kernels_equal_the_definition(within: Within) -> None:
    found = ahead.interpreted(__name__)
    assert len(found) == 2 * 13 * len(SHAPES)
    for what, deviation, bound in found:
        within(what, deviation, bound)


def test_the_definition_in_few_bits_rounds_its_results_alone(within: Within) -> None:
    """And an operation gives on a CPU what the definition does, in the layout that it promises."""
    for what, deviation, bound in differences(DEFINED, torch.bfloat16) + differences(DEFINED, torch.float32):
        within(what, deviation, bound)
    tensors, numbers = inputs(SHAPES[0], torch.float32, last=False)
    operations = {name: getattr(kernels, f"_{name}") for name in vars(DEFINED)}
    ours, defined = (every_pass(of, tensors, numbers) for of in (SimpleNamespace(**operations), DEFINED))
    for name, theirs in defined.items():
        assert torch.equal(ours[name], theirs), name
        assert theirs.ndim == 2 or ours[name].is_contiguous(memory_format=torch.channels_last), name


@pytest.mark.parametrize("shape", [(4, 6, 3, 3), (5, 6)])
def test_operations_promise_what_they_give(shape: tuple[int, ...]) -> None:
    """torch's own check: their fakes have the shapes, dtypes and strides of their results, and they change no argument."""
    (x, grad, residual, end), (mean, scale, level, slope, offset) = inputs(shape, torch.bfloat16)
    for operation, arguments in (
        (kernels._sums, (x, mean)),
        (kernels._affine, (x, scale, level, residual, slope, True)),
        (kernels._affine, (x, scale, level, None, None, False)),
        (kernels._gradient_sums, (grad, x, mean, scale, level, True)),
        (kernels._end_gradient_sums, (grad, residual, x, mean, end)),
        (kernels._gradient, (grad, x, scale, level, slope, offset, True)),
    ):
        torch.library.opcheck(operation, arguments, test_utils=("test_schema", "test_faketensor"))


# ── The assembler ──────────────────────────────────────────────────────────────────────────────────────────────────

# 256 channels and 2,048 are the same program: both in tiles of 128.
CASES = [(80, "bf16", 256), (90, "bf16", 64), (90, "fp32", 256), (100, "fp32", 64)]


def arguments(kernel: Any, dtype: str, channels: int, flags: dict[str, Any]) -> dict[str, Any]:
    """Types and settings of a launch for an activation with so many channels."""
    grid = kernels._Grid.over(torch.empty(1, channels, 1, 1, device="meta"))
    found: dict[str, Any] = dict.fromkeys(("rows", "per", "C", "slabs"), "i32")
    found |= dict.fromkeys(("x", "grad", "other", "residual", "y", "masked", "out"), f"*{dtype}")
    found |= dict.fromkeys(("shift", "partial", "mean", "scale", "level", "times", "slope", "offset"), "*fp32")
    found |= {"SLABS": kernels._SLABS, "COLUMNS": 16, "out": "*fp32"} if "SLABS" in kernel.arg_names else {**grid.tile, **flags}
    return {name: found[name] for name in kernel.arg_names}


@pytest.mark.parametrize(("capability", "dtype", "channels"), CASES)
def test_the_assembler_spills_nothing(capability: int, dtype: str, channels: int) -> None:
    """Four blocks of 128 threads fit a multiprocessor's 65,536 registers, and every load and store of an activation is of 16 bytes."""
    pytest.importorskip("triton")
    from simclr.kernels import norm_triton as t

    variants: list[tuple[Any, dict[str, Any], int, int]] = [  # settings, tensors that are loaded, and stored
        (t.sums_kernel, {}, 1, 0),
        (t.affine_kernel, {"RESIDUAL": True, "TIMES": True, "RELU": True}, 2, 1),
        (t.gradient_sums_kernel, {"RELU": True}, 2, 0),
        (t.end_gradient_sums_kernel, kernels._FOUR_TENSORS, 4, 1),
        (t.gradient_kernel, {"RELU": True}, 2, 1),
    ]
    if (capability, dtype, channels) in ((80, "bf16", 256), (90, "bf16", 64), (100, "fp32", 64)):
        variants.append((t.total_kernel, {}, 0, 0))
    for kernel, flags, loads, stores in variants:
        report = ahead.compiled(kernel, arguments(kernel, dtype, channels, flags), capability, aligned=("C", "per"))
        print(report.line(f"{kernel.__name__} {flags or ''} {dtype} sm_{capability} c = {channels}"))
        assert ahead.fits(report, registers=128, shared=8 * 1024)
        each = (1 if dtype == "bf16" else 2) * flags.get("DEEP", kernels._DEEP)
        assert report.instructions.get("LDG.E.128", 0) >= each * loads and report.instructions.get("STG.E.128", 0) == each * stores


def test_256_channels_and_2048_are_one_program() -> None:
    settings = {c: kernels._Grid.over(torch.empty(1024, c, 7, 7, device="meta")) for c in (64, 256, 2048)}
    assert settings[256].tile == settings[2048].tile == {"DEEP": 4, "ROWS": 8, "COLUMNS": 128}
    for c, grid in settings.items():
        assert grid.slabs * grid.per >= grid.rows > (grid.slabs - 1) * grid.per and grid.grid[0] * grid.tile["COLUMNS"] == c
        assert grid.grid[0] * grid.grid[1] <= kernels._PROGRAMS


# ── On the device ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_on_the_device_kernels_equal_the_definition(within: Within, dtype: torch.dtype) -> None:
    for what, deviation, bound in differences(kernels.KERNELS, dtype, "cuda") + differences(kernels.KERNELS, dtype, "cuda", last=False):
        within(what, deviation, bound)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("shape", [(64, 64, 112, 112), (64, 256, 56, 56), (64, 2048, 7, 7)])
def test_on_the_device_the_shapes_of_resnet_50_give_the_same_bits_twice(within: Within, shape: tuple[int, ...]) -> None:
    tensors, numbers = inputs(shape, torch.bfloat16, "cuda")
    once, again = (every_pass(kernels.KERNELS, tensors, numbers) for _ in range(2))
    defined: dict[str, Tensor] = every_pass(DEFINED, [t.double() for t in tensors], [n.double() for n in numbers])
    for name, ours in once.items():
        assert torch.equal(ours, again[name]), name
        bound = 1e-5 if ours.dtype == torch.float32 and name != "end's sums" else 2**-8
        within(name, float((ours.double() - defined[name]).abs().max() / defined[name].abs().max()), bound)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_the_device_offsets_beyond_32_bits(within: Within) -> None:
    """2³¹ elements and some, in bfloat16: 4 GiB each of input and output."""
    rows = 2**31 // 64 + 1000
    if torch.cuda.get_device_properties(0).total_memory < 20 * 2**30:
        pytest.skip("needs 20 GiB")
    x = torch.ones(rows, 64, dtype=torch.bfloat16, device="cuda")
    x[-1] = 3
    zeros, ones = torch.zeros(64, device="cuda"), torch.ones(64, device="cuda")
    first, second = kernels.launch_sums(x, zeros)
    within("sum", float((first.double() / (rows + 2) - 1).abs().max()), 1e-6)
    within("sum of squares", float((second.double() / (rows + 8) - 1).abs().max()), 1e-6)
    y = kernels.launch_affine(x, ones, ones, None, None, True)
    assert y[-1].eq(4).all() and y[:1000].eq(2).all() and y[-1000:-1].eq(2).all()
