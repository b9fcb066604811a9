"""The kernels of `views`: one program makes a run of pixels, or a square of them, of one view.

Imported only where the kernels run: Triton is not on every machine. A view's parameters are its row of the block (v, n, 17) of
`simclr.views.draw.Drawn`. Everything is computed in float32, in [0, 1], with the channels r, g, b apart.
"""

# Types of Triton's language are its compiler's business.
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

# Columns of a row of the block (`simclr.views.draw.Drawn`), and numbers of the operations (`simclr.views.draw.OPERATIONS`).
_FLIP = tl.constexpr(0)
_JITTER = tl.constexpr(1)
_ORDER = tl.constexpr(2)
_FACTOR = tl.constexpr(6)
_GREY = tl.constexpr(10)
_SIGMA = tl.constexpr(11)
_SOLARISE = tl.constexpr(12)
_WIDTH = tl.constexpr(17)
_BRIGHTNESS = tl.constexpr(0)
_CONTRAST = tl.constexpr(1)
_SATURATION = tl.constexpr(2)


@triton.jit
def _clip(x):
    return tl.minimum(tl.maximum(x, 0.0), 1.0)


@triton.jit
def _scaled(r, g, b, operation, factor):
    """Brightness, saturation or hue of `simclr.views.ops`."""
    if operation == _BRIGHTNESS:
        r = _clip(r * factor)
        g = _clip(g * factor)
        b = _clip(b * factor)
    else:
        v = tl.maximum(tl.maximum(r, g), b)
        chroma = v - tl.minimum(tl.minimum(r, g), b)
        c = tl.maximum(chroma, 1e-12)
        if operation == _SATURATION:
            limit = tl.minimum(factor, v / c)
            r = _clip(v - (v - r) * limit)
            g = _clip(v - (v - g) * limit)
            b = _clip(v - (v - b) * limit)
        else:
            along = tl.where(v == r, g - b, tl.where(v == g, b - r, r - g)) / c
            sector = along + tl.where(v == r, 0.0, tl.where(v == g, 2.0, 4.0)) + 6 * factor
            r = _turned(v, chroma, sector + 5)
            g = _turned(v, chroma, sector + 3)
            b = _turned(v, chroma, sector + 1)
    return r, g, b


@triton.jit
def _turned(v, chroma, k):
    k = k - 6 * tl.floor(k * (1 / 6))
    return _clip(v - chroma * _clip(tl.minimum(k, 4 - k)))


@triton.jit
def _contrasted(x, mean, factor):
    return _clip(mean * (1 - factor) + x * factor)


@triton.jit
def _solarised(x):
    return tl.minimum(x, 1 - x)


@triton.jit
def _pixels(crop, p, inside, flip, SIZE: tl.constexpr, PIXEL: tl.constexpr, CHANNEL: tl.constexpr, BYTES: tl.constexpr):
    """Pixels p of a view, row by row after its flip, as three channels in [0, 1]."""
    x = p % SIZE
    at = crop + (p - x + tl.where(flip > 0, SIZE - 1 - x, x)) * PIXEL
    r = tl.load(at, mask=inside, other=0).to(tl.float32)
    g = tl.load(at + CHANNEL, mask=inside, other=0).to(tl.float32)
    b = tl.load(at + 2 * CHANNEL, mask=inside, other=0).to(tl.float32)
    if BYTES:
        r, g, b = r * (1 / 255), g * (1 / 255), b * (1 / 255)
    return r, g, b


@triton.jit
def means_kernel(
    crops, block, means, n, per_image, per_view, block_view,
    SIZE: tl.constexpr, PIXEL: tl.constexpr, CHANNEL: tl.constexpr, BYTES: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    """means (m, 3): of the channels after the operations that come before contrast, for jittered views. One program per view, so the sum
    has one order."""
    row = tl.program_id(0)
    view, image = row // n, row % n
    drawn = block + view * block_view + image * _WIDTH
    crop = crops + image.to(tl.int64) * per_image + view.to(tl.int64) * per_view
    if tl.load(drawn + _JITTER) > 0:
        red = tl.zeros((PIXELS,), tl.float32)
        green = tl.zeros((PIXELS,), tl.float32)
        blue = tl.zeros((PIXELS,), tl.float32)
        for start in range(0, SIZE * SIZE, PIXELS):
            p = start + tl.arange(0, PIXELS)
            inside = p < SIZE * SIZE
            r, g, b = _pixels(crop, p, inside, 0.0, SIZE, PIXEL, CHANNEL, BYTES)
            ahead = 1
            for position in range(4):
                operation = tl.load(drawn + _ORDER + position).to(tl.int32)
                ahead = tl.where(operation == _CONTRAST, 0, ahead)
                if ahead > 0:
                    r, g, b = _scaled(r, g, b, operation, tl.load(drawn + _FACTOR + operation))
            # Pixels beyond the end are black, and every operation but contrast leaves black as it is.
            red += r
            green += g
            blue += b
        tl.store(means + 3 * row, tl.sum(red) / (SIZE * SIZE))
        tl.store(means + 3 * row + 1, tl.sum(green) / (SIZE * SIZE))
        tl.store(means + 3 * row + 2, tl.sum(blue) / (SIZE * SIZE))


@triton.jit
def colours_kernel(
    crops, block, means, unblurred, out, n, per_image, per_view, block_view,
    scale_r, scale_g, scale_b, shift_r, shift_g, shift_b,
    SIZE: tl.constexpr, PIXEL: tl.constexpr, CHANNEL: tl.constexpr, BYTES: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    """Flip, jitter in the view's order, grey. A view without blur is solarised where that was drawn, and goes normalised into
    out (m, SIZE, SIZE, 3); another one goes as it is into unblurred (m, 3, SIZE, SIZE)."""
    runs: tl.constexpr = (SIZE * SIZE + PIXELS - 1) // PIXELS
    row = tl.program_id(0) // runs
    view, image = row // n, row % n
    drawn = block + view * block_view + image * _WIDTH
    crop = crops + image.to(tl.int64) * per_image + view.to(tl.int64) * per_view
    p = tl.program_id(0) % runs * PIXELS + tl.arange(0, PIXELS)
    inside = p < SIZE * SIZE
    flip = tl.load(drawn + _FLIP) if BYTES else 0.0  # the resize of whole images has flipped them
    r, g, b = _pixels(crop, p, inside, flip, SIZE, PIXEL, CHANNEL, BYTES)
    if tl.load(drawn + _JITTER) > 0:
        for position in range(4):
            operation = tl.load(drawn + _ORDER + position).to(tl.int32)
            factor = tl.load(drawn + _FACTOR + operation)
            if operation == _CONTRAST:
                r = _contrasted(r, tl.load(means + 3 * row), factor)
                g = _contrasted(g, tl.load(means + 3 * row + 1), factor)
                b = _contrasted(b, tl.load(means + 3 * row + 2), factor)
            else:
                r, g, b = _scaled(r, g, b, operation, factor)
    if tl.load(drawn + _GREY) > 0:
        luma = r * 0.2989 + g * 0.5870 + b * 0.1140
        r, g, b = luma, luma, luma
    start = row.to(tl.int64) * (3 * SIZE * SIZE)
    if tl.load(drawn + _SIGMA) > 0:
        tl.store(unblurred + start + p, r, mask=inside)
        tl.store(unblurred + start + SIZE * SIZE + p, g, mask=inside)
        tl.store(unblurred + start + 2 * SIZE * SIZE + p, b, mask=inside)
    else:
        if tl.load(drawn + _SOLARISE) > 0:
            r, g, b = _solarised(r), _solarised(g), _solarised(b)
        tl.store(out + start + 3 * p, r * scale_r + shift_r, mask=inside)
        tl.store(out + start + 3 * p + 1, g * scale_g + shift_g, mask=inside)
        tl.store(out + start + 3 * p + 2, b * scale_b + shift_b, mask=inside)


@triton.jit
def blur_kernel(
    block, unblurred, out, n, block_view, scale_r, scale_g, scale_b, shift_r, shift_g, shift_b,
    SIZE: tl.constexpr, RADIUS: tl.constexpr, SIDE: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Blur of unblurred (m, 3, SIZE, SIZE), then solarised where that was drawn, and normalised, into out (m, SIZE, SIZE, 3), for the
    views that have a blur: a square of SIDE pixels from one of WIDE ≥ SIDE + 2 RADIUS, as two products with a band of weights."""
    across: tl.constexpr = (SIZE + SIDE - 1) // SIDE
    row = tl.program_id(0) // (across * across)
    square = tl.program_id(0) % (across * across)
    drawn = block + row // n * block_view + row % n * _WIDTH
    sigma = tl.load(drawn + _SIGMA)
    if sigma > 0:
        solarise = tl.load(drawn + _SOLARISE) > 0
        slope = -0.5 / (sigma * sigma)
        given = tl.arange(0, WIDE)
        made = tl.arange(0, SIDE)
        taps = given - RADIUS
        total = tl.sum(tl.where(taps <= RADIUS, tl.exp(taps * taps * slope), 0.0))
        apart = taps[:, None] - made[None, :]
        weights = tl.where(tl.abs(apart) <= RADIUS, tl.exp(apart * apart * slope) / total, 0.0).to(unblurred.dtype.element_ty)
        y, x = square // across * SIDE, square % across * SIDE
        from_y, from_x = y - RADIUS + given, x - RADIUS + given
        reached = given < SIDE + 2 * RADIUS
        there = (reached & (from_y >= 0) & (from_y < SIZE))[:, None] & (reached & (from_x >= 0) & (from_x < SIZE))[None, :]
        to_y, to_x = y + made, x + made
        inside = (to_y < SIZE)[:, None] & (to_x < SIZE)[None, :]
        start = row.to(tl.int64) * (3 * SIZE * SIZE)
        source = unblurred + start + from_y[:, None] * SIZE + from_x[None, :]
        target = out + start + 3 * (to_y[:, None] * SIZE + to_x[None, :])
        for channel in range(3):
            pixels = tl.load(source + channel * SIZE * SIZE, mask=there, other=0.0)
            rows = tl.dot(pixels, weights, input_precision="ieee").to(weights.dtype)
            blurred = tl.dot(tl.trans(weights), rows, input_precision="ieee")
            blurred = tl.where(solarise, _solarised(blurred), blurred)
            scale = tl.where(channel == 0, scale_r, tl.where(channel == 1, scale_g, scale_b))
            shift = tl.where(channel == 0, shift_r, tl.where(channel == 1, shift_g, shift_b))
            tl.store(target + channel, blurred * scale + shift, mask=inside)
