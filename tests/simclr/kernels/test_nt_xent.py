"""Kernels against the plain functions that define them; Triton's through its interpreter, and on a GPU where there is one."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from simclr import loss as losses
from simclr.kernels import nt_xent as kernels
from simclr.loss import nt_xent
from tests.conftest import Within


def unit(rows: int, d: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return F.normalize(torch.randn(rows, d, dtype=dtype, generator=torch.Generator().manual_seed(seed)), dim=1)


def definition(queries: Tensor, keys: Tensor, offset: int, temperature: float) -> Tensor:
    """Eq. 1 over given keys, in the words of cross entropy."""
    own = offset + torch.arange(len(queries))
    logits = (queries @ keys.T / temperature).scatter(1, own[:, None], float("-inf"))
    return F.cross_entropy(logits, own.roll(len(queries) // 2))


def graded(function: Callable[..., Tensor], queries: Tensor, keys: Tensor, *rest: Any) -> list[Tensor]:
    """Value and both gradients; a factor checks that the incoming gradient is used."""
    q, k = queries.clone().requires_grad_(), keys.clone().requires_grad_()
    value = function(q, k, *rest)
    return [value.detach(), *torch.autograd.grad(3 * value, (q, k))]


def compared(within: Within, name: str, ours: list[Tensor], theirs: list[Tensor], bound: float) -> None:
    for part, a, b in zip(("value", "queries' gradient", "keys' gradient"), ours, theirs, strict=True):
        within(f"{name}, {part}", float((a.double() - b.double()).abs().max() / b.double().abs().max()), bound)


CASES = [(8, 8, 0, 16, 0.5), (24, 72, 24, 32, 0.1), (66, 132, 66, 128, 0.05), (6, 200, 100, 7, 1.0)]


@pytest.mark.parametrize(("rows", "columns", "offset", "d", "temperature"), CASES)
@pytest.mark.parametrize("block", [1, 500, 1 << 22])
def test_blocks_of_rows_equal_the_definition(
    within: Within, rows: int, columns: int, offset: int, d: int, temperature: float, block: int
) -> None:
    keys = unit(columns, d)
    for dtype, bound in ((torch.float64, 1e-12), (torch.float32, 1e-6)):
        queries, all_keys = keys[offset : offset + rows].to(dtype), keys.to(dtype)
        theirs = graded(definition, keys[offset : offset + rows], keys, offset, temperature)
        ours = graded(kernels.streamed, queries, all_keys, offset, temperature, block)
        compared(within, str(dtype), ours, theirs, bound)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_wide_rows_of_few_bits_are_summed_in_float32(within: Within, dtype: torch.dtype) -> None:
    """768 dimensions fit no tile. Against float64 of the same rows, the only difference is the rounding of the gradient itself."""
    keys = unit(400, 768).to(dtype)
    queries = keys[200:300].contiguous()
    theirs = graded(definition, queries.double(), keys.double(), 200, 0.1)
    ours = graded(kernels.streamed, queries, keys, 200, 0.1)
    assert ours[0].dtype == torch.float32 and ours[1].dtype == dtype
    for part, a, b, bound in zip(("value", "queries' gradient", "keys' gradient"), ours, theirs, (1e-6, 4e-3, 4e-3), strict=True):
        within(f"{dtype}, {part}", float((a.double() - b.double()).abs().max() / b.abs().max()), bound)


def test_a_large_batch_takes_the_blocks_and_its_gradient_is_the_definitions(within: Within, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through `nt_xent`, with rows of any length, below and above the threshold."""
    z = 3 * torch.randn(96, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    found = []
    for threshold in (1 << 22, 0):
        monkeypatch.setattr(losses, "STREAMED_FROM", threshold)
        own = z.clone().requires_grad_()
        value = nt_xent(own, 0.2)
        found.append((value.detach(), *torch.autograd.grad(value, own)))
    for part, a, b in zip(("value", "gradient"), *found, strict=True):
        within(part, float((a - b).abs().max()), 1e-12)


def test_memory_is_flat_in_the_batch() -> None:
    """At N = 4,096 the logits alone would take 256 MiB, and the written-out loss four times that."""
    z = torch.randn(8_192, 16, generator=torch.Generator().manual_seed(0)).requires_grad_()
    nt_xent(z[:64], 0.1).backward()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    nt_xent(z, 0.1).backward()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 * 1024  # KiB


def interpreted() -> list[tuple[str, float, float]]:
    """Differences of Triton's kernels, run in Python on CPU tensors, from the definition: (name, difference, bound)."""
    found: list[tuple[str, float, float]] = []
    # The interpreter multiplies the bits of bfloat16. float16, which takes the same way through the kernels, replaces it here.
    for dtype, bound in ((torch.float32, 1e-6), (torch.float16, 2e-2)):
        for rows, columns, offset, d, temperature in CASES:
            keys = unit(columns, d).to(dtype)
            queries = keys[offset : offset + rows].contiguous()
            theirs = graded(definition, queries.double(), keys.double(), offset, temperature)
            lse, positive = kernels.triton_forward(queries, keys, offset, temperature)
            d_queries, d_keys = kernels.triton_backward(queries, keys, lse, offset, temperature)
            scale = 3 / (rows * temperature)
            ours = [(lse - positive).mean(), d_queries * scale, d_keys * scale]
            compared(lambda *one: found.append(one), f"{dtype}, {rows} rows, {columns} keys", ours, theirs, bound)
    return found


def test_tiles_equal_the_definition(within: Within) -> None:
    """In a process of its own: Triton decides at its import whether it is interpreted."""
    triton = pytest.importorskip("triton")
    if triton.__version__.startswith("3.6.") and np.lib.NumpyVersion(np.__version__) >= "2.4.0":
        pytest.skip("Triton 3.6 interprets kernels by int() of arrays of one element, which numpy refuses since 2.4")
    program = "import json; from tests.simclr.kernels.test_nt_xent import interpreted; print(json.dumps(interpreted()))"
    done = subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert len(found) == 2 * 3 * len(CASES)
    for what, deviation, bound in found:
        within(what, deviation, bound)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_tiles_on_the_device_equal_the_definition(within: Within, dtype: torch.dtype, bound: float) -> None:
    """float32 is multiplied as three TF32 products: 21 bits of each factor, so a cosine may be 2^-21 off, and a logit 1 / τ times that."""
    for rows, columns, offset, d, temperature in [*CASES, (2048, 4096, 2048, 128, 0.1)]:
        keys = unit(columns, d).to(dtype)
        queries = keys[offset : offset + rows].contiguous()
        theirs = graded(definition, queries.double(), keys.double(), offset, temperature)
        ours = graded(kernels.streamed, queries.cuda(), keys.cuda(), offset, temperature)
        compared(within, str(dtype), [t.cpu() for t in ours], theirs, bound)
