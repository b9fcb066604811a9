"""The pictures of a run's report, made once, while the features are in memory: pictures.npz in the run directory."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from simclr import files, keyed
from simclr.config import Config, time_of
from simclr.data.loader import Batch, batches, in_order
from simclr.data.sources.prepared import names_of
from simclr.encoder.directory import PublishedEncoder
from simclr.evaluation.features import Features
from simclr.evaluation.knn import nearest
from simclr.evaluation.rows import placed
from simclr.family import CLIP, MAE
from simclr.methods import mae
from simclr.networks.vit import VisionTransformer, class_attention
from simclr.views.draw import Crop
from simclr.views.preprocessing import Preprocessing
from simclr.views.two_views import raw_views

_SHOWN = 8
_NEIGHBOURS = 7
_POINTS = 1000
_THUMB_PX = 32
_NAME = 100  # letters


def write_pictures(
    path: Path,
    config: Config,
    data: Path,
    train: Features,
    test: Features,
    query_split: str,
    device: torch.device,
    published: PublishedEncoder,
    painter: mae.Network | None = None,
    at: str | Path = "",
) -> None:
    """Gallery (8, 3, H, W, 3): original and two views; neighbours of 8 test images, with their files' names; a 2-D map of up to 1,000 test
    features; of the same 8 images the class token's attention in the `published` encoder, where it has one, and what MAE's `painter` makes
    of them, where there is one.

    `query_split` is the split of the test features; it is train if a part of that was held back. `at` is where the shards in `data` are
    from, if they are a copy.
    """
    # Queries spread over the classes: first one test image of each class, then a second one, …
    order = np.argsort(_rank_in_class(test.y.cpu().numpy()), kind="stable")
    queries = np.sort(order[:_SHOWN])
    found = nearest(placed(train.h, device), train.y, test.h, config.watch.k, config.watch.temperature)
    predicted = found.votes.argmax(1).cpu().numpy()
    index = found.index[queries][:, :_NEIGHBOURS].cpu().numpy()
    points = np.sort(keyed.permutation(0, 0, len(test.h))[:_POINTS])
    train_ids, test_ids = train.ids.cpu().numpy(), test.ids.cpu().numpy()
    wanted = _images(data, "train", config, train_ids[index.ravel()])
    shown = _images(data, query_split, config, test_ids[queries])
    arrays: dict[str, NDArray[Any]] = {
        "gallery": gallery(config, data, _SHOWN),
        "queries": shown,
        "query_names": _names(data, query_split, test_ids[queries], at),
        "query_labels": test.y[queries].cpu().numpy(),
        "neighbours": wanted.reshape(*index.shape, *wanted.shape[1:]),
        "neighbour_names": _names(data, "train", train_ids[index.ravel()], at).reshape(index.shape),
        "neighbour_labels": train.y[torch.as_tensor(index)].cpu().numpy(),
        "similarity": found.similarity[queries][:, :_NEIGHBOURS].cpu().numpy(),
        "map": _plane(test.h[points].cpu().numpy()),
        "map_labels": test.y[points].cpu().numpy(),
        "map_predicted": predicted[points],
        "thumbs": _thumbs(_images(data, query_split, config, test_ids[points])),
    }
    if isinstance(encoder := published.encoder, VisionTransformer) and encoder.pool == "class":
        arrays["attention"] = attention(encoder, published.preprocessing, shown)
    if painter is not None and isinstance(config, MAE):
        arrays["painted"] = painted(painter, config, published.preprocessing, shown, test_ids[queries])
    with files.whole(path) as scratch, scratch.open("wb") as file:
        np.savez_compressed(file, **arrays)  # type: ignore[arg-type]


def _rank_in_class(y: NDArray[np.int64]) -> NDArray[np.int64]:
    """How many earlier rows share each row's class."""
    seen: dict[int, int] = {}
    rank = np.zeros(len(y), np.int64)
    for i, label in enumerate(y.tolist()):
        rank[i] = seen.get(label, 0)
        seen[label] = rank[i] + 1
    return rank


def _images(data: Path, split: str, config: Config, ids: NDArray[np.int64]) -> NDArray[np.uint8]:
    """Images `ids` of a split as evaluation sees them, (n, H, W, 3)."""
    wanted = {int(i) for i in ids}
    found: dict[int, NDArray[np.uint8]] = {}
    for batch in in_order(data, split, Preprocessing.of(config.views), 256):
        for row, sample in enumerate(batch.ids.tolist()):
            if sample in wanted:
                found[sample] = batch.images[0][row].numpy().copy()
        if len(found) == len(wanted):
            break
    return np.stack([found[int(i)] for i in ids])


def _names(data: Path, split: str, ids: NDArray[np.int64], at: str | Path) -> NDArray[np.str_]:
    """The ends of the names, which tell the most."""
    names = names_of(data, split, ids.tolist(), at)
    return np.array([name if len(name) <= _NAME else f"…{name[1 - _NAME :]}" for name in names], f"U{_NAME}")


def gallery(config: Config, data: Path, most: int) -> NDArray[np.uint8]:
    """The first images of the first epoch, (n, 3, H, W, 3): original, view 0, view 1, before normalisation; of MAE original, crop, and what
    its encoder sees of that, the rest grey."""
    stream = batches(config, data, 0, 0, 1, crops=(Crop(views=config.views, neighbours=time_of(config).neighbours),))
    batch: Batch = next(stream)
    n = min(most, len(batch.ids))
    ids = batch.ids[:n].clone()
    shown = config.views
    if isinstance(config, MAE | CLIP):  # whose views are crops and flips alone
        shown = replace(shown, jitter_p=0.0, grey_p=0.0, blur_p=0.0, solarise_p=0.0)
    pixels = raw_views(batch.images[0][:n], ids, batch.epoch, shown, config.seed)
    if batch.mates is not None and len(batch.images) == 2:  # whole images; view 1 is of another frame
        pixels = torch.cat([pixels[:n], raw_views(batch.images[1][:n], ids, batch.epoch, shown, config.seed)[n:]])
    if isinstance(config, MAE):
        pixels = torch.cat([pixels[:n], mae.seen(pixels[:n], config, batch.epoch, ids)])
    views = (pixels * 255).round().byte().permute(0, 2, 3, 1).numpy()
    stream.close()
    originals = _images(data, "train", config, ids.numpy())
    if originals.shape[1:] != views.shape[1:]:
        originals = np.stack([_resized(image, views.shape[1]) for image in originals])
    return np.stack([originals, views[:n], views[n:]], 1)


@torch.no_grad()
def attention(encoder: VisionTransformer, preprocessing: Preprocessing, images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """(n, heads, rows, columns) of images (n, H, W, 3): see `class_attention`."""
    x = preprocessing(torch.from_numpy(images)).to(encoder.cls_token.device)
    shares: NDArray[np.float32] = class_attention(encoder, x).float().cpu().numpy()
    return shares


@torch.no_grad()
def painted(
    network: mae.Network, config: MAE, preprocessing: Preprocessing, images: NDArray[np.uint8], ids: NDArray[np.int64]
) -> NDArray[np.uint8]:
    """(n, 3, H, W, 3) of images (n, H, W, 3) with sample `ids`: grey where the encoder does not see them in the first epoch, painted there
    by the decoder, and as they are."""
    pixels, device = preprocessing.resized(torch.from_numpy(images)), network.decoder.mask_token.device
    x, order = preprocessing(torch.from_numpy(images)).to(device), mae.orders(config, 0, ids).to(device)
    found = mae.completed(network({"views": x[None], "order": order[None]})["pred"][0], x, order, config).cpu()
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (preprocessing.mean, preprocessing.std))
    rows = torch.stack([mae.seen(pixels, config, 0, torch.from_numpy(ids)), (found * std + mean).clamp(0, 1), pixels], 1)
    return (rows * 255).round().byte().permute(0, 1, 3, 4, 2).numpy()


def _resized(image: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    from PIL import Image

    return np.asarray(Image.fromarray(image).resize((side, side), Image.Resampling.BICUBIC))


def _thumbs(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return images if max(images.shape[1:3]) <= _THUMB_PX else np.stack([_resized(image, _THUMB_PX) for image in images])


def _plane(h: NDArray[np.float32]) -> NDArray[np.float32]:
    """t-SNE of the normalised features, (n, 2); started from PCA, so that the same features give the same map."""
    from sklearn.manifold import TSNE

    if len(h) < 4:  # too few for t-SNE
        return np.zeros((len(h), 2), np.float32)
    unit = h / np.maximum(np.linalg.norm(h, axis=1, keepdims=True), 1e-12)
    perplexity = min(30.0, max((len(h) - 1) / 3, 1.0))
    xy: NDArray[np.float32] = TSNE(2, perplexity=perplexity, init="pca", random_state=0, metric="cosine", max_iter=500).fit_transform(unit)
    return xy.astype(np.float32)
