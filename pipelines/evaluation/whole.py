"""Scores of an encoder in memory on all images of prepared shards, for benches that train one by the loop alone."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from simclr.config import Config
from simclr.evaluation import features, knn, linear
from simclr.networks.encoders import encoder_of
from simclr.views.preprocessing import Preprocessing

_TEMPERATURE = 0.1  # of the kNN


def scores_of(tensors: dict[str, Tensor], config: Config, data: Path, device: torch.device, k: int) -> dict[str, float]:
    """{"knn_top1", "probe_top1", "train_images", "test_images"} of the encoder of `config` with the weights `tensors`: weighted kNN with
    `k` neighbours, and a linear probe, on the labelled images of the train and test split in `data`."""
    encoder = encoder_of(config).to(device)
    encoder.load_state_dict(tensors)
    seen = Preprocessing.of(config.views)
    found = [features.embed_split(encoder, data, split, seen, None, device, threads=torch.get_num_threads()) for split in ("train", "test")]
    bank, queries = (split.labelled() for split in found)
    voted = knn.knn(bank.h, bank.y, queries.h, queries.y, k, _TEMPERATURE)["top1"]
    probe = linear.linear_probe(bank.h, bank.y, queries.h, queries.y)["top1"]
    return {"knn_top1": voted, "probe_top1": probe, "train_images": len(bank.y), "test_images": len(queries.y)}
