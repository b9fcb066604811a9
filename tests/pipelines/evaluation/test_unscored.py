"""Neighbours and probes are no score of MAE: every way of `simclr evaluate` that prints them says so."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines.evaluation import suite
from simclr.config import Config
from simclr.encoder.directory import write_encoder
from simclr.networks.encoders import encoder_of
from simclr.papers import unscored
from tests.simclr.methods.test_mae import SMALL
from tests.support.command import Run
from tests.support.small import TINY

AT = ("--device", "cpu", "--resamples", "100", "--k", "3")


@pytest.mark.parametrize(("config", "said"), [(SMALL, unscored("mae", "ENCODER")), (TINY, "")])
def test_knn_and_probes_of_mae_are_said_to_be_no_score(
    config: Config, said: str, simclr: Run, patterns: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(suite, "run", lambda *given: [])
    write_encoder(dict(encoder_of(config).state_dict()), config, tmp_path / "encoder", {})
    pictures = np.random.default_rng(0).integers(0, 255, (24, 32, 32, 3), np.uint8)
    for i, picture in enumerate(pictures):
        path = tmp_path / "photos" / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(path)
    assert simclr("embed", "encoder", "photos", "--out", "features")[0] == 0
    for words in (
        ("encoder", "--data", patterns, "--protocol", "knn", "probe", *AT),
        ("encoder", "--suite", "transfer", "--root", tmp_path),
        ("--features", "features", *AT),
        ("--features", "features", "--protocol", "knn", *AT, "--out", "scores"),
        ("encoder", "--data", "photos", *AT),
    ):
        code, _, err = simclr("evaluate", *words)
        assert code == 0, err
        text = " ".join(err.split())
        assert said in text and ("no score of MAE" in text) == bool(said), words
