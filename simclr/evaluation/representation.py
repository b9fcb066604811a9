"""Measures of a representation without labels: tensor in, scalar out. None of these carries a gradient."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from simclr.collectives import all_gather, first_row

_BLOCK = 1 << 24  # cosines in memory at a time


@torch.no_grad()
def contrastive_top1(z: Tensor, images: int | None = None) -> Tensor:
    """Share of view-0 rows whose most similar view-1 row of the global batch is their own image's (chance: 1 / N).

    z (2n, d): this rank's rows, as in `nt_xent`. The candidates are the other view's N rows, as the official metric has
    it. `images`: N, where W does not divide it. Returns a scalar tensor, this rank's mean, so that the host does not wait for the device.
    """
    first, second = F.normalize(z.detach().float(), dim=1).chunk(2)
    own = first_row(first, images) + torch.arange(len(first), device=z.device)
    keys = all_gather(second, images)
    nearest = [(rows @ keys.T).argmax(1) for rows in first.split(_rows(keys))]
    return torch.cat(nearest).eq(own).float().mean()


@torch.no_grad()
def contrastive_entropy(z: Tensor, temperature: float, images: int | None = None) -> Tensor:
    """Mean entropy, in nats, of view 0's softmax over the other view's N rows (ln N at chance level)."""
    first, second = F.normalize(z.detach().float(), dim=1).chunk(2)
    keys = all_gather(second, images)
    found = []
    for rows in first.split(_rows(keys)):
        log_p = F.log_softmax(rows @ keys.T / temperature, dim=1)
        found.append(-(log_p.exp() * log_p).sum(1))
    return torch.cat(found).mean()


def _rows(keys: Tensor) -> int:
    """Rows to compare at a time, so that any batch fits in memory."""
    return max(_BLOCK // len(keys), 1)


@torch.no_grad()
def alignment(z: Tensor) -> Tensor:
    """E ‖z₀ − z₁‖² over positive pairs of normalised rows, 0 is perfect (arXiv:2005.10242, Eq. 1 with α = 2)."""
    first, second = F.normalize(z.detach().float(), dim=1).chunk(2)
    return (first - second).square().sum(1).mean()


@torch.no_grad()
def uniformity(z: Tensor) -> Tensor:
    """ln E exp(−2 ‖x − y‖²) over pairs of different rows, lower is more uniform (arXiv:2005.10242, Eq. 2 with t = 2)."""
    x = F.normalize(z.detach().float(), dim=1)
    n = len(x)
    squared = 2 - 2 * x @ x.T
    squared.fill_diagonal_(float("inf"))
    return torch.logsumexp((-2 * squared).flatten(), 0) - torch.log(torch.tensor(float(n * (n - 1))))


@torch.no_grad()
def rankme(h: Tensor) -> Tensor:
    """exp of the entropy of the normalised singular values of h (n, d): the effective rank (arXiv:2210.02885, Eq. 3)."""
    s = torch.linalg.svdvals(h.detach().float())
    p = s / s.sum().clamp_min(1e-30) + 1e-7
    return torch.exp(-(p * p.log()).sum())


@torch.no_grad()
def effective_dimension(x: Tensor) -> Tensor:
    """(Σ λ)² / Σ λ² of the eigenvalues λ of the covariance of x (n, d): 1 where all rows lie on a line, d where all directions
    are alike (the participation ratio, Gao et al. 2017, doi:10.1101/214262). 0 for constant rows."""
    centred = x.detach().float() - x.detach().float().mean(0)
    gram = centred.T @ centred if x.shape[1] <= len(x) else centred @ centred.T  # the same eigenvalues, and zeros
    ratio: Tensor = gram.diagonal().sum().square() / gram.square().sum().clamp_min(1e-30)
    return ratio


@torch.no_grad()
def spread(z: Tensor) -> Tensor:
    """√d times the mean standard deviation of the unit rows of z (n, d), dimension by dimension: 0 where all point the same way,
    at most 1, about 1 where they point everywhere (arXiv:2011.10566, Sec. 4.1)."""
    deviation: Tensor = F.normalize(z.detach().float(), dim=1).std(0, correction=0).mean()
    return deviation * math.sqrt(z.shape[1])
