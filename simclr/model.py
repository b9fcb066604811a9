"""SimCLR = encoder f + projection head g (arXiv:2002.05709, Sec. 2.1), and the encoder as it is published."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from simclr import config as configs
from simclr.batchnorm import BatchNorm
from simclr.resnet import ResNet, build_encoder

ENCODER_SCHEMA = 1


class ProjectionHead(nn.Module):
    """The head g: every layer but the last is as wide as h, with BatchNorm and ReLU; the last is linear with a BatchNorm
    without shift. v1 has 2 layers, v2 has 3; of the ablation, 1 is linear and 0 is none. Linear maps have no bias: the
    BatchNorm behind would take it off again.
    """

    def __init__(self, d_in: int, layers: int = 2, d_out: int = 128, per_worker_norm: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList()
        for index in range(layers):
            last = index == layers - 1
            linear = nn.Linear(d_in, d_out if last else d_in, bias=False)
            nn.init.normal_(linear.weight, std=0.01)
            norm = BatchNorm(linear.out_features, beta=not last, per_worker=per_worker_norm)
            self.layers.append(nn.Sequential(linear, norm) if last else nn.Sequential(linear, norm, nn.ReLU(inplace=True)))

    def forward(self, h: Tensor) -> list[Tensor]:
        """h (n, d_in) → [h, output of layer 1, …, z (n, d_out)]: `[tap]` is what v2 fine-tunes from (its Sec. 2)."""
        outputs = [h]
        for layer in self.layers:
            outputs.append(layer(outputs[-1]))
        return outputs


class SimCLR(nn.Module):
    """Views (2n, 3, H, W) → (h, z, logits): representation (2n, d_h), projection (2n, d_z), class scores (2n, classes).
    Both views go through one pass, so BatchNorm sees them together, as in the official code.

    The classifier is the linear evaluation that goes on beside pretraining: it sees h behind a stop-gradient, so that
    nothing of a label reaches the encoder. Without classes there is none, and logits are (2n, 0).
    """

    def __init__(self, config: configs.Config, classes: int = 0) -> None:
        super().__init__()
        self.encoder: ResNet = build_encoder(config.encoder)
        self.head = ProjectionHead(self.encoder.d_h, config.head.layers, config.head.d_out, config.encoder.batchnorm == "per_worker")
        self.classifier: nn.Linear | None = None
        if classes and config.train.linear_eval:  # made last: the other weights are the same with and without it
            self.classifier = nn.Linear(self.encoder.d_h, classes)
            nn.init.normal_(self.classifier.weight, std=0.01)
            nn.init.zeros_(self.classifier.bias)

    def forward(self, views: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h = self.encoder(views)
        z = self.head(h)[-1]
        seen = h.detach()
        return h, z, seen[:, :0] if self.classifier is None else self.classifier(seen)


def build_model(config: configs.Config, classes: int = 0) -> SimCLR:
    """The model with the initial weights that `config.seed` names, on the CPU, the same on every rank. `classes` of the data,
    0 = unlabelled."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return SimCLR(config, classes)


def shapes_only(config: configs.Config, classes: int = 0) -> SimCLR:
    """The model on the meta device: names and shapes without memory."""
    with torch.device("meta"):
        return SimCLR(config, classes)


class PublishedEncoder(nn.Module):
    """An encoder with the preprocessing it was trained under: what a user pulls from the registry.

    `forward` takes normalised images (n, 3, H, W); `embed` takes pictures as they come.
    """

    def __init__(self, encoder: ResNet, config: dict[str, Any]) -> None:
        super().__init__()
        self.encoder, self.config = encoder, config
        self.d_h = encoder.d_h
        views = config["views"]
        self.size_px = int(views["size_px"])
        self.centre_crop = 0.875 if self.size_px > 32 else 1.0  # the official code crops no CIFAR test image
        self.register_buffer("mean", torch.tensor(views["mean"]).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(views["std"]).view(1, 3, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        features: Tensor = self.encoder(x)
        return features

    @torch.no_grad()
    def embed(self, images: Tensor | NDArray[np.uint8]) -> Tensor:
        """uint8 images (n, H, W, 3) of any size → features (n, d_h), float32. See `prepared`."""
        features: Tensor = self(self.prepared(images)).float()
        return features

    @torch.no_grad()
    def prepared(self, images: Tensor | NDArray[np.uint8]) -> Tensor:
        """uint8 images (n, H, W, 3) of any size → what `forward` takes, (n, 3, size, size).

        Images of another size than the views' are centre-cropped (0.875 of the shorter side; all of it at 32 px and
        below) and resized bicubically with antialiasing.
        """
        if isinstance(images, np.ndarray):
            images = np.require(images, requirements="W")  # torch warns at an array that it could not write to
        x = torch.as_tensor(images)
        if x.ndim != 4 or x.shape[3] != 3 or x.dtype != torch.uint8:
            raise ValueError(f"embed got {x.dtype} images of shape {tuple(x.shape)}; expected uint8 (n, H, W, 3)")
        mean = self.get_buffer("mean")
        x = x.to(mean.device).permute(0, 3, 1, 2)
        if x.shape[2:] == (self.size_px, self.size_px):
            x = x.float() / 255
        else:
            side = max(round(self.centre_crop * min(x.shape[2:])), 1)
            top, left = (x.shape[2] - side) // 2, (x.shape[3] - side) // 2
            x = x[:, :, top : top + side, left : left + side].float() / 255
            x = F.interpolate(x, (self.size_px, self.size_px), mode="bicubic", antialias=True).clamp(0, 1)
        return (x - mean) / self.get_buffer("std")


def write_encoder(tensors: dict[str, Tensor], config: configs.Config, directory: Path, published: dict[str, Any]) -> None:
    """Publish an encoder's `tensors` (names as in `ResNet.state_dict()`) as `directory`/encoder.safetensors and config.json.

    `published` says where it comes from (recipe, step, data). An older version in `directory` is replaced at once.
    """
    scratch = directory.with_name(f".{directory.name}-{os.getpid()}")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    try:
        save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, scratch / "encoder.safetensors")
        text = {"schema": ENCODER_SCHEMA, **config.to_dict(), "published": published}
        (scratch / "config.json").write_text(json.dumps(text, indent=1) + "\n")
        shutil.rmtree(directory, ignore_errors=True)
        scratch.rename(directory)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def read_encoder(directory: Path) -> PublishedEncoder:
    """See `simclr.load_encoder`."""
    if not (directory / "config.json").is_file() or not (directory / "encoder.safetensors").is_file():
        raise ValueError(
            f"{directory} is no published encoder: expected encoder.safetensors and config.json in it; "
            "make one with `simclr publish RUN` or `simclr pull NAME@champion --to DIR`"
        )
    text = json.loads((directory / "config.json").read_text())
    if text.get("schema") != ENCODER_SCHEMA:
        raise ValueError(f"{directory} has encoder schema {text.get('schema')}, this version reads {ENCODER_SCHEMA}; publish it again")
    encoder = build_encoder(configs.Encoder(**text["encoder"]))
    try:
        encoder.load_state_dict(load_file(directory / "encoder.safetensors"))
    except (RuntimeError, SafetensorError) as error:
        raise ValueError(f"the weights in {directory} do not fit its config.json: {str(error).splitlines()[-1].strip()}") from None
    return PublishedEncoder(encoder, text).eval()
