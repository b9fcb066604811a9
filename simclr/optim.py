"""Optimizers, parameter groups, schedules and the clipping of gradients (arXiv:2002.05709, Sec. 2.2 and App. B.6; LARS: arXiv:1708.03888;
AdamW: arXiv:1711.05101)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from simclr.config import Optim
from simclr.networks.encoders import depths


def lr_peak(base_lr: float, batch_size: int, rule: Literal["linear", "sqrt"]) -> float:
    """Learning rate after scaling: base_lr · N / 256 (linear) or base_lr · √N (sqrt), App. B.1."""
    if rule == "linear":
        return base_lr * batch_size / 256
    if rule == "sqrt":
        return base_lr * math.sqrt(batch_size)
    raise ValueError(f"unknown scaling rule {rule!r}; expected 'linear' or 'sqrt'")


def warmup_cosine(step: int, peak: float, warmup_steps: int, total_steps: int, last: float = 0.0) -> float:
    """Learning rate at `step` (0-based): linear from 0 to `peak`, then half a cosine to `last` (App. B.6)."""
    if step < warmup_steps:
        return peak * step / warmup_steps
    progress = (step - warmup_steps) / max(total_steps - warmup_steps, 1)
    return last + (peak - last) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


def half_cosine(step: int, first: float, last: float, total_steps: int) -> float:
    """Value at `step` (0-based) of a setting that goes from `first` to `last` by half a cosine, as DINO's weight decay (arXiv:2104.14294,
    Sec. 3.2)."""
    return last + (first - last) * 0.5 * (1 + math.cos(math.pi * min(step / max(total_steps, 1), 1.0)))


class LARS(torch.optim.Optimizer):
    """Layer-wise adaptive rate scaling, with the learning rate inside the momentum buffer (App. B.6) or outside.

        g ← η ‖w‖ / ‖g + λ w‖ · (g + λ w)
        v ← m v + lr · g;   w ← w − v               rate_in_buffer=True, as in SimCLR's official code
        v ← m v + g;        w ← w − lr · v          rate_in_buffer=False, as in those of BYOL and MoCo v3, and in most ports

    Where lr stands matters: with it outside, a changing schedule rescales the whole history of gradients at once. The trust ratio
    η ‖w‖ / ‖g + λ w‖ is 1 where either norm is 0, and in groups with `adapt=False` (BatchNorm, biases, classifier).

    With `larc` it is the optimizer of SwAV's authors (arXiv:2006.09882, App. A), LARC without its clipping: the ratio is
    η ‖w‖ / (‖g‖ + λ ‖w‖ + 1e-8), and where ‖w‖ or ‖g‖ is 0 the gradient stays as it is, without decay.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 1e-6,
        trust_coefficient: float = 1e-3,
        nesterov: bool = False,
        rate_in_buffer: bool = True,
        larc: bool = False,
    ) -> None:
        super().__init__(
            params,
            {
                "lr": lr,
                "momentum": momentum,
                "weight_decay": weight_decay,
                "trust_coefficient": trust_coefficient,
                "nesterov": nesterov,
                "rate_in_buffer": rate_in_buffer,
                "larc": larc,
                "adapt": True,
            },
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step over every parameter that has a gradient, as a few multi-tensor calls per group."""
        result = None
        if closure is not None:
            with torch.enable_grad():
                result = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            grads: list[Tensor] = [p.grad for p in params if p.grad is not None]
            for p in params:
                if "momentum_buffer" not in self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
            buffers: list[Tensor] = [self.state[p]["momentum_buffer"] for p in params]

            momentum, decay = group["momentum"], group["weight_decay"]
            inside, outside = (group["lr"], 1.0) if group["rate_in_buffer"] else (1.0, group["lr"])
            # m v + s g is one call as lerp(v, s g / (1 − m), 1 − m): each call passes over all weights in memory, which is most of a
            # step's cost.
            scale = inside / (1 - momentum)
            if group["adapt"]:
                grads, trust = _adapted(params, grads, decay, group["trust_coefficient"], group["larc"])
                if params[0].is_cuda:
                    _follow(params, grads, buffers, list((trust * inside).unbind()), momentum, outside, group["nesterov"])
                    continue
                torch._foreach_mul_(grads, list((trust * scale).unbind()))
            else:
                grads = list(torch._foreach_mul(grads, scale))
                if decay:
                    torch._foreach_add_(grads, params, alpha=decay * scale)
            torch._foreach_lerp_(buffers, grads, 1 - momentum)
            torch._foreach_sub_(params, buffers, alpha=outside)
            if group["nesterov"]:  # w ← w − m v − s g, of which v was subtracted already
                torch._foreach_add_(params, buffers, alpha=(1 - momentum) * outside)
                torch._foreach_sub_(params, grads, alpha=(1 - momentum) * outside)
        return result


def _adapted(params: list[Tensor], grads: list[Tensor], decay: float, eta: float, larc: bool) -> tuple[list[Tensor], Tensor]:
    """(gradients with decay, trust ratio of each)."""
    w = torch.stack(torch._foreach_norm(params))
    if larc:
        g = torch.stack(torch._foreach_norm(grads))
        known = (w > 0) & (g > 0)
        trust = torch.where(known, eta * w / (g + decay * w + 1e-8), torch.ones_like(w))
        return list(torch._foreach_add(grads, torch._foreach_mul(params, list((known.to(w.dtype) * decay).unbind())))), trust
    grads = list(torch._foreach_add(grads, params, alpha=decay))
    g = torch.stack(torch._foreach_norm(grads))
    return grads, torch.where((w > 0) & (g > 0), eta * w / g, torch.ones_like(w))


def _follow(
    params: list[Tensor], grads: list[Tensor], buffers: list[Tensor], rates: list[Tensor], momentum: float, lr: float, nesterov: bool
) -> None:
    """v ← m v + r g, w ← w − lr v (Nesterov: w ← w − lr (m v + r g)), each tensor with a rate r of its own, a number on the device.

    On a GPU `_foreach_mul_` takes one launch for each such factor, 55 for ResNet-50. `_foreach_addcmul_` takes one for many tensors, in
    torch 2.15 (pytorch#172731). A CPU keeps the other order of roundings, in which its frozen numbers were made.
    """
    torch._foreach_mul_(buffers, momentum)
    torch._foreach_addcmul_(buffers, rates, grads)
    if nesterov:
        torch._foreach_sub_(params, buffers, alpha=momentum * lr)
        torch._foreach_addcmul_(params, rates, grads, value=-lr)
    else:
        torch._foreach_sub_(params, buffers, alpha=lr)


Schedule = Callable[[int], float]
"""Value of a setting at an optimizer step (0-based)."""


@dataclass(frozen=True, slots=True)
class Group:
    """Parameters that are optimized alike."""

    params: tuple[nn.Parameter, ...]
    settings: dict[str, Any]
    """Settings of the optimizer, such as {"weight_decay": 1e-4, "adapt": True}."""
    schedules: dict[str, Schedule]
    """Settings that are set before each step, such as {"lr": …}."""


Rule = Callable[[str, nn.Parameter], tuple[bool, bool]]
"""(name, parameter) → (whether it decays, whether LARS adapts its rate)."""


def simclr_rule(name: str, p: nn.Parameter) -> tuple[bool, bool]:
    """Kernels of dense layers and convolutions decay and adapt, nothing else does (`is_kernel`): for BatchNorm and biases as in App. B.6. A
    classifier's kernel decays only, as in the official code."""
    kernel = is_kernel(name, p)
    return kernel, kernel and not name.startswith("classifier.")


def is_kernel(name: str, p: nn.Parameter) -> bool:
    """Whether the parameter called `name` is the kernel of a dense layer or a convolution, by its name and shape.

    `p.ndim > 1` alone would take in class and mask tokens (1, 1, d), position embeddings (1, n, d), tables of relative positions, the
    lengths of weight normalisation (d, 1) and scales that are kept as (1, d, 1, 1).
    """
    *path, leaf = name.split(".")
    owner = path[-1] if path else ""
    if owner == "weight":  # torch's parametrizations.weight: original0 is a length, original1 the direction
        return p.ndim > 1 and leaf == "original1"
    other = "norm" in owner or owner.startswith("bn") or owner in ("pos_embed", "position_embedding", "position_embeddings")
    return p.ndim > 1 and not other and (leaf in ("weight", "weight_v", "proj") or leaf.endswith("proj_weight"))


def byol_rule(name: str, p: nn.Parameter) -> tuple[bool, bool]:
    """Biases, and all in a module whose name contains "norm", neither decay nor adapt, as in BYOL's official code, which goes by names.
    Some norms here have a number for a name; so vectors do neither, too: each is a bias or a norm's. The authors have no transformer; its
    class token and positions do neither here."""
    *path, leaf = name.split(".")
    named = leaf not in ("bias", "b", "cls_token", "pos_embed") and not any("norm" in part for part in path)
    return p.ndim > 1 and named, p.ndim > 1 and named


def mocov3_lars_rule(name: str, p: nn.Parameter) -> tuple[bool, bool]:
    """What has more than one dimension decays and adapts, tokens too, as in the LARS of MoCo v3's official code."""
    return p.ndim > 1, p.ndim > 1


def dino_rule(name: str, p: nn.Parameter) -> tuple[bool, bool]:
    """All but vectors and names that end in ".bias" decay, tokens and position embeddings too, as in the official code of DINO and MAE."""
    decays = p.ndim != 1 and not name.endswith(".bias")
    return decays, decays


def everything(name: str, p: nn.Parameter) -> tuple[bool, bool]:
    """All parameters decay and adapt, as MoCo's authors have it with SGD and AdamW."""
    return True, True


def parameter_groups(module: nn.Module, optim: Optim, lr: Schedule, steps: int, rule: Rule = simclr_rule) -> tuple[Group, ...]:
    """The trained parameters of `module`, grouped by what `rule` says of them, for a run of so many `steps`.

    Those that decay do so by optim.weight_decay, which goes to optim.weight_decay_end by half a cosine, step by step. With
    optim.layer_decay d, a parameter of `module.encoder` at depth k has the rate lr · d^(L − k), where L is the depth behind the encoder's
    blocks (`networks.encoders.depths`; arXiv:2106.08254); what is not in the encoder has the whole rate. Groups of the whole rate are the
    first.
    """
    found_depths, last = _depths(module) if optim.layer_decay != 1 else ({}, 0)
    # In this order, which checkpoints have.
    kinds = ((True, True), (False, False), (True, False), (False, True))
    found: dict[tuple[int, tuple[bool, bool]], list[nn.Parameter]] = {(up, kind): [] for up in range(last + 1) for kind in kinds}
    for name, p in module.named_parameters():
        if p.requires_grad:
            found[last - found_depths.get(name, last), rule(name, p)].append(p)
    groups = []
    for (up, (decays, adapts)), params in found.items():
        if not params:
            continue
        schedules: dict[str, Schedule] = {"lr": partial(_scaled, lr=lr, factor=optim.layer_decay**up) if up else lr}
        if decays and optim.weight_decay_end is not None:
            schedules["weight_decay"] = partial(half_cosine, first=optim.weight_decay, last=optim.weight_decay_end, total_steps=steps)
        groups.append(Group(tuple(params), {"weight_decay": optim.weight_decay if decays else 0.0, "adapt": adapts}, schedules))
    return tuple(groups)


def _depths(module: nn.Module) -> tuple[dict[str, int], int]:
    """Depth of each parameter of `module.encoder`, by its name in `module`, and the depth behind the encoder."""
    found, count = depths(module.encoder)  # type: ignore[arg-type]
    return {f"encoder.{name}": depth for name, depth in found.items()}, count - 1


def _scaled(step: int, lr: Schedule, factor: float) -> float:
    return factor * lr(step)


def build_optimizer(groups: Sequence[Group], optim: Optim) -> torch.optim.Optimizer:
    """The configured optimizer over `groups`, with lr 0: `set_schedules` sets it before each step."""
    given = [{"params": list(group.params), **group.settings} for group in groups]
    if optim.name in ("lars", "larc"):
        inside, larc = optim.rate_in_buffer and optim.name == "lars", optim.name == "larc"
        return LARS(given, lr=0.0, momentum=optim.momentum, nesterov=optim.nesterov, rate_in_buffer=inside, larc=larc)
    # One launch for all tensors of a group; torch raises where a device has no such kernel, as a TPU.
    fused = all(p.device.type in ("cpu", "cuda") for group in groups for p in group.params) or None
    if optim.name == "adamw":
        return torch.optim.AdamW(given, lr=0.0, betas=(optim.momentum, optim.beta2), eps=1e-8, fused=fused)
    sgd = torch.optim.SGD(given, lr=0.0, momentum=optim.momentum, nesterov=optim.nesterov, fused=fused)
    # Torch's fused kernel takes momentum of all parameters or of none, and some have no gradient in the first steps (SwAV's prototypes,
    # DINO's last layer). Momentum of 0 gives the step that none gives.
    for p in (p for group in groups for p in group.params if optim.momentum):
        sgd.state[p]["momentum_buffer"] = torch.zeros_like(p, requires_grad=False)
    return sgd


def set_schedules(optimizer: torch.optim.Optimizer, groups: Sequence[Group], step: int) -> None:
    """Set the scheduled settings of `optimizer` for `step`."""
    for there, group in zip(optimizer.param_groups, groups, strict=True):
        for name, schedule in group.schedules.items():
            there[name] = schedule(step)


@torch.no_grad()
def clip_gradients(optimizer: torch.optim.Optimizer, optim: Optim) -> Tensor | None:
    """Scale the gradients of the optimizer's parameters down to optim.clip_each and optim.clip_norm. Returns the norm () of the whole
    gradient before clip_norm, if that is set; nothing waits for it.

        clip_each   g ← g · min(1, c / (‖g‖ + 1e-6)) for the gradient g of each parameter (DINO's official code)
        clip_norm   the same for the vector of all gradients

    It stands behind the all-reduce, so every rank scales alike.
    """
    params = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    if optim.clip_each and params:
        grads: list[Tensor] = [p.grad for p in params]
        norms = torch.stack(torch._foreach_norm(grads))
        torch._foreach_mul_(grads, list((optim.clip_each / (norms + 1e-6)).clamp(max=1).unbind()))
    return nn.utils.clip_grad_norm_(params, optim.clip_norm) if optim.clip_norm else None
