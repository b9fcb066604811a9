"""The official code's max-pool."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class SameMaxPool(nn.Module):
    """3 × 3 max-pool of stride 2 with TensorFlow's 'SAME' padding: on even sizes it pads only at the end."""

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[2] % 2 == x.shape[3] % 2 == 0:  # the same to the bit without a padded copy: the last windows end with the image
            return F.max_pool2d(x, 3, 2, 0, ceil_mode=True)
        pads = []
        for size in (x.shape[3], x.shape[2]):
            total = max((-(-size // 2) - 1) * 2 + 3 - size, 0)
            pads += [total // 2, total - total // 2]
        return F.max_pool2d(F.pad(x, pads, value=float("-inf")), 3, 2)
