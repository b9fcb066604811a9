"""Settings that are each valid and together senseless, found before any worker starts: refused, or mended and said in a sentence.

Intervals of evaluation, reports and checkpoints may exceed the run: its last step has all three.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from simclr.config import Config, Encoder, SimCLR, Time, Views, time_of
from simclr.data.manifest import Manifest
from simclr.data.tokens import NEEDED, judged_prompts
from simclr.data.videos import false_negatives, videos_of
from simclr.errors import UserError
from simclr.extras import command, has
from simclr.family import CLIP, DINO, MAE, MoCo, SwAV
from simclr.networks.encoders import small_px
from simclr.networks.timm import looked_at, require_grouped
from simclr.optim import lr_peak
from simclr.papers import TUNED, adamw
from simclr.stages import Distill, FineTune

_LEAST_PX = 64  # a ResNet with ImageNet's stem has one place for every 32 × 32 px; below this it has a single one
_MOST_ADAMW = 0.02  # a peak rate of AdamW: authors come to 0.016 with batches of 4096, LARS's settings to 0.16 with 1024
_LEAST_SHARE = 25  # percent of an image; authors train classifiers from 8 % on
_ENOUGH = 16  # images; with fewer the error of a ResNet-50 rises (arXiv:1803.08494, Fig. 1)


def notes(config: Config, manifest: Manifest, examples: int, workers: Sequence[int] = (1,), under_way: bool = False) -> tuple[str, ...]:
    """What a run of `config` over `examples` images of `manifest` does otherwise than its settings say, a sentence each. `workers`: the
    numbers of workers that it may be trained with.

    Raises UserError for what cannot be learned from: BatchNorm over a single image, crops of a pixel, a queue longer than an epoch. Of a
    run that is `under_way` that is a note too: another config would be another run. And for a network that timm has not.
    """
    pretrains = not isinstance(config, FineTune | Distill)
    if config.encoder.timm:
        seen = looked_at(config.encoder.timm, config.views.size_px, small_px(config))
        if config.optim.layer_decay != 1:
            require_grouped(config.encoder.timm, seen)
    refusals = [_crops(config.views, manifest), _queue(config, examples), single_image(config, workers), _no_videos(config, manifest)]
    alike, cut = _prompts(config, manifest)
    refusals += [_no_captions(config, manifest), alike, _paths(config)]
    found = [f"{what.partition(';')[0]}; this run goes on all the same, and a new one is refused" for what in refusals if what]
    if found and not under_way:
        raise UserError(next(filter(None, refusals)))
    found += [_warmup(config, examples), _enlarged(config.views, manifest), _few(normalised_over(config, workers), config)]
    found += [cut, _lars(config), _adamw(config), _elastic(config, workers)]
    found += [_unused(config.encoder), _stem(config.encoder, config.views.size_px)]
    if pretrains:
        found += [_unblurred(config), _neighbours(config, manifest), *_never(config, examples), *_frames(config, manifest, examples)]
    return tuple(note for note in found if note)


def mild_crops(views: Views) -> dict[str, str]:
    """Field of `views` → what few train a classifier with, in words: crops of more than a quarter of an image, which CLIP has, and no
    flips."""
    low, high = (100 * share for share in views.area)
    found = {"area": f"crops cover {low:g} to {high:g} % of an image"} if low > _LEAST_SHARE else {}
    return found | ({} if views.flip_p else {"flip_p": "no image is mirrored"})


# ── Refused, with what mends it after a semicolon ──────────────────────────────────────────────────────────────────


def single_image(config: Config, workers: Sequence[int]) -> str:
    """Refuses BatchNorm over a single image, whose two views become opposites, and whose one view 0. "" for more images."""
    train = config.train
    if normalised_over(config, workers) > 1:
        return ""
    if train.micro_batch == 1:
        return "train.micro_batch 1 leaves BatchNorm a single image; use --train.micro-batch 2 or more"
    return (
        f"encoder.batchnorm {config.encoder.batchnorm} and batch size {train.batch_size} over {max(workers)} workers leave BatchNorm a "
        f"single image; use --workers {max(train.batch_size // 2, 1)} or fewer, or a larger batch"
    )


def normalises(config: Config) -> bool:
    """Whether training by `config` has BatchNorms that move: a vision transformer has none, nor have many networks of timm's."""
    encoder = config.encoder
    if isinstance(config, FineTune) and config.linear:  # whose statistics stay as they are
        return False
    if isinstance(config, SimCLR):
        layers = config.tap if isinstance(config, FineTune) else 0 if isinstance(config, Distill) else config.head.layers
    elif isinstance(config, DINO):
        layers = int(config.head_norm)
    else:
        layers = int(not isinstance(config, MoCo | MAE | CLIP))
    if layers or not (encoder.vit or encoder.timm):
        return True
    return not encoder.vit and looked_at(encoder.timm, config.views.size_px, small_px(config)).normalises


def statistics_over(config: Config, workers: int) -> int:
    """How many of so many workers share BatchNorm's statistics. Raises UserError where groups do not divide the workers: the last group
    would normalise over fewer images than the others."""
    group = config.encoder.norm_ranks or workers
    if not normalises(config):
        return workers
    if workers > group and workers % group:
        low = workers // group * group
        raise UserError(
            f"encoder.batchnorm {group} wants groups of {group} workers, and there are {workers}; use --workers {low} or {low + group}"
        )
    return min(group, workers)


def normalised_over(config: Config, workers: Sequence[int]) -> int:
    """How few images BatchNorm may normalise over."""
    train, found = config.train, []
    if not normalises(config):
        return train.batch_size
    for count in workers:
        each, pieces = statistics_over(config, count), config.pieces(count)
        own = train.batch_size // count // pieces  # of the smallest piece of a worker
        found.append(train.batch_size if each == count and pieces == 1 else own * each)
    return min(found)


def _crops(views: Views, manifest: Manifest) -> str:
    """Even the largest image must have crops of more than a pixel."""
    height, width = manifest.height_px[1], manifest.width_px[1]
    side = math.sqrt(views.least_area * height * width)
    if side >= 2:
        return ""
    low, high = views.area
    return f"views.area {low:g} {high:g} cuts crops of {side:.2g} px out of {height} × {width} px; give a larger --views.area"


def _queue(config: Config, examples: int) -> str:
    """A longer queue holds every image, so each would be its own negative."""
    match config:
        case SimCLR():
            name, length, each = "loss.memory", config.loss.memory, 2 * config.train.batch_size
        case MoCo():
            name, length, each = "queue", config.queue, config.keys_per_step
        case _:
            return ""
    epoch = each * config.steps_per_epoch(examples)
    return f"{name} {length:,} exceeds the {epoch:,} projections of an epoch; use --{name} {epoch} or less" if length > epoch else ""


def _no_captions(config: Config, manifest: Manifest) -> str:
    if not isinstance(config, CLIP):
        return ""
    if not manifest.captions:
        return "the shards have no captions, and CLIP trains on pairs; prepare them with --captions auto, or --captions FILE"
    return "" if has("open_clip") else f"{NEEDED}; add it with `{command('pairs')}`"


def _prompts(config: Config, manifest: Manifest) -> tuple[str, str]:
    """What refuses the prompt of online evaluation, and what is said of it."""
    if not isinstance(config, CLIP) or not manifest.classes or "test" not in manifest.splits or not has("open_clip"):
        return "", ""
    return judged_prompts(manifest.classes, (config.prompt,), config.context)


def _paths(config: Config) -> str:
    """Refuses MAE with paths to leave out, which it has not; a run of before, which had them for nothing, goes on."""
    path = config.encoder.drop_path
    if not isinstance(config, MAE) or not path:
        return ""
    return f"encoder.drop_path is {path}, and MAE leaves no path out; leave it out, `simclr finetune` has it"


def _no_videos(config: Config, manifest: Manifest) -> str:
    if time_of(config) == Time() or manifest.videos.get("train"):
        return ""
    return (
        "time.neighbours and time.one_per_video want frames of videos, and the shards hold none; prepare folders of frames with --videos, "
        "or leave both out"
    )


# ── Said ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def _warmup(config: Config, examples: int) -> str:
    steps, asked, total = config.warmup_steps(examples), config.warmup_asked(examples), config.total_steps(examples)
    if steps == asked:
        if 2 * steps <= total:
            return ""
        share = f"{100 * steps / total:.0f} %"
        return f"the warm-up lasts {steps:,} of {total:,} steps, {share} of the run; a smaller --optim.warmup-epochs leaves time to decay"
    epochs = f"{config.optim.warmup_epochs:g} epoch{'' if config.optim.warmup_epochs == 1 else 's'}"
    return f"the warm-up lasts {steps:,} of {total:,} steps, a tenth of this short run, and not the {asked:,} steps of {epochs}"


def _never(config: Config, examples: int) -> list[str]:
    """Of parts that wait for longer than the run lasts."""
    total, per_epoch, found = config.total_steps(examples), config.steps_per_epoch(examples), []
    if isinstance(config, SwAV):
        if config.frozen_steps >= total:
            waits = f"they wait for {config.frozen_steps:,} of {total:,} steps"
            found.append(f"the prototypes never learn: {waits}; give a smaller --frozen-steps")
        full = round(config.queue_epochs * per_epoch) + config.queue // config.train.batch_size
        if config.queue and full >= total:
            found.append(f"the queue is never used: it is full after {full:,} of {total:,} steps; give a smaller --queue-epochs or --queue")
    if isinstance(config, DINO) and (until := round(config.frozen_epochs * per_epoch)) >= total:
        found.append(f"the head's last layer never learns: it waits for {until:,} of {total:,} steps; give a smaller --frozen-epochs")
    return found


def _frames(config: Config, manifest: Manifest, examples: int) -> list[str]:
    """Of frames without a neighbour, and of frames of one video that are each other's negatives. Of a subset neither is known."""
    time, n, per_epoch = time_of(config), config.train.batch_size, config.steps_per_epoch(examples)
    if time == Time() or not manifest.videos.get("train") or examples != manifest.examples("train"):
        return []
    videos, found = videos_of(manifest), []
    lengths, longest = videos.lengths, int(videos.lengths.max())
    if time.neighbours and (alone := int((lengths == 1).sum())):
        found.append(f"{alone:,} of {len(lengths):,} videos have one frame, which is paired with itself")
    if not time.one_per_video and (others := false_negatives(videos, n)):
        found.append(
            f"a frame has {others:.3g} frames of its own video among the {n - 1:,} other images of its batch, in the mean, as false "
            f"negatives; --time.one-per-video keeps them apart{' as far as can be' if longest > per_epoch else ''}"
        )
    if time.one_per_video and longest > per_epoch:
        fits = examples // longest
        found.append(
            f"a batch of {n:,} has up to {-(-longest // per_epoch):,} frames of a video, and no order of all frames has fewer: the longest "
            f"video has {longest:,} frames, an epoch {per_epoch:,} batches"
            + (f"; --train.batch-size {fits} leaves one" if fits > 1 else "")
        )
    return found


def _unused(encoder: Encoder) -> str:
    usual = Encoder()
    names = ("depth", "width", "sk_ratio", "se_ratio", "cifar_stem")
    given = [f"encoder.{name} {getattr(encoder, name)}" for name in names if getattr(encoder, name) != getattr(usual, name)]
    if not given or not (encoder.vit or encoder.timm):
        return ""
    return f"the encoder is {encoder.title}, so {' and '.join(given)}, a ResNet's, {'say' if len(given) > 1 else 'says'} nothing"


def _stem(encoder: Encoder, size_px: int) -> str:
    if encoder.vit or encoder.timm or encoder.cifar_stem or size_px >= _LEAST_PX:
        return ""
    side = -(-size_px // 32)
    return (
        f"views of {size_px} px leave {encoder.title} a last map of {side} × {side}, since its stem is for large images; "
        "--encoder.cifar-stem is for small ones"
    )


def _few(images: int, config: Config) -> str:
    if images >= min(_ENOUGH, config.train.batch_size) or images == 1:
        return ""
    return f"BatchNorm normalises over {images} images at a time and trains worse than over {_ENOUGH} or more"


def _lars(config: Config) -> str:
    encoder, wanted = config.encoder, _wanted(config)
    if config.optim.name != "lars" or not wanted or (isinstance(config, FineTune) and config.linear):
        return ""
    if not encoder.vit and (not encoder.timm or looked_at(encoder.timm, config.views.size_px).normalises):
        return ""
    title = encoder.title + ", without BatchNorm" * bool(encoder.timm)
    return f"LARS has a ResNet's settings here, and the encoder is {title}; authors of vision transformers have {wanted}"


def _adamw(config: Config) -> str:
    """Of AdamW with the rate of LARS, which both stages have unless they are told another."""
    optim, wanted = config.optim, _wanted(config)
    peak = lr_peak(optim.base_lr, config.train.batch_size, optim.scaling)
    if optim.name != "adamw" or not wanted or peak <= _MOST_ADAMW:
        return ""
    return (
        f"AdamW's rate rises to {peak:.2g}, as LARS's may (optim.base_lr {optim.base_lr:g}, scaling {optim.scaling}); with AdamW a usual "
        f"setting is {wanted}"
    )


def _wanted(config: Config) -> str:
    """The flags with which a stage trains a vision transformer; "" for a pretraining."""
    match config:
        case FineTune():
            name = config.encoder.timm
            ordered = not name or looked_at(name, config.views.size_px).grouped
            return TUNED if ordered and not config.linear else adamw("1e-3")
        case Distill():
            return adamw("2.5e-4")  # as DeiT (arXiv:2012.12877, Table 9: 5e-4 for 512 images)
        case _:
            return ""


def _elastic(config: Config, workers: Sequence[int]) -> str:
    images = [normalised_over(config, [count]) for count in workers]
    few, many = min(images), max(images)
    if few == many:
        return ""
    return f"BatchNorm normalises over {few} to {many} images at a time, by the number of workers, and so the weights depend on it"


def _enlarged(views: Views, manifest: Manifest) -> str:
    height, width = manifest.height_px[1], manifest.width_px[1]
    if max(height, width) >= views.size_px:
        return ""
    return f"every image is enlarged: views are {views.size_px} px, and the largest image in the shards is {height} × {width} px"


def _unblurred(config: Config) -> str:
    views = config.views
    if isinstance(config, MAE | CLIP):  # whose crops are flipped and no more
        return ""
    blurs = views.of_view("blur_p", 0) + views.of_view("blur_p", 1) > 0
    asked = blurs if views.operations is None else "blur" in views.operations
    if not asked or views.size_px // 10 // 2:
        return ""
    return f"views of {views.size_px} px are not blurred, though they should be: the kernel, a tenth of the side, is a single pixel"


def _neighbours(config: Config, manifest: Manifest) -> str:
    bank = min(config.watch.bank, manifest.examples("train", config.train.shard_groups))
    if not manifest.classes or "test" not in manifest.splits or config.watch.k <= bank:
        return ""
    return f"online kNN: all {bank:,} images of its bank vote, since watch.k is {config.watch.k:,}; a smaller --watch.k tells more"
