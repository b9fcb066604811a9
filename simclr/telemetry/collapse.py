"""Whether a run has collapsed, by the metrics of its reports. It needs no torch, so that the driver need not import it."""

from __future__ import annotations

from collections.abc import Mapping

_LEAST_SPREAD, _LEAST_DIMENSION = 0.2, 1.2


def collapse(metrics: Mapping[str, float]) -> str | None:
    """A sentence without its full stop if a report's `health/spread` and `health/dimension` (`simclr.evaluation.representation`, of z)
    show a collapse; None if they do not, or are absent.

    Measured on rendered patterns (ResNet-8, 16 px): BYOL without its predictor falls from a spread of 0.80 to 0.17 in half an epoch, 30
    steps of 64 images, and to 0.10 at its end; with the predictor it stays between 0.79 and 0.82, and its dimension above 2.1. MoCo, whose
    head has no BatchNorm, begins at 0.46 and is never below 0.26; its dimension is 1.3 in the first steps, that of a line 1.0.
    """
    if "health/spread" not in metrics:  # a stage without projections
        return None
    if metrics["health/spread"] < _LEAST_SPREAD:
        return f"all projections point nearly the same way (spread {metrics['health/spread']:.3f} of 1)"
    if metrics["health/dimension"] < _LEAST_DIMENSION:
        return f"the projections lie nearly on a line (effective dimension {metrics['health/dimension']:.1f})"
    return None
