"""The projection head g (arXiv:2002.05709, Sec. 2.1), projectors and predictors of SimCLR's siblings, and classifiers for linear
evaluation and fine-tuning."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simclr import config as configs
from simclr.errors import UserError
from simclr.networks.batchnorm import BatchNorm
from simclr.networks.encoders import Encoder
from simclr.networks.initial import Law, Linear, draw, draw_uniform, fill


class ProjectionHead(nn.Module):
    """The head g: every layer but the last is as wide as h, with BatchNorm and ReLU; the last is linear with a BatchNorm
    without shift. v1 has 2 layers, v2 has 3; in the ablation, 1 is linear and 0 is no head. Linear maps have no bias: the BatchNorm after
    them would subtract it. Initial weights are N(0, 0.01²), keyed by `seed` (`simclr.networks.initial`). `norm_ranks`: see `BatchNorm`.
    """

    def __init__(self, d_in: int, layers: int = 2, d_out: int = 128, norm_ranks: int | None = None, seed: int = 0) -> None:
        super().__init__()
        self.layers = nn.ModuleList()
        self.widths = [d_in] * layers + [d_out]  # of the outputs
        for index in range(layers):
            last = index == layers - 1
            linear = Linear(d_in, d_out if last else d_in, bias=False)
            norm = BatchNorm(linear.out_features, beta=not last, ranks=norm_ranks)
            self.layers.append(nn.Sequential(linear, norm) if last else nn.Sequential(linear, norm, nn.ReLU(inplace=True)))
        draw(self, seed, "head")

    def forward(self, h: Tensor) -> list[Tensor]:
        """h (n, d_in) → [h, output of layer 1, …, z (n, d_out)]: v2 fine-tunes from `[tap]` (its Sec. 2)."""
        outputs = [h]
        for layer in self.layers:
            outputs.append(layer(outputs[-1]))
        return outputs


def build_head(config: configs.SimCLR, d_h: int) -> ProjectionHead:
    """The projection head that `config` describes for an encoder of width `d_h`, with initial weights keyed by its seed."""
    return ProjectionHead(d_h, config.head.layers, config.head.d_out, config.encoder.norm_ranks, config.seed)


class MLP(nn.Module):
    """Linear maps with BatchNorm and ReLU between them, as in the projectors and predictors of MoCo v3 and BYOL: `layers` of them, all but
    the last `hidden` wide. `bias` says whether all but the last have a bias, and whether the last has one; `last_norm` adds a BatchNorm
    without scale and shift. `drawn` gives the initial weights, keyed by `seed` and `name`: torch's, uniform within ±1 / √fan-in, if
    it is not given. `norm_ranks`: see `BatchNorm`.
    """

    def __init__(
        self,
        d_in: int,
        hidden: int,
        d_out: int,
        layers: int = 2,
        bias: tuple[bool, bool] = (False, False),
        last_norm: bool = False,
        seed: int = 0,
        name: str = "projector",
        norm_ranks: int | None = None,
        drawn: Callable[[nn.Module, int, str], None] = draw_uniform,
    ) -> None:
        super().__init__()
        widths = [d_in, *[hidden] * (layers - 1), d_out]
        self.layers = nn.ModuleList()
        for index in range(layers - 1):
            linear = Linear(widths[index], hidden, bias=bias[0])
            self.layers.append(nn.Sequential(linear, BatchNorm(hidden, ranks=norm_ranks), nn.ReLU(inplace=True)))
        last = Linear(widths[-2], d_out, bias=bias[1])
        self.layers.append(nn.Sequential(last, BatchNorm(d_out, affine=False, ranks=norm_ranks)) if last_norm else nn.Sequential(last))
        drawn(self, seed, name)

    def forward(self, x: Tensor) -> Tensor:
        """x (n, d_in) → (n, d_out)."""
        for layer in self.layers:
            x = layer(x)
        return x


class UnitRows(nn.Module):
    """x (n, d) → (n, K): x · g v / ‖v‖ for each row v of K, without bias. The lengths g begin at 1; they are trained unless `fixed`."""

    def __init__(self, d_in: int, d_out: int, fixed: bool, seed: int, name: str) -> None:
        super().__init__()
        self.weight_g = nn.Parameter(torch.ones(d_out, 1), requires_grad=not fixed)
        self.weight_v = nn.Parameter(torch.empty(d_out, d_in))
        fill([(f"{name}.weight_v", self.weight_v, Law("uniform", 1 / math.sqrt(d_in)))], seed)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight_g * F.normalize(self.weight_v, dim=1))


class DINOHead(nn.Module):
    """The head of DINO (arXiv:2104.14294, App. C): h (n, d_in) → (z (n, bottleneck) of length 1, scores (n, d_out)).

    `layers` linear maps with biases, exact GELU between them and, with `norm`, BatchNorm before it; then rows of length 1 and `UnitRows`.
    Initial weights are N(0, 0.02²), biases 0, the last layer's torch's in distribution; all keyed by `seed`.
    """

    def __init__(
        self,
        d_in: int,
        d_out: int,
        hidden: int = 2048,
        bottleneck: int = 256,
        layers: int = 3,
        norm: bool = False,
        unit_rows: bool = True,
        norm_ranks: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        widths = [d_in, *[hidden] * (layers - 1), bottleneck]
        self.layers = nn.ModuleList()
        for index in range(layers):
            linear = Linear(widths[index], widths[index + 1])
            last = index == layers - 1
            between = [] if last else [*([BatchNorm(hidden, ranks=norm_ranks)] if norm else []), nn.GELU()]
            self.layers.append(nn.Sequential(linear, *between))
        draw(self.layers, seed, "head", lambda name, layer: Law("normal", 0.02))
        self.last_layer = UnitRows(bottleneck, d_out, unit_rows, seed, "head.last_layer")

    def forward(self, h: Tensor) -> tuple[Tensor, Tensor]:
        for layer in self.layers:
            h = layer(h)
        z = F.normalize(h, dim=1)
        return z, self.last_layer(z)


def linear_classifier(d_in: int, classes: int, seed: int) -> nn.Linear:
    """Features (n, d_in) → class scores (n, classes). Initial weights are N(0, 0.01²), keyed by `seed`, biases 0."""
    linear = Linear(d_in, classes)
    draw(linear, seed, "classifier")
    return linear


class Classifier(nn.Module):
    """Images (n, 3, H, W) → class scores (n, classes): encoder, the head's first `tap` layers, one linear layer.

    Tap 0 is h itself, which v1 classifies; v2 fine-tunes from the head's first layer on (arXiv:2006.10029, Sec. 2). The rest of the head
    is discarded. The linear layer begins as `linear_classifier`.
    """

    def __init__(self, encoder: Encoder, head: ProjectionHead | None, tap: int, classes: int, seed: int = 0) -> None:
        super().__init__()
        layers = len(head.layers) if head is not None else 0
        if not 0 <= tap <= layers:
            raise UserError(f"tap {tap} does not exist; the projection head here has {layers} layers, and tap 0 is the encoder's h")
        self.encoder, self.tap = encoder, tap
        self.head = nn.Sequential(*head.layers[:tap]) if head is not None else nn.Sequential()
        width = head.widths[tap] if head is not None else encoder.d_h
        self.classifier = linear_classifier(width, classes, seed)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.classifier(self.head(self.encoder(x)))
        return scores
