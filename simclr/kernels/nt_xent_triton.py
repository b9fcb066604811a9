"""The tiles of `nt_xent`: one program per tile of rows (of keys, for their gradient), which passes over all keys (rows).

Imported only where the kernels run: Triton is not on every machine. All take queries (2n, d) and keys (2N, d), row by row in memory; ROWS
× KEYS logits are in registers at a time and accumulate in float32.
"""

# Types of Triton's language are its compiler's business.
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _load(x, at, count, D: tl.constexpr, WIDE: tl.constexpr):
    """Rows `at` of x (count, D), as (len(at), WIDE), zero beyond."""
    column = tl.arange(0, WIDE)
    return tl.load(x + at[:, None] * D + column[None, :], mask=(at < count)[:, None] & (column < D)[None, :], other=0.0)


@triton.jit
def _store(x, at, count, values, D: tl.constexpr, WIDE: tl.constexpr):
    column = tl.arange(0, WIDE)
    tl.store(x + at[:, None] * D + column[None, :], values, mask=(at < count)[:, None] & (column < D)[None, :])


@triton.jit
def _tile(q, k, row, key, rows, keys, offset, scale, PRECISION: tl.constexpr):
    """Logits of a tile, −inf where there is no key or the key is the row itself; and whether each is the row's positive."""
    logits = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
    itself = key[None, :] == (offset + row)[:, None]
    logits = tl.where(itself | (key >= keys)[None, :], float("-inf"), logits)
    partner = offset + (row + rows // 2) % rows
    return logits, (key[None, :] == partner[:, None]) & (row < rows)[:, None]


@triton.jit
def forward_kernel(
    queries, key_rows, lse, positive, rows, keys, offset, scale,
    D: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """lse (2n,) and the positives' logits (2n,) of a tile of rows."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    q = _load(queries, row, rows, D, WIDE)
    largest = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    own = tl.zeros((ROWS,), tl.float32)
    for start in range(0, keys, KEYS):
        key = start + tl.arange(0, KEYS)
        logits, is_positive = _tile(q, _load(key_rows, key, keys, D, WIDE), row, key, rows, keys, offset, scale, PRECISION)
        own += tl.sum(tl.where(is_positive, logits, 0.0), 1)
        above = tl.maximum(largest, tl.max(logits, 1))
        above = tl.maximum(above, -1e30)  # a first tile may hold nothing but the row itself
        total = total * tl.exp(largest - above) + tl.sum(tl.exp(logits - above[:, None]), 1)
        largest = above
    tl.store(lse + row, largest + tl.log(total), mask=row < rows)
    tl.store(positive + row, own, mask=row < rows)


@triton.jit
def queries_kernel(
    queries, key_rows, lse, out, rows, keys, offset, scale,
    D: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Σ over keys of (p − [positive]) k, for a tile of rows, into out (2n, d)."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    q = _load(queries, row, rows, D, WIDE)
    level = tl.load(lse + row, mask=row < rows, other=0.0)
    found = tl.zeros((ROWS, WIDE), tl.float32)
    for start in range(0, keys, KEYS):
        key = start + tl.arange(0, KEYS)
        k = _load(key_rows, key, keys, D, WIDE)
        logits, is_positive = _tile(q, k, row, key, rows, keys, offset, scale, PRECISION)
        p = tl.exp(logits - level[:, None]) - tl.where(is_positive, 1.0, 0.0)
        found += tl.dot(p.to(k.dtype), k, input_precision=PRECISION)
    _store(out, row, rows, found, D, WIDE)


@triton.jit
def keys_kernel(
    queries, key_rows, lse, out, rows, keys, offset, scale,
    D: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Σ over rows of (p − [positive]) q, for a tile of keys, into out (2N, d)."""
    key = tl.program_id(0) * KEYS + tl.arange(0, KEYS)
    k = _load(key_rows, key, keys, D, WIDE)
    found = tl.zeros((KEYS, WIDE), tl.float32)
    for start in range(0, rows, ROWS):
        row = start + tl.arange(0, ROWS)
        q = _load(queries, row, rows, D, WIDE)
        level = tl.load(lse + row, mask=row < rows, other=float("inf"))  # rows beyond the end have weight 0
        logits, is_positive = _tile(q, k, row, key, rows, keys, offset, scale, PRECISION)
        p = tl.exp(logits - level[:, None]) - tl.where(is_positive, 1.0, 0.0)
        found += tl.dot(tl.trans(p).to(q.dtype), q, input_precision=PRECISION)
    _store(out, key, keys, found, D, WIDE)
