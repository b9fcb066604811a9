"""The recipes of SwAV, DINO and MAE (`simclr.recipes`)."""

from __future__ import annotations

from dataclasses import replace

from simclr.config import Encoder, Optim, Train, Views, Watch
from simclr.family import DINO, MAE, SwAV
from simclr.recipes_siblings import cifar10_views
from simclr.recipes_simclr import patterns_tiny
from simclr.sections import Local

# ── SwAV ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def patterns_swav() -> SwAV:
    """SwAV on the rendered dataset, on two CPU cores: encoder, views, epochs and batch of `patterns_tiny`, two large crops alone.

    simclr prepare --source patterns --out runs/patterns
    simclr pretrain patterns_swav --data runs/patterns --workers 2

    kNN 79.8 (55.6 … 93.0), probe 82.7; mean and range of seeds 0, 1, 2, by `simclr bench methods` (docs/methods.md).
    """
    base = patterns_tiny()
    return SwAV(
        encoder=base.encoder,
        views=base.views,
        local=Local(crops=0),
        optim=replace(base.optim, base_lr=8.0),
        train=base.train,
        watch=base.watch,
        prototypes=64,
        hidden=256,
        d_out=64,
        frozen_steps=0,  # with LARS at this rate the prototypes may learn from the first step on
    )


def cifar10_swav() -> SwAV:
    """SwAV with ResNet-18 on CIFAR-10, 200 epochs, two large crops alone: one GPU.

    simclr prepare --source cifar10 --out runs/cifar10
    simclr pretrain cifar10_swav --data runs/cifar10 --train.precision bfloat16 --train.compile

    The setting of lightly's benchmark (N = 512, 512 prototypes, crops from 14 % of the image, Adam at 1e-3 · N / 128 with decay 1e-6).
    *Published* there on clean CIFAR-10: kNN 84.2 after 200 epochs, 88.4 after 800 (best epoch). Differences: the decay is AdamW's, apart
    from the gradient; the head's layers end without one more BatchNorm.
    """
    return SwAV(
        encoder=Encoder(depth=18, cifar_stem=True),
        views=replace(cifar10_views(), area=(0.14, 1.0)),
        local=Local(crops=0),
        optim=Optim(name="adamw", base_lr=2e-3, warmup_epochs=0, weight_decay=1e-6),
        train=Train(batch_size=512, epochs=200),
        watch=Watch(every_epochs=20, bank=10_000, queries=2_000),
        prototypes=512,
        hidden=512,
        frozen_steps=0,
    )


def imagenet_swav() -> SwAV:
    """SwAV with ResNet-50 on ImageNet, as its authors run it on 64 GPUs: N = 4096, crops 2 x 224 + 6 x 96, LARC, 800 epochs.

    simclr prepare --source /data/imagenet --out /data/imagenet-shards
    simclr pretrain imagenet_swav --data /data/imagenet-shards --workers 64 --train.precision bfloat16 --train.compile

    *Published*: linear probe 75.3 after 800 epochs, 74.6 after 400, 73.9 after 200, 72.1 after 100. With N = 256 for 200 epochs they have
    --queue 3840 --frozen-steps 5005 --optim.base-lr 0.6 --optim.last-lr 0.0006 --optim.warmup-epochs 0 (published: 72.7). Differences: the
    warm-up begins at 0, there at 0.3.
    """
    return SwAV(
        views=Views(
            area=(0.14, 1.0),
            crop_law="torchvision",
            resize="bilinear",
            mean=(0.485, 0.456, 0.406),
            std=(0.228, 0.224, 0.225),
        ),
        optim=Optim(name="larc", base_lr=0.3, last_lr=0.0003, warmup_epochs=10, weight_decay=1e-6),
        train=Train(batch_size=4096, epochs=800),
        watch=Watch(every_epochs=25),
    )


# ── DINO ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def patterns_dino() -> DINO:
    """DINO on the rendered dataset, on two CPU cores: encoder, views, epochs and batch of `patterns_tiny`, two large crops alone.

    simclr prepare --source patterns --out runs/patterns
    simclr pretrain patterns_dino --data runs/patterns --workers 2

    kNN 58.5 (55.2 … 62.9), probe 67.9; mean and range of seeds 0, 1, 2, by `simclr bench methods` (docs/methods.md).
    """
    base = patterns_tiny()
    return DINO(
        encoder=base.encoder,
        views=base.views,
        local=Local(crops=0),
        optim=replace(base.optim, rate_in_buffer=False),
        train=base.train,
        watch=base.watch,
        ema=0.99,
        hidden=256,
        bottleneck=64,
        d_out=256,
        head_norm=True,
    )


def cifar10_dino() -> DINO:
    """DINO with ResNet-18 on CIFAR-10, 200 epochs, two large crops alone: one GPU.

    simclr prepare --source cifar10 --out runs/cifar10
    simclr pretrain cifar10_dino --data runs/cifar10 --train.precision bfloat16 --train.compile

    The setting of lightly's benchmark (N = 512, SGD, 2,048 prototypes, head 2048 and 256 wide with BatchNorm). *Published* there on clean
    CIFAR-10: kNN 81.3 after 200 epochs (84.0 with N = 128), 84.8 after 800 (best epoch). Differences: norms and biases do not decay; the
    average's share of itself goes from 0.99 to 1.
    """
    return DINO(
        encoder=Encoder(depth=18, cifar_stem=True),
        views=cifar10_views(),
        local=Local(crops=0),
        optim=Optim(name="sgd", base_lr=0.12, warmup_epochs=0, weight_decay=5e-4),
        train=Train(batch_size=512, epochs=200),
        watch=Watch(every_epochs=20, bank=10_000, queries=2_000),
        ema=0.99,
        d_out=2048,
        head_norm=True,
    )


def imagenet_dino_vit_small() -> DINO:
    """DINO with ViT-S/16 on ImageNet, 100 epochs by its authors' defaults: N = 512, AdamW, crops 2 x 224 + 8 x 96.

    simclr prepare --source /data/imagenet --out /data/imagenet-shards
    simclr pretrain imagenet_dino_vit_small --data /data/imagenet-shards --workers 8 --train.precision bfloat16 --train.compile

    *Published*: kNN 69.3, linear probe 74.0; after 300 epochs with --teacher-temperature 0.07 --teacher-epochs 30 --no-unit-rows 73.3 and
    76.0. Differences: position embeddings of small crops are resized by size, there by an enlarged scale.
    """
    return DINO(
        encoder=Encoder(vit="small", drop_path=0.1),
        views=Views(
            area=(0.4, 1.0),
            crop_law="torchvision",
            colour_strength=0.5,
            saturation=0.5,
            blur_p=(1.0, 0.1),
            solarise_p=(0.0, 0.2),
            mean=(0.485, 0.456, 0.406),
            std=(0.229, 0.224, 0.225),
        ),
        optim=Optim(
            name="adamw",
            base_lr=5e-4,
            last_lr=5e-7,  # 1e-6 at 512
            warmup_epochs=10,
            weight_decay=0.04,
            weight_decay_end=0.4,
            clip_each=3.0,
        ),
        train=Train(batch_size=512, epochs=100),
        watch=Watch(every_epochs=10),
    )


# ── MAE ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def patterns_mae() -> MAE:
    """MAE on the rendered dataset, on two CPU cores, with a small ViT: batch and epochs of `patterns_tiny`.

    simclr prepare --source patterns --out runs/patterns
    simclr pretrain patterns_mae --data runs/patterns --workers 2

    Neighbours in its features are no score of it; `simclr finetune` is. In 12 epochs it learns next to nothing: fine-tuned on a tenth
    of the labels 41.8 (40.1 … 44.8), where an untrained encoder of its kind comes to 62.2, n = 1. In 100 (`--train.epochs 100
    --optim.warmup-epochs 10`) its linear probe comes to 76.6, an untrained one's to 61.1, n = 1 (docs/methods.md).
    """
    base = patterns_tiny()
    return MAE(
        encoder=Encoder(vit="micro", patch_px=4, positions="sin_cos"),
        views=base.views,
        optim=Optim(name="adamw", base_lr=2e-3, warmup_epochs=2, weight_decay=0.05, beta2=0.95),
        train=base.train,
        watch=base.watch,
        decoder_width=48,
        decoder_blocks=2,
        decoder_heads=3,
    )


def imagenet_mae_vit_base() -> MAE:
    """MAE with ViT-B/16 on ImageNet, as its authors run it: N = 4096, AdamW, 1,600 epochs for the released weights.

    simclr prepare --source /data/imagenet --out /data/imagenet-shards
    simclr pretrain imagenet_mae_vit_base --data /data/imagenet-shards --workers 64 --train.precision bfloat16 --train.compile

    *Published*: fine-tuned 83.6, linear probe 67.8. Fine-tuned on the patches' mean (--encoder.pool mean) with layer decay. Differences:
    fixed positions have the row first; q, k and v begin as three matrices.
    """
    return MAE(
        views=Views(
            area=(0.2, 1.0),
            crop_law="torchvision",
            colour_strength=0.0,
            blur_p=0.0,
            mean=(0.485, 0.456, 0.406),
            std=(0.229, 0.224, 0.225),
        ),
        optim=Optim(name="adamw", base_lr=1.5e-4, warmup_epochs=40, weight_decay=0.05, beta2=0.95),
        train=Train(batch_size=4096, epochs=1600),
        watch=Watch(every_epochs=0),
    )
