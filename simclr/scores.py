"""What a classifier's scores are worth against the labels. Tensors in, numbers out."""

from __future__ import annotations

from torch import Tensor


def accuracy(scores: Tensor, y: Tensor) -> dict[str, float]:
    """Shares of the rows of scores (m, classes) whose label y (m,) is the highest, or among the five highest: {"top1", "top5"}."""
    ranked = scores.topk(min(5, scores.shape[1]), dim=1).indices.eq(y[:, None])
    return {"top1": ranked[:, 0].float().mean().item(), "top5": ranked.any(1).float().mean().item()}
