"""SimCLR's recipes (`simclr.recipes`)."""

from __future__ import annotations

from dataclasses import replace

from simclr.config import Encoder, Head, Loss, Optim, SimCLR, Time, Train, Views, Watch


def patterns_tiny() -> SimCLR:
    """The rendered dataset on two CPU cores; `simclr demo` runs it.

    simclr prepare --source patterns --out runs/patterns
    simclr pretrain patterns_tiny --data runs/patterns --workers 2

    kNN 93.3 (90.7 … 95.7), probe 88.9, an untrained encoder 34.2 and 42.5;
    mean and range of seeds 0, 1, 2, by `simclr bench methods` (docs/methods.md).
    """
    return SimCLR(
        encoder=Encoder(depth=8, cifar_stem=True),
        head=Head(layers=2, d_out=64),
        # Pixel by pixel, patterns differ mostly in brightness and contrast: the strong jitter removes that.
        views=Views(size_px=32, area=(0.2, 1.0), colour_strength=0.8, blur_p=0.0, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25)),
        loss=Loss(temperature=0.2),
        optim=Optim(base_lr=4.0, warmup_epochs=2, weight_decay=1e-4),
        train=Train(batch_size=128, epochs=12, report_every_steps=5, checkpoint_every_steps=100),
        watch=Watch(every_epochs=3, k=20),
    )


def patterns_time() -> SimCLR:
    """Pairs from time on videos of rotating patterns: view 1 is of a frame at most three before or behind, and a batch has one frame of a
    video (after SimCLR-TT, openreview HTCRs8taN8).

    simclr prepare --source rotating-patterns --out runs/rotating
    simclr pretrain patterns_time --data runs/rotating --workers 2

    The paper's pairs have no other distortion; these keep `patterns_tiny`'s, since tint and contrast stay alike throughout a video.
    """
    return replace(patterns_tiny(), time=Time(neighbours=3, one_per_video=True))


def cifar10_resnet14() -> SimCLR:
    """A small ResNet-14 on CIFAR-10: every stage of v1 and v2 on a CPU.

    simclr prepare --source cifar10 --out runs/cifar10
    simclr pretrain cifar10_resnet14 --data runs/cifar10

    CIFAR-10 as JPEG files of quality 75, one worker with one core (AMD EPYC, torch 2.15.0): 225 images/s where nothing else ran,
    so about 55 min; kNN 58.2, L-BFGS probe 61.1 (n = 1, seed 0). Fine-tuned on 1 % of the labels (seeds 0, 1, 2): 51.6, 53.3, 52.9.
    The scores are of 21 November 2026, before initial weights were keyed: the same seeds start from other weights now.
    """
    return SimCLR(
        encoder=Encoder(depth=14, cifar_stem=True),
        head=Head(layers=3, d_out=64),
        # Short runs of small networks gain from easier crops and a lower temperature than App. B.9's 0.08 and 0.5.
        views=Views(
            size_px=32, area=(0.2, 1.0), colour_strength=0.5, blur_p=0.0, mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616)
        ),
        loss=Loss(temperature=0.2),
        optim=Optim(base_lr=2.0, warmup_epochs=1, weight_decay=1e-4),
        train=Train(batch_size=256, epochs=15),
        watch=Watch(every_epochs=3, bank=10_000, queries=2_000),
    )


def cifar10_resnet18() -> SimCLR:
    """ResNet-18 on CIFAR-10: one GPU, or a few steps on a CPU to try the path.

    simclr prepare --source cifar10 --out runs/cifar10
    simclr pretrain cifar10_resnet18 --data runs/cifar10 --train.precision bfloat16 --train.compile

    The setting of D. Kobak's simclr-cifar10 (N = 512, SGD, 0.03 · N / 256, decay 5e-4, cosine without warm-up, τ = 0.5).
    *Published* there on clean CIFAR-10: kNN 91.4, probe 91.7 after 1,000 epochs; 83.2 and 85.6 after 100.
    Differences from the reference: crops come from the official sampler, BatchNorm closes the head as in the official code, whose hidden
    layer is as wide as h (512, there 1,024).
    """
    return SimCLR(
        encoder=Encoder(depth=18, cifar_stem=True),
        # App. B.9: half the colour strength, no blur.
        views=Views(size_px=32, colour_strength=0.5, blur_p=0.0, mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616)),
        loss=Loss(temperature=0.5),
        optim=Optim(name="sgd", base_lr=0.03, warmup_epochs=0, weight_decay=5e-4),
        train=Train(batch_size=512, epochs=1000),
        # Online evaluation uses a fifth of the data; `simclr evaluate` scores with all of it, as the published figures do.
        watch=Watch(every_epochs=20, bank=10_000, queries=2_000),
    )


def cifar10_speedrun() -> SimCLR:
    """A plan, not run yet: 90 % kNN on clean CIFAR-10 by ResNet-18 in little time on one GPU; three seeds.

    simclr prepare --source cifar10 --out runs/cifar10
    for seed in 0 1 2; do simclr pretrain cifar10_speedrun --seed $seed --data runs/cifar10 --run runs/speedrun-$seed; done
    for seed in 0 1 2; do simclr evaluate runs/speedrun-$seed --protocol knn; done

    The setting of `cifar10_resnet18` with four times its rate, for half its epochs. Neither its score nor its time is known.
    """
    base = cifar10_resnet18()
    return replace(
        base,
        optim=replace(base.optim, base_lr=0.12),
        train=replace(base.train, epochs=500, precision="bfloat16", compile=True),
        watch=replace(base.watch, every_epochs=50),
    )


def imagenet_resnet50() -> SimCLR:
    """ResNet-50 on ImageNet, the paper's main setting (arXiv:2002.05709, Sec. 4 and 5): N = 4096, LARS, τ = 0.1, 100 epochs.

    simclr prepare --source /data/imagenet --out /data/imagenet-shards
    simclr pretrain imagenet_resnet50 --data /data/imagenet-shards --workers 32 --train.precision bfloat16 --train.compile

    *Published*: linear probe 64.6 after 100 epochs with this setting (Table B.1, N = 4096, linear scaling).
    """
    # The paper says weight decay 1e-6, the official README runs ImageNet with 1e-4; we follow the paper.
    return SimCLR(train=Train(batch_size=4096, epochs=100), watch=Watch(every_epochs=10))


def imagenet_resnet50_2x() -> SimCLR:
    """ResNet-50 (2×) on ImageNet, 1,000 epochs. *Published*: linear probe 74.2 (arXiv:2002.05709, Table 6)."""
    return SimCLR(encoder=Encoder(depth=50, width=2), train=Train(batch_size=4096, epochs=1000), watch=Watch(every_epochs=50))


def imagenet_resnet50_4x() -> SimCLR:
    """ResNet-50 (4×) on ImageNet, 1,000 epochs. *Published*: linear probe 76.5 (arXiv:2002.05709, Table 6)."""
    return SimCLR(encoder=Encoder(depth=50, width=4), train=Train(batch_size=4096, epochs=1000), watch=Watch(every_epochs=50))


def imagenet_resnet152_3x_sk() -> SimCLR:
    """ResNet-152 (3×) with selective kernels and a 3-layer head, SimCLR v2's largest (arXiv:2006.10029, Sec. 3).

    *Published*: linear probe 79.8 after 800 epochs (its Table 1), 795 M parameters.
    """
    # v2 (Sec. 3): N = 4096, lr = 0.1 · √N with the square-root rule, decay 1e-4, 5 % of the epochs are warm-up.
    return SimCLR(
        encoder=Encoder(depth=152, width=3, sk_ratio=0.0625),
        head=Head(layers=3),
        optim=Optim(base_lr=0.1, scaling="sqrt", warmup_epochs=40, weight_decay=1e-4),
        train=Train(batch_size=4096, epochs=800),
        watch=Watch(every_epochs=50),
    )


# ── MoCo ───────────────────────────────────────────────────────────────────────────────────────────────────────────
