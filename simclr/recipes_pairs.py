"""Recipes of methods on image–text pairs."""

from __future__ import annotations

from dataclasses import replace

from simclr.config import Encoder, Optim, Train, Views, Watch
from simclr.family import CLIP
from simclr.recipes_simclr import patterns_tiny


def patterns_clip() -> CLIP:
    """CLIP on the rendered dataset with captions ("bright rings on dark"), on two CPU cores: encoder, epochs and batch of `patterns_tiny`.

    simclr prepare --source patterns:captions --out runs/pairs
    simclr pretrain patterns_clip --data runs/pairs --workers 2

    kNN 98.6 (97.9 … 99.6), probe 97.7: captions name the classes;
    mean and range of seeds 0, 1, 2, by `simclr bench methods` (docs/methods.md).
    """
    base = patterns_tiny()
    return CLIP(
        encoder=base.encoder,
        views=replace(base.views, area=(0.4, 1.0)),
        optim=Optim(name="adamw", base_lr=8e-3, warmup_epochs=1, weight_decay=0.1, beta2=0.98),
        train=base.train,
        watch=base.watch,
        d_out=64,
        context=24,
        text_width=64,
        text_blocks=2,
        text_heads=4,
        prompt="a picture of {}",
    )


def pairs_clip() -> CLIP:
    """CLIP with ViT-B/16 on some millions of pairs from the web (CC3M, CC12M), such as img2dataset leaves as WebDataset.

    simclr prepare --source '/data/cc12m/{00000..01242}.tar' --captions auto --out s3://bucket/cc12m
    simclr pretrain pairs_clip --data s3://bucket/cc12m --workers 8 --train.precision bfloat16 --train.compile

    Text tower, scale and AdamW are the paper's (Tables 18 and 20: beta 0.9 and 0.98, decay 0.2), the batch is an eighth of its 32,768.
    Not run here.
    """
    return CLIP(
        encoder=Encoder(vit="base", patch_px=16),
        # A square crop alone: a flip would make wrong what a caption says of left and right.
        views=Views(
            area=(0.9, 1.0),
            crop_law="torchvision",
            flip_p=0.0,
            mean=(0.48145466, 0.4578275, 0.40821073),
            std=(0.26862954, 0.26130258, 0.27577711),
        ),
        optim=Optim(name="adamw", base_lr=5e-4 / 16, warmup_epochs=1, weight_decay=0.2, beta2=0.98),  # 5e-4 at 4096
        train=Train(batch_size=4096, epochs=32),
        watch=Watch(every_epochs=1),
    )
