"""Stragglers: ranks that keep the others waiting.

Ranks synchronise many times in every step, so all steps take as long as the slowest rank's, and the time of a rank's step does not show
which rank is slow. Its own time does: the step without the waits for other ranks (`simclr.telemetry.timing`). A slow disk, another
process on the same cores or a hot GPU makes it long on one rank and leaves it short on the rest.

A single long step is a pause, not a straggler, and every machine has some. So a report counts by its *median* step, and a rank is named
when that was long in every report over 50 steps. The reference is the ordinary median over ranks. For two ranks it is their mean, so one
must be half again as slow as the other (b > 1.2 (a + b) / 2 where b > 1.5 a): of two ranks, either may be the normal one.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from simclr.shares import shares

LIMIT = 1.2
"""A rank is slow above this many times the median over ranks."""
STEPS = 50
"""Slow steps in a row after which a rank is a straggler."""
SLOW = f"keeps the others waiting: over {LIMIT} times the median of a step's own time for {STEPS} steps; look at its disk, cores and GPU"
"""The sentence, without its full stop, that follows the ranks."""


class Stragglers:
    """For how many steps each of `ranks` has been slow."""

    def __init__(self, ranks: int, images: int | None = None) -> None:
        """`images` of a step, that the ranks share; None = equally many each."""
        counts = shares(images or ranks, ranks)
        # A rank with one image more than others may take as much longer.
        self.weights = [min(counts) / count for count in counts]
        self.slow = [0] * ranks

    def see(self, own_s: Sequence[float], steps: int) -> dict[str, float]:
        """Add each rank's own time in the median step of the last `steps` steps. Returns the metrics of the slowest rank, {} for one
        rank.

        speed/slowest_rank; speed/straggle, its time over the median; speed/straggler_steps, for how many steps it has been
        slower than LIMIT times that.
        """
        median, for_as_many = statistics.median(own_s), [own * weight for own, weight in zip(own_s, self.weights, strict=True)]
        if len(own_s) < 2 or median <= 0:
            return {}
        # A part of a step's time does not depend on the images. So a rank is slow if both are long: its time, and its time for as many
        # images as others have.
        alike = statistics.median(for_as_many)
        over = [min(own / median, each / alike) for own, each in zip(own_s, for_as_many, strict=True)]
        self.slow = [before + steps if times > LIMIT else 0 for before, times in zip(self.slow, over, strict=True)]
        slowest = max(range(len(over)), key=lambda r: over[r])
        return {
            "speed/slowest_rank": float(slowest),
            "speed/straggle": over[slowest],
            "speed/straggler_steps": float(self.slow[slowest]),
        }

    def named(self) -> list[int]:
        """The stragglers."""
        return [r for r, steps in enumerate(self.slow) if steps >= STEPS]
