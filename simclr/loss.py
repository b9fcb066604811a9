"""NT-Xent, the contrastive loss of SimCLR (arXiv:2002.05709, Eq. 1 and Algorithm 1), exact over ranks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from simclr.collectives import all_gather, rank


def nt_xent(z: Tensor, temperature: float) -> Tensor:
    """The normalised temperature-scaled cross entropy of the global batch, seen from this rank's rows.

    z (2n, d): this rank's projections, rows [view 0 of n images; view 1 of the same n], any scale. Returns the mean
    of Eq. 1 over these 2n rows, a scalar. The other 2N − 1 views of the global batch, from every rank, are the
    candidates. The mean over ranks is the loss of the global batch, and with DDP its gradient is exact.

    The official TensorFlow code adds the two directions, loss_a + loss_b, which is twice this value.
    Raises ValueError for an odd number of rows.
    """
    if z.ndim != 2 or z.shape[0] % 2:
        raise ValueError(f"nt_xent got z of shape {tuple(z.shape)}; expected (2n, d): view 0 of n images, then view 1")
    z = z.float() if z.dtype in (torch.bfloat16, torch.float16) else z
    with torch.autocast(z.device.type, enabled=False):
        z = F.normalize(z, dim=1)
        keys = all_gather(z)  # (2N, d), in the order of ranks
        own = rank() * z.shape[0] + torch.arange(z.shape[0], device=z.device)  # each row's own column
        logits = z @ keys.T / temperature
        logits = logits.scatter(1, own[:, None], float("-inf"))  # an image is no candidate for itself
        # A row's partner is the same image's other view, half of this rank's rows away.
        return F.cross_entropy(logits, own.roll(z.shape[0] // 2))
