"""The text tower of image–text pairs (arXiv:2103.00020, Sec. 2.4): a transformer whose tokens see those before them."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from simclr.networks.initial import Law, Linear, draw, fill
from simclr.networks.vit import Block

VOCABULARY = 49_408
"""Numbers of CLIP's tokens, the begin's and the end's included; the end has the highest."""


class TextTransformer(nn.Module):
    """(n, L) tokens → (n, width): the last token of each text, which has the highest number, behind the blocks and the last norm.

    As in CLIP: a table of tokens and one of positions, pre-norm blocks whose attention is causal, N(0, 0.02²) and N(0, 0.01²) for the
    tables, deviations of width^-½ for attention, (2 width)^-½ for the MLP's first layer, and both branches' last layers smaller by
    (2 blocks)^-½. Initial weights are keyed by `seed`. Differences: the GELU is the exact one, and norms have eps 1e-6, as in our ViTs.
    Raises ValueError where heads do not divide the width.
    """

    def __init__(self, vocabulary: int, context: int, width: int, blocks: int, heads: int, seed: int = 0) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"{heads} heads do not divide a width of {width}")
        self.token_embed, self.pos_embed = nn.Parameter(torch.empty(vocabulary, width)), nn.Parameter(torch.empty(context, width))
        self.blocks = nn.ModuleList([Block(width, heads, 4 * width, True, causal=True) for _ in range(blocks)])
        self.norm = nn.LayerNorm(width, 1e-6)
        draw(self, seed, "text", partial(_law, width=width, blocks=blocks))
        tables = {"token_embed": Law("normal", 0.02), "pos_embed": Law("normal", 0.01)}
        fill([(f"text.{name}", getattr(self, name), law) for name, law in tables.items()], seed)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.token_embed[tokens] + self.pos_embed[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        ends = tokens.argmax(1)
        found: Tensor = self.norm(x[torch.arange(len(x), device=x.device), ends])
        return found


class Towers(nn.Module):
    """What leads into the common space of images and texts: a text transformer, and a linear map behind it and behind the encoder of images
    (arXiv:2103.00020, Fig. 3), of N(0, 1 / fan-in)."""

    def __init__(self, d_h: int, d_out: int, vocabulary: int, context: int, width: int, blocks: int, heads: int, seed: int = 0) -> None:
        super().__init__()
        self.transformer = TextTransformer(vocabulary, context, width, blocks, heads, seed)
        self.image_head, self.text_head = Linear(d_h, d_out, bias=False), Linear(width, d_out, bias=False)
        for name in ("image_head", "text_head"):
            draw(getattr(self, name), seed, name, _fan_in)

    def images(self, h: Tensor) -> Tensor:
        """Representations (n, d_h) → (n, d_out), of any length."""
        found: Tensor = self.image_head(h)
        return found

    def texts(self, tokens: Tensor) -> Tensor:
        """Tokens (n, L) → (n, d_out), of any length."""
        found: Tensor = self.text_head(self.transformer(tokens))
        return found


def _fan_in(name: str, layer: nn.Module) -> Law:
    assert isinstance(layer, Linear)
    return Law("normal", layer.weight.shape[1] ** -0.5)


def _law(name: str, layer: nn.Module, width: int, blocks: int) -> Law:
    assert isinstance(layer, Linear)
    kind = name.rpartition(".")[2]
    std = {"qkv": width**-0.5, "fc1": (2 * width) ** -0.5}.get(kind, width**-0.5 * (2 * blocks) ** -0.5)
    return Law("normal", std)
