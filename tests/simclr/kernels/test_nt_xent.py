"""NT-Xent by blocks of rows against the definition. The tiles' tests are in `test_nt_xent_tiles`."""

from __future__ import annotations

import resource
from collections.abc import Callable
from typing import Any

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
    names = ("value", "queries' gradient", "keys' gradient")[: len(ours)]
    for part, a, b in zip(names, ours, theirs, strict=True):
        within(f"{name}, {part}", float((a.double() - b.double()).abs().max() / b.double().abs().max()), bound)


# Queries, keys, the first key of the queries' own, dimensions, τ.
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
