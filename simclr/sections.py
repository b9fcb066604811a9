"""The sections of a config that networks, views and optimizers read: `Encoder`, `Head`, `Views`, `Optim`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, get_args

from simclr.errors import UserError

Resize = Literal["bicubic", "bilinear", "area"]
Operation = Literal["crop", "cutout", "colour", "sobel", "noise", "blur", "rotate"]
Size = Literal["micro", "tiny", "small", "base", "large"]


def require(condition: bool, message: str) -> None:
    """Raise UserError with this sentence unless `condition` holds."""
    if not condition:
        raise UserError(message)


@dataclass(frozen=True, kw_only=True, slots=True)
class Encoder:
    """The encoder f(.): a ResNet (arXiv:2002.05709, Sec. 2.1) or, where `vit` or `timm` names one, a vision transformer (arXiv:2010.11929)
    or a network of timm's, which have no use for a ResNet's fields: depth, width, sk_ratio, se_ratio and cifar_stem."""

    depth: Literal[8, 14, 20, 18, 34, 50, 101, 152, 200] = 50
    """Layers of a ResNet. 8, 14 and 20 are the three-stage CIFAR networks of arXiv:1512.03385, Sec. 4.2 (6n + 2 layers)."""
    width: int = 1
    """Width multiplier of every layer."""
    sk_ratio: float = 0.0
    """Selective kernels' reduction ratio (arXiv:1903.06586); 0 = none. SimCLR v2 uses 0.0625."""
    se_ratio: float = 0.0
    """Squeeze-and-excitation reduction ratio (arXiv:1709.01507); 0 = none."""
    cifar_stem: bool = False
    """A 3 x 3 convolution with stride 1 and no max-pool, for images of about 32 px (App. B.9)."""
    batchnorm: Literal["global", "per_worker"] | int = "global"
    """Whose images the batch statistics cover: all workers' (Sec. 2.1), those of so many workers in a row, as 8 for a node's GPUs, or each
    worker's own, which leaks the positive pair. But for all workers', the numbers depend on how many workers there are."""
    vit: Size | None = None
    """A vision transformer of this size in place of a ResNet: micro (6 blocks of width 96, for small images) to large."""
    patch_px: int = 16
    """Side of a vision transformer's patches, in pixels; it divides views.size_px."""
    heads: int | None = None
    """Attention heads of a vision transformer. Nothing = its size's: 3 (micro, tiny), 6, 12, 16. MoCo v3 has 12 in its small one."""
    pool: Literal["class", "mean"] = "class"
    """What a vision transformer's h is: its class token behind the last norm, or the mean of its patches before it, normed then."""
    positions: Literal["learned", "sin_cos"] = "learned"
    """Position embeddings of a vision transformer: learned, or fixed sines and cosines of row and column (MoCo v3)."""
    frozen_patches: bool = False
    """The patch embedding of a vision transformer keeps its initial weights, which makes contrastive training stable (arXiv:2104.02057,
    Sec. 4.2)."""
    drop_path: float = 0.0
    """Largest probability that the attention of a vision transformer's block is left out for an image while it is trained, and as large a
    one for its MLP (arXiv:1603.09382): from 0 in the first block it rises in a line to this in the last."""
    timm: str = ""
    """A network of timm's by its name, as convnext_tiny, in place of a ResNet (the extra `timm`); its weights begin as timm draws them from
    the seed."""

    def __post_init__(self) -> None:
        require(1 <= self.width <= 32, f"encoder.width is {self.width}; expected 1 to 32, a multiplier of the layers' widths")
        require(0 <= self.sk_ratio <= 1, f"encoder.sk_ratio is {self.sk_ratio}; expected a share in [0, 1]")
        require(0 <= self.se_ratio <= 1, f"encoder.se_ratio is {self.se_ratio}; expected a share in [0, 1]")
        known = self.batchnorm in ("global", "per_worker") or (isinstance(self.batchnorm, int) and self.batchnorm >= 2)
        require(known, f"encoder.batchnorm is {self.batchnorm}; expected global, per_worker, or 2 or more workers in a row, as 8")
        require(not (self.vit and self.timm), f"encoder.vit {self.vit} and encoder.timm {self.timm} name two networks; leave out one")
        require(self.patch_px >= 1, f"encoder.patch_px is {self.patch_px}; expected at least 1 pixel")
        require(self.heads is None or self.heads >= 1, f"encoder.heads is {self.heads}; expected at least 1")
        require(0 <= self.drop_path < 1, f"encoder.drop_path is {self.drop_path}; expected a probability in [0, 1)")
        usual = {"heads": None, "pool": "class", "positions": "learned", "frozen_patches": False, "drop_path": 0.0}
        for name in () if self.vit else usual:
            value, flag = getattr(self, name), f"--encoder.{name.replace('_', '-')}"
            require(value == usual[name], f"encoder.{name} is {value}, and {self.title} has none; leave out {flag}, or give --encoder.vit")

    @property
    def title(self) -> str:
        """What people call the network: ResNet-50 (2×), ViT-S/16, convnext_tiny."""
        if self.timm:
            return self.timm
        if self.vit:
            return f"ViT-{'Ti' if self.vit == 'tiny' else self.vit if self.vit == 'micro' else self.vit[0].upper()}/{self.patch_px}"
        return f"ResNet-{self.depth}" + (f" ({self.width}×)" if self.width > 1 else "")

    @property
    def trained(self) -> Encoder:
        """This network with all its weights to train, for what comes after a pretraining that froze the patch embedding or had fixed
        positions: those are where learned ones begin."""
        return replace(self, frozen_patches=False, positions="learned")

    @property
    def norm_ranks(self) -> int | None:
        """How many ranks in a row share the statistics; None = all."""
        return self.batchnorm if isinstance(self.batchnorm, int) else {"global": None, "per_worker": 1}[self.batchnorm]


@dataclass(frozen=True, kw_only=True, slots=True)
class Head:
    """The projection head g(.) (arXiv:2002.05709, Sec. 4.2; three layers in arXiv:2006.10029)."""

    layers: int = 2
    """Linear layers; all but the last are as wide as h and followed by BatchNorm and ReLU. 1 and 0 are the paper's ablation
    (Fig. 8): a linear head, and none, where z is h itself and d_out counts for nothing."""
    d_out: int = 128
    """Dimension of the projection z."""

    def __post_init__(self) -> None:
        require(0 <= self.layers <= 32, f"head.layers is {self.layers}; expected 2 (v1) or 3 (v2), at least 0 and at most 32")
        require(1 <= self.d_out <= 2**17, f"head.d_out is {self.d_out}; expected 1 to 131,072, the papers use 128")


@dataclass(frozen=True, kw_only=True, slots=True)
class Views:
    """The two random views of an image (arXiv:2002.05709, App. A)."""

    size_px: int = 224
    """Side of a view, in pixels."""
    area: tuple[float, float] = (0.08, 1.0)
    """Smallest and largest area of a crop, as a share of the image."""
    aspect: tuple[float, float] = (3 / 4, 4 / 3)
    """Smallest and largest aspect ratio (width / height) of a crop."""
    crop_law: Literal["tensorflow", "torchvision"] = "tensorflow"
    """How a crop is drawn. tensorflow, as in SimCLR's official code: aspect uniform, then height uniform, and at least 10 % of the image
    whatever `area` says; in the mean 39 % of a 3:4 photograph. torchvision: area and log aspect uniform; 44 %."""
    resize: Resize = "bicubic"
    """How a crop is resized, with half-pixel centres: bicubic (a = -1/2) and bilinear read 4 and 2 pixels per side at any scale, as the
    official code does with its bicubic; area averages the pixels that an output pixel covers. Bicubic is the default because the official
    numbers come from it; it costs at most a tenth of the loader's rate (`simclr bench loader`)."""
    flip_p: float = 0.5
    """Probability of a left-right flip."""
    colour_strength: float = 1.0
    """s in App. A: brightness, contrast and saturation vary by 0.8 s, hue by 0.2 s. The paper uses 0.5 on CIFAR-10."""
    jitter_p: float = 0.8
    """Probability of the colour jitter."""
    grey_p: float = 0.2
    """Probability of dropping the colour."""
    blur_p: float | tuple[float, float] = 0.5
    """Probability of a Gaussian blur (sigma in [0.1, 2.0], kernel 10 % of the side), of all views, or of the first and the second, as
    1.0 0.1 for BYOL and MoCo v3. The paper uses none on CIFAR-10."""
    solarise_p: float | tuple[float, float] = 0.0
    """Probability that values from a half on are inverted (x becomes 1 - x), behind the blur; of all views, or of the first and the second,
    as 0.0 0.2 for BYOL and MoCo v3."""
    saturation: float = 1.0
    """How far the jitter changes saturation, as a share of how far it changes brightness and contrast: half as far, 0.5, in BYOL and
    MoCo v3."""
    operations: tuple[Operation, ...] | None = None
    """The paper's ablation (Fig. 5): one random crop is both views; view 0 stays as it is, view 1 goes through these operations,
    one after the other (`simclr.views.ablations`). Nothing = both views are drawn as in App. A."""
    mean: tuple[float, float, float] = (0.0, 0.0, 0.0)
    """Subtracted from the pixels, which lie in [0, 1], before the encoder sees them. The official code subtracts nothing."""
    std: tuple[float, float, float] = (1.0, 1.0, 1.0)
    """Standard deviation by which the pixels are divided after the mean is subtracted. The official code divides by nothing."""

    def __post_init__(self) -> None:
        require(8 <= self.size_px <= 4096, f"views.size_px is {self.size_px}; expected 8 to 4096 pixels")
        lo, hi = self.area
        require(0 < lo <= hi <= 1, f"views.area is {lo} {hi}; expected 0 < smallest <= largest <= 1")
        lo, hi = self.aspect
        require(0 < lo <= hi, f"views.aspect is {lo} {hi}; expected 0 < smallest <= largest")
        for name in ("flip_p", "jitter_p", "grey_p", "blur_p", "solarise_p"):
            value = getattr(self, name)
            each = value if isinstance(value, tuple) else (value,)
            require(all(0 <= p <= 1 for p in each), f"views.{name} is {value}; expected a probability in [0, 1]")
        require(0 <= self.colour_strength <= 1.25, f"views.colour_strength is {self.colour_strength}; expected [0, 1.25]")
        require(0 <= self.saturation <= 1, f"views.saturation is {self.saturation}; expected a share in [0, 1]")
        solarised = self.solarise_p not in (0, (0, 0))
        require(not (solarised and self.operations), "views.solarise_p is not among views.operations; leave out one of them")
        unknown = set(self.operations or ()) - set(get_args(Operation))
        require(not unknown, f"views.operations has {', '.join(sorted(unknown))}; expected some of {', '.join(get_args(Operation))}")
        require(min(self.std) > 0, f"views.std is {self.std}; every entry must be positive")

    @property
    def least_area(self) -> float:
        """Smallest area of a crop that is taken: SimCLR's official code asks a crop to cover 10 % of the image, which overrules its 8 %."""
        low, high = self.area
        return low if self.crop_law == "torchvision" else max(low, min(0.1, high))

    def of_view(self, name: Literal["blur_p", "solarise_p"], view: int) -> float:
        """The probability `name` of view number `view` (0-based)."""
        value: float | tuple[float, float] = getattr(self, name)
        return value[min(view, 1)] if isinstance(value, tuple) else value


@dataclass(frozen=True, kw_only=True, slots=True)
class Local:
    """Small crops beside the two large ones (multi-crop, arXiv:2006.09882, Sec. 3.2): what differs from `Views`."""

    crops: int = 6
    """How many; 0 = none."""
    size_px: int = 96
    """Their side, in pixels."""
    area: tuple[float, float] = (0.05, 0.14)
    """Smallest and largest area of one, as a share of the image."""
    blur_p: float = 0.5
    """Probability of a Gaussian blur."""

    def __post_init__(self) -> None:
        require(0 <= self.crops <= 64, f"local.crops is {self.crops}; expected 0 to 64, the papers have 6 to 10")
        self.of(Views())

    def of(self, views: Views) -> Views:
        """`views` with these fields; none of them is solarised."""
        return replace(views, size_px=self.size_px, area=self.area, blur_p=self.blur_p, solarise_p=0.0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Optim:
    """Optimizer and learning-rate schedule (arXiv:2002.05709, Sec. 2.2 and App. B.6)."""

    name: Literal["lars", "larc", "sgd", "adamw"] = "lars"
    """LARS (arXiv:1708.03888), LARC, as which SwAV has it (`simclr.optim.LARS`), SGD with momentum, which is good enough below about
    N = 1024, or AdamW (arXiv:1711.05101), for transformers."""
    base_lr: float = 0.3
    """Learning rate per 256 images, before scaling (App. B.1)."""
    last_lr: float = 0.0
    """The rate at which the cosine ends, as `base_lr`; SwAV has a thousandth of that."""
    scaling: Literal["linear", "sqrt"] = "linear"
    """lr = base_lr * N / 256, or base_lr * sqrt(N), which trains better below N = 2048 (App. B.1)."""
    warmup_epochs: float = 10.0
    """Epochs of linear warm-up; then half a cosine down to 0. A run that is no longer, or that train.steps cuts, warms up for at most a
    tenth of its steps."""
    momentum: float = 0.9
    """Decay of the momentum buffer; AdamW's beta1."""
    beta2: float = 0.999
    """AdamW's decay of the mean square gradient."""
    nesterov: bool = False
    """Nesterov's momentum; v1 fine-tunes with it (App. B.5)."""
    rate_in_buffer: bool = True
    """LARS's learning rate stands inside its momentum buffer, as in SimCLR's official code, and not outside, as in BYOL's and MoCo v3's.
    While the rate stays the two are one; a changing rate rescales what lies in the buffer only if it stands outside."""
    weight_decay: float = 1e-6
    """Decay of kernels per step, times the learning rate. Norms, biases, position embeddings and tokens have none, unless the method's
    authors have it otherwise."""
    weight_decay_end: float | None = None
    """Weight decay at the end of training, to which it goes by half a cosine; nothing = it stays."""
    layer_decay: float = 1.0
    """Factor by which the learning rate shrinks with each block towards the input, as transformers are fine-tuned (arXiv:2106.08254);
    1 = all alike."""
    clip_norm: float = 0.0
    """Largest norm of the whole gradient, which is scaled down to it; 0 = no limit."""
    clip_each: float = 0.0
    """Largest norm of the gradient of each parameter; 0 = no limit."""

    def __post_init__(self) -> None:
        require(self.base_lr > 0, f"optim.base_lr is {self.base_lr}; expected a positive learning rate")
        require(0 <= self.last_lr <= self.base_lr, f"optim.last_lr is {self.last_lr}; expected 0 to optim.base_lr, {self.base_lr}")
        require(self.warmup_epochs >= 0, f"optim.warmup_epochs is {self.warmup_epochs}; expected 0 or more epochs")
        require(0 <= self.momentum < 1, f"optim.momentum is {self.momentum}; expected [0, 1)")
        require(0 <= self.beta2 < 1, f"optim.beta2 is {self.beta2}; expected [0, 1)")
        require(self.momentum > 0 or not self.nesterov, "optim.nesterov asks for momentum; give optim.momentum 0.9, or leave it out")
        require(not (self.nesterov and self.name in ("adamw", "larc")), "optim.nesterov is for lars and sgd; leave it out")
        require(self.weight_decay >= 0, f"optim.weight_decay is {self.weight_decay}; expected 0 or more")
        end = self.weight_decay_end
        require(end is None or end >= 0, f"optim.weight_decay_end is {end}; expected 0 or more")
        require(0 < self.layer_decay <= 1, f"optim.layer_decay is {self.layer_decay}; expected a factor above 0, at most 1")
        for name in ("clip_norm", "clip_each"):
            require(getattr(self, name) >= 0, f"optim.{name} is {getattr(self, name)}; expected a norm, 0 = no limit")
