"""Settings of the stages after pretraining: fine-tuning on few labels, and distillation (arXiv:2006.10029, Sec. 2).

Each is a `Config` with a few fields more: encoder, head, views, optimizer, schedule and seed mean the same, and so do steps and
epochs. They inherit the `loss` settings too, which have no effect here.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from simclr.config import Config, Optim, SimCLR, Time, Train, Watch, require
from simclr.family import pretraining

_LAST_ONLY = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class FineTune(SimCLR):
    """Second stage: the whole network trained on labels, from a layer of the projection head on.

    The defaults are v2's for 1 % of the labels and a plain ResNet-50 (Sec. 3 and the official README's command): LARS,
    lr = 0.005 √N, N = 1024, 60 epochs, no weight decay, no warm-up, from the head's first layer. For 10 % and for all labels it
    says 30 epochs, for wider networks and selective kernels lr = 0.002 √N, for all labels tap 0. v1 (App. B.5) has SGD with
    Nesterov's momentum, lr = 0.05 N / 256, N = 4096 and tap 0, else the same.
    """

    optim: Optim = field(default_factory=lambda: Optim(base_lr=0.005, scaling="sqrt", warmup_epochs=0, weight_decay=0.0))
    train: Train = field(default_factory=lambda: Train(batch_size=1024, epochs=60))
    watch: Watch = field(default_factory=lambda: Watch(every_epochs=_LAST_ONLY))
    tap: int = 1
    """Layer of the projection head that the classifier reads; the layers up to it are trained too. 0 = h."""
    linear: bool = False
    """Train only the classifier: encoder and head are frozen, their statistics too."""
    class_weights: Literal["none", "balanced"] = "none"
    """Weights of the classes in the loss: none, or balanced, n / (C · n_c) for a class with n_c of the n labelled images of C classes, so
    that every class counts alike, however rare (`simclr.data.labels.balanced`)."""
    encoder_sha256: str = ""
    """sha256 of the published encoder that training begins with; empty = from scratch, the supervised baseline."""
    labels_sha256: str = ""
    """sha256 of the sample ids whose labels are used."""

    def __post_init__(self) -> None:
        SimCLR.__post_init__(self)
        require(0 <= self.tap <= self.head.layers, f"tap is {self.tap}; the projection head has {self.head.layers} layers, 0 is h")
        _require_plain(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class Distill(SimCLR):
    """Third stage: a student learns the teacher's probabilities on images without labels (Eq. 2), and some labels (Eq. 3).

    The defaults are v2's (Sec. 3): optimizer, schedule, weight decay and batch of its pretraining, 400 epochs, no labels.
    """

    optim: Optim = field(default_factory=lambda: Optim(base_lr=0.1, scaling="sqrt", warmup_epochs=20, weight_decay=1e-4))
    train: Train = field(default_factory=lambda: Train(batch_size=4096, epochs=400))
    watch: Watch = field(default_factory=lambda: Watch(every_epochs=_LAST_ONLY))
    temperature: float = 0.1
    """tau of teacher and student. v2: 0.1 where both are alike (self-distillation), 1 for a smaller student; it matters little."""
    alpha: float = 1.0
    """Weight of the teacher's term; the true labels have 1 - alpha. 1 = Eq. 2, no label is used."""
    teacher: str = ""
    """sha256 of the published teacher."""
    labels_sha256: str = ""
    """sha256 of the sample ids whose labels are used; empty = none."""

    def __post_init__(self) -> None:
        SimCLR.__post_init__(self)
        require(self.temperature > 0, f"temperature is {self.temperature}; expected a positive number, v2 uses 0.1 to 1")
        require(0 < self.alpha <= 1, f"alpha is {self.alpha}; expected above 0 (at 0 nothing would be distilled) and at most 1")
        _require_plain(self)


def _require_plain(config: SimCLR) -> None:
    require(config.train.micro_batch is None, "train.micro_batch is for pretraining, whose loss needs all of a batch; use a smaller batch")
    require(config.time == Time(), "time.neighbours and time.one_per_video are for pretraining, where images come in pairs; leave them out")
    require(config.train.shard_groups == 1, "train.shard_groups is for pretraining; fine-tuning and distilling read all shards")


STAGES: dict[str, type[Config]] = {"pretrain": Config, "finetune": FineTune, "distill": Distill}
"""Name of a stage and of its command → its settings; pretraining has those of a method."""


def read_config(stage: str, values: Any) -> Config:
    """The config of a run of `stage` from `Config.to_dict()`. Raises UserError as `Config.from_dict`, or for an unknown method."""
    return pretraining(values) if stage == "pretrain" else STAGES[stage].from_dict(values)
