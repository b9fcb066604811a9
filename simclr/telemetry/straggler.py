"""Which rank keeps the others waiting.

Ranks meet in every step, many times over, so all steps take as long as the slowest rank's, and a rank's step says nothing of the
rank. What does is its own time: the step without what it waited for others (`simclr.telemetry.timing`). A disk, a neighbour on
the same cores or a hot GPU make that long on one rank and leave it short on the rest.

A single long step is no straggler: it is a pause, and every machine has some. So a report counts by its *median* step, and a rank is
named when that was long in every report over 50 steps. The ordinary median over ranks is the yardstick; of two ranks that is their
mean, so that one of them must be half again as slow as the other (b > 1.2 (a + b) / 2 where b > 1.5 a): of two nobody can say which
one is as it should be.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

LIMIT = 1.2
"""Times the median over ranks."""
STEPS = 50
"""In a row."""
SLOW = f"keeps the others waiting: over {LIMIT} times the median of a step's own time for {STEPS} steps; look at its disk, cores and GPU"
"""Behind the names of ranks, a sentence without its end."""


class Stragglers:
    """How long each of `ranks` has been slow."""

    def __init__(self, ranks: int) -> None:
        self.slow = [0] * ranks

    def see(self, own_s: Sequence[float], steps: int) -> dict[str, float]:
        """Take each rank's own time of the median step of the last `steps` steps; the metrics of the slowest rank, {} for one rank.

        speed/slowest_rank; speed/straggle, its time over the median; speed/straggler_steps, for how many steps it has been
        slower than LIMIT times that.
        """
        median = statistics.median(own_s)
        if len(own_s) < 2 or median <= 0:
            return {}
        self.slow = [before + steps if own > LIMIT * median else 0 for before, own in zip(self.slow, own_s, strict=True)]
        slowest = max(range(len(own_s)), key=lambda r: own_s[r])
        return {
            "speed/slowest_rank": float(slowest),
            "speed/straggle": own_s[slowest] / median,
            "speed/straggler_steps": float(self.slow[slowest]),
        }

    def named(self) -> list[int]:
        """The ranks to be named."""
        return [r for r, steps in enumerate(self.slow) if steps >= STEPS]
