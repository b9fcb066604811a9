"""NT-Xent, the contrastive loss of SimCLR (arXiv:2002.05709, Eq. 1 and Algorithm 1), exact over ranks; with the paper's other two losses
(Table 2), each also with semi-hard negatives (Sec. 5.1), for its ablation (Table 4), and one without normalisation (Table 5). The losses
of its siblings stand behind them, with their own shapes.

Each of SimCLR's takes z (2n, d): this rank's projections, rows [view 0 of n images; view 1 of the same n], any scale, and returns the
mean over these 2n rows, a scalar. The other 2N − 1 views of the global batch, from every rank, are the candidates. The mean
over ranks is the loss of the global batch, and with DDP its gradient is exact. Where W does not divide N, say N as `images`: ranks
then hold n and n + 1 images (`simclr.config.share`), and the value is weighted by n W / N. Each raises ValueError for an odd number of
rows. A check for NaN would make the host wait for the device at every step: the loop checks when it reports, and names rank and step.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from simclr.collectives import all_gather, all_reduce_sum, first_row, share_of_mean, world_size
from simclr.kernels.nt_xent import streamed
from simclr.kernels.nt_xent_tiles import in_tiles

STREAMED_FROM = 1 << 22
"""Number of logits above which they are not stored: NT-Xent then goes block by block (`simclr.kernels.nt_xent`), as it always does on a
GPU."""


def nt_xent(z: Tensor, temperature: float, memory: Tensor | None = None, images: int | None = None) -> Tensor:
    """The normalised temperature-scaled cross entropy of the global batch, seen from this rank's rows (2n, d) (Eq. 1). Unit rows (m, d)
    of a queue, `memory`, the same on every rank, are negatives too, without gradient (`simclr.methods.queue`).

    The definition stands below; large batches and GPUs take `kernels.nt_xent`, which stores no logits and is tested against it. The
    official TensorFlow code adds the two directions, loss_a + loss_b, which is twice this value.
    """
    with torch.autocast(z.device.type, enabled=False):
        stored = 0 if memory is None else len(memory)
        if z.is_cuda or len(z) * (len(z) * world_size() + stored) > STREAMED_FROM:
            unit, keys = _unit_rows(z, memory, images)
            if z.dtype in (torch.bfloat16, torch.float16) and in_tiles(z):  # the tensor cores multiply this dtype; sums are float32
                rows = unit.to(z.dtype)
                unit, keys = rows, rows if keys is unit else keys.to(z.dtype)
            return _share(streamed(unit, keys, first_row(z, images), temperature), z, images)
        cosines, own = _cosines(z, memory, images)
        logits = cosines / temperature
        logits = logits.scatter(1, own[:, None], float("-inf"))  # a view is no candidate for itself
        return _share(F.cross_entropy(logits, _partner(own)), z, images)


def nt_xent_dot(z: Tensor, temperature: float, images: int | None = None) -> Tensor:
    """NT-Xent with the similarity u·v of projections as they are, without ℓ2 normalisation (Table 5, lower half, where τ is 10 or
    100). An ablation: it tells more pairs apart than the normalised loss, and its representation is worse."""
    with torch.autocast(z.device.type, enabled=False):
        z = _rows(z)
        own = first_row(z, images) + torch.arange(len(z), device=z.device)
        logits = (z @ all_gather(z, images).T / temperature).scatter(1, own[:, None], float("-inf"))
        return _share(F.cross_entropy(logits, _partner(own)), z, images)


def nt_logistic(z: Tensor, temperature: float, semi_hard: bool = False, images: int | None = None) -> Tensor:
    """−log σ(u·v⁺ / τ) − log σ(−u·v⁻ / τ) (Table 2, second row), averaged over the anchor's negatives v⁻ and the rows u.

    With `semi_hard` an anchor's one negative is the closest of those further away than its positive; without such a
    negative only the positive's term is left.
    """
    with torch.autocast(z.device.type, enabled=False):
        cosines, own = _cosines(z, images=images)
        positive, weights = _pairs(cosines, own, float("inf") if semi_hard else None)
        loss = -(F.logsigmoid(positive / temperature)[:, 0] + (weights * F.logsigmoid(-cosines / temperature)).sum(1)).mean()
        return _share(loss, z, images)


def margin_triplet(z: Tensor, margin: float, semi_hard: bool = False, images: int | None = None) -> Tensor:
    """max(u·v⁻ − u·v⁺ + m, 0) (Table 2, third row), averaged over the anchor's negatives v⁻ and the rows u.

    With `semi_hard` an anchor's one negative is the closest of those further away than its positive by less than the
    margin m (a difference of cosines, arXiv:1503.03832, Sec. 3.2); an anchor without one counts as 0.
    """
    with torch.autocast(z.device.type, enabled=False):
        cosines, own = _cosines(z, images=images)
        positive, weights = _pairs(cosines, own, margin if semi_hard else None)
        return _share((weights * F.relu(cosines - positive + margin)).sum(1).mean(), z, images)


def info_nce(q: Tensor, k: Tensor, temperature: float, images: int | None = None) -> Tensor:
    """MoCo v3's loss (arXiv:2104.02057, Eq. 1 and Algorithm 1) of this rank's predictions q (n, d) and keys k (n, d) of the same images,
    both of any scale, the mean over these n rows:

        −2 τ log( exp(u_i·v_i / τ) / Σ_j exp(u_i·v_j / τ) ),   u = q / ‖q‖,  v = k / ‖k‖

    j goes over the keys of all ranks, of so many `images`; keys have no gradient. The factor 2 τ, as in the official code, keeps the size
    of the gradient as τ changes. One call is one direction: a step adds two. In float32 at least.
    """
    with torch.autocast(q.device.type, enabled=False):
        q, k = (x.float() if x.dtype in (torch.bfloat16, torch.float16) else x for x in (q, k))
        keys = all_gather(F.normalize(k.detach(), dim=1), images)
        own = first_row(q, images) + torch.arange(len(q), device=q.device)
        logits = F.normalize(q, dim=1) @ keys.T / temperature
        return share_of_mean(2 * temperature * F.cross_entropy(logits, own), len(q), images)


def clip(image: Tensor, text: Tensor, scale: Tensor, images: int | None = None) -> Tensor:
    """CLIP's loss (arXiv:2103.00020, Fig. 3) of this rank's features of images and of their captions, both (n, d) and of any scale, and the
    factor `scale` (n,) of cosines, the same number in every row:

        ½ [cross entropy of s a_i·b_j over j + cross entropy of s b_i·a_j over j], each to i;  a = image / ‖image‖,  b = text / ‖text‖

    j goes over the pairs of all ranks, of so many `images`, with gradients through the gathering: without these the gradient is another,
    and no smaller multiple of it. In float32 at least.
    """
    with torch.autocast(image.device.type, enabled=False):
        image, text, scale = (x.float() if x.dtype in (torch.bfloat16, torch.float16) else x for x in (image, text, scale))
        a, b = F.normalize(image, dim=1), F.normalize(text, dim=1)
        own = first_row(a, images) + torch.arange(len(a), device=a.device)
        factors = scale[:, None]
        rows = F.cross_entropy(factors * (a @ all_gather(b, images).T), own)
        columns = F.cross_entropy(factors * (b @ all_gather(a, images).T), own)
        return share_of_mean((rows + columns) / 2, len(a), images)


def byol(predictions: Tensor, projections: Tensor, images: int | None = None) -> Tensor:
    """d(p₁, t₂) + d(p₂, t₁), averaged over images, with d(p, t) = ‖p̄ − t̄‖² = 2 − 2 cos(p, t) (arXiv:2006.07733, Eq. 2): BYOL's loss of
    the predictions p (2, n, d) of both views and the target network's projections t (2, n, d), which carry no gradient.

    Each pair of views counts in both directions, once each. Rows shorter than 1e-6 are divided by that, as in the authors' code. There are
    no negatives, so the rows of other ranks add nothing but to the mean.
    """
    with torch.autocast(predictions.device.type, enabled=False):
        p, t = (_unit(x) for x in (predictions, projections.detach().flip(0)))
        return share_of_mean((p - t).square().sum(2).sum(0).mean(), p.shape[1], images)


@torch.no_grad()
def sinkhorn(scores: Tensor, epsilon: float, iterations: int, samples: int) -> Tensor:
    """Codes of SwAV (arXiv:2006.09882, Eq. 3 to 5): scores (n, K), cosines of this rank's samples with K prototypes, → (n, K) whose rows
    sum to 1 and whose columns sum to about the same over all ranks' `samples`, n here.

        Q = exp(scores / ε), over its sum; `iterations` times: each prototype's column over its sum and K, each sample's row over its sum
        and the samples; in the end times the samples

    Ranks exchange sums alone. In float32 at least.
    """
    with torch.autocast(scores.device.type, enabled=False):
        q = scores.float() if scores.dtype in (torch.bfloat16, torch.float16) else scores
        q = torch.exp(q / epsilon)
        q = q / all_reduce_sum(q.sum())
        for _ in range(iterations):
            q = q / (all_reduce_sum(q.sum(0)) * q.shape[1])
            q = q / (q.sum(1, keepdim=True) * samples)
        return q * samples


def swav(scores: Tensor, codes: Tensor, temperature: float, images: int | None = None) -> Tensor:
    """SwAV's swapped prediction (arXiv:2006.09882, Eq. 2 and 6) of this rank's `scores` (V, n, K), cosines of V crops of n images with K
    prototypes, and the `codes` (2, n, K) of the first two, which carry no gradient:

        ½ Σ over c in (0, 1) of 1 / (V − 1) Σ over v ≠ c of the mean of −Σ_k code_c · log softmax(scores_v / τ)

    The mean over ranks is the loss of the global batch, of so many `images`. In float32 at least.
    """
    with torch.autocast(scores.device.type, enabled=False):
        x = scores.float() if scores.dtype in (torch.bfloat16, torch.float16) else scores
        log_p, codes = F.log_softmax(x / temperature, dim=2), codes.detach().to(x.dtype)
        # Σ over v ≠ c of log p_v: all crops' but the code's own.
        others = log_p.sum(0) - log_p[:2]
        mean = -(codes * others).sum(2).mean(1).mean() / (len(scores) - 1)
        return share_of_mean(mean, scores.shape[1], images)


def dino(scores: Tensor, taught: Tensor, centre: Tensor, temperature: float, sharp: float, images: int | None = None) -> Tensor:
    """DINO's loss (arXiv:2104.14294, Eq. 3) of this rank's `scores` (V, n, K) of V crops of n images, and the scores `taught` (2, n, K) of
    the first two by the network's moving average, whose mean so far is the `centre` (K,); these carry no gradient:

        1 / (2 (V − 1)) Σ over i in (0, 1), v ≠ i of the mean of −Σ_k q_i log softmax(scores_v / τ)
        q = softmax((taught − centre) / sharp)

    The mean over ranks is the loss of the global batch, of so many `images`. In float32 at least.
    """
    with torch.autocast(scores.device.type, enabled=False):
        x, t = (y.float() if y.dtype in (torch.bfloat16, torch.float16) else y for y in (scores, taught.detach()))
        q = F.softmax((t - centre) / sharp, dim=2)
        log_p = F.log_softmax(x / temperature, dim=2)
        mean = -(q * (log_p.sum(0) - log_p[:2])).sum(2).mean(1).mean() / (len(scores) - 1)
        return share_of_mean(mean, scores.shape[1], images)


def masked_mean_square(predicted: Tensor, patches: Tensor, gone: Tensor, images: int | None = None) -> Tensor:
    """MAE's loss (arXiv:2111.06377, Sec. 3): (predicted − patches)², (n, L, values), averaged over the values of a patch and then over the
    patches that are `gone`, (n, L) of 0 and 1, as many in each image. The mean over ranks is the loss of the global batch, of so many
    `images`. In float32 at least."""
    with torch.autocast(predicted.device.type, enabled=False):
        p = predicted.float() if predicted.dtype in (torch.bfloat16, torch.float16) else predicted
        of_patches = (p - patches.to(p.dtype)).square().mean(2)
        return share_of_mean((of_patches * gone).sum() / gone.sum(), len(p), images)


def _unit(x: Tensor) -> Tensor:
    """Rows of length 1, in float32 at least."""
    return F.normalize(x.float() if x.dtype in (torch.bfloat16, torch.float16) else x, dim=-1, eps=1e-6)


def _share(mean: Tensor, z: Tensor, images: int | None) -> Tensor:
    return share_of_mean(mean, len(z) // 2, images)


def _unit_rows(z: Tensor, memory: Tensor | None, images: int | None) -> tuple[Tensor, Tensor]:
    """This rank's rows (2n, d) and those of all ranks (2N, d), in the order of ranks, of length 1, in float32 at least; behind them the
    rows of the queue."""
    z = F.normalize(_rows(z), dim=1)
    keys = all_gather(z, images)
    return z, keys if memory is None else torch.cat([keys, memory.to(keys.dtype)])


def _rows(z: Tensor) -> Tensor:
    """z (2n, d) in float32 at least."""
    if z.ndim != 2 or z.shape[0] % 2:
        raise ValueError(f"the loss got z of shape {tuple(z.shape)}; expected (2n, d): view 0 of n images, then view 1")
    return z.float() if z.dtype in (torch.bfloat16, torch.float16) else z


def _cosines(z: Tensor, memory: Tensor | None = None, images: int | None = None) -> tuple[Tensor, Tensor]:
    """(2n, 2N) cosines of this rank's rows with all ranks' (and the queue's), and (2n,) the column of each row itself."""
    unit, keys = _unit_rows(z, memory, images)
    return unit @ keys.T, first_row(z, images) + torch.arange(len(z), device=z.device)


def _partner(own: Tensor) -> Tensor:
    """(2n,) the column of each row's positive: the same image's other view, half of this rank's rows away."""
    return own.roll(len(own) // 2)


def _pairs(cosines: Tensor, own: Tensor, within: float | None) -> tuple[Tensor, Tensor]:
    """(2n, 1) cosines of the positives, and (2n, 2N) the weight of each candidate as a negative.

    `within` None: all 2N − 2 negatives alike. Else the closest one whose cosine lies below the positive's by less than
    `within`. Which one that is, is a choice and carries no gradient.
    """
    partner = _partner(own)
    positive = cosines.gather(1, partner[:, None])
    negative = torch.ones_like(cosines, dtype=torch.bool).scatter(1, torch.stack([own, partner], 1), False)
    if within is None:
        return positive, negative.to(cosines.dtype) / (cosines.shape[1] - 2)
    with torch.no_grad():
        eligible = negative & (cosines < positive) & (cosines > positive - within)
        closest = cosines.masked_fill(~eligible, float("-inf")).argmax(1, keepdim=True)
        return positive, torch.zeros_like(cosines).scatter(1, closest, 1.0) * eligible


# ── MoCo ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def info_nce_queue(q: Tensor, k: Tensor, queue: Tensor, temperature: float, images: int | None = None) -> Tensor:
    """MoCo's loss (arXiv:1911.05722, Eq. 1) of this rank's queries q (n, d), of any scale, the mean over these n rows:

        −log( exp(u·k / τ) / (exp(u·k / τ) + Σ_j exp(u·queue_j / τ)) ),   u = q / ‖q‖

    k (n, d) are the queries' own keys and queue (K, d) all ranks' earlier ones, unit rows without gradient. The mean over ranks is the
    loss of the global batch, of so many `images`; no row of another rank is in it. It is computed in float32 at least and keeps n (K + 1)
    logits and as many probabilities for the backward pass: 128 MiB for 256 images a rank and K = 65,536.
    """
    with torch.autocast(q.device.type, enabled=False):
        q = q.float() if q.dtype in (torch.bfloat16, torch.float16) else q
        u = F.normalize(q, dim=1) / temperature
        k, queue = k.to(u.dtype), queue.to(u.dtype)
        logits = torch.cat([(u * k).sum(1, keepdim=True), u @ queue.T], 1)
        own = torch.zeros(len(q), dtype=torch.int64, device=q.device)
        return share_of_mean(F.cross_entropy(logits, own), len(q), images)
