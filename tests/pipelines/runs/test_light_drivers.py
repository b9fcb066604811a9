"""Drivers read the manifest of shards in S3, and of labels the tables: a head without a GPU and with a small disk fetches no dataset."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pipelines.train import ray_train
from simclr.data import labels, loader
from simclr.data.manifest import read_manifest
from simclr.data.s3 import remote
from simclr.data.s3.store import Store
from simclr.data.s3.uri import Address, cache
from simclr.encoder.directory import write_encoder
from simclr.errors import UserError
from simclr.methods.classifier import build_classifier
from tests.simclr.data.test_remote import silent
from tests.support.command import Run
from tests.support.s3 import Proxy
from tests.support.small import TINY

AT = Address("photos", "light/patterns")
FEW = ("--epochs", "1", "--tracking-uri", "sqlite:///mlflow.db", "--workers", "2")


@pytest.fixture
def light(s3: Proxy, simclr: Run, patterns: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """`simclr`, which ends where it would connect to Ray: its driver has done all that it does with data then. The shards are in S3."""

    def connect(*asked: object) -> bool:
        raise UserError("Ray begins here")

    monkeypatch.setattr(ray_train, "connect", connect)
    remote.push(patterns, AT, silent, Store())
    s3.quiet()
    return simclr


def shards_fetched(s3: Proxy) -> list[str]:
    """Ranges of shards that were asked for; "" for a whole one."""
    return [part for method, path, part in s3.log if method == "GET" and ".beton" in path]


def test_pretrain_and_sweep_ask_for_no_shard(s3: Proxy, light: Run) -> None:
    for words in (
        ("pretrain", "patterns_tiny", "--data", AT, "--run", "run", *FEW[2:], "--train.batch-size", "60"),
        ("sweep", "smoke", "--recipe", "patterns_tiny", "--data", AT, "--set", "train.batch_size=60", "--out", "many", *FEW[2:4]),
    ):
        code, _, said = light(*words)
        assert code == 2 and "Ray begins here" in said, said
    assert shards_fetched(s3) == [] and not list(cache().rglob("*.beton"))


def test_finetune_and_distill_ask_for_tables_alone(s3: Proxy, light: Run, patterns: Path, published: Path, tmp_path: Path) -> None:
    words = ("--data", AT, *FEW, "--labels", "0.1")
    code, _, said = light("finetune", published, *words, "--run", "tuned", "--class-weights", "balanced")
    assert code == 2 and "Ray begins here" in said and "class weights from" in said, said
    chosen = [int(line) for line in (tmp_path / "tuned" / "labels.txt").read_text().splitlines() if not line.startswith("#")]
    assert chosen == labels.subset(loader.labels(patterns), 0.1, 0).tolist()

    model, teacher = build_classifier(TINY, 10, 0), tmp_path / "teacher"
    tensors, classes = model.classifier.state_dict(), list(read_manifest(patterns).classes)
    write_encoder(model.encoder.state_dict(), TINY, teacher, {}, classifier=tensors, classes=classes)
    code, _, said = light("distill", teacher, *words, "--run", "student", "--alpha", "0.5")
    assert code == 2 and "Ray begins here" in said, said

    ranges = [re.fullmatch(r"bytes=(\d+)-(\d+)", part) for part in shards_fetched(s3)]
    size = sum(shard.bytes for shard in read_manifest(patterns).shards)
    assert ranges and sum(int(found[2]) + 1 - int(found[1]) for found in ranges if found) < 0.02 * size and None not in ranges
    assert not list(cache().rglob("*.beton"))
