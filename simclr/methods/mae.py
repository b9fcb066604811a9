"""MAE (arXiv:2111.06377): a vision transformer sees a quarter of an image's patches, and a small decoder paints the rest from what it saw.

As in the authors' code: which patches stay is a random order of them, drawn for each image (here keyed by seed, epoch and sample id); the
encoder has the patches that stay and its class token, and no others; the decoder has a mask's token at every other place; the loss is the
mean square error of the patches that are gone, each of them normalised by its own mean and deviation. Views are crops and flips alone.

Differences from that code: fixed position embeddings have the row first, there the column, which is another order of the same channels; its
weights begin as MoCo v3's, with q, k and v as three matrices.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from simclr import keyed
from simclr import loss as losses
from simclr.checkpoint import State, check, part
from simclr.data.loader import Batch
from simclr.data.manifest import Manifest
from simclr.family import MAE
from simclr.methods.method import Method, Rows, Start, begun, examples_of, placed, schedule, views_for
from simclr.methods.online import neighbours
from simclr.networks.encoders import encoder_of
from simclr.networks.vit import Decoder, VisionTransformer
from simclr.optim import dino_rule, parameter_groups
from simclr.precision import weights_dtype
from simclr.to_device import to_device
from simclr.views.draw import Crop


class Network(nn.Module):
    """{"views": (1, n, 3, H, W), "order": (1, n, L) a random order of each image's L patches} → {"pred": (1, n, L, 3 p²) the decoder's
    patches, in their places}. The first `kept` patches of the order are seen."""

    def __init__(self, encoder: VisionTransformer, decoder: Decoder, kept: int) -> None:
        super().__init__()
        self.encoder, self.decoder, self.kept = encoder, decoder, kept

    def forward(self, rows: Rows) -> Rows:
        order = rows["order"][0]
        seen = self.encoder.visible(rows["views"][0], order[:, : self.kept])
        return {"pred": self.decoder(seen, order)[None]}


def build_network(config: MAE) -> Network:
    """The network with the initial weights of `config.seed`."""
    encoder = encoder_of(config)
    assert isinstance(encoder, VisionTransformer)  # the config refuses others
    decoder = Decoder(
        encoder.d_h, config.decoder_width, config.decoder_blocks, config.decoder_heads, encoder.patch_px, encoder.grid, config.seed
    )
    return Network(encoder, decoder, config.kept)


def orders(config: MAE, epoch: int, ids: NDArray[np.int64]) -> Tensor:
    """(n, L) a random order of each image's patches, a function of (seed, epoch, sample id)."""
    noise = keyed.uniform(config.seed, "mask", epoch, ids, 0, config.patches)
    return torch.from_numpy(np.argsort(noise, axis=1, kind="stable"))


def inputs_of(batch: Batch, some: slice, crops: tuple[Crop, ...], config: MAE, device: torch.device) -> Rows:
    """The rows that the network reads, of some images of this rank. Their pixels are targets too, so they are not rounded to bfloat16, as
    autocast does for the network."""
    (views,) = views_for(batch, some, crops, config, device, weights_dtype(config.train.precision))
    return {"views": views[None], "order": to_device(orders(config, batch.epoch, batch.ids[some].numpy()), device)[None]}


def painted(inputs: Rows, config: MAE) -> Rows:
    """{"patches": (1, n, L, 3 p²) what the decoder is to paint, "gone": (1, n, L) 1 for each patch that the encoder did not see}."""
    patches = patches_of(inputs["views"][0], config.encoder.patch_px)
    if config.normalised:
        mean, deviation = _moments(patches)
        patches = (patches - mean) / deviation
    order = inputs["order"][0]
    gone = torch.ones(order.shape, dtype=patches.dtype, device=order.device).scatter_(1, order[:, : config.kept], 0.0)
    return {"patches": patches[None], "gone": gone[None]}


def _moments(patches: Tensor) -> tuple[Tensor, Tensor]:
    """(n, L, 3 p²) → mean and deviation of each patch, (n, L, 1), as the authors normalise by them."""
    return patches.mean(2, keepdim=True), (patches.var(2, keepdim=True) + 1e-6).sqrt()


def completed(pred: Tensor, x: Tensor, order: Tensor, config: MAE) -> Tensor:
    """(n, 3, H, W) images: the patches of `x` that the encoder saw, the first `config.kept` of `order` (n, L), and in the other places the
    decoder's, `pred` (n, L, 3 p²), as the authors paste them (arXiv:2111.06377, Fig. 2).

    Of a normalised patch the decoder tells no mean and no deviation. For pictures it gets those of the patch that it stands for.
    """
    patches = patches_of(x, config.encoder.patch_px)
    if config.normalised:
        mean, deviation = _moments(patches)
        pred = pred * deviation + mean
    hidden = order[:, config.kept :, None].expand(-1, -1, patches.shape[2])
    return images_of(patches.scatter(1, hidden, pred.to(patches.dtype).gather(1, hidden)), config.encoder.patch_px)


def network_in(state: State, config: MAE) -> Network:
    """The network in a checkpoint of a run with `config`, its decoder too, on the CPU. Raises UserError where it does not fit."""
    network = build_network(config)
    check(state, network)
    network.load_state_dict(part(state, network, network))
    return network.eval()


def patches_of(x: Tensor, side: int) -> Tensor:
    """(n, 3, H, W) → (n, L, 3 p²): patches row by row, in each the rows, columns, channels."""
    n, channels, height, width = x.shape
    found = x.reshape(n, channels, height // side, side, width // side, side)
    return found.permute(0, 2, 4, 3, 5, 1).reshape(n, -1, side * side * channels)


def images_of(patches: Tensor, side: int) -> Tensor:
    """The inverse of `patches_of`, of square images."""
    n, count, values = patches.shape
    grid, channels = round(count**0.5), values // side**2
    found = patches.reshape(n, grid, grid, side, side, channels)
    return found.permute(0, 5, 1, 3, 2, 4).reshape(n, channels, grid * side, grid * side)


def seen(x: Tensor, config: MAE, epoch: int, ids: Tensor) -> Tensor:
    """(n, 3, H, W) images in [0, 1] with the patches grey that the encoder does not see at `epoch`, for pictures."""
    hidden = orders(config, epoch, ids.numpy())[:, config.kept :, None]
    patches = patches_of(x, config.encoder.patch_px)
    return images_of(patches.scatter(1, hidden.expand(-1, -1, patches.shape[2]), 0.5), config.encoder.patch_px)


def mae(config: MAE, start: Start, manifest: Manifest | None = None) -> Method:
    """MAE on the images of `manifest`; without one there is no online evaluation."""
    precision, images = config.train.precision, config.train.batch_size
    crops = (Crop(count=1, views=config.views, distorted=False),)
    network = placed(begun(lambda: build_network(config), start), start, precision)
    examples = examples_of(config, start, manifest) if manifest is not None else images
    return Method(
        crops=crops,
        inputs=partial(inputs_of, crops=crops, config=config, device=start.device),
        network=network,
        targets=partial(painted, config=config),
        loss=partial(objective, images=images),
        groups=parameter_groups(network, config.optim, schedule(config, examples), config.total_steps(examples), dino_rule),
        published={"encoder": network.encoder},
        evaluate=neighbours(network.encoder, config, start, manifest),
        chance=1.0 if config.normalised else 0.0,  # of grey patches, where each has variance 1
    )


def objective(outputs: Rows, targets: Rows, step: int, images: int) -> tuple[Tensor, Rows]:
    """This rank's share of the loss and its sums."""
    found = losses.masked_mean_square(outputs["pred"][0], targets["patches"][0], targets["gone"][0], images)
    return found, {"train/loss": found}
