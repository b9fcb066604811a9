"""Online evaluation: scores of an encoder during training."""

from __future__ import annotations

import time
from pathlib import Path

import torch
from torch import nn

from simclr.config import Config
from simclr.evaluation import features, knn, representation
from simclr.precision import autocast
from simclr.views.preprocessing import Preprocessing

_RANKED = 2048  # features whose singular values are taken


def knn_of(encoder: nn.Module, config: Config, data: Path, device: torch.device, threads: int) -> dict[str, float]:
    """kNN accuracy of the encoder as it stands, and the effective rank of its features: {"eval/knn_top1", …}."""
    watch = config.watch
    dtype = next(encoder.parameters()).dtype
    began = time.perf_counter()
    with autocast(config.train.precision, device):  # the encoder as it trains; the neighbours' cosines below are float32
        bank, queries = (
            features.embed_split(
                *(encoder, data, split, Preprocessing.of(config.views), limit, device, dtype),
                threads=threads,
                groups=config.train.shard_groups,
            )
            for split, limit in (("train", watch.bank), ("test", watch.queries))
        )
    rank = float(representation.rankme(queries.h[:_RANKED]))
    measured = {"health/rankme": rank, "eval/seconds": time.perf_counter() - began}
    bank, queries = bank.labelled(), queries.labelled()
    if len(bank.y) and len(queries.y):
        measured["eval/knn_top1"] = knn.knn(bank.h, bank.y, queries.h, queries.y, watch.k, watch.temperature)["top1"]
    return measured
