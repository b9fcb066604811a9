"""Every setting of a run as a frozen value that is valid from birth.

A config is built once (by a recipe, by the command line or from a checkpoint) and never changed. The meaning of a field, and its unit,
stands below the field. Derived values are properties or functions of `(config, examples)`.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Self, get_type_hints

from simclr.errors import UserError
from simclr.fields import fits, shown
from simclr.sections import Encoder, Head, Operation, Optim, Resize, Views, require
from simclr.shares import groups_of, share

__all__ = [
    "ADDED",
    "RENAMED",
    "Config",
    "Encoder",
    "Head",
    "Loss",
    "Operation",
    "Optim",
    "Resize",
    "SimCLR",
    "Time",
    "Train",
    "Views",
    "Watch",
    "head_of",
    "require",
    "require_whole_patches",
    "time_of",
]

RENAMED = {"begins": "encoder_sha256", "labelled": "labels_sha256"}
"""Fields of a stage (`simclr.stages`) by their names before 26 November 2026, which older files and default run directories have."""
ADDED = {
    "class_weights": "none",
    "encoder.vit": None,
    "encoder.patch_px": 16,
    "encoder.heads": None,
    "encoder.pool": "class",
    "encoder.positions": "learned",
    "encoder.frozen_patches": False,
    "encoder.drop_path": 0.0,
    "encoder.timm": "",
    "views.crop_law": "tensorflow",
    "views.solarise_p": 0.0,
    "views.saturation": 1.0,
    "optim.last_lr": 0.0,
    "optim.beta2": 0.999,
    "optim.rate_in_buffer": True,
    "optim.weight_decay_end": None,
    "optim.layer_decay": 1.0,
    "optim.clip_norm": 0.0,
    "optim.clip_each": 0.0,
    "time.neighbours": 0,
    "time.one_per_video": False,
}
"""Fields that came later, and what older runs did: with this value they are left out of the name of a default run directory."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Loss:
    """NT-Xent (arXiv:2002.05709, Eq. 1), or one of the losses that the paper compares it with (Tables 2, 4 and 5)."""

    name: Literal["nt_xent", "nt_xent_dot", "nt_logistic", "margin_triplet"] = "nt_xent"
    """Which loss. The others are the paper's ablation and train worse. nt_xent_dot compares by z·z' instead of the cosine."""
    temperature: float = 0.1
    """tau in Eq. 1. The paper uses 0.1 on ImageNet and 0.5 on CIFAR-10. The triplet loss has none."""
    margin: float = 0.8
    """m of the triplet loss, a difference of cosines."""
    semi_hard: bool = False
    """For the ablation losses: only the closest negative that is further away than the positive counts (Sec. 5.1)."""
    memory: int = 0
    """Length of the queue: projections of earlier batches, by a moving average of the network, that are negatives too; 0 = no queue. v2
    tries 65,536 (arXiv:2006.10029, Sec. 2), for about a point."""
    memory_decay: float = 0.999
    """Decay of that moving average: the share of its weights that it keeps at each step."""

    def __post_init__(self) -> None:
        require(self.memory >= 0, f"loss.memory is {self.memory}; expected a number of projections, 0 = no queue")
        require(0 <= self.memory_decay < 1, f"loss.memory_decay is {self.memory_decay}; expected [0, 1), v2 uses 0.999")
        require(not self.memory or self.name == "nt_xent", "loss.memory is for nt_xent; leave it out, or use that loss")
        require(self.margin > 0, f"loss.margin is {self.margin}; expected a positive difference of cosines, at most 2")
        contrasts_all = self.name.startswith("nt_xent")
        require(not (self.semi_hard and contrasts_all), "loss.semi_hard is for the other losses; NT-Xent weighs its negatives")
        require(self.temperature > 0, f"loss.temperature is {self.temperature}; expected a positive number, the paper tries 0.05 to 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class Train:
    """How long, how much at a time, and how exactly."""

    batch_size: int = 4096
    """N: images per step over all workers. Each gives two views, so the loss sees 2 N."""
    micro_batch: int | None = None
    """Most images that a worker embeds at a time; nothing = all its N / W. The gradient stays that of the whole batch, memory use is that
    of a piece; it costs a second forward pass (`simclr bench step --micro-batch`). BatchNorm then normalises over one piece of every
    worker."""
    epochs: float = 100.0
    """Passes over the training split."""
    steps: int | None = None
    """Optimizer steps, in place of `epochs` when given; the schedule then has this length."""
    precision: Literal["float32", "tf32", "bfloat16", "float64"] = "float32"
    """float32 = float32 everywhere, also where cuDNN would round the factors of convolutions to TF32; tf32 = float32 numbers, with TF32
    factors (10 bits) in convolutions and matrix products on GPUs that have them; bfloat16 = autocast with float32 weights, statistics and
    loss; float64 is for tests."""
    compile: bool = False
    """Compile the encoder and head with torch.compile. Expected on a GPU: fewer passes over memory for BatchNorm and ReLU, for about a
    minute before the first step. `simclr bench step --compile` measures the gain on your machine."""
    bucket_mib: float = 25.0
    """MiB of gradients that workers exchange at a time, while the backward pass goes on (DDP's buckets). `simclr bench scale` shows
    how many there are."""
    compress_gradients: bool = False
    """Gradients travel between workers as bfloat16: half the bytes for a slow link, and each rounded to 8 bits."""
    linear_eval: bool = True
    """Train a linear classifier on h during pretraining, if the data has labels; its gradient does not reach the encoder."""
    cache: Literal["page", "process"] = "page"
    """Where shards stay between epochs: in the page cache, which the system frees when memory is short, or read once into each worker's
    own memory, for a slow or shared disk."""
    shard_groups: int = 1
    """For data larger than a node's disk: shard i belongs to group i mod G, and every step draws N / G images from each group. A worker
    reads the training shards of group r * G // W only; where G does not divide W, some read the next one too."""
    report_every_steps: int = 10
    """Steps between two reports (metrics, progress). The host does not wait for the device in between."""
    checkpoint_every_steps: int | None = None
    """Steps between two checkpoints. Nothing = by time: every minute, less often if writing would stop training for more than 2 % of the
    time, and at least every five minutes. A checkpoint is also written at the end, and with every score of the online evaluation."""
    keep_checkpoints: int = 2
    """How many of the newest checkpoints stay; the one with the best score stays too."""

    def __post_init__(self) -> None:
        require(self.batch_size >= 2, f"train.batch_size is {self.batch_size}; contrasting needs at least 2 images per step")
        require(self.micro_batch is None or self.micro_batch >= 1, f"train.micro_batch is {self.micro_batch}; expected at least 1")
        require(self.epochs > 0, f"train.epochs is {self.epochs}; expected more than 0")
        require(self.steps is None or self.steps >= 1, f"train.steps is {self.steps}; expected at least 1")
        require(self.bucket_mib > 0, f"train.bucket_mib is {self.bucket_mib}; expected more than 0 MiB, DDP's default is 25")
        # DDP's first bucket is never larger than 1 MiB, and torch cuts a compiled network only where no other is smaller.
        small = self.compile and self.bucket_mib < 1
        require(not small, f"train.bucket_mib is {self.bucket_mib}; with train.compile expected at least 1")
        for name in ("shard_groups", "report_every_steps", "checkpoint_every_steps", "keep_checkpoints"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"train.{name} is {value}; expected at least 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class Watch:
    """Online evaluation: a weighted kNN vote during training (arXiv:1805.01978), if the data has labels and a test split."""

    every_epochs: float = 5.0
    """Epochs between two evaluations; the last step is always evaluated. 0 = only the last step."""
    k: int = 200
    """Neighbours that vote."""
    temperature: float = 0.1
    """A neighbour's vote weighs exp(cosine / temperature)."""
    bank: int = 50_000
    """Most training images that may be neighbours: drawn once, the same in every run."""
    queries: int = 10_000
    """Most test images that are classified: drawn once, the same in every run."""

    def __post_init__(self) -> None:
        require(self.every_epochs >= 0, f"watch.every_epochs is {self.every_epochs}; expected 0 or more")
        for name in ("k", "bank", "queries"):
            require(getattr(self, name) >= 1, f"watch.{name} is {getattr(self, name)}; expected at least 1")
        require(self.temperature > 0, f"watch.temperature is {self.temperature}; expected a positive number")


@dataclass(frozen=True, kw_only=True, slots=True)
class Time:
    """Pairs from time, of frames of videos (`simclr prepare --videos`), after SimCLR-TT (openreview HTCRs8taN8)."""

    neighbours: int = 0
    """View 1 is of another frame of the same video, drawn anew in every epoch from the frames at most so many before or behind;
    0 = of the same image."""
    one_per_video: bool = False
    """An order in which a batch holds as few frames of a video as can be, one where no video has more frames than an epoch has batches:
    else frames of a video are each other's negatives."""

    def __post_init__(self) -> None:
        require(self.neighbours >= 0, f"time.neighbours is {self.neighbours}; expected a number of frames, 0 = no pairs from time")


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """What every run has, whatever its method. Two runs with equal configs on equal shards compute the same numbers."""

    METHOD: ClassVar[str] = ""
    """The method's name, as a file states it; "" = the class alone tells it, as of a stage."""

    seed: int = 0
    """Key of all randomness: weights, order, crops, colours."""
    encoder: Encoder = field(default_factory=Encoder)
    views: Views = field(default_factory=Views)
    optim: Optim = field(default_factory=Optim)
    train: Train = field(default_factory=Train)
    watch: Watch = field(default_factory=Watch)

    def __post_init__(self) -> None:
        require(0 <= self.seed < 2**63, f"seed is {self.seed}; expected a whole number from 0 to 2^63 - 1")
        require_whole_patches(self.encoder, "views.size_px", self.views.size_px)

    def of_batch(self, images: int) -> Self:
        """The same with steps of so many `images`; a queue keeps about its length, and holds whole batches."""
        return dataclasses.replace(self, train=dataclasses.replace(self.train, batch_size=images))

    @property
    def whole_batch(self) -> str:
        """Why a worker must embed all its images at once, in place of pieces (train.micro_batch); "" = it need not."""
        return ""

    def steps_per_epoch(self, examples: int) -> int:
        """Whole batches in one pass over `examples` images; the rest is dropped, other images in each epoch."""
        if self.train.batch_size > examples:
            raise UserError(
                f"batch_size {self.train.batch_size} is larger than the training split ({examples} images); "
                f"use --train.batch-size {examples} or less"
            )
        return examples // self.train.batch_size

    def total_steps(self, examples: int) -> int:
        """Optimizer steps of the run. As in the official code: examples * epochs // N + 1 (get_train_steps)."""
        if self.train.steps is not None:
            return self.train.steps
        return math.floor(examples * self.train.epochs / self.train.batch_size) + 1

    def warmup_asked(self, examples: int) -> int:
        """Steps of `optim.warmup_epochs`, as the official code rounds them."""
        return round(self.optim.warmup_epochs * examples // self.train.batch_size)

    def warmup_steps(self, examples: int) -> int:
        """Steps of linear warm-up: those asked for, but at most a tenth of a run that train.steps cuts or that is no longer than they."""
        warmup = self.warmup_asked(examples)
        short = self.train.steps is not None or self.optim.warmup_epochs >= self.train.epochs
        return min(warmup, self.total_steps(examples) // 10) if short else warmup

    def watch_steps(self, examples: int) -> int:
        """Steps between two kNN evaluations; 0 = only the last step."""
        every = self.watch.every_epochs
        return max(round(every * self.steps_per_epoch(examples)), 1) if every else 0

    def checkpoint_due(self, step: int, total: int) -> bool:
        """Whether a checkpoint is due after `step` of `total` steps, apart from those due by time."""
        every = self.train.checkpoint_every_steps
        return step == total or (every is not None and step % every == 0)

    def images_per_rank(self, workers: int) -> int:
        """n = ⌈N / W⌉, the most images of a worker: where W does not divide N, some have one fewer (`share`). Raises UserError if a worker
        would have none."""
        n = self.train.batch_size
        if workers > n:
            raise UserError(f"batch_size {n} has no image for each of {workers} workers; use --workers {n} or fewer, or a larger batch")
        return -(-n // workers)

    def images_of(self, rank: int, workers: int) -> slice:
        """The images of a batch, in its order, that worker `rank` has. Raises UserError if a worker would have none."""
        self.images_per_rank(workers)
        return share(self.train.batch_size, rank, workers)

    def pieces(self, workers: int) -> int:
        """In how many pieces every worker embeds its images: as many on each, since BatchNorm's sums are over a piece of every worker. They
        have `train.micro_batch` images at most; but one image at a time are two where a worker has one more than others."""
        most, fewest = self.images_per_rank(workers), self.train.batch_size // workers
        return 1 if self.train.micro_batch is None else min(-(-most // self.train.micro_batch), fewest)

    def groups_of(self, rank: int, workers: int) -> range:
        """The shard groups that worker `rank` reads, one or two. Raises UserError where the groups do not divide the batch, or are more
        than the workers."""
        groups, n = self.train.shard_groups, self.train.batch_size
        if n % groups:
            raise UserError(f"train.shard_groups {groups} does not divide batch_size {n}, of which each group gives as much; use a divisor")
        if groups > workers:
            raise UserError(f"train.shard_groups {groups} is more than {workers} workers; use {workers} or fewer, or more workers")
        return groups_of(groups, rank, workers)

    def to_dict(self) -> dict[str, Any]:
        """Nested plain values, ready for JSON; `from_dict` is the inverse."""
        plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self)))
        return {"method": self.METHOD, **plain} if self.METHOD else plain

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Rebuild a config. Raises UserError naming an unknown field and the nearest known ones, or a value of another type."""
        known = {f.name for f in dataclasses.fields(cls)}
        new = {old: name for old, name in RENAMED.items() if old not in known and name in known}
        if isinstance(values, dict):
            values = {new.get(name, name): value for name, value in values.items()}
            if cls.METHOD and values.get("method") == cls.METHOD:
                del values["method"]
        config: Self = _build(cls, values, "")
        return config

    def flat(self) -> dict[str, str | int | float | bool | None]:
        """Field path -> value, e.g. {"optim.base_lr": 0.3}; tuples as text. For trackers and tables."""
        return _flatten(self.to_dict(), "")


@dataclass(frozen=True, kw_only=True, slots=True)
class SimCLR(Config):
    """All settings of SimCLR (arXiv:2002.05709, 2006.10029). Its name is not written: files from before other methods have none."""

    head: Head = field(default_factory=Head)
    loss: Loss = field(default_factory=Loss)
    time: Time = field(default_factory=Time)

    def __post_init__(self) -> None:
        Config.__post_init__(self)  # super() without arguments fails in a dataclass with slots
        rows, memory = 2 * self.train.batch_size, self.loss.memory
        require(memory % rows == 0, f"loss.memory {memory} holds no whole batches; use a multiple of {rows}, 2 views of train.batch_size")
        require(not self.whole_batch or self.train.micro_batch is None, f"{self.whole_batch}; leave out train.micro_batch")
        whole = self.time == Time() or self.train.shard_groups == 1
        require(whole, "time.neighbours and time.one_per_video want every shard; leave out train.shard_groups, or both")

    def of_batch(self, images: int) -> Self:
        queue = self.loss.memory and max(self.loss.memory // (2 * self.train.batch_size), 1) * 2 * images
        train, loss = dataclasses.replace(self.train, batch_size=images), dataclasses.replace(self.loss, memory=queue)
        return dataclasses.replace(self, train=train, loss=loss)

    @property
    def whole_batch(self) -> str:
        return "loss.memory needs a whole batch at once" if self.loss.memory else ""


def require_whole_patches(encoder: Encoder, name: str, size: int) -> None:
    """Raise UserError unless a vision transformer's patches divide images of `size`, which the field `name` states."""
    patch = encoder.patch_px
    near, flag = max(size // patch, 1) * patch, name.replace("_", "-")
    whole = encoder.vit is None or size % patch == 0
    require(whole, f"encoder.patch_px {patch} does not divide {name} {size}; use --{flag} {near} or {near + patch}")


def time_of(config: Config) -> Time:
    """The pairs from time of a run of SimCLR; another method has none."""
    return config.time if isinstance(config, SimCLR) else Time()


def head_of(config: Config) -> Head:
    """The projection head of a run of SimCLR; of another method the default, which a later stage at tap 0 has no use for."""
    return config.head if isinstance(config, SimCLR) else Head()


def _build(cls: type[Any], values: Any, path: str) -> Any:
    if not isinstance(values, dict):
        raise UserError(f"{path.rstrip('.') or 'the config'} is {values!r}; expected its fields by name")
    hints = get_type_hints(cls)
    known = {f.name for f in dataclasses.fields(cls)}
    for name in values:
        if name not in known:
            near = difflib.get_close_matches(name, sorted(known), n=3, cutoff=0.3) or sorted(known)
            raise UserError(f"unknown field {path}{name}; nearest: {', '.join(path + n for n in near)}")
    arguments = {}
    for name, value in values.items():
        if dataclasses.is_dataclass(hints[name]):
            arguments[name] = _build(hints[name], value, f"{path}{name}.")
        elif fits(value, hints[name]):
            arguments[name] = tuple(value) if isinstance(value, list) else value
        else:
            raise UserError(f"{path}{name} = {value!r} does not fit; expected {shown(hints[name])}")
    return cls(**arguments)


def _flatten(values: dict[str, Any], path: str) -> dict[str, str | int | float | bool | None]:
    flat: dict[str, str | int | float | bool | None] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{path}{name}.")
        else:
            flat[path + name] = " ".join(map(str, value)) if isinstance(value, list) else value
    return flat
