"""`simclr pretrain --start` and `--extend` with the run of a sibling of SimCLR's: what is taken beside the encoder."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

from pipelines.commands import pretrain as command
from simclr.family import BYOL
from tests.pipelines.train.test_warm_start import CONFIG, complete


def test_a_siblings_run_is_extended_from_its_checkpoint(patterns: Path, tmp_path: Path) -> None:
    """It has the predictor and the average, which are not published; --start takes what is."""
    train = dataclasses.replace(CONFIG.train, steps=1, checkpoint_every_steps=1)
    config = BYOL(encoder=CONFIG.encoder, views=CONFIG.views, train=train, watch=CONFIG.watch, hidden=12, d_out=8)
    run = complete(tmp_path / "byol", patterns, config)
    extended, started = (command.weights_at(run.path, None, None, extends) for extends in (True, False))
    assert extended.method == "byol" and extended.rest and not started.rest
    assert extended.sha256 != started.sha256  # they begin other runs
    shutil.rmtree(run.checkpoints)
    assert command.weights_at(run.path, None, None, True).sha256 == started.sha256


def test_start_takes_the_same_of_a_siblings_run_before_its_end_and_behind_it(patterns: Path, tmp_path: Path) -> None:
    train = dataclasses.replace(CONFIG.train, steps=1, checkpoint_every_steps=1)
    config = BYOL(encoder=CONFIG.encoder, views=CONFIG.views, train=train, watch=CONFIG.watch, hidden=12, d_out=8)
    run = complete(tmp_path / "byol", patterns, config)
    behind = command.weights_at(run.path, None)
    shutil.rmtree(run.encoder)
    before = command.weights_at(run.path, None)
    assert before.sha256 == behind.sha256 and not before.rest and not before.method
