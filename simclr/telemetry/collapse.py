"""Whether a run has collapsed, by the metrics of its reports. It needs no torch, so that the driver need not import it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Least:
    """What the projections of a healthy run have at least (`simclr.evaluation.representation`, of z); each method has its own."""

    spread: float = 0.1
    """1 = they point everywhere, 0 = all the same way."""
    dimension: float = 1.5
    """Effective dimension; that of a line is 1.0."""
    advice: str = "a lower --optim.base-lr, more warm-up or another temperature may help"
    """What to do below."""


def collapse(metrics: Mapping[str, float], least: Least) -> str | None:
    """A sentence without its full stop if a report's `health/spread` or `health/dimension` is below `least`; None if neither is, or if they
    are absent."""
    if "health/spread" not in metrics:  # a stage without projections
        return None
    if metrics["health/spread"] < least.spread:
        return f"all projections point nearly the same way (spread {metrics['health/spread']:.3f} of 1)"
    if metrics["health/dimension"] < least.dimension:
        return f"the projections lie nearly on a line (effective dimension {metrics['health/dimension']:.1f})"
    return None
