"""Frozen weights that are pooled otherwise than they were trained: their features are others, and whoever has those of one sees it."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines import cli
from pipelines.commands import finetune
from pipelines.runs.directory import Run
from pipelines.tracking import registry
from pipelines.train import driver
from simclr.config import Encoder
from simclr.encoder.directory import read_text, trained_pool, weights_digest, write_encoder
from simclr.networks.encoders import encoder_of
from tests.support import command as commands
from tests.support.command import refused
from tests.support.small import TINY

VIT = replace(TINY, encoder=Encoder(vit="micro", patch_px=8))


@pytest.fixture
def given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A published vision transformer of class tokens."""
    monkeypatch.setattr(driver, "train", lambda job, began: _published(job))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    write_encoder(dict(encoder_of(VIT).state_dict()), VIT, tmp_path / "class", {"recipe": "none"})
    return tmp_path / "class"


def _published(job: driver.Job) -> Run:
    job.publish(job.run, None)
    return job.run


def tuned(start: Path | str, patterns: Path, *more: str) -> Path:
    """What a fine-tuning of no steps publishes."""
    words = [str(start), "--data", str(patterns), "--batch-size", "24", *more]
    return finetune.finetune(cli.parse("finetune", finetune.Args, words)).encoder


def test_frozen_weights_that_are_pooled_otherwise_make_other_features(simclr: commands.Run, given: Path, patterns: Path) -> None:
    mean = tuned(given, patterns, "--linear", "--encoder.pool", "mean")
    assert (mean / "encoder.safetensors").read_bytes() == (given / "encoder.safetensors").read_bytes()
    assert weights_digest(mean) != weights_digest(given) and trained_pool(read_text(mean)) == "class"
    alike = tuned(given, patterns, "--linear")  # the same features, and so the same digest
    assert weights_digest(alike) == weights_digest(given) == weights_digest(tuned(mean, patterns, "--linear", "--encoder.pool", "class"))
    assert weights_digest(tuned(mean, patterns, "--linear", "--seed", "3")) == weights_digest(mean)

    Path("photos").mkdir()
    for i, image in enumerate(np.random.default_rng(0).integers(0, 255, (3, 32, 32, 3), np.uint8)):
        Image.fromarray(image).save(f"photos/{i}.png")
    assert simclr("embed", given, "photos", "--out", "features")[0] == 0
    assert "holds these features already" in simclr("embed", alike, "photos", "--out", "features")[2]
    refused(simclr("embed", mean, "photos", "--out", "features"), "features holds features with another encoder; use another --out")
    refused(simclr("neighbours", "features", "photos/0.png", "--encoder", mean), "is not the encoder that made the features")


def test_weights_that_were_trained_with_their_pooling_have_the_digest_of_before(given: Path, patterns: Path, tmp_path: Path) -> None:
    """An encoder's file alone: features that were made before are still its own."""
    mean = replace(VIT, encoder=replace(VIT.encoder, pool="mean"))
    write_encoder(dict(encoder_of(mean).state_dict()), mean, tmp_path / "mean", {})
    assert weights_digest(tmp_path / "mean") == weights_digest(given)
    assert "trained_pool" not in read_text(tuned(given, patterns, "--encoder.pool", "mean"))["published"]


def test_an_encoder_of_the_registry_is_read_while_it_is_there(given: Path, patterns: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its copy goes once the run has begun."""
    monkeypatch.setattr(registry, "pull", lambda uri, name, to, progress: shutil.copytree(given, to))
    assert trained_pool(read_text(tuned("photos@champion", patterns, "--linear", "--encoder.pool", "mean"))) == "class"
