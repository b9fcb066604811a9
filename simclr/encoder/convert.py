"""Official SimCLR checkpoints (TensorFlow 1 and 2, v1 and v2) → our modules.

The official code numbers its layers as it creates them, a block's shortcut first, and so do we: the i-th convolution (dense
layer, BatchNorm) there is the i-th here. The kernels' shapes give the architecture, and every shape is compared with that network, so a
checkpoint of another network is refused. Shapes leave one thing open: ResNet-18 and -34 with selective kernels *and* the CIFAR stem (only
the shortcuts' average pools differ) would pass for the plain network.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from simclr import config as configs
from simclr.encoder.tf_checkpoint import Bundle, open_bundle
from simclr.errors import UserError
from simclr.networks.batchnorm import BatchNorm
from simclr.networks.encoders import build_encoder
from simclr.networks.heads import Classifier, ProjectionHead
from simclr.networks.initial import unfilled
from simclr.networks.resnet import ResNet

_PARTS = {"encoder": ("base_model", "resnet"), "head": ("head_contrastive", "projection_head"), "classifier": ("head_supervised",)}
_KINDS = ("kernel", "bias", "gamma", "beta", "moving_mean", "moving_variance")
# Beside the weights: slots of the official optimizers, counters, averages of weights and of statistics.
_NO_WEIGHT = re.compile(
    r"(^|/)(global_step|save_counter|beta[12]_power|Momentum(_\d+)?|Adam(_\d+)?|ExponentialMovingAverage|local_step|biased)$"
)
_DEPTHS: tuple[Literal[18, 34, 50, 101, 152, 200], ...] = (18, 34, 50, 101, 152, 200)
Shapes = dict[str, tuple[int, ...]]
"""Variable name → shape."""


@dataclass(frozen=True)
class Converted:
    """The content of a checkpoint as our modules, in evaluation mode."""

    encoder: ResNet
    config: configs.Config
    """Only `encoder`, `head` and `views.size_px` come from the checkpoint, which does not state how it was trained."""
    head: ProjectionHead | None
    linear: dict[str, Tensor] | None
    """The linear classifier: weight (classes, d), bias (classes)."""
    taps: tuple[int, ...]
    """Layers of the head that are as wide as the classifier's input; 0 is the encoder's h. One is the right one."""
    source: str
    step: int | None
    ignored: list[str] = field(default_factory=list)
    """Variables that are no weights."""

    def classifier(self, tap: int) -> Classifier:
        """Images → class scores, with the classifier at `tap`. Raises UserError where there is none or the tap is too wide."""
        if self.linear is None:
            raise UserError(f"{self.source} holds no classifier (no variables of {_PARTS['classifier'][0]}); leave --tap out")
        if tap not in self.taps:
            d, fits = self.linear["weight"].shape[1], " or ".join(map(str, self.taps))
            raise UserError(f"the classifier takes {d} numbers, which tap {tap} of the head does not give; give --tap {fits}")
        with torch.device("meta"):
            model = Classifier(self.encoder, self.head, tap, len(self.linear["bias"]))
        model.classifier.to_empty(device="cpu")
        model.classifier.load_state_dict(self.linear)
        return model.eval()


def load_tensorflow(path: str | Path) -> tuple[ResNet, ProjectionHead | None]:
    """The encoder and projection head (None where there is none) of an official checkpoint, in evaluation mode.

    `path` is a checkpoint's prefix, one of its files, a folder with a checkpoint, or a SavedModel. Inputs are (n, 3, H, W) in [0, 1], not
    normalised by mean and standard deviation. Raises UserError if it is no checkpoint of a known network.
    """
    found = convert(open_bundle(Path(path)))
    return found.encoder, found.head


def convert(bundle: Bundle) -> Converted:
    """Every variable of `bundle` is used exactly once, or listed as no weight. Raises UserError naming variables that fit nowhere."""
    parts: dict[str, Shapes] = {part: {} for part in _PARTS}
    ignored, unknown = list(bundle.ignored), []
    for name, shape in bundle.shapes.items():
        part = next((part for part, scopes in _PARTS.items() if set(scopes) & set(name.split("/")[:-1])), None)
        if _NO_WEIGHT.search(name):
            ignored.append(name)
        elif part is None or name.rpartition("/")[2] not in _KINDS:
            unknown.append(name)
        else:
            parts[part][name] = shape
    if unknown or not parts["encoder"]:
        found = f"variables that no official SimCLR network has: {_some(unknown)}" if unknown else "no variables of an encoder"
        raise UserError(f"{bundle.source} holds {found}; expected names as base_model/conv2d/kernel or resnet/…/conv2d/kernel")
    config = infer(parts["encoder"], bundle.source)
    encoder = unfilled(lambda: build_encoder(config))
    assert isinstance(encoder, ResNet)
    fill(encoder, bundle, parts["encoder"])
    head = _head(bundle, parts["head"], encoder.d_h)
    head_config = configs.Head(layers=len(head.layers), d_out=head.widths[-1]) if head else configs.Head()
    linear, taps = _linear(bundle, parts["classifier"], head.widths if head else [encoder.d_h])
    whole = configs.SimCLR(encoder=config, head=head_config, views=configs.Views(size_px=32 if config.cifar_stem else 224))
    return Converted(encoder.eval(), whole, head.eval() if head else None, linear, taps, bundle.source, bundle.step, sorted(ignored))


def infer(shapes: Shapes, source: str = "the checkpoint") -> configs.Encoder:
    """The network whose variables have these names and shapes. Raises UserError if no official network has them."""
    kernels = [shapes[f"{layer}/kernel"] for layer in created(shapes) if f"{layer}/kernel" in shapes]
    biased = [shape[0] for layer in created(shapes) if len(shape := shapes.get(f"{layer}/bias", ())) == 1]
    if not kernels or any(len(shape) != 4 for shape in kernels):
        raise UserError(f"{source} holds no convolutional encoder: expected kernels (height, width, in, out)")
    deep_stem = [k[0] for k in kernels[:3]] == [3, 3, 3]  # ResNet-D's, which goes with selective kernels
    base = kernels[2 if deep_stem else 0][3]
    width, widest = base // 64, base * 8  # of a block of the last group
    mid = next((k[3] for k, after in pairwise(kernels) if k[:3] == (1, 1, widest) and after == (1, 1, k[3], 2 * widest)), None)
    sk = (0.0625, mid / widest, (mid + 0.5) / widest) if mid else (0.0625,) if deep_stem else (0.0,)
    se = (0.0625, biased[-2] / widest, (biased[-2] + 0.5) / widest) if len(biased) > 1 else (0.0,)
    theirs = _shapes_by_layer(shapes)
    for depth in _DEPTHS:
        for sk_ratio in sk:
            for se_ratio in se:
                if width < 1 or max(sk_ratio, se_ratio) > 1:
                    continue
                cifar_stem = kernels[0][0] == 3 and not deep_stem
                config = configs.Encoder(depth=depth, width=width, sk_ratio=sk_ratio, se_ratio=se_ratio, cifar_stem=cifar_stem)
                with torch.device("meta"):
                    ours = [{k: tuple(t.shape) for k, t in layer.items()} for layer in _layers(build_encoder(config))]
                if ours == theirs:
                    return config
    raise UserError(
        f"{source} is no official network: {len(kernels)} kernels, the first {kernels[0]}, the last {kernels[-1]}, fit no ResNet "
        f"of depth {', '.join(map(str, _DEPTHS))} with width {max(width, 1)}"
    )


def created(names: Iterable[str]) -> list[str]:
    """The layers that variables belong to, convolutions and dense layers before BatchNorms, each in the order of creation."""
    norms: dict[str, bool] = {}
    for name in names:
        layer, _, kind = name.rpartition("/")
        norms[layer] = norms.get(layer, False) or kind in ("gamma", "moving_mean")

    def order(layer: str) -> tuple[bool, int, int]:
        head = re.search(r"(?:^|/)n?l_(\d+)(?:/|$)", layer)  # TF1 numbers the head's layers by their scope alone
        number = re.search(r"_(\d+)$", layer)
        return norms[layer], int(head[1]) if head else 0, int(number[1]) if number else 0

    return sorted(norms, key=order)


def fill(module: nn.Module, bundle: Bundle, names: Iterable[str]) -> dict[str, Tensor]:
    """Copy the variables `names` into `module`, each exactly once; returns variable name → our tensor. Raises UserError where
    a layer has another shape, or one side has more layers."""
    layers, theirs = _layers(module), created(names)
    if len(layers) != len(theirs):
        raise UserError(f"{bundle.source} has {len(theirs)} layers where {len(layers)} were expected: {_some(theirs)}")
    ours = {f"{layer}/{kind}": t for layer, tensors in zip(theirs, layers, strict=True) for kind, t in tensors.items()}
    if different := sorted(set(ours) ^ set(names)):
        raise UserError(f"{bundle.source} and the network found for it differ in {_some(different)}")
    with torch.no_grad():
        for name, tensor in ours.items():
            value = _turned(torch.as_tensor(bundle.read(name)))
            if value.shape != tensor.shape:
                raise UserError(f"{bundle.source}: {name} has shape {bundle.shapes[name]}, which does not fit {tuple(tensor.shape)}")
            tensor.copy_(value)
    assert len(ours) == len(module.state_dict())  # every tensor of the module was copied
    return ours


def _head(bundle: Bundle, shapes: Shapes, d_h: int) -> ProjectionHead | None:
    if not shapes:
        return None
    widths = [shapes[f"{layer}/kernel"] for layer in created(shapes) if f"{layer}/kernel" in shapes]
    expected = [(d_h, d_h)] * (len(widths) - 1) + [(d_h, widths[-1][-1])] if widths else []
    if widths != expected or not widths:
        raise UserError(f"{bundle.source} has a head of kernels {widths}; expected {d_h} numbers in, and out of all but the last")
    head = unfilled(lambda: ProjectionHead(d_h, len(widths), widths[-1][1]))
    fill(head, bundle, shapes)
    return head


def _linear(bundle: Bundle, shapes: Shapes, widths: list[int]) -> tuple[dict[str, Tensor] | None, tuple[int, ...]]:
    """(weight and bias, taps of the head whose `widths` fit) of the classifier."""
    if not shapes:
        return None, ()
    kinds = {name.rpartition("/")[2]: name for name in shapes}
    kernel = shapes.get(kinds.get("kernel", ""), ())
    if len(shapes) != 2 or len(kernel) != 2 or shapes.get(kinds.get("bias", "")) != kernel[1:] or kernel[0] not in widths:
        raise UserError(f"{bundle.source} has a classifier of {shapes}; expected a kernel (d, classes) with d one of {widths}, and a bias")
    linear = unfilled(lambda: nn.Linear(*kernel))
    fill(linear, bundle, shapes)
    return dict(linear.state_dict()), tuple(tap for tap, width in enumerate(widths) if width == kernel[0])


def _layers(module: nn.Module) -> list[dict[str, Tensor]]:
    """For each layer, in the order of `created`: TensorFlow's kind of variable → our tensor."""
    maps = [m for m in module.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    norms = [m for m in module.modules() if isinstance(m, BatchNorm)]
    found: list[dict[str, Tensor | None]] = [{"kernel": m.weight, "bias": m.bias} for m in maps]
    found += [{"gamma": m.weight, "beta": m.bias, "moving_mean": m.running_mean, "moving_variance": m.running_var} for m in norms]
    return [{kind: t for kind, t in layer.items() if t is not None} for layer in found]


def _shapes_by_layer(shapes: Shapes) -> list[Shapes]:
    """For each layer, in the order of `created`: kind → shape in our layout."""
    layers: dict[str, Shapes] = {layer: {} for layer in created(shapes)}
    for name, shape in shapes.items():
        layer, _, kind = name.rpartition("/")
        layers[layer][kind] = tuple(_turned(torch.empty(shape, device="meta")).shape)
    return list(layers.values())


def _turned(value: Tensor) -> Tensor:
    """TensorFlow's kernels are (height, width, in, out) and (in, out); ours (out, in, height, width) and (out, in)."""
    return value.permute(3, 2, 0, 1) if value.ndim == 4 else value.T if value.ndim == 2 else value


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
