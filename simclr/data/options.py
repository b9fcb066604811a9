"""How images are stored: what a user states."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from simclr.data.depth import Bands, Rule
from simclr.data.pixels import MOST_PIXELS
from simclr.errors import UserError

Kind = Literal["auto", "raw", "jpeg"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """How images are stored."""

    kind: Kind = "auto"
    """raw: pixels of one size; jpeg: photographs; auto: raw where a sample of the images has one size of at most 64 px."""
    max_side_px: int = 500
    """A larger image is reduced until its longer side has this many pixels."""
    jpeg_quality: int = 90
    """JPEG quality of images that are encoded here; a JPEG that needs no change is stored as it is."""
    shard_mib: int = 1024
    """Approximate size of a shard, in MiB."""
    max_skipped_pct: float = 1.0
    """Share of the images, in per cent, that may be unreadable; they are skipped and listed in skipped.csv. The same command with a
    larger share goes on where the smaller one stopped."""
    value_range: tuple[float, float] | None = None
    """Black and white point of pixels of more than 8 bits and of floats, as 0 4095; without it a sample of the images decides: the bit
    depth that holds integers, 0 to 1 for floats, else the percentiles 0.1 and 99.9. Pictures of 8 bits stay as they are."""
    bands: Bands | None = None
    """Which bands are red, green and blue, counted from 1, as 4 3 2; needed where pictures have two, or four and more, without
    transparency."""
    max_pixels: int = MOST_PIXELS
    """A picture with more pixels, or a file of more than 6 bytes for each of these, is skipped; a JPEG may have twice as many. Each
    thread holds one picture."""

    def __post_init__(self) -> None:
        if self.max_side_px < 8:
            raise UserError(f"--max-side-px is {self.max_side_px}; expected at least 8 pixels")
        if self.max_side_px**2 > 2 * MOST_PIXELS:  # which the loader would refuse
            most = math.isqrt(2 * MOST_PIXELS)
            raise UserError(f"--max-side-px is {self.max_side_px}; expected at most {most}: training has room for {most}² pixels an image")
        if not 1 <= self.jpeg_quality <= 100:
            raise UserError(f"--jpeg-quality is {self.jpeg_quality}; expected 1 to 100")
        if self.shard_mib < 1:
            raise UserError(f"--shard-mib is {self.shard_mib}; expected at least 1")
        if not 0 <= self.max_skipped_pct <= 100:
            raise UserError(f"--max-skipped-pct is {self.max_skipped_pct}; expected 0 to 100")
        if self.value_range and not -math.inf < self.value_range[0] < self.value_range[1] < math.inf:
            raise UserError(f"--value-range is {self.value_range[0]:g} {self.value_range[1]:g}; expected black below white, as 0 4095")
        if self.bands and min(self.bands) < 1:
            raise UserError(f"--bands is {' '.join(map(str, self.bands))}; expected three numbers of bands from 1, as 4 3 2")
        if self.max_pixels < 1:
            raise UserError(f"--max-pixels is {self.max_pixels}; expected at least 1")

    def rule(self, ranges: dict[str, tuple[float, float]]) -> Rule:
        """How pixels become 8-bit RGB: with the stated range, else with those that a sample gave."""
        if self.value_range:
            ranges = dict.fromkeys(("integers", "floats"), self.value_range)
        return Rule(ranges=ranges, stated=self.value_range is not None, bands=self.bands, max_pixels=self.max_pixels)


def stated(options: Options) -> dict[str, Any]:
    """The options on which the shards' bytes depend, as a manifest has them. Fields younger than the first manifests are there only where
    they differ from their defaults."""
    known: dict[str, Any] = {
        "kind": {"auto": 0, "raw": 1, "jpeg": 2}[options.kind],
        "max_side_px": options.max_side_px,
        "jpeg_quality": options.jpeg_quality,
        "shard_mib": options.shard_mib,
    }
    if options.value_range:
        known["value_range"] = list(options.value_range)
    if options.bands:
        known["bands"] = list(options.bands)
    if options.max_pixels != MOST_PIXELS:
        known["max_pixels"] = options.max_pixels
    return known
