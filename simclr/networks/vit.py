"""Vision transformers (arXiv:2010.11929) as MoCo v3, DINO and MAE build them: pre-norm blocks, exact GELU, LayerNorm with eps 1e-6.

Names of parameters are timm's and DINO's, so that their weights load by name.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from simclr.networks.initial import Conv2d, Law, Linear, draw, fill

SIZES: dict[str, tuple[int, int, int]] = {
    "micro": (96, 6, 3),
    "tiny": (192, 12, 3),
    "small": (384, 12, 6),
    "base": (768, 12, 12),
    "large": (1024, 24, 16),
}
"""(width, blocks, heads) by size. MoCo v3 has 12 heads in its small one."""
_EPS = 1e-6


def vit(
    width: int = 384,
    blocks: int = 12,
    heads: int = 6,
    patch_px: int = 16,
    size_px: int = 224,
    mlp_ratio: float = 4.0,
    qkv_bias: bool = True,
    pool: Literal["class", "mean"] = "class",
    positions: Literal["learned", "sin_cos"] = "learned",
    frozen_patches: bool = False,
    init: Literal["xavier", "normal"] | None = None,
    enlarged: float = 0.0,
    seed: int = 0,
    prefix: str = "encoder",
) -> VisionTransformer:
    """The encoder f: images (n, 3, H, W) → representations h (n, width), with the width in `.d_h`; H and W are multiples of `patch_px`.

    `size_px` is the side of the images that the position table has a row for each patch of; for others it is interpolated
    (`positions_at`). h is the class token behind the last norm or, with `pool` mean, the norm of the patches' mean (arXiv:2111.06377).
    Initial weights are keyed by `seed` and `prefix`. `init` xavier is MoCo v3's and MAE's: Xavier uniform, q, k and v as three matrices,
    the class token N(0, 1e-6²); normal is DINO's and timm's: N(0, 0.02²) for linear maps and tokens, the patch projection uniform within
    1 / √fan-in, as torch has it. Nothing = xavier with fixed positions, normal with learned ones, as these authors have them. Biases are
    0; in DINO the patch projection's is uniform. Raises ValueError where heads do not divide the width or patches the image.
    """
    if width % heads:
        raise ValueError(f"{heads} heads do not divide a width of {width}")
    if size_px % patch_px:
        raise ValueError(f"patches of {patch_px} px do not divide images of {size_px} px")
    if positions == "sin_cos" and width % 4:
        raise ValueError(f"sines and cosines of row and column want a width that 4 divides, not {width}")
    network = VisionTransformer(width, blocks, heads, patch_px, size_px, mlp_ratio, qkv_bias, pool, enlarged)
    _begin(network, init or ("xavier" if positions == "sin_cos" else "normal"), seed, prefix)
    if positions == "sin_cos":
        network.pos_embed.requires_grad_(False)
        if not network.pos_embed.is_meta:
            network.pos_embed.copy_(torch.from_numpy(sin_cos(size_px // patch_px, width))[None])
    if frozen_patches:
        network.patch_embed.requires_grad_(False)
    return network


class VisionTransformer(nn.Module):
    """Patches, class token, positions, blocks, norm. `stages(x)` gives the tokens before and behind every block, for tests and taps."""

    def __init__(
        self,
        width: int,
        blocks: int,
        heads: int,
        patch_px: int,
        size_px: int,
        mlp_ratio: float,
        qkv_bias: bool,
        pool: Literal["class", "mean"],
        enlarged: float,
    ) -> None:
        super().__init__()
        self.d_h, self.heads, self.patch_px, self.grid = width, heads, patch_px, size_px // patch_px
        self.pool, self.enlarged = pool, enlarged
        self.cls_token = nn.Parameter(torch.empty(1, 1, width))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + self.grid**2, width))
        self.patch_embed = _Patches(width, patch_px)
        self.blocks = nn.ModuleList([Block(width, heads, round(mlp_ratio * width), qkv_bias) for _ in range(blocks)])
        self.norm = nn.LayerNorm(width, _EPS)

    def tokens(self, x: Tensor) -> Tensor:
        """(n, 3, H, W) → (n, 1 + patches, width): the class token, then the patches row by row, with their positions."""
        n, _, height, width = x.shape
        if height % self.patch_px or width % self.patch_px:
            raise ValueError(f"images of {height} x {width} px are not whole patches of {self.patch_px} px; crop or resize them")
        table = positions_at(self.pos_embed, self.grid, height // self.patch_px, width // self.patch_px, self.enlarged)
        patches: Tensor = self.patch_embed(x)
        return torch.cat([self.cls_token.to(patches.dtype).expand(n, -1, -1), patches], 1) + table

    def stages(self, x: Tensor, paths: Tensor | None = None) -> list[Tensor]:
        """(n, 3, H, W) → (n, 1 + patches, width) tokens before the first block and behind each. `paths` (n, 2 · blocks): factors of each
        image's attention and MLP in each block, as `path_factors` gives them; in training mode only. Nothing = none is left out."""
        found = [self.tokens(x)]
        factors = paths.to(found[0].dtype)[:, :, None, None].unbind(1) if paths is not None and self.training else None
        for index, block in enumerate(self.blocks):
            found.append(block(found[-1], factors[2 * index : 2 * index + 2] if factors is not None else None))
        return found

    def visible(self, x: Tensor, kept: Tensor) -> Tensor:
        """(n, 3, H, W), and (n, m) numbers of patches → (n, 1 + m, width) normed tokens: the class token's and those of these patches, in
        this order, which have seen no others (arXiv:2111.06377, Sec. 3)."""
        tokens = self.tokens(x)
        patches = tokens[:, 1:].gather(1, kept[:, :, None].expand(-1, -1, tokens.shape[2]))
        found = torch.cat([tokens[:, :1], patches], 1)
        for block in self.blocks:
            found = block(found)
        normed: Tensor = self.norm(found)
        return normed

    def forward(self, x: Tensor, paths: Tensor | None = None) -> Tensor:
        tokens = self.stages(x, paths)[-1]
        # Each image is normed by itself, so that the norm of the class token alone is that of all tokens, at less cost.
        h: Tensor = self.norm(tokens[:, 0] if self.pool == "class" else tokens[:, 1:].mean(1))
        return h


class Decoder(nn.Module):
    """The decoder of MAE (arXiv:2111.06377, Sec. 3): (n, 1 + m, d_in) tokens of the class and of m seen patches, and (n, L) an order of all
    patches that begins with those, → (n, L, 3 p²) pixels of every patch, in its place. Positions are fixed (`sin_cos`). Initial weights
    are keyed by `seed`, Xavier uniform; the mask's token is N(0, 0.02²)."""

    def __init__(self, d_in: int, width: int, blocks: int, heads: int, patch_px: int, grid: int, seed: int = 0) -> None:
        super().__init__()
        self.embed, self.mask_token = Linear(d_in, width), nn.Parameter(torch.empty(1, 1, width))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + grid**2, width), requires_grad=False)
        self.blocks = nn.ModuleList([Block(width, heads, 4 * width, True) for _ in range(blocks)])
        self.norm, self.pred = nn.LayerNorm(width, _EPS), Linear(width, 3 * patch_px**2)
        draw(self, seed, "decoder", _xavier)
        fill([("decoder.mask_token", self.mask_token, Law("normal", 0.02))], seed)
        if not self.pos_embed.is_meta:
            self.pos_embed.copy_(torch.from_numpy(sin_cos(grid, width))[None])

    def forward(self, seen: Tensor, order: Tensor) -> Tensor:
        x = self.embed(seen)
        masks = self.mask_token.to(x.dtype).expand(len(x), order.shape[1] + 1 - x.shape[1], -1)
        shuffled = torch.cat([x[:, 1:], masks], 1)
        places = order.argsort(1)[:, :, None].expand(-1, -1, x.shape[2])
        found = torch.cat([x[:, :1], shuffled.gather(1, places)], 1) + self.pos_embed
        for block in self.blocks:
            found = block(found)
        pixels: Tensor = self.pred(self.norm(found[:, 1:]))
        return pixels


class _Patches(nn.Module):
    def __init__(self, width: int, patch_px: int) -> None:
        super().__init__()
        self.proj = Conv2d(3, width, patch_px, patch_px)

    def forward(self, x: Tensor) -> Tensor:
        patches: Tensor = self.proj(x)
        return patches.flatten(2).transpose(1, 2)


class Block(nn.Module):
    """x + attention(norm1(x)), then x + mlp(norm2(x)); `factors` are those of the two terms, each (n, 1, 1). In `causal` attention a token
    sees those before it, and itself."""

    def __init__(self, width: int, heads: int, hidden: int, qkv_bias: bool, causal: bool = False) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(width, _EPS), _Attention(width, heads, qkv_bias, causal)
        self.norm2, self.mlp = nn.LayerNorm(width, _EPS), _Mlp(width, hidden)

    def forward(self, x: Tensor, factors: tuple[Tensor, ...] | None = None) -> Tensor:
        y = self.attn(self.norm1(x))
        x = x + (y if factors is None else y * factors[0])
        z: Tensor = self.mlp(self.norm2(x))
        return x + (z if factors is None else z * factors[1])


class _Attention(nn.Module):
    """Softmax attention of all tokens to all (arXiv:1706.03762, Eq. 1) in each head, with q, k and v from one matrix."""

    def __init__(self, width: int, heads: int, qkv_bias: bool, causal: bool = False) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.qkv, self.proj = Linear(width, 3 * width, bias=qkv_bias), Linear(width, width)

    def parts(self, x: Tensor) -> tuple[Tensor, ...]:
        """(n, tokens, width) → q, k, v, each (n, heads, tokens, width / heads)."""
        found: Tensor = self.qkv(x).unflatten(2, (3, self.heads, -1))
        return found.permute(2, 0, 3, 1, 4).unbind()

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.parts(x)
        y: Tensor = self.proj(F.scaled_dot_product_attention(q, k, v, is_causal=self.causal).transpose(1, 2).flatten(2))
        return y


class _Mlp(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = Linear(width, hidden), Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc2(F.gelu(self.fc1(x)))
        return y


def class_attention(network: VisionTransformer, x: Tensor) -> Tensor:
    """(n, 3, H, W) → (n, heads, rows, columns): how much the class token attends to each patch in the last block, by head, as DINO's
    authors show it (arXiv:2104.14294, Fig. 1): the first row of softmax(q kᵀ / √(width / heads)), without its first entry, which is the
    token's attention to itself. So a head's map adds up to 1 less that. H and W are any whole numbers of patches."""
    block = network.blocks[-1]
    assert isinstance(block, Block)
    q, k, _ = block.attn.parts(block.norm1(network.stages(x)[-2]))
    # The network itself never has these numbers: its kernels compute attention without storing the probabilities.
    shares = torch.softmax(q[:, :, :1] @ k.mT / math.sqrt(q.shape[-1]), -1)
    found: Tensor = shares[:, :, 0, 1:].unflatten(2, (x.shape[2] // network.patch_px, -1))
    return found


# ── Positions ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def positions_at(table: Tensor, grid: int, rows: int, columns: int, enlarged: float = 0.0) -> Tensor:
    """The position table (1, 1 + grid², d) for rows × columns patches, (1, 1 + rows · columns, d). The class token's row stays, the others
    are interpolated: bicubic with a = −3/4, half-pixel centres and the border repeated, in steps of grid / (rows + `enlarged`).

    By size (0), as timm and MAE do it. DINO gives its interpolation a scale that is enlarged by 0.1, which moves the samples too.
    """
    if rows == columns == grid:
        return table
    patches = table[:, 1:].unflatten(1, (grid, grid)).permute(0, 3, 1, 2)
    if enlarged:
        scale = ((rows + enlarged) / grid, (columns + enlarged) / grid)
        patches = F.interpolate(patches, scale_factor=scale, mode="bicubic")
    else:
        patches = F.interpolate(patches, size=(rows, columns), mode="bicubic")
    return torch.cat([table[:, :1], patches.flatten(2).transpose(1, 2)], 1)


def sin_cos(grid: int, width: int) -> NDArray[np.float32]:
    """MoCo v3's position table, (1 + grid², width): zeros for the class token; for the patch in row i and column j
    [sin iω, cos iω, sin jω, cos jω] with ω_k = 10000^(−k / (width / 4)) (arXiv:2104.02057, App. A). MAE has the column first."""
    omega = 10000.0 ** -(np.arange(width // 4) / (width // 4))
    row, column = (np.outer(place.ravel(), omega) for place in np.mgrid[:grid, :grid])
    table = np.concatenate([np.sin(row), np.cos(row), np.sin(column), np.cos(column)], 1)
    return np.concatenate([np.zeros((1, width)), table]).astype(np.float32)


# ── Drop path ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def drop_path_rates(largest: float, blocks: int) -> tuple[float, ...]:
    """The probability of each block that its attention is left out, and as much for its MLP: in a line from 0 to `largest`."""
    return tuple(largest * index / max(blocks - 1, 1) for index in range(blocks))


def path_factors(uniform: NDArray[np.float64], largest: float) -> NDArray[np.float32]:
    """Uniform numbers in [0, 1), (…, 2 · blocks), → factors of the attention and the MLP of each block: 0 with the block's probability p,
    else 1 / (1 − p), so that their mean is 1 (arXiv:1603.09382)."""
    keep = 1 - np.repeat(drop_path_rates(largest, uniform.shape[-1] // 2), 2)
    factors: NDArray[np.float32] = (np.floor(keep + uniform) / keep).astype(np.float32)
    return factors


# ── Initial weights ────────────────────────────────────────────────────────────────────────────────────────────────────


def _begin(network: VisionTransformer, init: Literal["xavier", "normal"], seed: int, prefix: str) -> None:
    """Fill the weights of `network`; norms begin at 1 and 0, as torch makes them."""
    draw(network, seed, prefix, _xavier if init == "xavier" else _normal)
    tokens = {"cls_token": Law("normal", 1e-6 if init == "xavier" else 0.02), "pos_embed": Law("normal", 0.02)}
    fill([(".".join(filter(None, (prefix, name))), getattr(network, name), law) for name, law in tokens.items()], seed)


def _xavier(name: str, layer: nn.Module) -> Law:
    assert isinstance(layer, nn.Conv2d | nn.Linear)
    fan_out, fan_in = len(layer.weight), layer.weight[0].numel()
    if name.endswith(".qkv"):  # three matrices in one
        fan_out //= 3
    return Law("uniform", math.sqrt(6 / (fan_in + fan_out)))


def _normal(name: str, layer: nn.Module) -> Law:
    assert isinstance(layer, nn.Conv2d | nn.Linear)
    return Law("uniform", 1 / math.sqrt(layer.weight[0].numel())) if isinstance(layer, nn.Conv2d) else Law("normal", 0.02)
