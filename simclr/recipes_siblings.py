"""The recipes of SimCLR's siblings (`simclr.recipes`): MoCo, BYOL, MoCo v3."""

from __future__ import annotations

from dataclasses import replace

from simclr.config import Encoder, Optim, Train, Views, Watch
from simclr.family import BYOL, MoCo, MoCoV3
from simclr.recipes_simclr import cifar10_resnet18, patterns_tiny


def patterns_moco() -> MoCo:
    """MoCo v2 on the rendered dataset, on two CPU cores: encoder, views, epochs, batch and optimizer of `patterns_tiny`.

    simclr prepare --source patterns --out runs/patterns
    simclr pretrain patterns_moco --data runs/patterns --workers 2

    kNN 40.1 (31.8 … 49.1), probe 49.9: 376 steps are too few for its queue;
    mean and range of seeds 0, 1, 2, by `simclr bench methods` (docs/methods.md).
    """
    base = patterns_tiny()
    return MoCo(
        encoder=base.encoder,
        views=base.views,
        # LARS, as SimCLR has it, hardly moves the shifts of a head without BatchNorm: it scored worse in every trial.
        optim=Optim(name="sgd", base_lr=0.2, warmup_epochs=1, weight_decay=5e-4),
        train=base.train,
        watch=base.watch,
        temperature=0.1,
        queue=1024,
        ema=0.99,
        d_out=64,
    )


def cifar10_moco() -> MoCo:
    """MoCo with ResNet-18 on CIFAR-10, the setting of the authors' notebook (its symmetric loss: `--symmetric`).

    simclr prepare --source cifar10 --out runs/cifar10
    simclr pretrain cifar10_moco --data runs/cifar10 --train.precision bfloat16

    *Published* there on clean CIFAR-10, kNN of the 128-d output: 82.6, 86.3, 88.7 after 200, 400, 800 epochs; symmetric 85.3, 88.5, 89.7.
    Differences: kNN here is of h, 512-d; BatchNorm is over the batch, there over eighths of it; the rate falls by step, there by epoch.
    """
    return MoCo(
        encoder=Encoder(depth=18, cifar_stem=True),
        views=replace(cifar10_views(), resize="bilinear", std=(0.2023, 0.1994, 0.2010)),
        temperature=0.1,
        queue=4096,
        ema=0.99,
        layers=1,
        optim=Optim(name="sgd", base_lr=0.03, warmup_epochs=0, weight_decay=5e-4),  # 0.06 at 512
        train=Train(batch_size=512, epochs=200),
        watch=Watch(every_epochs=20, bank=10_000, queries=2_000),
    )


def imagenet_mocov2() -> MoCo:
    """MoCo v2 with ResNet-50 on ImageNet (arXiv:2003.04297): N = 256, K = 65,536, SGD, τ = 0.2, 200 epochs.

    simclr prepare --source /data/imagenet --out /data/imagenet-shards
    simclr pretrain imagenet_mocov2 --data /data/imagenet-shards --workers 8 --train.precision bfloat16

    *Published*: linear probe 67.7 after 200 epochs (67.5 ± 0.1 over runs), 71.1 after 800. Differences: BatchNorm is over all workers,
    there over each one's 32 images with a shuffle (`--encoder.batchnorm per_worker --shuffle`); the rate falls by step, there by epoch.
    """
    return MoCo(
        views=Views(
            area=(0.2, 1.0),
            crop_law="torchvision",
            resize="bilinear",
            colour_strength=0.5,
            mean=(0.485, 0.456, 0.406),
            std=(0.229, 0.224, 0.225),
        ),
        optim=Optim(name="sgd", base_lr=0.03, warmup_epochs=0, weight_decay=1e-4),
        train=Train(batch_size=256, epochs=200),
        watch=Watch(every_epochs=10),
    )


# ── BYOL ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def patterns_byol() -> BYOL:
    """BYOL on the rendered dataset, with encoder, views, batch and epochs of `patterns_tiny`, to compare.

    simclr prepare --source patterns --out runs/patterns
    simclr pretrain patterns_byol --data runs/patterns --workers 2

    kNN 64.6 (44.0 … 83.0), probe 74.6, the best of the seed that it was tuned on;
    mean and range of seeds 0, 1, 2, by `simclr bench methods` (docs/methods.md).
    """
    base = patterns_tiny()
    return BYOL(
        encoder=base.encoder,
        views=base.views,
        # Searched on seed 0 over rates 1 to 32 and averages of 0.8 to 0.99: in 375 steps an average must be short to follow.
        optim=replace(base.optim, base_lr=32.0, warmup_epochs=1, rate_in_buffer=False),
        train=base.train,
        watch=base.watch,
        ema=0.9,
        hidden=256,
        d_out=64,
    )


def cifar10_byol() -> BYOL:
    """BYOL with ResNet-18 on CIFAR-10, 200 epochs, on one GPU.

    simclr prepare --source cifar10 --out runs/cifar10
    simclr pretrain cifar10_byol --data runs/cifar10 --train.precision bfloat16 --train.compile

    The setting of lightly's benchmark (N = 512, SGD, cosine without warm-up, heads 1024 wide). *Published* there on clean CIFAR-10: kNN
    86.8 after 200 epochs, 91.0 after 800 (best epoch). Its loss is a quarter of the paper's, which is taken here: a quarter of its rate,
    0.12 per 256, and four times its decay, 5e-4, are the same steps. Differences: norms and biases do not decay; the average's 0.99 goes
    to 1, and it moves behind the optimizer, not before the step.
    """
    return BYOL(
        encoder=Encoder(depth=18, cifar_stem=True),
        views=cifar10_views(),
        optim=Optim(name="sgd", base_lr=0.03, warmup_epochs=0, weight_decay=2e-3),
        train=Train(batch_size=512, epochs=200),
        watch=Watch(every_epochs=20, bank=10_000, queries=2_000),
        ema=0.99,
        hidden=1024,
    )


def imagenette_byol() -> BYOL:
    """BYOL with ResNet-18 on Imagenette (160 px), with crops of 128 px: the authors' own small example.

    simclr prepare --source imagenette2-160 --size-px 160 --out runs/imagenette
    simclr pretrain imagenette_byol --data runs/imagenette --train.precision bfloat16 --train.compile

    The preset of `imagenet_byol` with N = 256, base rate 2.0 and decay 1e-6. *Published* (README of the official code): the linear
    classifier that learns beside it scores about 92.3 after 1,000 epochs, in about 4 hours on a V100.
    """
    base = imagenet_byol()
    return replace(
        base,
        encoder=Encoder(depth=18),
        views=replace(base.views, size_px=128),
        optim=replace(base.optim, base_lr=2.0, weight_decay=1e-6),
        train=Train(batch_size=256, epochs=1000),
        watch=Watch(every_epochs=50, k=20),
    )


def imagenet_byol() -> BYOL:
    """BYOL with ResNet-50 on ImageNet (arXiv:2006.07733, Sec. 3.3 and App. B): N = 4096, LARS, 1,000 epochs.

    simclr prepare --source /data/imagenet --out /data/imagenet-shards
    simclr pretrain imagenet_byol --data /data/imagenet-shards --workers 32 --train.precision bfloat16 --train.compile

    *Published*: linear probe 74.3 (Table 1); 74.4 by the released weights. The official presets of shorter runs are base rate 0.3, decay
    1e-6 and ema 0.99 for 300 epochs; 0.45, 1e-6 and 0.99 for 100; 0.45, 1e-6 and 0.97 for 40.
    Differences: a box that does not fit is drawn again, there it is cut off at the image's sides; brightness multiplies, there it is added.
    """
    return BYOL(
        # The first view is always blurred and never solarised, the second seldom blurred and sometimes solarised (App. B, Table 6).
        views=Views(
            crop_law="torchvision",
            colour_strength=0.5,
            saturation=0.5,
            blur_p=(1.0, 0.1),
            solarise_p=(0.0, 0.2),
            mean=(0.485, 0.456, 0.406),
            std=(0.229, 0.224, 0.225),
        ),
        optim=Optim(base_lr=0.2, warmup_epochs=10, weight_decay=1.5e-6, rate_in_buffer=False),
        train=Train(batch_size=4096, epochs=1000),
        watch=Watch(every_epochs=50),
    )


# ── MoCo v3 ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def patterns_mocov3() -> MoCoV3:
    """MoCo v3 on the rendered dataset, on two CPU cores: encoder, views, epochs and batch of `patterns_tiny`.

    simclr prepare --source patterns --out runs/patterns
    simclr pretrain patterns_mocov3 --data runs/patterns --workers 2

    kNN 85.2 (81.6 … 88.2), probe 85.2; mean and range of seeds 0, 1, 2, by `simclr bench methods` (docs/methods.md).
    """
    base = patterns_tiny()
    return MoCoV3(
        encoder=base.encoder,
        views=base.views,
        # Searched on seed 0 over rates 4 to 16 and averages of 0.8 to 0.99: in 375 steps an average must be short to follow.
        optim=Optim(base_lr=4.0, warmup_epochs=1, weight_decay=1e-4, rate_in_buffer=False),
        train=base.train,
        watch=base.watch,
        temperature=0.2,
        ema=0.8,
        hidden=256,
        d_out=64,
    )


def cifar10_mocov3() -> MoCoV3:
    """MoCo v3 with ResNet-18 on CIFAR-10: one GPU.

    simclr prepare --source cifar10 --out runs/cifar10
    simclr pretrain cifar10_mocov3 --data runs/cifar10 --train.precision bfloat16 --train.compile

    Encoder, heads, τ, momentum, N = 256, 1,000 epochs and decay are those of solo-learn, whose LARS has another trust coefficient (0.02,
    clipped), so the rate is another. *Published* there on clean CIFAR-10: linear classifier trained beside 93.1. Not run here yet.
    """
    base = cifar10_resnet18()
    return MoCoV3(
        encoder=base.encoder,
        # At 32 px a blur takes away what the network should see (arXiv:2002.05709, App. B.9).
        views=replace(base.views, crop_law="torchvision", solarise_p=(0.0, 0.2), saturation=0.5),
        optim=Optim(base_lr=2.0, weight_decay=1e-6, rate_in_buffer=False),
        train=Train(batch_size=256, epochs=1000),
        watch=base.watch,
        temperature=0.2,
    )


def imagenet_mocov3_resnet50() -> MoCoV3:
    """MoCo v3 with ResNet-50 on ImageNet, as its authors run it for 100 epochs: N = 4096, LARS, τ = 1.

    simclr prepare --source /data/imagenet --out /data/imagenet-shards
    simclr pretrain imagenet_mocov3_resnet50 --data /data/imagenet-shards --workers 16 --train.precision bfloat16 --train.compile

    *Published*: linear probe 68.9 after 100 epochs. After 300 and 1,000, 72.8 and 74.6 with --optim.base-lr 0.3; 1,000 take
    --optim.weight-decay 1.5e-6 and --ema 0.996 too.
    """
    return MoCoV3(
        views=replace(_mocov3_views(), area=(0.2, 1.0)),
        optim=Optim(base_lr=0.6, warmup_epochs=10, weight_decay=1e-6, rate_in_buffer=False),
        train=Train(batch_size=4096, epochs=100),
        watch=Watch(every_epochs=10),
    )


def imagenet_mocov3_vit_small() -> MoCoV3:
    """MoCo v3 with ViT-S/16 of 12 heads on ImageNet, as its authors run it: N = 4096, AdamW, τ = 0.2, patch embedding frozen.

    simclr prepare --source /data/imagenet --out /data/imagenet-shards
    simclr pretrain imagenet_mocov3_vit_small --data /data/imagenet-shards --workers 16 --train.precision bfloat16 --train.compile

    *Published*: linear probe 73.2 after 300 epochs, fine-tuned 81.4.
    """
    return MoCoV3(
        encoder=Encoder(vit="small", heads=12, positions="sin_cos", frozen_patches=True),
        views=_mocov3_views(),
        optim=Optim(name="adamw", base_lr=1.5e-4, warmup_epochs=40, weight_decay=0.1),
        train=Train(batch_size=4096, epochs=300),
        watch=Watch(every_epochs=20),
        temperature=0.2,
        layers=3,
        predictor_norm=True,
    )


def _mocov3_views() -> Views:
    """The distortions of MoCo v3: brightness and contrast by 0.4, saturation by 0.2, hue by 0.1; another blur for each view."""
    return Views(
        crop_law="torchvision",
        resize="bilinear",
        colour_strength=0.5,
        saturation=0.5,
        blur_p=(1.0, 0.1),
        solarise_p=(0.0, 0.2),
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
    )


# ── Views ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def cifar10_views() -> Views:
    """Those of lightly's benchmark on CIFAR-10."""
    return Views(
        size_px=32,
        crop_law="torchvision",
        colour_strength=0.5,
        blur_p=0.0,
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2470, 0.2435, 0.2616),
    )
