"""CLIP (arXiv:2103.00020) on image–text pairs: of all ranks' captions an image finds its own, and a caption its image.

As in the paper: an encoder of images and a transformer of texts, a linear map of each into a common space, cosines over a learnt
temperature, whose logarithm begins at log(1 / 0.07), does not decay and stays within [0, log 100]; the loss is the mean of both
directions, over the whole global batch with exact gradients. Images are one crop each, without colour distortions.

Differences: encoders are this project's (a ResNet ends in its mean, not in attention; biases where they have them), the exact GELU, and
initial weights keyed. The tokenizer is CLIP's, from open_clip's wheel.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from simclr import loss as losses
from simclr.collectives import share_of_mean
from simclr.data import tokens as words
from simclr.data.loader import Batch
from simclr.data.manifest import Manifest
from simclr.errors import UserError
from simclr.evaluation.features import embed_split
from simclr.evaluation.zero_shot import class_directions, similarities
from simclr.family import CLIP
from simclr.methods.method import Method, Rows, Start, begun, examples_of, no_evaluation, paths_for, placed, schedule, views_for
from simclr.methods.online import neighbours, of_pairs, of_rows
from simclr.networks.encoders import Encoder, encoded, encoder_of
from simclr.networks.text import VOCABULARY, Towers
from simclr.optim import dino_rule, parameter_groups
from simclr.precision import autocast
from simclr.telemetry.collapse import Least
from simclr.to_device import to_device
from simclr.views.draw import Crop
from simclr.views.preprocessing import Preprocessing

_TEXTS = 256  # at a time


class Network(nn.Module):
    """{"views": (1, n, 3, H, W), "tokens": (1, n, L)} → {"image": (1, n, d), "text": (1, n, d), of any length, "scale": (1, n, 1) the
    factor of cosines, once for each image}."""

    def __init__(self, config: CLIP) -> None:
        super().__init__()
        self.encoder: Encoder = encoder_of(config)
        self.towers = build_towers(config, self.encoder.d_h)
        self.log_scale = nn.Parameter(torch.full((1,), math.log(1 / config.temperature)))

    def forward(self, rows: Rows) -> Rows:
        seen = {name: x for name, x in rows.items() if name != "tokens"}
        image, text = self.towers.images(encoded(self.encoder, seen)), self.towers.texts(rows["tokens"][0])
        return {"image": image[None], "text": text[None], "scale": self.log_scale.exp().expand(len(image), 1)[None]}


def build_towers(config: CLIP, d_h: int) -> Towers:
    """Behind an encoder whose representations have `d_h` numbers, the text tower and both heads, with the initial weights of the seed."""
    c = config
    return Towers(d_h, c.d_out, VOCABULARY, c.context, c.text_width, c.text_blocks, c.text_heads, c.seed)


def clip(config: CLIP, start: Start, manifest: Manifest | None = None) -> Method:
    """CLIP on the pairs of `manifest`; without one there is no online evaluation. Raises UserError for shards without captions."""
    precision, images = config.train.precision, config.train.batch_size
    if start.device.type != "meta" and manifest is not None and not manifest.captions:
        raise UserError(f"{start.data} has no captions, and CLIP trains on pairs; `simclr prepare --captions auto` or FILE keeps them")
    crops = (Crop(count=1, views=config.views, distorted=False),)
    network = placed(begun(lambda: Network(config), start), start, precision)
    examples = examples_of(config, start, manifest) if manifest is not None else images
    nearest = neighbours(network.encoder, config, start, manifest)

    def evaluate() -> dict[str, float]:
        """kNN of the encoder and, by the names of the classes, zero-shot accuracy."""
        assert manifest is not None
        return nearest() | zero_shot_of(network.encoder, network.towers, config, manifest.classes, start)

    return Method(
        crops=crops,
        inputs=partial(inputs_of, crops=crops, config=config, device=start.device),
        network=network,
        loss=partial(objective, images=images),
        after=partial(clamp, network, config.scale_most),
        report=partial(diagnosed, images=images),
        groups=parameter_groups(network, config.optim, schedule(config, examples), config.total_steps(examples), dino_rule),
        published={"encoder": network.encoder, "towers": network.towers},
        evaluate=evaluate if nearest is not no_evaluation else no_evaluation,
        chance=math.log(images),
        least=Least(dimension=1.2),
    )


def inputs_of(batch: Batch, some: slice, crops: tuple[Crop, ...], config: CLIP, device: torch.device) -> Rows:
    """The rows that the network reads, of some pairs of this rank."""
    (views,) = views_for(batch, some, crops, config, device)
    tokens = torch.from_numpy(words.tokens_of(batch.captions[some], config.context))
    return {"views": views[None], "tokens": to_device(tokens, device)[None], **paths_for(batch, some, crops, config, device)}


def objective(outputs: Rows, targets: Rows, step: int, images: int) -> tuple[Tensor, Rows]:
    """This rank's share of the loss, and its sums: both losses' mean, and the factor of the cosines."""
    found = losses.clip(outputs["image"][0], outputs["text"][0], outputs["scale"][0, :, 0], images)
    return found, {"train/loss": found}


@torch.no_grad()
def zero_shot_of(encoder: Encoder, towers: Towers, config: CLIP, classes: Sequence[str], start: Start) -> dict[str, float]:
    """{"eval/zero_shot_top1"} of the towers as they stand, on images of the test split: of watch.queries images, or all."""
    seen, dtype = Preprocessing.of(config.views), next(encoder.parameters()).dtype
    with autocast(config.train.precision, start.device):
        given = encoder, start.data, "test", seen, config.watch.queries, start.device, dtype
        queries = embed_split(*given, threads=start.loader_threads).labelled()
        if not len(queries.y):
            return {}
        directions = class_directions(classes, (config.prompt,), partial(texts_of, towers, config.context))
        images = towers.images(queries.h.to(towers.image_head.weight.device, dtype))
    return {"eval/zero_shot_top1": float((similarities(images, directions).argmax(1).cpu() == queries.y).double().mean())}


@torch.no_grad()
def texts_of(towers: Towers, context: int, captions: list[str]) -> Tensor:
    """(n, d) of n texts in the common space."""
    tokens = to_device(torch.from_numpy(words.tokens_of(captions, context)), towers.text_head.weight.device)
    return torch.cat([towers.texts(some) for some in tokens.split(_TEXTS)])  # thousands of classes by many prompts would not fit at once


@torch.no_grad()
def clamp(network: Network, most: float, inputs: Rows, targets: Rows, step: int) -> None:
    """Keep the factor of cosines within 1 and `most` (Sec. 2.5)."""
    network.log_scale.clamp_(0.0, math.log(most))


def diagnosed(outputs: Rows, targets: Rows, images: int) -> dict[str, Tensor]:
    """SimCLR's measures: of pairs of an image and its caption; of collapse, of the images."""
    image, text, scale = outputs["image"][0].detach(), outputs["text"][0].detach(), outputs["scale"][0].detach()
    found = of_pairs(torch.cat([image, text]), None, images) | of_rows(image, len(image), images)
    return found | {"train/temperature": share_of_mean(1 / scale.double().mean(), len(image), images).to(image.dtype)}
