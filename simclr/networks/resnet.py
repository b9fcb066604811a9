"""ResNets as the official SimCLR code builds them: width multiplier, selective kernels, squeeze-and-excitation, CIFAR stem.

A port easily loses two facts of padding. Strided convolutions of the official code pad explicitly, (k − 1) // 2 before and the rest
after, which for odd k is torch's symmetric padding, not TensorFlow's 'SAME'. Its max-pool *is* 'SAME': on even sizes one row and column
at the end only, so `nn.MaxPool2d(3, 2, padding=1)` shifts the image.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simclr.networks.batchnorm import BatchNorm
from simclr.networks.initial import Conv2d, draw
from simclr.networks.pooling import SameMaxPool

# depth → (blocks per stage, bottleneck). 8, 14, 20: three stages of 16, 32, 64 channels (arXiv:1512.03385, Sec. 4.2).
_STAGES: dict[int, tuple[tuple[int, ...], bool]] = {
    8: ((1, 1, 1), False),
    14: ((2, 2, 2), False),
    20: ((3, 3, 3), False),
    18: ((2, 2, 2, 2), False),
    34: ((3, 4, 6, 3), False),
    50: ((3, 4, 6, 3), True),
    101: ((3, 4, 23, 3), True),
    152: ((3, 8, 36, 3), True),
    200: ((3, 24, 36, 3), True),
}
Norm = Callable[..., BatchNorm]


def resnet(
    depth: int,
    width: int = 1,
    sk_ratio: float = 0.0,
    se_ratio: float = 0.0,
    cifar_stem: bool = False,
    norm_ranks: int | None = None,
    seed: int = 0,
) -> ResNet:
    """The encoder f: images (n, 3, H, W) → representations h (n, d_h), with d_h in `.d_h`.

    `depth` 18 to 200 are the official networks; 8, 14 and 20 the small three-stage ones. Raises ValueError for other depths.
    Its initial weights are keyed by `seed` (`simclr.networks.initial`), the same on every machine. `norm_ranks`: see `BatchNorm`.
    """
    if depth not in _STAGES:
        raise ValueError(f"no ResNet of depth {depth}; choose one of {', '.join(map(str, sorted(_STAGES)))}")
    return ResNet(depth, width, sk_ratio, se_ratio, cifar_stem, partial(BatchNorm, ranks=norm_ranks), seed)


class ResNet(nn.Module):
    """Stem, block groups, global average. `stages(x)` gives the output of every part, for tests and taps."""

    def __init__(self, depth: int, width: int, sk_ratio: float, se_ratio: float, cifar_stem: bool, norm: Norm, seed: int) -> None:
        super().__init__()
        blocks, bottleneck = _STAGES[depth]
        base = (16 if len(blocks) == 3 else 64) * width
        if cifar_stem:
            self.stem: nn.Module = nn.Sequential(_conv(3, base, 3), norm(base), nn.ReLU(inplace=True))
        elif sk_ratio > 0:  # ResNet-D's stem (arXiv:1812.01187), as v2 uses it
            half = base // 2
            self.stem = nn.Sequential(
                *(_conv(3, half, 3, 2), norm(half), nn.ReLU(inplace=True)),
                *(_conv(half, half, 3), norm(half), nn.ReLU(inplace=True)),
                *(_conv(half, base, 3), norm(base), nn.ReLU(inplace=True), SameMaxPool()),
            )
        else:
            self.stem = nn.Sequential(_conv(3, base, 7, 2), norm(base), nn.ReLU(inplace=True), SameMaxPool())
        self.groups = nn.ModuleList()
        c_in = base
        for stage, count in enumerate(blocks):
            width_here = base * 2**stage
            group = []
            for index in range(count):
                stride = 2 if stage > 0 and index == 0 else 1
                block = (
                    _Bottleneck(c_in, width_here, stride, index == 0, sk_ratio, se_ratio, norm)
                    if bottleneck
                    else _Basic(c_in, width_here, stride, index == 0, sk_ratio, se_ratio, norm)
                )
                group.append(block)
                c_in = width_here * (4 if bottleneck else 1)
            self.groups.append(nn.Sequential(*group))
        self.d_h = c_in
        draw(self, seed, "encoder")

    def stages(self, x: Tensor) -> list[Tensor]:
        """(n, 3, H, W) → feature maps (n, c, h, w) after the stem and after each block group."""
        maps = [self.stem(x)]
        for group in self.groups:
            maps.append(group(maps[-1]))
        return maps

    def forward(self, x: Tensor) -> Tensor:
        return self.stages(x)[-1].mean((2, 3))


def _conv(c_in: int, c_out: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    return Conv2d(c_in, c_out, kernel, stride, padding=(kernel - 1) // 2, bias=False)


class _Shortcut(nn.Sequential):
    """1 × 1 projection; with selective kernels ResNet-D's, which averages 2 × 2 before it instead of striding."""

    def __init__(self, c_in: int, c_out: int, stride: int, sk_ratio: float, norm: Norm) -> None:
        if sk_ratio > 0:
            super().__init__(_AveragePool(stride), _conv(c_in, c_out, 1), norm(c_out))
        else:
            super().__init__(_conv(c_in, c_out, 1, stride), norm(c_out))


class _AveragePool(nn.Module):
    """2 × 2 average of stride 1 or 2, where the window's part outside the image does not count."""

    def __init__(self, stride: int) -> None:
        super().__init__()
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        if self.stride == 1:  # repeating the last row and column averages what is inside, at the corner too
            return F.avg_pool2d(F.pad(x, (0, 1, 0, 1), mode="replicate"), 2, 1)
        # The official code pads one zero row and column at the end and pools 'VALID': on even sizes they are never reached.
        return F.avg_pool2d(F.pad(x, (0, x.shape[3] % 2, 0, x.shape[2] % 2)), 2, 2)


class _SelectiveKernel(nn.Module):
    """Two 3 × 3 convolutions (as one, twice as wide) mixed per channel by a softmax over the two (arXiv:1903.06586)."""

    def __init__(self, c_in: int, c_out: int, stride: int, ratio: float, norm: Norm) -> None:
        super().__init__()
        mid = max(int(c_out * ratio), 32)
        self.branches = nn.Sequential(_conv(c_in, 2 * c_out, 3, stride), norm(2 * c_out), nn.ReLU(inplace=True))
        self.attention = nn.Sequential(_conv(c_out, mid, 1), norm(mid), nn.ReLU(inplace=True), _conv(mid, 2 * c_out, 1))

    def forward(self, x: Tensor) -> Tensor:
        both = self.branches(x).unflatten(1, (2, -1))  # (n, 2, c, h, w)
        logits = self.attention(both.sum(1).mean((2, 3), keepdim=True)).unflatten(1, (2, -1))
        mixed: Tensor = (both * torch.softmax(logits, dim=1)).sum(1)
        return mixed


class _SqueezeExcite(nn.Module):
    """Channels weighted by a gate that sees their spatial means (arXiv:1709.01507). As in the official code the ratio is of
    the block's `width`, which in a bottleneck is a quarter of its `channels`."""

    def __init__(self, channels: int, width: int, ratio: float) -> None:
        super().__init__()
        mid = max(1, int(width * ratio))
        self.reduce, self.expand = Conv2d(channels, mid, 1), Conv2d(mid, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.expand(F.relu(self.reduce(x.mean((2, 3), keepdim=True)))))


class _Block(nn.Module):
    """relu(gate(body(x)) + shortcut(x)); the body's last layer is a norm."""

    shortcut: nn.Module
    body: nn.Sequential
    gate: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.gate(self.body(x)) + self.shortcut(x), inplace=True)


class _Basic(_Block):
    """Two 3 × 3 convolutions; the last BatchNorm starts at 0, so the block starts as its shortcut (App. B)."""

    def __init__(self, c_in: int, width: int, stride: int, project: bool, sk_ratio: float, se_ratio: float, norm: Norm) -> None:
        super().__init__()
        self.shortcut = _Shortcut(c_in, width, stride, sk_ratio, norm) if project else nn.Identity()
        self.body = nn.Sequential(
            *(_conv(c_in, width, 3, stride), norm(width), nn.ReLU(inplace=True)),
            *(_conv(width, width, 3), norm(width, zero_init=True)),
        )
        self.gate = _SqueezeExcite(width, width, se_ratio) if se_ratio > 0 else nn.Identity()


class _Bottleneck(_Block):
    """1 × 1, 3 × 3 (strided, or a selective kernel), 1 × 1 to four times the width."""

    def __init__(self, c_in: int, width: int, stride: int, project: bool, sk_ratio: float, se_ratio: float, norm: Norm) -> None:
        super().__init__()
        middle = (
            [_SelectiveKernel(width, width, stride, sk_ratio, norm)]
            if sk_ratio > 0
            else [_conv(width, width, 3, stride), norm(width), nn.ReLU(inplace=True)]
        )
        self.shortcut = _Shortcut(c_in, 4 * width, stride, sk_ratio, norm) if project else nn.Identity()
        self.body = nn.Sequential(
            *(_conv(c_in, width, 1), norm(width), nn.ReLU(inplace=True)),
            *middle,
            *(_conv(width, 4 * width, 1), norm(4 * width, zero_init=True)),
        )
        self.gate = _SqueezeExcite(4 * width, width, se_ratio) if se_ratio > 0 else nn.Identity()
