"""How pixels of more than 8 bits, of floats and of many bands become 8-bit RGB: by one rule for a whole set, never by each image's own
maximum, which would hide how bright it is beside the others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simclr.data.pixels import MOST_PIXELS, Unreadable

Bands = tuple[int, int, int]
DEPTHS = (8, 10, 12, 14, 16)
"""Bits that cameras and scanners give."""
_LOW_PCT, _HIGH_PCT = 0.1, 99.9
_SAMPLED = 4096  # pixels of an image from which percentiles are computed
_ROWS = 256
_NO_NUMBER = "none of its pixels is a number (NaN or infinite)"
_CLIPPED = 0.01  # of an image's pixels


@dataclass(frozen=True, kw_only=True, slots=True)
class Rule:
    """How the pictures of a set become 8-bit RGB."""

    ranges: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """Black and white point of "integers" of more than 8 bits and of "floats", where the set has such."""
    stated: bool = False
    """Whether the user stated the range."""
    bands: Bands | None = None
    """Which bands are red, green and blue, from 1; None = those that the picture has."""
    max_pixels: int = MOST_PIXELS


@dataclass(frozen=True, slots=True)
class Values:
    """Pixels of one image, for the choice of a range."""

    kind: str
    """integers or floats."""
    low: float
    high: float
    some: NDArray[np.float64]
    """Some 4,000 evenly spaced ones."""


@dataclass(frozen=True, slots=True)
class Scaled:
    """8-bit pixels, and how they came about."""

    pixels: NDArray[np.uint8]
    high: float
    """The largest value before."""
    clipped: bool
    """Whether more than 1 % of the values lay outside the range."""


def kind_of(values: NDArray[Any]) -> str:
    """integers, floats, or "" for pixels that are 8 bits already."""
    return "" if values.dtype in (np.uint8, np.bool_) else "floats" if values.dtype.kind == "f" else "integers"


def values_of(pixels: NDArray[Any]) -> Values:
    """Raises Unreadable if no pixel is a number."""
    finite = pixels[np.isfinite(pixels)] if pixels.dtype.kind == "f" else pixels.reshape(-1)
    if not finite.size:
        raise Unreadable(_NO_NUMBER)
    some = finite[:: max(finite.size // _SAMPLED, 1)].astype(np.float64)
    return Values(kind_of(pixels), float(finite.min()), float(finite.max()), some)


def decided(sample: Sequence[Values]) -> dict[str, tuple[float, float]]:
    """Kind → (black, white), from a sample of a set.

    Integers from 0 on: all of the bit depth that holds the largest, 8 to 16 bits. Floats from 0 to 1: these. Else, where there are
    negative or larger values: the percentiles 0.1 and 99.9 of the sample's pixels.
    """
    ranges = {}
    for kind in sorted({values.kind for values in sample}):
        of = [values for values in sample if values.kind == kind]
        low, high = min(v.low for v in of), max(v.high for v in of)
        if kind == "integers" and low >= 0 and high < 2 ** DEPTHS[-1]:
            ranges[kind] = depth_for(high)
        elif kind == "floats" and low >= 0 and high <= 1:
            ranges[kind] = (0.0, 1.0)
        else:
            black, white = np.percentile(np.concatenate([v.some for v in of]), [_LOW_PCT, _HIGH_PCT]).tolist()
            ranges[kind] = (black, white if white > black else black + 1)
    return ranges


def depth_for(high: float) -> tuple[float, float]:
    """(0, white) of the least bit depth that holds `high`."""
    return 0.0, float(2 ** next(bits for bits in DEPTHS if high < 2**bits) - 1)


def bits_of(kind: str, black: float, white: float) -> int:
    """The bit depth of a range of integers; 0 where it is none."""
    return next((bits for bits in DEPTHS if kind == "integers" and (black, white) == depth_for(2**bits - 1)), 0)


def deeper(rule: Rule, high: float) -> dict[str, tuple[float, float]] | None:
    """The ranges that hold integers up to `high` as well; None where those of `rule` do, or were not a guess of the bit depth."""
    black, white = rule.ranges.get("integers", (0.0, 0.0))
    if rule.stated or not bits_of("integers", black, white) or not white < high < 2 ** DEPTHS[-1]:
        return None
    return {**rule.ranges, "integers": depth_for(high)}


def remarks(pixels: Mapping[str, Any]) -> list[str]:
    """Sentences for the user about a manifest's `pixels`."""
    lines = []
    if pixels.get("rescaled"):
        rules = []
        for kind, (black, white) in pixels["ranges"].items():
            bits = bits_of(kind, black, white)
            rules.append(f"{kind} from {black:,.6g} (black) to {white:,.6g} (white){f', {bits} bits' if bits else ''}")
        by = "as --value-range states" if pixels["stated"] else "by a sample of the images; --value-range states another range"
        lines.append(f"{_images(pixels['rescaled'])} rescaled to 8 bits, {' and '.join(dict.fromkeys(rules))}, {by}")
    if pixels.get("clipped"):
        lines.append(f"{pixels['clipped']:,} of these had more than 1 % of their pixels outside this range, cut off at black or white")
    if pixels.get("grey"):
        lines.append(f"{_images(pixels['grey'])} of one channel, which is repeated to three")
    return lines


def _images(count: int) -> str:
    return f"{count:,} images were" if count != 1 else "1 image was"


def scaled(values: NDArray[Any], rule: Rule) -> Scaled:
    """Pixels of any type → 8 bits: black to 0, white to 255, rounded. What is no number counts as black.

    Raises Unreadable where the rule has no range for them, or none is a number.
    """
    kind = kind_of(values)
    if kind not in rule.ranges:
        raise Unreadable(f"its pixels are {kind}, and no image of the sample had such: state black and white as --value-range 0 65535")
    black, white = rule.ranges[kind]
    if values.dtype == np.uint16:
        table = np.clip((np.arange(1 << 16) - black) * (255 / (white - black)), 0, 255)
        outside = int((values > white).sum() + (values < black).sum())
        return Scaled(np.rint(table).astype(np.uint8)[values], float(values.max()), outside > _CLIPPED * values.size)
    shades, outside, numbers, high = np.empty(values.shape, np.uint8), 0, 0, -np.inf
    for row in range(0, len(values), _ROWS):  # some rows at a time, in doubles
        known = values[row : row + _ROWS].astype(np.float64)
        finite = np.isfinite(known)
        high = max(high, float(known.max(initial=-np.inf, where=finite)))
        known[~finite] = black
        numbers += int(finite.sum())
        outside += int((known > white).sum() + (known < black).sum() + (~finite).sum())
        shades[row : row + _ROWS] = np.rint(np.clip((known - black) * (255 / (white - black)), 0, 255))
    if not numbers:
        raise Unreadable(_NO_NUMBER)
    return Scaled(shades, high, outside > _CLIPPED * values.size)
