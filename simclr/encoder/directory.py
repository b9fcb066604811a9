"""An encoder as it is published: a directory of safetensors and config.json, with the preprocessing of its training.

encoder.safetensors      names as in the `state_dict()` of its network (`simclr.networks`)
head.safetensors         the projection head, or its first layers; v2 fine-tunes and distils from them
towers.safetensors       the text tower of image–text pairs, and the maps of image and text into their common space
classifier.safetensors   a linear classifier, where there is one; config.json names its classes and the tap it reads
config.json              schema, the run's config, `preprocessing`, `published` (recipe, step, data), `classifier`
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from simclr import config as configs
from simclr import fields, files
from simclr.data.depth import Rule
from simclr.data.options import Options
from simclr.encoder import pictures
from simclr.encoder.pictures import Listed, Pictures
from simclr.errors import UserError
from simclr.family import CLIP, METHODS
from simclr.networks.encoders import Encoder, build_encoder
from simclr.networks.heads import Classifier, ProjectionHead, build_head
from simclr.networks.text import VOCABULARY, Towers
from simclr.views.preprocessing import Preprocessing

ENCODER_SCHEMA = 1
_INSTEAD = "publish or pull it again"
_TOGETHER = 1 << 24  # pixels that are cut at a time: as floats of three colours they take 200 MB


class PublishedEncoder(nn.Module):
    """An encoder with its preprocessing, as a user pulls it from the registry.

    `forward` takes normalised images (n, 3, H, W); `embed` takes pictures of any size, as arrays, files or objects of Pillow.
    """

    def __init__(self, encoder: Encoder, config: dict[str, Any]) -> None:
        super().__init__()
        self.encoder, self.config, self.d_h = encoder, config, encoder.d_h
        self.preprocessing = preprocessing_of(config)
        self.register_buffer("mean", torch.tensor(self.preprocessing.mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(self.preprocessing.std).view(1, 3, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        features: Tensor = self.encoder(x)
        return features

    @torch.no_grad()
    def embed(self, images: Pictures, batch_size: int = 64, options: Options = Options()) -> Tensor:  # noqa: B008  it is frozen
        """Pictures of any size → features (n, d_h), float32, on the CPU, whatever the encoder's device.

        `images`: uint8 RGB (n, H, W, 3) or (H, W, 3), NumPy or torch; a picture of Pillow's; the bytes of an image file, or its path; or a
        list of these, of any sizes. Files and pictures of Pillow's are decoded as `simclr embed` does it (upright, transparency over white,
        more than 8 bits by `options`), but for a JPEG's last level or two: its decoder is Pillow's. `batch_size` images are in memory at a
        time, cut to the encoder's input. Raises UserError for what is no picture.
        """
        if batch_size < 1:
            raise UserError(f"batch_size is {batch_size}; expected at least 1")
        given = pictures.listed(images)
        rule = pictures.rule_of(given, options)
        features = [torch.empty(0, self.d_h)]
        for begin in range(0, len(given), batch_size):
            x = self._cut(given[begin : begin + batch_size], rule, begin, len(given))
            features.append(self(x.to(memory_format=torch.channels_last)).float().cpu())
        return torch.cat(features)

    def embed_files(self, paths: Pictures, batch_size: int = 64, options: Options = Options()) -> Tensor:  # noqa: B008
        """Features (n, d_h) of image files by their paths, as `embed`. For folders, buckets and millions there is `simclr embed`."""
        return self.embed(paths, batch_size, options)

    @torch.no_grad()
    def prepared(self, images: Tensor | NDArray[np.uint8]) -> Tensor:
        """uint8 images (n, H, W, 3) of any size → the input of `forward`, (n, 3, size, size), on the encoder's device.

        Images of another size than the encoder's are cropped and resized as `Preprocessing` says.
        """
        return self.preprocessing(pictures.tensor_of(pictures.require_images(images)).to(self.get_buffer("mean").device))

    def _cut(self, given: Listed, rule: Rule, begin: int, count: int) -> Tensor:
        """`prepared` of the pictures `given`, which are those from `begin` on of `count`. Those of one array go together, in pieces."""
        if isinstance(given, np.ndarray | Tensor):
            rows = max(_TOGETHER // (given.shape[1] * given.shape[2]), 1)
            return torch.cat([self.prepared(given[i : i + rows]) for i in range(0, len(given), rows)])
        names = [f"picture {begin + i + 1:,} of {count:,}" for i in range(len(given))]
        return torch.cat([self.prepared(pictures.pixels(one, rule, name)[None]) for one, name in zip(given, names, strict=True)])


def preprocessing_of(text: dict[str, Any]) -> Preprocessing:
    """The preprocessing that a config.json states or, if it is older, the one that follows from its views."""
    stated = text.get("preprocessing")
    if stated is None:
        return Preprocessing.of(config_of(text).views)
    return fields.build(Preprocessing, stated, "the preprocessing in the encoder's config.json", _INSTEAD)


def config_of(text: dict[str, Any]) -> configs.Config:
    """The run's config in a config.json. Raises UserError where a field of it is unknown or does not fit."""
    kind = METHODS.get(str(text.get("method", "simclr")), configs.Config)  # of a method that a newer version has, what all have
    known = {field.name for field in dataclasses.fields(kind)}
    try:
        return kind.from_dict({name: value for name, value in text.items() if name in known})
    except UserError as error:
        raise UserError(f"the encoder's config.json is damaged: {error}; {_INSTEAD}") from None


def write_encoder(
    tensors: dict[str, Tensor],
    config: configs.Config,
    directory: Path,
    published: dict[str, Any],
    *,
    head: dict[str, Tensor] | None = None,
    towers: dict[str, Tensor] | None = None,
    classifier: dict[str, Tensor] | None = None,
    tap: int = 0,
    classes: list[str] | None = None,
    preprocessing: Preprocessing | None = None,
) -> None:
    """Publish an encoder's `tensors` (names as in its `state_dict()`) as `directory`; an older version in it is replaced at once.

    `published` says where it comes from (recipe, step, data). `head` (as `ProjectionHead.state_dict()`, all layers or the first
    ones), `towers` (as `networks.text.Towers`), `classifier` (weight, bias), which reads the head's layer `tap`, and the `classes` that it
    tells apart, are optional.
    """
    scratch = directory.with_name(f".{directory.name}-{os.getpid()}")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    try:
        for name, part in (("encoder", tensors), ("head", head), ("towers", towers), ("classifier", classifier)):
            if part:
                file = scratch / f"{name}.safetensors"
                save_file({key: t.detach().cpu().contiguous() for key, t in part.items()}, file)
                files.usual_mode(file)
        stated = dataclasses.asdict(preprocessing or Preprocessing.of(config.views))
        text = {"schema": ENCODER_SCHEMA, **config.to_dict(), "preprocessing": stated, "published": published}
        if classifier:
            text["classifier"] = {"tap": tap, "classes": classes or [str(i) for i in range(len(classifier["bias"]))]}
        (scratch / "config.json").write_text(json.dumps(text, indent=1) + "\n")
        shutil.rmtree(directory, ignore_errors=True)
        scratch.rename(directory)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def read_encoder(directory: Path, device: str | torch.device = "cpu") -> PublishedEncoder:
    """See `simclr.load_encoder`."""
    place = device_of(device)
    text = read_text(directory)
    with torch.device("meta"):
        encoder = _build(text)
    _fill(encoder, read_part(directory, "encoder"), directory)
    return PublishedEncoder(encoder, text).eval().to(place)


def device_of(name: str | torch.device) -> torch.device:
    """The device called `name`: cpu, cuda, cuda:1, mps …; "auto" is a GPU where there is one. Raises UserError where there is none."""
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError, TypeError):
        raise UserError(f'device {str(name)!r} is not there; expected "cpu", or "cuda" where torch sees a GPU') from None
    return device


def read_head(directory: Path) -> ProjectionHead | None:
    """The projection head published in `directory`, or the first layers of it that are there; None if there is none."""
    if not (directory / "head.safetensors").is_file():
        return None
    text = read_text(directory)
    config = config_of(text)
    if not isinstance(config, configs.SimCLR):
        return None
    tensors = read_part(directory, "head")
    with torch.device("meta"):
        head = build_head(config, _build(text).d_h)
    layers = [re.match(r"layers\.(\d{1,3})\.", name) for name in tensors]
    del head.layers[1 + max((int(found[1]) for found in layers if found), default=0) :]
    _fill(head, tensors, directory)
    return head.eval()


def read_towers(directory: Path) -> tuple[Towers, CLIP]:
    """What leads the encoder published in `directory` into the common space of images and texts, and its config. Raises UserError where
    there is none."""
    text = read_text(directory)
    config = config_of(text)
    if not isinstance(config, CLIP) or not (directory / "towers.safetensors").is_file():
        raise UserError(f"{directory} has no text tower, by which class names could be read; an encoder of CLIP has one")
    with torch.device("meta"):
        c = config
        towers = Towers(_build(text).d_h, c.d_out, VOCABULARY, c.context, c.text_width, c.text_blocks, c.text_heads)
    _fill(towers, read_part(directory, "towers"), directory)
    return towers.eval(), config


def read_classifier(directory: Path) -> tuple[Classifier, list[str]]:
    """(encoder + head up to the tap + linear classifier, its classes). Raises UserError where none was published."""
    text = read_text(directory)
    if "classifier" not in text:
        raise UserError(f"{directory} holds no classifier; `simclr finetune` makes one")
    stated = text["classifier"]
    encoder, head = read_encoder(directory).encoder, read_head(directory)
    with torch.device("meta"):
        model = Classifier(encoder, head, stated["tap"], len(stated["classes"]))
    _fill(model.classifier, read_part(directory, "classifier"), directory)
    return model.eval(), stated["classes"]


def read_text(directory: Path) -> dict[str, Any]:
    """config.json of a published encoder. Raises UserError where `directory` is none, or of another schema."""
    if not (directory / "config.json").is_file() or not (directory / "encoder.safetensors").is_file():
        raise UserError(
            f"{directory} is no published encoder: expected encoder.safetensors and config.json in it; "
            "make one with `simclr publish RUN` or `simclr pull NAME@champion --to DIR`"
        )
    path = directory / "config.json"
    text = files.read_json(path, _INSTEAD)
    if text.get("schema") != ENCODER_SCHEMA:
        raise UserError(f"{directory} has encoder schema {text.get('schema')}, this version reads {ENCODER_SCHEMA}; publish it again")
    optional: dict[str, Any] = {name: dict[str, Any] for name in ("preprocessing", "published", "classifier") if name in text}
    fields.require(text, {"encoder": dict[str, Any], **optional}, path, _INSTEAD)
    if "classifier" in text:
        fields.require(text["classifier"], {"tap": int, "classes": list[str]}, f"the classifier in {path}", _INSTEAD)
    return text


def weights_digest(directory: Path) -> str:
    """sha256 (hex) of a published encoder's weights, as its features state it; of frozen weights that are pooled otherwise than they were
    trained, of the pooling too, since their features are others. Of what else tells equal weights apart, the preprocessing is stated beside
    it, and other heads want other weights. Raises UserError where `directory` is no published encoder."""
    text = read_text(directory)
    with (directory / "encoder.safetensors").open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    pool = shape_of(text).pool
    return found if pool == trained_pool(text) else hashlib.sha256(f"{found} pool {pool}".encode()).hexdigest()


def trained_pool(text: dict[str, Any]) -> str:
    """The pooling with which the weights were trained that a config.json describes: the encoder's own, unless `published` says that a
    classifier was trained on frozen weights with another."""
    return str(text.get("published", {}).get("trained_pool") or shape_of(text).pool)


def width_of(text: dict[str, Any]) -> int:
    """Numbers of a feature of the encoder that a config.json describes."""
    with torch.device("meta"):
        return _build(text).d_h


def _build(text: dict[str, Any]) -> Encoder:
    """The encoder that a config.json describes. Whoever trains it on trains all of it."""
    return build_encoder(shape_of(text).trained, size_px=preprocessing_of(text).size_px)


def shape_of(text: dict[str, Any]) -> configs.Encoder:
    """The encoder's fields in a config.json; other versions may have other fields elsewhere in it. Raises UserError where they do not
    fit."""
    return config_of({"encoder": text["encoder"], "views": {"size_px": preprocessing_of(text).size_px}}).encoder


def read_part(directory: Path, name: str) -> dict[str, Tensor]:
    """The tensors of one part (encoder, head, classifier) of a published directory. Raises UserError for a damaged file."""
    try:
        tensors: dict[str, Tensor] = load_file(directory / f"{name}.safetensors")
    except SafetensorError as error:
        raise UserError(f"the weights in {directory} cannot be read: {str(error).splitlines()[-1].strip()}; {_INSTEAD}") from None
    return tensors


def differences(wanted: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> list[str]:
    """How the tensors `given` differ in names, shapes and kind from those that a module wants; [] = they fit."""
    wrong = [
        f"{name} has shape {tuple(given[name].shape)}, expected {tuple(t.shape)}"
        for name, t in wanted.items()
        if name in given and given[name].shape != t.shape
    ]
    wrong += [f"{name} is missing" for name in wanted if name not in given]
    wrong += [f"{name} is unknown" for name in given if name not in wanted]
    return wrong + [f"{name} is of {given[name].dtype}" for name in wanted if name in given and not given[name].is_floating_point()]


def _fill(module: nn.Module, tensors: dict[str, Tensor], directory: Path) -> None:
    """Put `tensors`, from `directory`, into `module`, which is on the meta device. It gets memory once its shapes are those of the
    tensors: a damaged config.json may describe a network of any size."""
    if wrong := differences(module.state_dict(), tensors):
        more = f"; and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise UserError(f"the weights in {directory} do not fit its config.json: {'; '.join(wrong[:3])}{more}; {_INSTEAD}")
    module.to_empty(device="cpu").load_state_dict(tensors)
