"""NT-Xent without the table of logits: tile by tile, with a running log-sum-exp. Triton on a GPU, blocks of rows elsewhere.

Written out, the loss of N images stores 4 N² logits several times over: 48 GiB at N = 32,768. Here forward keeps one number
per row, the log-sum-exp, and backward computes each tile again from it. Both versions take unit rows and give the mean over rows of Eq. 1
(arXiv:2002.05709) with its gradient; `simclr.loss.nt_xent` is the definition that they are tested against.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_BLOCK = 1 << 22  # logits at a time on a CPU: 16 MiB in float32, which stay in the cache
_TILED = {torch.float32: 32, torch.bfloat16: 64, torch.float16: 64}  # side of a tile: 64 KiB of shared memory at d = 128
_WIDEST = {torch.float32: 256, torch.bfloat16: 512, torch.float16: 512}  # dimensions of z; wider rows go block by block


def in_tiles(x: Tensor) -> bool:
    """Whether rows like x (n, d) are multiplied in their own dtype, in tiles: on a GPU, if a tile holds a row's whole width."""
    return x.is_cuda and x.shape[1] <= _WIDEST.get(x.dtype, 0)


def streamed(queries: Tensor, keys: Tensor, offset: int, temperature: float, block: int = _BLOCK) -> Tensor:
    """Mean over this rank's rows of their loss, a scalar.

    queries (2n, d): this rank's unit rows, [view 0 of n images; view 1]. keys (2N, d): every rank's, of which this rank's begin
    at row `offset`. Without tiles, `block` logits are in memory at a time. For bfloat16 and float16 rows the products' sums, the
    log-sum-exp and the loss are float32 in both versions.
    """
    loss: Tensor = _Streamed.apply(queries, keys, offset, temperature, block)
    return loss


class _Streamed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, queries: Tensor, keys: Tensor, offset: int, temperature: float, block: int) -> Tensor:
        queries, keys = queries.contiguous(), keys.contiguous()
        tiled = in_tiles(queries)
        if tiled:
            lse, positive = triton_forward(queries, keys, offset, temperature)
        else:
            lse, positive = _forward(queries, keys, offset, temperature, block)
        ctx.save_for_backward(queries, keys, lse)
        ctx.offset, ctx.temperature, ctx.block, ctx.tiled = offset, temperature, block, tiled
        return (lse - positive).mean()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        queries, keys, lse = ctx.saved_tensors
        if ctx.tiled:
            d_queries, d_keys = triton_backward(queries, keys, lse, ctx.offset, ctx.temperature)
        else:
            d_queries, d_keys = _backward(queries, keys, lse, ctx.offset, ctx.temperature, ctx.block)
        scale = grad / (len(queries) * ctx.temperature)
        return (d_queries * scale).to(queries.dtype), (d_keys * scale).to(keys.dtype), None, None, None


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


# ── Tiles, in Triton ───────────────────────────────────────────────────────────────────────────────────────────────


def triton_forward(queries: Tensor, keys: Tensor, offset: int, temperature: float) -> tuple[Tensor, Tensor]:
    from simclr.kernels.nt_xent_triton import forward_kernel

    rows = len(queries)
    lse, positive = (torch.empty(rows, dtype=torch.float32, device=queries.device) for _ in range(2))
    tile = _tile(queries)
    forward_kernel[(-(-rows // tile["ROWS"]),)](queries, keys, lse, positive, rows, len(keys), offset, 1 / temperature, **tile)
    return lse, positive


def triton_backward(queries: Tensor, keys: Tensor, lse: Tensor, offset: int, temperature: float) -> tuple[Tensor, Tensor]:
    from simclr.kernels.nt_xent_triton import keys_kernel, queries_kernel

    rows, columns = len(queries), len(keys)
    d_queries, d_keys = (torch.empty(x.shape, dtype=torch.float32, device=x.device) for x in (queries, keys))
    arguments, tile = (rows, columns, offset, 1 / temperature), _tile(queries)
    queries_kernel[(-(-rows // tile["ROWS"]),)](queries, keys, lse, d_queries, *arguments, **tile)
    keys_kernel[(-(-columns // tile["KEYS"]),)](queries, keys, lse, d_keys, *arguments, **tile)
    return d_queries, d_keys


def _tile(queries: Tensor) -> dict[str, Any]:
    """The kernels' compile-time settings. float32 is multiplied as three TF32 products, whose error is float32's own."""
    d = queries.shape[1]
    wide = max(16, 1 << (d - 1).bit_length())
    side = max(16, min(_TILED[queries.dtype], _TILED[queries.dtype] * 128 // wide))  # a tile holds the whole width
    precision = "tf32x3" if queries.dtype == torch.float32 else "ieee"
    return {"D": d, "WIDE": wide, "ROWS": side, "KEYS": side, "PRECISION": precision, "num_stages": 2}
