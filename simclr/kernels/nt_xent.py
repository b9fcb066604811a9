"""NT-Xent without the table of logits: tile by tile on a GPU (`simclr.kernels.nt_xent_tiles`), by blocks of rows elsewhere.

Written out, the loss of N images stores 4 N² logits several times over: 48 GiB at N = 32,768. Here forward keeps one number
per row, of its log-sum-exp, and backward computes each tile again from it. Both versions take unit rows and give the mean over rows of
Eq. 1 (arXiv:2002.05709) with its gradient; `simclr.loss.nt_xent` is the definition that they are tested against.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from simclr.kernels import nt_xent_tiles as tiles
from simclr.kernels.device import gpu

_BLOCK = 1 << 22  # logits at a time on a CPU: 16 MiB in float32, which stay in the cache


def streamed(queries: Tensor, keys: Tensor, offset: int, temperature: float, block: int = _BLOCK) -> Tensor:
    """Mean over this rank's rows of their loss, a scalar.

    queries (2n, d): this rank's unit rows, [view 0 of n images; view 1]. keys (2N, d): every rank's, of which this rank's begin
    at row `offset`; the very tensor `queries` where there are no others, which saves two of five products in tiles. Without tiles, `block`
    logits are in memory at a time. For bfloat16 and float16 rows the products' sums, the log-sum-exp and the loss are float32 in both
    versions. In tiles, a cosine of float32 rows is exact to 3 · 2^-22 (`simclr.kernels.nt_xent_tiles`).
    """
    loss: Tensor = _Streamed.apply(queries, None if keys is queries else keys, offset, temperature, block)
    return loss


class _Streamed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, queries: Tensor, keys: Tensor | None, offset: int, temperature: float, block: int) -> Tensor:
        ctx.offset, ctx.temperature, ctx.block, ctx.tiled, ctx.dtype = offset, temperature, block, tiles.in_tiles(queries), queries.dtype
        if ctx.tiled:
            queries = tiles.parts(queries)
            keys = None if keys is None else tiles.parts(keys)
            losses, kept = tiles.forward(queries, queries if keys is None else keys, offset, temperature, gpu(queries.device))
        else:
            queries = queries.contiguous()
            keys = None if keys is None else keys.contiguous()
            kept, positive = _forward(queries, queries if keys is None else keys, offset, temperature, block)
            losses = kept - positive
        ctx.save_for_backward(queries, keys, kept)
        return losses.mean()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None, None, None]:
        queries, keys, kept = ctx.saved_tensors
        d_keys: Tensor | None
        if ctx.tiled:
            on = gpu(queries.device)
            d_queries, d_keys = tiles.gradients(queries, keys, kept, ctx.offset, ctx.temperature, grad, ctx.dtype, on)
            return d_queries, d_keys, None, None, None
        d_queries, d_keys = _backward(queries, queries if keys is None else keys, kept, ctx.offset, ctx.temperature, ctx.block)
        scale = grad / (len(queries) * ctx.temperature)
        d_queries, d_keys = (d_queries * scale).to(ctx.dtype), (d_keys * scale).to(ctx.dtype)
        return (d_queries + d_keys, None, None, None, None) if keys is None else (d_queries, d_keys, None, None, None)


# ── Blocks of rows, in plain torch: for CPUs, XLA and wide rows ────────────────────────────────────────────────────


def _wide(x: Tensor) -> Tensor:
    """x in float32 at least. A log-sum-exp of bfloat16 logits has two digits: the gradient was off by a tenth of its largest entry."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def _logits(queries: Tensor, keys: Tensor, first: int, last: int, offset: int, temperature: float) -> tuple[Tensor, Tensor]:
    """(rows, 2N) logits of the rows first … last, −inf at each row's own column, and (rows, 1) columns of the positives."""
    row = torch.arange(first, last, device=queries.device)[:, None]
    logits = (queries[first:last] @ keys.T).div_(temperature).scatter_(1, offset + row, float("-inf"))
    return logits, offset + (row + len(queries) // 2) % len(queries)


def _forward(queries: Tensor, keys: Tensor, offset: int, temperature: float, block: int) -> tuple[Tensor, Tensor]:
    queries, keys = _wide(queries), _wide(keys)
    rows = max(block // len(keys), 1)
    lse, positive = queries.new_empty(len(queries)), queries.new_empty(len(queries))
    for first in range(0, len(queries), rows):
        last = min(first + rows, len(queries))
        logits, partner = _logits(queries, keys, first, last, offset, temperature)
        positive[first:last] = logits.gather(1, partner)[:, 0]
        lse[first:last] = logits.logsumexp(1)
    return lse, positive


def _backward(queries: Tensor, keys: Tensor, lse: Tensor, offset: int, temperature: float, block: int) -> tuple[Tensor, Tensor]:
    """Gradients of temperature × the sum of losses: Σ (p − [positive]) k, and the same towards the keys."""
    queries, keys = _wide(queries), _wide(keys)
    rows = max(block // len(keys), 1)
    d_queries, d_keys = torch.empty_like(queries), torch.zeros_like(keys)
    for first in range(0, len(queries), rows):
        last = min(first + rows, len(queries))
        logits, partner = _logits(queries, keys, first, last, offset, temperature)
        p = logits.sub_(lse[first:last, None]).exp_()
        p.scatter_add_(1, partner, p.new_full(partner.shape, -1.0))
        torch.matmul(p, keys, out=d_queries[first:last])
        d_keys.addmm_(p.T, queries[first:last])
    return d_queries, d_keys
