"""Weights that a training may begin with: from a published directory, a checkpoint, or a file with torchvision's names of a ResNet or
timm's of a vision transformer.

Nothing is unpickled: torch's own files are read with `weights_only`.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args, get_type_hints

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from simclr import checkpoint, fields, files
from simclr.config import Config, Encoder, SimCLR
from simclr.encoder.directory import differences, preprocessing_of, read_part, read_text, shape_of
from simclr.encoder.export import own_name
from simclr.errors import UserError
from simclr.networks.encoders import build_encoder
from simclr.networks.timm import looked_at
from simclr.networks.vit import SIZES
from simclr.sections import Size

Triple = tuple[float, float, float]
_PATCHES = "patch_embed.proj.weight"
_OWN = re.compile(r"(stem|groups|patch_embed|blocks|norm)\.|(cls_token|pos_embed)$")  # names of encoders here
_NEVER_USED = "num_batches_tracked"  # torchvision counts batches; no network here does


@dataclass(frozen=True, kw_only=True, slots=True)
class Weights:
    """Tensors by name, each part under the names of its own module here."""

    encoder: dict[str, Tensor]
    head: dict[str, Tensor] = field(default_factory=dict)
    """The projection head, or its first layers; empty = none."""
    classifier: dict[str, Tensor] = field(default_factory=dict)
    """weight and bias of a linear map of h; empty = none."""
    classes: tuple[str, ...] = ()
    """The classes that it tells apart; empty = unknown."""
    method: str = ""
    """The method of the run whose `rest` is here."""
    rest: dict[str, Tensor] = field(default_factory=dict)
    """What else a run of one of SimCLR's siblings has, its further layers and its state, by names in its checkpoint; empty = unknown."""
    shape: Encoder | None = None
    """The encoder that they are of; None = to be seen from the tensors."""
    size_px: int | None = None
    """Side of the images that it read; None = unknown."""
    unused: tuple[str, ...] = ()
    """Names in the file that belong to none of these."""
    norm: tuple[Triple, Triple] | None = None
    """Mean and standard deviation that normalised their images; None = unknown."""
    timm: tuple[Triple, Triple, str] | None = None
    """Mean, standard deviation and interpolation that timm's own weights of the network want; None = not timm's, or `norm` is known."""
    pool: str = ""
    """How a vision transformer's file says that it pools; "" = it does not, or `shape` has it."""
    step: int | None = None
    """Optimizer steps after which they were; None = unknown."""

    @property
    def sha256(self) -> str:
        """Of every tensor with its name, type and shape: without a `rest` the same for a run's checkpoint and for what it published."""
        found = hashlib.sha256()
        for part in ("encoder", "head", "classifier", "rest"):
            for name, t in sorted(getattr(self, part).items()):
                found.update(f"{part}.{name} {t.dtype} {tuple(t.shape)}\n".encode())
                found.update(t.contiguous().reshape(-1).view(torch.uint8).numpy())
        return found.hexdigest()


def of_directory(directory: Path) -> Weights:
    """The weights published in `directory`. Raises UserError where it is no published encoder, or damaged."""
    text = read_text(directory)
    stated, preprocessing = text.get("classifier", {}), preprocessing_of(text)
    reads_h, step = stated.get("tap") == 0, text.get("published", {}).get("step")
    return Weights(
        encoder=read_part(directory, "encoder"),
        head=read_part(directory, "head") if (directory / "head.safetensors").is_file() else {},
        classifier=read_part(directory, "classifier") if reads_h else {},
        classes=tuple(stated["classes"]) if reads_h else (),
        shape=shape_of(text),
        size_px=preprocessing.size_px,
        unused=("classifier",) if stated and not reads_h else (),
        norm=(preprocessing.mean, preprocessing.std),
        step=step if fields.fits(step, int) else None,
    )


def of_checkpoint(path: Path, config: Config, classes: tuple[str, ...], whole: bool = False) -> Weights:
    """The weights in checkpoint `path` of a run with `config`, whose data has `classes` (empty = unknown): what it would publish or, if
    `whole`, the rest of its method too. Raises UserError where it is damaged."""
    state = checkpoint.read(path)
    parts: dict[str, dict[str, Tensor]] = {"encoder": {}, "classifier": {}}
    if isinstance(config, SimCLR):  # as it is published
        parts["head"] = {}
    rest: dict[str, Tensor] = {}
    for name, t in state.tensors.items():
        root, _, below = name.partition(".")
        part, _, own = below.partition(".")
        if root == "model" and part in parts:
            parts[part][own] = t
        elif whole and config.METHOD and root in ("model", "state"):
            rest[name] = t
    reads_h = not getattr(config, "tap", 0)  # else it is a fine-tuned classifier that reads the head
    return Weights(
        encoder=parts["encoder"],
        head=parts.get("head", {}),
        classifier=parts["classifier"] if reads_h else {},
        classes=classes if reads_h else (),
        method=config.METHOD if rest else "",
        rest=rest,
        shape=config.encoder,
        size_px=config.views.size_px,
        norm=(config.views.mean, config.views.std),
        step=state.step,
    )


def of_file(path: Path, config: Config | None = None) -> Weights:
    """The weights in a file of safetensors or in torch's format, by torchvision's names or by those here, which timm and DINO have too for
    a vision transformer, behind any one prefix ("module.", "state_dict.encoder."); of a network of timm's, where the run's `config` has
    one, by timm's names.

    Raises UserError for a file that cannot be read without unpickling, with no such network, or with several, and for weights that are
    not dense or not finite.
    """
    tensors = dict(_flat(_read(path), ""))
    if config is not None and config.encoder.timm:
        return _of_timm(tensors, config, path)
    theirs = {name.removesuffix("conv1.weight") for name in tensors if name.endswith("conv1.weight")}
    theirs = {prefix for prefix in theirs if f"{prefix}layer1.0.conv1.weight" in tensors and f"{prefix}bn1.weight" in tensors}
    ours = {name.removesuffix("stem.0.weight") for name in tensors if name.endswith("stem.0.weight")}
    ours |= {p for p in (name.removesuffix("cls_token") for name in tensors if name.endswith("cls_token")) if f"{p}{_PATCHES}" in tensors}
    prefixes = sorted(theirs | ours)
    if not prefixes:
        some = ", ".join(list(tensors)[:3]) or "nothing"
        raise UserError(
            f"{path} holds no ResNet by torchvision's names (conv1.weight, bn1.weight, layer1.0.conv1.weight, …) and no vision transformer "
            f"by timm's (cls_token, {_PATCHES}, …), but {some}; "
            "rename its tensors, or give a published encoder"
        )
    if len(prefixes) > 1:
        raise UserError(
            f"{path} holds {len(prefixes)} networks, under {' and '.join(repr(p) for p in prefixes[:3])}; save the tensors of one alone"
        )
    (prefix,) = prefixes
    encoder, unused = {}, []
    # timm's name of the norm where patches are averaged: the Hub's file of such a network has it.
    averaged = f"{prefix}fc_norm.weight" in tensors and f"{prefix}norm.weight" not in tensors
    for name, t in tensors.items():
        rest = name.removeprefix(prefix) if name.startswith(prefix) else ""
        rest = re.sub(r"^fc_norm\.", "norm.", rest) if averaged else rest
        own = rest if _OWN.match(rest) else own_name(rest)
        if own is None:
            unused.append(name)
        elif not own.endswith(_NEVER_USED):
            _require_numbers(t, name, path)
            encoder[own] = t
    return Weights(encoder=encoder, unused=tuple(unused), pool="mean" if averaged else "")


def _of_timm(tensors: dict[str, Tensor], config: Config, path: Path) -> Weights:
    """The weights of the network of timm's in `config`. timm's classifiers are left out."""
    wanted = _shapes(config.encoder, config.views.size_px)
    first = next(iter(wanted)).removeprefix("model.")
    prefixes = [name.removesuffix(first) for name in tensors if name.endswith(first)]
    prefix = max(prefixes, key=lambda prefix: sum(prefix + name.removeprefix("model.") in tensors for name in wanted), default=None)
    if prefix is None:
        some = ", ".join(list(tensors)[:3]) or "nothing"
        raise UserError(f"{path} holds no {config.encoder.timm} by timm's names ({first}, …), but {some}; give weights of this network")
    encoder, unused = {}, []
    for name, t in tensors.items():
        own = f"model.{name.removeprefix(prefix)}"
        if name.startswith(prefix) and own in wanted:
            _require_numbers(t, name, path)
            encoder[own] = t
        elif not name.endswith(_NEVER_USED):
            unused.append(name)
    seen = looked_at(config.encoder.timm, config.views.size_px).pretrained_cfg
    return Weights(encoder=encoder, unused=tuple(unused), timm=(tuple(seen["mean"]), tuple(seen["std"]), str(seen["interpolation"])))


def _require_numbers(t: Tensor, name: str, path: Path) -> None:
    """Raise UserError unless tensor `name` of the file is dense, in memory and finite, as float32 too, which training makes of it."""
    kind = "quantised" if t.is_quantized else "without numbers" if t.is_meta else "" if t.layout is torch.strided else "sparse"
    # A file of some bytes may state a view of any size.
    if not kind and t.untyped_storage().nbytes() < t.numel() * t.element_size():
        kind = f"a view of {tuple(t.shape)} of fewer numbers"
    if kind:
        raise UserError(f"{name} in {path} is {kind}; save dense tensors of floating-point numbers, as model.state_dict() has them")
    if t.is_floating_point() and (bad := t.numel() - int(t.float().isfinite().sum())):
        raise UserError(
            f"{name} in {path} has NaN or infinity in {bad:,} of {t.numel():,} places, and training needs finite numbers; "
            "give a checkpoint from before they came up"
        )


def require_fit(encoder: Encoder, weights: Weights, where: object, size_px: int = 224) -> None:
    """Raise UserError if the weights, which come from `where`, are not those of such an encoder of images of `size_px`: it names the first
    differences, and the flags that would fit."""
    wrong = differences(_shapes(encoder, size_px), weights.encoder)
    if not wrong and encoder.vit and weights.shape and _heads(encoder) != _heads(weights.shape):  # no shape tells it
        wrong = [f"they are of {_heads(weights.shape)} attention heads, not {_heads(encoder)}"]
    if not wrong:
        return
    more = f"; and {len(wrong) - 3} more" if len(wrong) > 3 else ""
    raise UserError(f"the weights in {where} do not fit the encoder: {'; '.join(wrong[:3])}{more}; {_advice(encoder, weights, size_px)}")


def _heads(encoder: Encoder) -> int:
    return encoder.heads or (SIZES[encoder.vit][2] if encoder.vit else 0)


def _advice(encoder: Encoder, weights: Weights, size_px: int) -> str:
    if encoder.timm and weights.shape is None:
        return f"give weights of {encoder.timm} for images of {size_px} px (--views.size-px)"
    for fits, size in _candidates(weights, size_px):
        wrong = differences(_shapes(fits, size), weights.encoder)
        if not wrong:
            other = [f"--views.size-px {size}"] if fits.vit and size != size_px else []
            return f"would fit: {' '.join([*_flags(encoder, fits), *other])}"
        if all(text.startswith("groups.0.0.shortcut.") and text.endswith("is missing") for text in wrong):
            return "torchvision's ResNet-18 and -34 have no projection in their first block, and the network here has one: give a ResNet-50"
    return "no network here has these weights"


def _shapes(encoder: Encoder, size_px: int) -> dict[str, Tensor]:
    with torch.device("meta"):
        return build_encoder(encoder, size_px=size_px).state_dict()


def _candidates(weights: Weights, size_px: int) -> Iterator[tuple[Encoder, int]]:
    """Encoders that may have these weights, and the size of their images; a ResNet's are of any, as of `size_px`."""
    stem, patches = weights.encoder.get("stem.0.weight"), weights.encoder.get(_PATCHES)
    table = weights.encoder.get("pos_embed")
    if weights.shape is not None:
        yield weights.shape, weights.size_px or size_px
    elif patches is not None and patches.ndim == 4 and table is not None and table.ndim == 3 and table.shape[1] > 1:
        patch, blocks = patches.shape[-1], len({name.split(".")[1] for name in weights.encoder if name.startswith("blocks.")})
        side = math.isqrt(table.shape[1] - 1) * patch
        for size in get_args(Size):
            if SIZES[size][:2] == (len(patches), blocks) and side:
                yield Encoder(vit=size, patch_px=patch), side
    elif stem is not None and stem.ndim == 4:
        sk_ratio = 0.0625 if any(".branches." in name for name in weights.encoder) else 0.0
        deep = "stem.3.weight" in weights.encoder  # a stem of three convolutions, the first of half the channels
        for depth in get_args(get_type_hints(Encoder)["depth"]):
            width, rest = divmod(len(stem) * (1 + deep), 16 if depth in (8, 14, 20) else 64)
            if width and not rest:
                yield Encoder(depth=depth, width=width, sk_ratio=sk_ratio, cifar_stem=not deep and stem.shape[-1] == 3), size_px


def _flags(asked: Encoder, fits: Encoder) -> Iterator[str]:
    """The flags that make the encoder that was asked for the one that fits."""
    kind = ("patch_px",) if fits.vit else () if fits.timm else ("depth", "width", "sk_ratio", "se_ratio", "cifar_stem")
    for name in ("vit", "timm", *kind):
        value, flag = getattr(fits, name), name.replace("_", "-")
        if value != getattr(asked, name):
            yield f"--encoder.{'' if value else 'no-'}{flag}" if isinstance(value, bool) else f"--encoder.{flag} {value}"
    if fits.vit and _heads(fits) != (asked.heads or SIZES[fits.vit][2]):
        yield f"--encoder.heads {_heads(fits)}"


def _read(path: Path) -> Any:
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except SafetensorError as error:
            raise UserError(f"{path} cannot be read as safetensors ({error}); bring it back from a copy") from None
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # for a damaged file torch raises nearly anything; nothing here computes
        if files.trouble(error):
            raise
        reason = str(error).strip().splitlines()[0][:120] if str(error).strip() else type(error).__name__
        raise UserError(
            f"{path} cannot be read as tensors alone ({reason}), and nothing here unpickles more; "
            "save them by themselves: torch.save(model.state_dict(), PATH), or as safetensors"
        ) from None


def _flat(value: Any, name: str) -> Iterable[tuple[str, Tensor]]:
    """The tensors in nested dicts, their keys joined by dots."""
    if isinstance(value, Tensor):
        yield name, value.detach()
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flat(inner, f"{name}.{key}" if name else str(key))
