"""Zero-shot classification by class names (arXiv:2103.00020, Sec. 3.1): no image of the classes is seen with its label."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch.nn.functional as F
from torch import Tensor

from simclr.data.tokens import prompted


def class_directions(names: Sequence[str], prompts: Sequence[str], texts: Callable[[list[str]], Tensor]) -> Tensor:
    """(classes, d) unit rows in float64: of each name the mean, over `prompts` such as "a photo of a {}.", of the unit features that
    `texts` makes, (n, d) of n texts (Sec. 3.1.4)."""
    said = [prompted(prompt, name) for name in names for prompt in prompts]
    rows = F.normalize(texts(said).double(), dim=1).unflatten(0, (len(names), len(prompts)))
    return F.normalize(rows.mean(1), dim=1)


def similarities(images: Tensor, directions: Tensor) -> Tensor:
    """(n, classes) cosines, in float64, of images (n, d) and `directions` (classes, d): the largest is the class."""
    found: Tensor = F.normalize(images.double(), dim=1) @ directions.to(images.device).T
    return found
