"""Whether a run has collapsed, by the metrics of its reports. It needs no torch, so that the driver need not import it."""

from __future__ import annotations

from collections.abc import Mapping

_LEAST_SPREAD, _LEAST_DIMENSION = 0.1, 1.5


def collapse(metrics: Mapping[str, float]) -> str | None:
    """A sentence without its full stop if a report's `health/spread` and `health/dimension` (`simclr.evaluation.representation`, of z)
    show a collapse; None if they do not, or are absent."""
    if "health/spread" not in metrics:  # a stage without projections
        return None
    if metrics["health/spread"] < _LEAST_SPREAD:
        return f"all projections point nearly the same way (spread {metrics['health/spread']:.3f} of 1)"
    if metrics["health/dimension"] < _LEAST_DIMENSION:
        return f"the projections lie nearly on a line (effective dimension {metrics['health/dimension']:.1f})"
    return None
