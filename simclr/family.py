"""Settings of SimCLR's siblings, each a `Config` with a few fields more, and which class a config's text is of."""

from __future__ import annotations

import dataclasses
import difflib
from dataclasses import dataclass, field
from typing import Any, Literal, Self

from simclr.config import Config, SimCLR, require, require_whole_patches
from simclr.errors import UserError
from simclr.sections import Encoder, Local


@dataclass(frozen=True, kw_only=True, slots=True)
class MoCo(Config):
    """MoCo v1 (arXiv:1911.05722) and v2 (arXiv:2003.04297): keys by a moving average of the network, kept in a queue."""

    METHOD = "moco"

    temperature: float = 0.2
    """tau of InfoNCE: 0.07 in v1, 0.2 in v2."""
    queue: int = 65_536
    """K: keys of earlier batches, the negatives; a multiple of the keys of a step."""
    ema: float = 0.999
    """m: the share of itself that the key network keeps at each step."""
    layers: Literal[1, 2] = 2
    """Linear layers of the head: 1 in v1; 2 in v2, the first as wide as h, with ReLU and no BatchNorm."""
    d_out: int = 128
    """Dimension of queries and keys."""
    symmetric: bool = False
    """Each view is a query once and a key once; the losses are added, and a step enqueues 2 N keys."""
    shuffle: bool = False
    """The images of a batch change workers before the key network sees them (v1, Sec. 3.3). For encoder.batchnorm per_worker, to compare
    with the paper: with statistics of all workers it changes nothing."""

    def __post_init__(self) -> None:
        Config.__post_init__(self)
        keys = self.keys_per_step
        near = max(round(self.queue / keys), 1) * keys
        require(
            self.queue > 0 and self.queue % keys == 0, f"queue {self.queue} is no multiple of the {keys} keys of a step; use --queue {near}"
        )
        _require_common(self.temperature, self.ema, self.d_out)
        require(not (self.shuffle and self.encoder.vit), f"shuffle is for BatchNorm, and {self.encoder.title} has none; leave it out")
        alone = self.encoder.batchnorm == "per_worker"
        require(alone or not self.shuffle, "shuffle is for --encoder.batchnorm per_worker; with other statistics leave it out")
        require(not self.whole_batch or self.train.micro_batch is None, f"{self.whole_batch}; leave out train.micro_batch")

    @property
    def whole_batch(self) -> str:
        return "shuffle needs a whole batch at once" if self.shuffle else ""

    def of_batch(self, images: int) -> Self:
        each = self.keys_per_step // self.train.batch_size * images
        train = dataclasses.replace(self.train, batch_size=images)
        return dataclasses.replace(self, train=train, queue=max(self.queue // each, 1) * each)

    @property
    def keys_per_step(self) -> int:
        """How many keys a step puts into the queue."""
        return self.train.batch_size * (2 if self.symmetric else 1)


@dataclass(frozen=True, kw_only=True, slots=True)
class MoCoV3(Config):
    """MoCo v3 (arXiv:2104.02057): no queue, a predictor, and the keys of the batch as negatives."""

    METHOD = "mocov3"

    temperature: float = 1.0
    """tau of InfoNCE: 1.0 with ResNet-50, 0.2 with ViT."""
    ema: float = 0.99
    """m at the first step: the share of itself that the key network keeps; it goes to 1 by half a cosine."""
    hidden: int = 4096
    """Width of the hidden layers of projector and predictor."""
    d_out: int = 256
    """Dimension of queries and keys."""
    layers: int = 2
    """Linear layers of the projector: 2 with ResNet-50, 3 with ViT."""
    predictor_norm: bool = False
    """A BatchNorm without scale and shift behind the predictor, as with ViT."""

    def __post_init__(self) -> None:
        Config.__post_init__(self)
        _require_common(self.temperature, self.ema, self.d_out)
        require(self.hidden >= 1, f"hidden is {self.hidden}; expected a width of at least 1")
        require(1 <= self.layers <= 8, f"layers is {self.layers}; expected 2 (ResNet) or 3 (ViT), at least 1 and at most 8")


@dataclass(frozen=True, kw_only=True, slots=True)
class BYOL(Config):
    """BYOL (arXiv:2006.07733): a network predicts the projections of its own moving average, without negatives."""

    METHOD = "byol"

    ema: float = 0.996
    """tau at the first step: the share of itself that the target network keeps; it goes to 1 by half a cosine. 0.99 for short runs."""
    hidden: int = 4096
    """Width of the hidden layers of projector and predictor."""
    d_out: int = 256
    """Dimension of projections and predictions."""
    predictor: bool = True
    """Whether there is a predictor. Without one the network collapses, as the paper's ablation shows (Table 5b)."""

    def __post_init__(self) -> None:
        Config.__post_init__(self)
        _require_common(1.0, self.ema, self.d_out)
        require(self.hidden >= 1, f"hidden is {self.hidden}; expected a width of at least 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class SwAV(Config):
    """SwAV (arXiv:2006.09882): each view predicts to which prototypes the other belongs, as an assignment in equal shares has it."""

    METHOD = "swav"

    local: Local = field(default_factory=Local)
    prototypes: int = 3000
    """K: vectors to which images are assigned."""
    temperature: float = 0.1
    """tau of the predictions."""
    epsilon: float = 0.05
    """Entropy of the assignment (Eq. 3); where the loss stays at ln K, the authors lower it to 0.03."""
    iterations: int = 3
    """Of Sinkhorn's algorithm."""
    hidden: int = 2048
    """Width of the head's hidden layer."""
    d_out: int = 128
    """Dimension of projections and prototypes."""
    frozen_steps: int = 313
    """First steps in which the prototypes do not learn."""
    queue: int = 0
    """Projections of earlier batches, of each of the two views, that are assigned together with the batch's, which a batch of few
    images for K wants; a multiple of N, 0 = none."""
    queue_epochs: float = 15.0
    """Epochs before projections go into the queue; it is used once it is full."""

    def __post_init__(self) -> None:
        Config.__post_init__(self)
        _require_common(self.temperature, 0.0, self.d_out)
        require(self.prototypes >= 2, f"prototypes is {self.prototypes}; expected at least 2")
        require(self.hidden >= 1, f"hidden is {self.hidden}; expected a width of at least 1")
        require(self.epsilon >= 0.01, f"epsilon is {self.epsilon}; expected at least 0.01: exp(1 / epsilon) must be a number")
        require(self.iterations >= 1, f"iterations is {self.iterations}; expected at least 1, the paper has 3")
        require(self.frozen_steps >= 0, f"frozen_steps is {self.frozen_steps}; expected 0 or more")
        require(self.queue_epochs >= 0, f"queue_epochs is {self.queue_epochs}; expected 0 or more")
        n = self.train.batch_size
        near = max(round(self.queue / n), 1) * n
        require(self.queue >= 0 and self.queue % n == 0, f"queue {self.queue} is no multiple of the batch of {n}; use --queue {near}")
        require_whole_patches(self.encoder, "local.size_px", self.local.size_px if self.local.crops else self.views.size_px)

    def of_batch(self, images: int) -> Self:
        train = dataclasses.replace(self.train, batch_size=images)
        queue = self.queue and max(self.queue // images, 1) * images
        return dataclasses.replace(self, train=train, queue=queue)

    @property
    def crops(self) -> int:
        """Crops of an image, large and small."""
        return 2 + self.local.crops


@dataclass(frozen=True, kw_only=True, slots=True)
class DINO(Config):
    """DINO (arXiv:2104.14294): every crop learns the softmax that a moving average of the network gives for another large view."""

    METHOD = "dino"

    local: Local = field(default_factory=lambda: Local(crops=8, area=(0.05, 0.4)))
    temperature: float = 0.1
    """tau of the network's softmax."""
    teacher_temperature: float = 0.04
    """tau of the average's softmax; above 0.07 it is not sharp enough, the authors say."""
    first_teacher_temperature: float = 0.04
    """That of the first epoch; from it to the last one in a line, epoch by epoch."""
    teacher_epochs: int = 0
    """Epochs that this takes."""
    ema: float = 0.996
    """m at the first step: the share of itself that the average keeps; it goes to 1 by half a cosine. Small batches want more."""
    centre_ema: float = 0.9
    """The share of itself that the centre keeps at a step."""
    hidden: int = 2048
    """Width of the head's hidden layers."""
    bottleneck: int = 256
    """Width of what the head's last layer reads."""
    layers: int = 3
    """Linear layers of the head ahead of the last one."""
    d_out: int = 65_536
    """K: dimension of the softmax."""
    head_norm: bool = False
    """BatchNorm in the head, as with ResNets."""
    unit_rows: bool = True
    """The rows of the last layer keep length 1; the authors free them for small ViTs that gain from it."""
    frozen_epochs: float = 1.0
    """First epochs in which the last layer does not learn."""

    def __post_init__(self) -> None:
        Config.__post_init__(self)
        _require_common(self.temperature, self.ema, self.d_out)
        for name in ("teacher_temperature", "first_teacher_temperature"):
            require(getattr(self, name) > 0, f"{name} is {getattr(self, name)}; expected a positive number, at most 0.07")
        require(self.teacher_epochs >= 0, f"teacher_epochs is {self.teacher_epochs}; expected 0 or more")
        require(0 <= self.centre_ema < 1, f"centre_ema is {self.centre_ema}; expected a share in [0, 1)")
        require(1 <= self.layers <= 8, f"layers is {self.layers}; expected 3, at least 1 and at most 8")
        for name in ("hidden", "bottleneck"):
            require(getattr(self, name) >= 1, f"{name} is {getattr(self, name)}; expected a width of at least 1")
        require(self.frozen_epochs >= 0, f"frozen_epochs is {self.frozen_epochs}; expected 0 or more")
        require_whole_patches(self.encoder, "local.size_px", self.local.size_px if self.local.crops else self.views.size_px)


@dataclass(frozen=True, kw_only=True, slots=True)
class MAE(Config):
    """MAE (arXiv:2111.06377): a vision transformer sees some patches of an image, and a decoder paints the others."""

    METHOD = "mae"

    encoder: Encoder = field(default_factory=lambda: Encoder(vit="base", positions="sin_cos"))
    mask_ratio: float = 0.75
    """Share of the patches that the encoder does not see."""
    normalised: bool = True
    """The pixels to paint are normalised patch by patch."""
    decoder_width: int = 512
    """Width of the decoder's tokens."""
    decoder_blocks: int = 8
    """Its blocks."""
    decoder_heads: int = 16
    """Attention heads of each."""

    def __post_init__(self) -> None:
        Config.__post_init__(self)
        known = self.encoder.vit is not None
        require(known, f"MAE hides patches, and {self.encoder.title} has none; give --encoder.vit small, or another size")
        require(0 < self.mask_ratio < 1, f"mask_ratio is {self.mask_ratio}; expected a share between 0 and 1, the paper has 0.75")
        few = f"mask_ratio {self.mask_ratio} of {self.patches} patches leaves the encoder {self.kept}"
        require(1 <= self.kept < self.patches, f"{few}; give another, a larger views.size_px or smaller patches")
        whole = self.decoder_width % self.decoder_heads == 0 and self.decoder_width % 4 == 0
        require(whole, f"decoder_width is {self.decoder_width}; expected a multiple of decoder_heads, {self.decoder_heads}, and of 4")
        require(self.decoder_blocks >= 1, f"decoder_blocks is {self.decoder_blocks}; expected at least 1")

    @property
    def patches(self) -> int:
        """L: patches of an image."""
        return (self.views.size_px // self.encoder.patch_px) ** 2

    @property
    def kept(self) -> int:
        """Patches that the encoder sees, rounded down in floating point as in the authors' code."""
        return int(self.patches * (1 - self.mask_ratio))


@dataclass(frozen=True, kw_only=True, slots=True)
class CLIP(Config):
    """CLIP (arXiv:2103.00020) on image–text pairs: shards with captions (`simclr prepare --captions`)."""

    METHOD = "clip"

    temperature: float = 0.07
    """tau at the first step; it is learnt, and does not fall below 1 / scale_most."""
    scale_most: float = 100.0
    """The largest factor of cosines."""
    d_out: int = 512
    """Dimension of the common space of images and texts."""
    context: int = 77
    """Tokens of a caption, its begin and end included; longer ones are cut."""
    text_width: int = 512
    """Width of the text transformer."""
    text_blocks: int = 12
    """Its blocks."""
    text_heads: int = 8
    """Attention heads of each."""
    prompt: str = "a photo of a {}."
    """What zero-shot evaluation makes of a class's name, in the place of {}."""

    def __post_init__(self) -> None:
        Config.__post_init__(self)
        _require_common(self.temperature, 0.0, self.d_out)
        require(self.scale_most >= 1, f"scale_most is {self.scale_most}; expected at least 1, the paper has 100")
        fits = 1 / self.scale_most <= self.temperature <= 1
        require(fits, f"temperature is {self.temperature}; expected 1 / scale_most = {1 / self.scale_most:g} to 1")
        require(3 <= self.context <= 1024, f"context is {self.context}; expected 3 to 1024 tokens, the paper has 77")
        whole = self.text_heads >= 1 and self.text_width >= 1 and self.text_width % self.text_heads == 0
        require(whole, f"text_width is {self.text_width}; expected a multiple of text_heads, {self.text_heads}")
        require(self.text_blocks >= 1, f"text_blocks is {self.text_blocks}; expected at least 1")
        require(self.prompt.count("{}") == 1, f"prompt is {self.prompt!r}; expected a text with {{}} where the class stands")


_LISTED = 4

METHODS: dict[str, type[Config]] = {"simclr": SimCLR, **{kind.METHOD: kind for kind in (MoCo, MoCoV3, BYOL, SwAV, DINO, MAE, CLIP)}}
"""Name of a method → its settings."""


def method_name(config: Config) -> str:
    """The name of the method of a pretraining's `config`, one of `METHODS`."""
    return config.METHOD or "simclr"


def pretraining(values: Any) -> Config:
    """The config of a pretraining from `Config.to_dict()`, of the method that it states; SimCLR where it states none.

    Raises UserError for an unknown method, and as `Config.from_dict`.
    """
    name = values.get("method", "simclr") if isinstance(values, dict) else "simclr"
    if not isinstance(name, str) or name not in METHODS:
        near = difflib.get_close_matches(str(name), METHODS, n=1, cutoff=0.3) or list(METHODS)
        raise UserError(f"unknown method {name!r}; nearest: {', '.join(near)}")
    return METHODS[name].from_dict({key: value for key, value in values.items() if key != "method"} if isinstance(values, dict) else values)


def foreign(path: str, config: Config) -> str:
    """Whose the field `path` is, as "loss.temperature", where a `config` has none of that name: a sentence without its full stop, with the
    nearest field that it has. "" for a field that it has, for one of no method, and for a stage's config."""
    mine = config.flat()
    if path in mine or type(config) not in METHODS.values():
        return ""
    theirs = [name for name, kind in METHODS.items() if path in kind().flat() and path != "method"]
    if not theirs:
        return ""
    name, last = method_name(config), path.rpartition(".")[2]
    own = [field for field in mine if field not in Config().flat() and field != "method"]
    near = [field for field in own if field.rpartition(".")[2] == last] or difflib.get_close_matches(path, own, n=1, cutoff=0.5)
    instead = f"{name} has {near[0] if near else ', '.join(own[:_LISTED]) + (' …' if len(own) > _LISTED else '')}"
    whose = " and ".join(filter(None, (", ".join(theirs[:-1]), theirs[-1])))
    return f"{path} is a field of {whose}; {instead}"


def _require_common(temperature: float, ema: float, d_out: int) -> None:
    require(temperature > 0, f"temperature is {temperature}; expected a positive number")
    require(0 <= ema <= 1, f"ema is {ema}; expected a share in [0, 1]")
    require(1 <= d_out <= 2**17, f"d_out is {d_out}; expected 1 to 131,072")
