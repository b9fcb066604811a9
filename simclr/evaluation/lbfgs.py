"""Logistic regressions that differ in their l2 penalty alone, fitted to convergence as one batched L-BFGS.

The transfer protocol asks for 45 of them. In a loop each would read the features anew, with a product too narrow for a GPU;
here every product with the features serves all problems that have not converged, and a problem that has converged leaves the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

_HISTORY = 10
_TRIALS = 25
_ARMIJO, _CURVATURE = 1e-4, 0.9
_ROWS = 1 << 16  # centred and turned at a time
_LOGITS = 1 << 24  # logits that exist at a time
_STATE_BYTES = 8 << 30  # of weights, gradients and histories; problems beyond that wait for the next batch


@dataclass(frozen=True, slots=True)
class Fits:
    """The results of `fit`, one row per penalty."""

    weights: Tensor
    """(L, classes, d + 1): kernel and, as the last column, bias."""
    loss: Tensor
    """(L,) float64, the objective's value / n."""
    gradient: Tensor
    """(L,) float64, compared with `tolerance`: |gradient| / objective, relative to its value at zero weights; 0 if it is rounding
    alone."""
    iterations: Tensor
    """(L,) int64."""
    converged: Tensor
    """(L,) bool: whether it fell to the tolerance. If not, the iterations or the precision of the numbers ended first."""


@torch.no_grad()
def fit(
    h: Tensor,
    y: Tensor,
    penalties: Sequence[float],
    classes: int,
    tolerance: float = 1e-5,
    iterations: int = 1000,
    progress: Callable[[int, int], None] = lambda iteration, moving: None,
) -> Fits:
    """For each λ of `penalties` the minimum of Σ_i loss_i + λ/2 · |kernel|², the bias free, over features h (n, d).

    y (n,) int64 gives softmax cross-entropy; y (n, classes) with 1 = has the class, 0 = has not, −1 = does not count gives a
    logistic regression per class. A class that no row shows gets the bias −∞. λ multiplies the penalty beside the *sum* of the
    losses (Kornblith et al., arXiv:1805.08974), so it is scikit-learn's 1/C, and its meaning does not change when rows are added. Every
    problem starts at zero, so none depends on the others.

    Works in the dtype of h, float32 or float64. A fit has converged when the gradient of the *logarithm* of the objective is `tolerance`
    times its value at zero weights: with separable classes and a weak penalty, the objective itself falls to 1e-6 within a step or two,
    in a direction that is not yet the minimum's. `progress` gets the iteration and the number of problems that have not converged.

    The objective is convex. It is solved along the principal axes of the centred features, each scaled by the Hessian at zero weights;
    the rotation does not change the penalty and is undone at the end. Features after a ReLU are all positive and correlated, and plain
    L-BFGS converges slowly on them.
    """
    if not len(penalties) or min(penalties) <= 0:
        raise ValueError(f"penalties are {list(penalties)}; expected at least one, each more than 0: at 0 there may be no minimum")
    if len(h) != len(y) or not len(h):
        raise ValueError(f"{len(h)} features and {len(y)} labels; expected as many, and at least one")
    mean = h.mean(0)
    axes = _axes(h, mean)
    x = h.new_empty(len(h), axes.shape[1])
    for part, rows in zip(h.split(_ROWS), x.split(_ROWS), strict=True):
        torch.mm(part - mean, axes, out=rows)
    # A class that no row shows has no minimum: its free bias falls for ever. The bias of a class that every row shows rises for ever.
    certain = _certain(y, classes)
    fitted = torch.nonzero(certain.isnan())[:, 0]
    problem = _Softmax(x, torch.searchsorted(fitted, y), len(fitted)) if y.ndim == 1 else _OneVsRest(x, y[:, fitted])
    size = len(fitted) * (h.shape[1] + 1) * h.element_size() * (2 * _HISTORY + 8)
    at_once = max(1, _STATE_BYTES // max(size, 1))
    lambdas = torch.tensor(penalties, dtype=h.dtype, device=h.device) / len(h)
    parts = [_minimise(problem, part, tolerance, iterations, progress) for part in lambdas.split(at_once)]
    found, loss, gradient, taken = (torch.cat([part[i] for part in parts]) for i in range(4))
    weights = found.new_zeros(len(lambdas), classes, h.shape[1] + 1)
    weights[..., -1] = certain
    weights[:, fitted] = torch.cat([found[..., :-1] @ axes.T, found[..., -1:]], 2)
    weights[..., -1] -= weights[..., :-1] @ mean
    return Fits(weights, loss, gradient, taken, gradient <= tolerance)


def _axes(h: Tensor, mean: Tensor) -> Tensor:
    """(d, r) principal axes of the centred rows x = h − mean (n, d), without those along which x is rounding alone: with more features
    than rows there are many, and under a weak penalty the fit would follow them."""
    gram = h.new_zeros(h.shape[1], h.shape[1], dtype=torch.float64)
    for part in h.split(_ROWS):
        rows = (part - mean).double()
        gram += rows.T @ rows
    squares, axes = torch.linalg.eigh(gram)
    rounding = (8 * torch.finfo(h.dtype).eps) ** 2 * h.shape[1]
    kept: Tensor = axes[:, squares > rounding * squares[-1].clamp_min(1e-300)].to(h.dtype)
    return kept


def _certain(y: Tensor, classes: int) -> Tensor:
    """(classes,) float, biases known beforehand: −∞ for a class that no row shows, ∞ for one (against the rest) that every row shows,
    else NaN."""
    if y.ndim == 1:
        shown = torch.bincount(y, minlength=classes) > 0
        missed = torch.ones_like(shown)
    else:
        shown, missed = (y == 1).any(0), (y == 0).any(0)
    undecided = torch.full((classes,), torch.nan, device=y.device)
    return torch.where(shown, torch.where(missed, undecided, torch.inf), -torch.inf)


def logits(h: Tensor, weights: Tensor) -> Tensor:
    """(n, classes) of features h (n, d) under one row of `Fits.weights`."""
    return F.linear(h, weights[:, :-1], weights[:, -1])


# ── The objectives ─────────────────────────────────────────────────────────────────────────────────────────────────


class _Softmax:
    """Mean cross-entropy of n rows for a batch of weights at once, and its gradient."""

    def __init__(self, x: Tensor, y: Tensor, classes: int) -> None:
        self.x, self.y, self.classes = x, y, classes
        # p(1 − p) at p = 1 / classes, over the directions in which the classes differ, which the weights never leave.
        self.curvature = torch.cat([x.square().mean(0), x.new_ones(1)]) / classes

    def __call__(self, weights: Tensor, penalties: Tensor) -> tuple[Tensor, Tensor]:
        """weights (L, classes, d + 1), penalties / n (L,) → objective / n (L,) float64 and its gradient, shaped like weights."""
        problems, classes, width = weights.shape
        kernel, bias = weights[..., :-1].reshape(-1, width - 1), weights[..., -1].reshape(-1)
        total = weights.new_zeros(problems, dtype=torch.float64)
        gradient = torch.zeros_like(weights).view(-1, width)
        step = max(1, _LOGITS // len(kernel))
        for first in range(0, len(self.x), step):
            x = self.x[first : first + step]
            z = torch.addmm(bias, x, kernel.T).view(-1, problems, classes)
            loss, residual = self.block(z, slice(first, first + step))
            total += loss
            flat = residual.view(len(x), -1)
            gradient[:, :-1].addmm_(flat.T, x)
            gradient[:, -1] += flat.sum(0)
        gradient = gradient.view_as(weights).div_(len(self.x))
        gradient[..., :-1] += penalties[:, None, None] * weights[..., :-1]
        return total / len(self.x) + 0.5 * penalties.double() * weights[..., :-1].square().sum((1, 2)).double(), gradient

    def block(self, z: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        """Summed loss (L,) and d loss / d z of logits z (rows, L, classes). z is overwritten."""
        y = self.y[rows, None, None].expand(-1, z.shape[1], 1)
        z.sub_(z.amax(2, keepdim=True))
        right = z.gather(2, y)
        # The other classes' share is summed directly. As 1 − p it would be rounding where the classes are well separated, as would the
        # loss, and fits with weak penalties would stop at arbitrary points.
        residual = z.exp_().scatter_(2, y, 0.0)
        others = residual.sum(2, keepdim=True)
        sums = others + right.exp()
        loss = torch.where(right == 0, others.log1p(), sums.log() - right)
        residual.scatter_(2, y, -others).div_(sums)
        return loss.sum((0, 2), dtype=torch.float64), residual


class _OneVsRest(_Softmax):
    """Summed logistic losses of every class on its own, mean over n rows."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        super().__init__(x, y, y.shape[1])
        self.away, self.counts = 1 - 2 * (y == 1).to(x.dtype), (y >= 0).to(x.dtype)
        self.curvature = self.curvature * (self.classes / 4)

    def block(self, z: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        away, counts = self.away[rows, None], self.counts[rows, None]
        z = z.mul_(away)  # distance on the wrong side: p − 1 would be rounding where p is nearly 1
        return (F.softplus(z) * counts).sum((0, 2), dtype=torch.float64), z.sigmoid_().mul_(counts).mul_(away)


# ── The solver ─────────────────────────────────────────────────────────────────────────────────────────────────────


def _minimise(
    problem: _Softmax, penalties: Tensor, tolerance: float, iterations: int, progress: Callable[[int, int], None]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """L-BFGS (Nocedal and Wright, Alg. 7.4 and 7.5) of all problems in step: weights, loss, relative gradient, iterations taken.

    Problems differ in penalty, step length and whether they have converged. Finished problems are removed from every tensor, so the rest
    gets faster as it gets smaller.
    """
    found = penalties.new_zeros(len(penalties), problem.classes, len(problem.curvature))
    loss_found = torch.zeros(len(penalties), dtype=torch.float64, device=penalties.device)
    gradient_found, taken = torch.zeros_like(loss_found), torch.zeros(len(penalties), dtype=torch.int64, device=penalties.device)
    penalised = penalties.new_ones(len(problem.curvature))
    penalised[-1] = 0
    scale = 1 / (problem.curvature + penalties[:, None] * penalised).clamp_min(torch.finfo(penalties.dtype).tiny ** 0.5)
    state = _State(torch.arange(len(penalties), device=penalties.device), penalties, scale[:, None], found.clone())
    state.loss, state.gradient = problem(state.weights, penalties)
    least = state.loss.clamp_min(1e-300)
    first = _norm(state.gradient, state.scale) / least
    # A gradient of this size is rounding, most of it in the bias. Under a strong penalty it is larger than `tolerance` allows.
    rounding = torch.finfo(penalties.dtype).eps * problem.classes * (problem.curvature * scale).sum(1).double().sqrt() / least
    for iteration in range(iterations + 1):
        gradient = _norm(state.gradient, state.scale) / state.loss.clamp_min(1e-300)
        if iteration:
            gradient = torch.where(gradient > rounding[state.ids], gradient, 0.0)
        size = gradient / first[state.ids].clamp_min(1e-300)
        found[state.ids], loss_found[state.ids], gradient_found[state.ids], taken[state.ids] = state.weights, state.loss, size, iteration
        state.keep((size > tolerance) & ~state.stuck)
        progress(iteration, len(state.ids))
        if not len(state.ids) or iteration == iterations:
            break
        state.step(problem)
    return found, loss_found, gradient_found, taken


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """(L,) inner products, problem by problem, of a and b (L, classes, d + 1)."""
    return (a * b).sum((1, 2), dtype=torch.float64)


def _norm(gradient: Tensor, scale: Tensor) -> Tensor:
    """(L,) √(g · H₀⁻¹ g): the gradient's norm in coordinates where the Hessian at zero weights is the identity."""
    return _dot(gradient, gradient * scale).sqrt()


class _State:
    """The problems that have not converged. They are the first dimension of every tensor."""

    def __init__(self, ids: Tensor, penalties: Tensor, scale: Tensor, weights: Tensor) -> None:
        self.ids, self.penalties, self.scale, self.weights = ids, penalties, scale, weights
        self.loss = self.gradient = weights  # the caller evaluates them first
        self.stuck = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
        self.moves: list[Tensor] = []
        self.turns: list[Tensor] = []

    def keep(self, moving: Tensor) -> None:
        if moving.all():
            return
        for name in ("ids", "penalties", "scale", "weights", "loss", "gradient", "stuck"):
            setattr(self, name, getattr(self, name)[moving])
        self.moves, self.turns = [m[moving] for m in self.moves], [t[moving] for t in self.turns]

    def step(self, problem: _Softmax) -> None:
        """One step of every problem, with its own direction and line search."""
        direction = self._direction()
        weights, loss, gradient, ok = self._search(problem, direction)
        self.stuck = ~ok
        self.moves = [*self.moves[-_HISTORY + 1 :], weights - self.weights]
        self.turns = [*self.turns[-_HISTORY + 1 :], gradient - self.gradient]
        self.weights, self.loss, self.gradient = weights, loss, gradient

    def _direction(self) -> Tensor:
        """−H⁻¹ g by the two-loop recursion; H₀ is the scale, times the last pair's ratio."""
        q = -self.gradient
        rho, alpha = [], []
        for move, turn in zip(self.moves, self.turns, strict=True):
            curved = _dot(move, turn)
            rho.append(torch.where(curved > 0, 1 / curved, 0.0))  # a step of rounding alone has no curvature
        for move, turn, r in reversed(list(zip(self.moves, self.turns, rho, strict=True))):
            alpha.append(r * _dot(move, q))
            q = q - alpha[-1][:, None, None].to(q.dtype) * turn
        q = q * self.scale
        if self.moves:
            curved, squared = _dot(self.moves[-1], self.turns[-1]), _dot(self.turns[-1], self.turns[-1] * self.scale)
            q = q * torch.where((curved > 0) & (squared > 0), curved / squared, 1.0)[:, None, None].to(q.dtype)
        for move, turn, r, a in zip(self.moves, self.turns, rho, reversed(alpha), strict=True):
            q = q + (a - r * _dot(turn, q))[:, None, None].to(q.dtype) * move
        return q

    def _search(self, problem: _Softmax, direction: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Steps that meet the weak Wolfe conditions, found by doubling and halving (Lewis and Overton 2013, Alg. 2.6), each problem's on
        its own: (weights, loss, gradient, whether a step was found). Without one, the problem stays where it is.

        Near the minimum the loss cannot tell two points apart, so a rise within rounding is accepted.
        """
        slope = _dot(self.gradient, direction)
        grant = 4 * torch.finfo(direction.dtype).eps * self.loss.abs()
        step, low = torch.ones_like(slope), torch.zeros_like(slope)
        high = torch.full_like(slope, torch.inf)
        weights, loss, gradient = self.weights.clone(), self.loss.clone(), self.gradient.clone()
        ok = torch.zeros_like(self.stuck)
        trying = torch.nonzero(slope < 0)[:, 0]
        for _ in range(_TRIALS):
            if not len(trying):
                break
            t = step[trying]
            tried = self.weights[trying] + t[:, None, None].to(direction.dtype) * direction[trying]
            value, gradient_there = problem(tried, self.penalties[trying])
            far = ~(value <= self.loss[trying] + _ARMIJO * t * slope[trying] + grant[trying])  # also where it is not a number
            near = ~far & (_dot(gradient_there, direction[trying]) < _CURVATURE * slope[trying])
            good = ~far & ~near
            weights[trying[good]], loss[trying[good]], gradient[trying[good]] = tried[good], value[good], gradient_there[good]
            ok[trying[good]] = True
            high[trying[far]], low[trying[near]] = t[far], t[near]
            step = torch.where(high.isinf(), 2 * low.clamp_min(0.5), (low + high) / 2)
            trying = trying[~good]
        return weights, loss, gradient, ok
