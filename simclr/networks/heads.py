"""The projection head g (arXiv:2002.05709, Sec. 2.1), and classifiers for linear evaluation and fine-tuning."""

from __future__ import annotations

from torch import Tensor, nn

from simclr import config as configs
from simclr.errors import UserError
from simclr.networks.batchnorm import BatchNorm
from simclr.networks.encoders import Encoder
from simclr.networks.initial import Linear, draw


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
