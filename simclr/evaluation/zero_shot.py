"""Zero-shot classification by class names (arXiv:2103.00020, Sec. 3.1): no image of the classes is seen with its label."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch.nn.functional as F
from torch import Tensor


def class_directions(names: Sequence[str], prompts: Sequence[str], texts: Callable[[list[str]], Tensor]) -> Tensor:
    """(classes, d) unit rows: of each name the mean, over `prompts` such as "a photo of a {}.", of the unit features that `texts` makes,
    (n, d) of n texts (Sec. 3.1.4). Folders' names are words with _ for spaces."""
    said = [prompt.format(name.replace("_", " ")) for name in names for prompt in prompts]
    rows = F.normalize(texts(said).double(), dim=1).unflatten(0, (len(names), len(prompts)))
    return F.normalize(rows.mean(1), dim=1)


def zero_shot(features: Tensor, labels: Tensor, directions: Tensor) -> float:
    """Share of the images (n, d) whose nearest of the `directions` (classes, d), by cosine, is their label's (n,)."""
    nearest = (F.normalize(features.double(), dim=1) @ directions.to(features.device).T).argmax(1)
    return float((nearest == labels.to(nearest.device)).double().mean())
