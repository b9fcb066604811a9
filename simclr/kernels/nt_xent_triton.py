"""The tiles of `nt_xent`: one program per tile of rows and share of the others, over which it passes tile by tile.

Imported only where the kernels run: Triton is not on every machine. `outer` (outers, d) are the rows that a result belongs to, `inner`
(inners, d) those that it sums over: queries and keys, for the keys' gradient keys and queries, and on one rank twice the same. This
rank's 2n queries are the rows from `outer_at` in outer and from `inner_at` in inner. Rows lie one by one in memory; with PARTS = 2 they
are sums of two planes (2, rows, d) of float16, and a product is high · low + low · high + high · high. OUTER × INNER products are in
registers at a time, in float32.

A row itself and its positive are left out of the tiles' sums. The positive's term is added afterwards in float32: where it is almost the
whole sum, p − 1 keeps its digits. In base 2, exp(cos / τ) is 2^(slope · product). With FIXED, `shift`, the exponent of a cosine of 1, is
subtracted from every exponent; without, each row's largest one is. Offsets within a tensor are 64 bits wide from the first row of a tile.
"""

# Types of Triton's language are its compiler's business.
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

# ── Over tiles ─────────────────────────────────────────────────────────────────────────────────────────────────────


@triton.jit
def sums_kernel(
    outer, inner, sums, outers, inners, half, outer_at, inner_at, slope, shift,
    D: tl.constexpr, WIDE: tl.constexpr, PARTS: tl.constexpr, FIXED: tl.constexpr,
    OUTER: tl.constexpr, INNER: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """sums (splits, outers): Σ 2^(slope · product − shift) over the negatives of a split. Without FIXED sums is (2, splits, outers): these
    with each row's largest exponent as the shift, and the exponents."""
    first, split, splits = tl.program_id(0) * OUTER, tl.program_id(1), tl.num_programs(1)
    row = first + tl.arange(0, OUTER)
    high, low = _parts(outer, first, outers, D, WIDE, PARTS, OUTER, False)
    total = tl.zeros((OUTER,), tl.float32)
    largest = tl.full((OUTER,), float("-inf"), tl.float32)
    tiles = tl.cdiv(inners, INNER)
    for tile in range(split * tiles // splits, (split + 1) * tiles // splits):
        start = _start(tile, inners, INNER, WHOLE)
        inner_high, inner_low = _parts(inner, start, inners, D, WIDE, PARTS, INNER, WHOLE)
        products = _negatives(
            _products(high, low, inner_high, inner_low, PARTS),
            first, start, tile * INNER, inners, half, outer_at, inner_at, OUTER, INNER,
        )  # fmt: skip
        if FIXED:
            total += tl.sum(tl.exp2(tl.fma(products, slope, -shift)), 1)
        else:
            exponents = products * slope
            above = tl.maximum(tl.maximum(largest, tl.max(exponents, 1)), -1e30)  # a tile may hold no negative
            total = total * tl.exp2(largest - above) + tl.sum(tl.exp2(exponents - above[:, None]), 1)
            largest = above
    at = sums + split.to(tl.int64) * outers + row
    tl.store(at, total, mask=row < outers)
    if not FIXED:
        tl.store(at + splits.to(tl.int64) * outers, largest, mask=row < outers)


@triton.jit
def weighted_kernel(
    outer, inner, share, weighted, outers, inners, half, outer_at, inner_at, slope, shift,
    D: tl.constexpr, WIDE: tl.constexpr, PARTS: tl.constexpr, FIXED: tl.constexpr,
    BY_OUTER: tl.constexpr, BY_INNER: tl.constexpr, OUTER: tl.constexpr, INNER: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """weighted (splits, outers, d): Σ p · inner row over the negatives of a split. p is exp(cos / τ) over the sum of the outer row, over
    that of the inner one, or both added; a lower `shift` makes it larger, so that small p have their digits in float16."""
    first, split, splits = tl.program_id(0) * OUTER, tl.program_id(1), tl.num_programs(1)
    row, column = first + tl.arange(0, OUTER), tl.arange(0, WIDE)
    high, low = _parts(outer, first, outers, D, WIDE, PARTS, OUTER, False)
    of_outer = tl.load(share + row, mask=(row < outers) & BY_OUTER, other=0.0)
    of_inner = tl.zeros((INNER,), tl.float32)
    found = tl.zeros((OUTER, WIDE), tl.float32)
    tiles = tl.cdiv(inners, INNER)
    for tile in range(split * tiles // splits, (split + 1) * tiles // splits):
        start = _start(tile, inners, INNER, WHOLE)
        inner_high, inner_low = _parts(inner, start, inners, D, WIDE, PARTS, INNER, WHOLE)
        if BY_INNER:
            at = start + tl.arange(0, INNER)
            of_inner = tl.load(share + at) if WHOLE else tl.load(share + at, mask=at < inners, other=0.0)
        products = _negatives(
            _products(high, low, inner_high, inner_low, PARTS),
            first, start, tile * INNER, inners, half, outer_at, inner_at, OUTER, INNER,
        )  # fmt: skip
        p = _probability(tl.fma(products, slope, -shift), of_outer[:, None], of_inner[None, :], FIXED, BY_OUTER, BY_INNER)
        p_high = p.to(inner_high.dtype)
        if PARTS == 2:
            p_low = (p - p_high.to(tl.float32)).to(inner_high.dtype)
            # A tile's own sum first: tensor cores cut off what they add to a long sum, and do not round it (doi:10.7717/peerj-cs.330).
            of_tile = tl.dot(p_high, inner_low)
            of_tile = tl.dot(p_low, inner_high, of_tile)
            found += tl.dot(p_high, inner_high, of_tile)
        else:
            found = tl.dot(p_high, inner_high, found)
    at = weighted + (split.to(tl.int64) * outers + first) * D + tl.arange(0, OUTER)[:, None] * D + column[None, :]
    tl.store(at, found, mask=(row < outers)[:, None] & (column < D)[None, :])


@triton.jit
def _start(tile, inners, INNER: tl.constexpr, WHOLE: tl.constexpr):
    """First row of a tile. The last one begins earlier, so that it is as long as the others and loads need no mask."""
    return tl.minimum(tile * INNER, inners - INNER) if WHOLE else tile * INNER


@triton.jit
def _parts(x, first, count, D: tl.constexpr, WIDE: tl.constexpr, PARTS: tl.constexpr, ROWS: tl.constexpr, WHOLE: tl.constexpr):
    """Rows first … first + ROWS of x as (ROWS, WIDE), zero beyond its edge, and their low part, if there is one."""
    row, column = tl.arange(0, ROWS), tl.arange(0, WIDE)
    at = x + first.to(tl.int64) * D + (row[:, None] * D + column[None, :])
    plane = count.to(tl.int64) * D * (PARTS - 1)
    if WHOLE:
        high = tl.load(at)
        return high, tl.load(at + plane) if PARTS == 2 else high
    inside = (first + row < count)[:, None] & (column < D)[None, :]
    high = tl.load(at, mask=inside, other=0.0)
    return high, tl.load(at + plane, mask=inside, other=0.0) if PARTS == 2 else high


@triton.jit
def _products(high, low, inner_high, inner_low, PARTS: tl.constexpr):
    """(OUTER, INNER) products of rows, the small ones added first."""
    if PARTS == 1:
        return tl.dot(high, tl.trans(inner_high))
    small = tl.dot(low, tl.trans(inner_high), tl.dot(high, tl.trans(inner_low)))
    return tl.dot(high, tl.trans(inner_high), small)


@triton.jit
def _negatives(products, first, start, new, inners, half, outer_at, inner_at, OUTER: tl.constexpr, INNER: tl.constexpr):
    """The products of a tile, −inf where the inner row is the outer one or its positive, is no row, or stood in the tile before (below
    `new`). Most tiles touch none of these and are left as they are."""
    own = first - outer_at + inner_at
    touched = _touch(start, own, OUTER, INNER) | _touch(start, own + half, OUTER, INNER) | _touch(start, own - half, OUTER, INNER)
    if touched | (new + INNER > inners):
        itself, partner = _places(first + tl.arange(0, OUTER), half, outer_at, inner_at)
        at = (start + tl.arange(0, INNER))[None, :]
        none = (at == itself[:, None]) | (at == partner[:, None]) | (at < new) | (at >= inners)
        products = tl.where(none, float("-inf"), products)
    return products


@triton.jit
def _touch(start, at, OUTER: tl.constexpr, INNER: tl.constexpr):
    return (start < at + OUTER) & (at < start + INNER)


@triton.jit
def _places(outer_row, half, outer_at, inner_at):
    """Where outer rows and their positives stand in inner; −1 for rows that are none of this rank's queries."""
    query = outer_row - outer_at
    ours = (query >= 0) & (query < 2 * half)
    partner = tl.where(query < half, query + half, query - half)
    return tl.where(ours, query + inner_at, -1), tl.where(ours, partner + inner_at, -1)


@triton.jit
def _probability(exponent, of_outer, of_inner, FIXED: tl.constexpr, BY_OUTER: tl.constexpr, BY_INNER: tl.constexpr):
    """2^exponent as a share of the sums of its rows: 1 / sum with FIXED, else their logarithms."""
    if FIXED:
        share = of_outer + of_inner if BY_OUTER and BY_INNER else of_outer if BY_OUTER else of_inner
        return tl.exp2(exponent) * share
    if BY_OUTER and BY_INNER:
        return tl.exp2(exponent - of_outer) + tl.exp2(exponent - of_inner)
    return tl.exp2(exponent - (of_outer if BY_OUTER else of_inner))


# ── Over rows, behind the tiles: the splits' sums in their order, and the positives ────────────────────────────────


@triton.jit
def losses_kernel(
    queries, keys, sums, share, losses, rows, key_rows, offset, splits, slope, shift,
    D: tl.constexpr, WIDE: tl.constexpr, PARTS: tl.constexpr, FIXED: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """share (2n,), what `_probability` needs of a row, and losses (2n,)."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    _, partner = _places(row, rows // 2, 0, offset)
    product = tl.sum(_gathered(queries, row, rows, D, WIDE, PARTS) * _gathered(keys, partner, key_rows, D, WIDE, PARTS), 1)
    positive = tl.fma(product, slope, -shift)  # as `gradient_kernel` has it: p must be 1 where no other term counts
    at = sums + row
    if FIXED:
        above = tl.zeros((ROWS,), tl.float32)
    else:
        above = positive
        for _ in range(splits):
            above = tl.maximum(above, tl.load(at + splits * rows, mask=inside, other=0.0))
            at += rows
        at = sums + row
    total = tl.exp2(positive - above)
    for _ in range(splits):
        part = tl.load(at, mask=inside, other=0.0)
        if not FIXED:
            part *= tl.exp2(tl.load(at + splits * rows, mask=inside, other=0.0) - above)
        total += part
        at += rows
    tl.store(share + row, 1 / total if FIXED else above + tl.log2(total), mask=inside)
    tl.store(losses + row, (tl.log2(total) + above - positive) * 0.6931471805599453, mask=inside)


@triton.jit
def gradient_kernel(
    outer, inner, share, weighted, grad, out, outers, inners, half, outer_at, inner_at, splits, slope, shift, unlifted, scale,
    D: tl.constexpr, WIDE: tl.constexpr, PARTS: tl.constexpr, FIXED: tl.constexpr,
    BY_OUTER: tl.constexpr, BY_INNER: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """out (outers, d): (Σ weighted · unlifted + (p − 1) positive) · grad · scale; with the shares of both rows, p − 2."""
    row, column = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, WIDE)
    itself, partner = _places(row, half, outer_at, inner_at)
    ours = (itself >= 0) & (row < outers)
    other = _gathered(inner, partner, inners, D, WIDE, PARTS)
    product = tl.sum(_gathered(outer, row, outers, D, WIDE, PARTS) * other, 1)
    # The shares are the queries': outer's, or inner's, or both.
    of_outer = tl.load(share + row, mask=ours & BY_OUTER, other=0.0)
    of_inner = tl.load(share + partner, mask=ours & BY_INNER, other=0.0)
    p = _probability(tl.fma(product, slope, -shift), of_outer, of_inner, FIXED, BY_OUTER, BY_INNER)
    found = tl.where(ours, p - (BY_OUTER + BY_INNER), 0.0)[:, None] * other
    at = row.to(tl.int64)[:, None] * D + column[None, :]
    inside = (row < outers)[:, None] & (column < D)[None, :]
    total = tl.zeros((ROWS, WIDE), tl.float32)
    part = weighted + at
    for _ in range(splits):
        total += tl.load(part, mask=inside, other=0.0)
        part += outers.to(tl.int64) * D
    found += total * unlifted
    tl.store(out + at, (found * (tl.load(grad) * scale)).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _gathered(x, at, count, D: tl.constexpr, WIDE: tl.constexpr, PARTS: tl.constexpr):
    """Rows `at` of x (count, D) in float32, as (len(at), WIDE), zero where there is none."""
    column = tl.arange(0, WIDE)
    inside = ((at >= 0) & (at < count))[:, None] & (column < D)[None, :]
    place = x + at.to(tl.int64)[:, None] * D + column[None, :]
    rows = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    if PARTS == 2:
        rows += tl.load(place + count.to(tl.int64) * D, mask=inside, other=0.0).to(tl.float32)
    return rows
