"""What was written before the rooms were rebuilt is read, resumed and served after: golden/before.tar.xz, made by the commit before
(a0bc340, 26 November 2026) with its own commands; `went_on.json` holds what that commit computed from there on."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import simclr
from pipelines.commands.report import Args, report
from pipelines.runs.directory import load_run, open_run
from pipelines.train import driver
from simclr import checkpoint
from simclr.data import labels, loader, shards
from simclr.data.manifest import read_manifest
from simclr.data.sources.open import open_source
from simclr.encoder.directory import read_classifier
from simclr.train import Start, train
from tests.support.paths import GOLDEN, ROOT


@pytest.fixture(scope="module")
def before(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("old")
    with tarfile.open(GOLDEN / "before.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    # Its shards are 8 MB of rendered pixels; the manifest says whether those that are made today are the same bytes.
    manifest = folder / "before" / "shards" / "manifest.json"
    old = manifest.read_text()
    manifest.unlink()
    shards.prepare(open_source("patterns:train=240,test=60,size=32"), manifest.parent, shards.Options(), 2, lambda done: None)
    manifest.write_text(old)
    return folder / "before"


@pytest.fixture(scope="module")
def went_on(before: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((before / "went_on.json").read_text())
    return found


def test_the_shards_of_today_are_those_that_the_old_manifest_describes(before: Path) -> None:
    from simclr.data.verify import damaged

    assert damaged(before / "shards") == [] and read_manifest(before / "shards").examples("train") == 240


@pytest.mark.parametrize(("name", "steps"), [("pretrained", 16), ("queued", 10), ("tuned", 12)])
def test_an_old_run_goes_on_as_it_would_have_then(before: Path, went_on: dict[str, Any], name: str, steps: int) -> None:
    run = load_run(before / name)
    assert run.data.resolve() == (before / "shards").resolve()
    newest = checkpoint.latest(run.checkpoints, print)
    assert newest is not None
    method = driver.shapes_of(run)
    checkpoint.check(checkpoint.read(newest), method.network, method.state)
    config = dataclasses.replace(run.config, train=dataclasses.replace(run.config.train, steps=steps, report_every_steps=1))
    ids = labels.read(run.path / "labels.txt", loader.labels(run.data), None) if name == "tuned" else None
    losses = [report.metrics["train/loss"] for report in train(config, Start(run.data, checkpoint=newest, ids=ids))]
    assert losses == pytest.approx(went_on[name], rel=1e-3)  # float32; on this data other instructions differ by 8e-7, two threads by 2e-4


@pytest.mark.parametrize(("name", "path"), [("pretrained", "patterns_tiny-0bc3d737"), ("tuned", "finetune-patterns_tiny-a75f30cf")])
def test_the_same_command_looks_where_it_did(before: Path, name: str, path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The default directory's digits are of config and data; fields that have another name now count under their old one."""
    run = load_run(before / name)
    data = run.data.resolve()
    monkeypatch.chdir(tmp_path)
    assert open_run(None, run.recipe, run.config, data, stage=run.stage).path == Path("runs") / path


def test_old_weights_are_published_and_old_encoders_read(before: Path, went_on: dict[str, Any]) -> None:
    for name, parts in (("pretrained", {"encoder", "head", "classifier"}), ("tuned", {"encoder", "head", "classifier"})):
        step, tensors = driver.newest_tensors(load_run(before / name))
        assert set(tensors) == parts and step == {"pretrained": 12, "tuned": 9}[name]
        published = simclr.load_encoder(before / name / "encoder").encoder.state_dict()
        assert published.keys() == tensors["encoder"].keys() and all(torch.equal(t, tensors["encoder"][k]) for k, t in published.items())
    assert len(read_classifier(before / "tuned" / "encoder")[1]) == 10
    images = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), dtype=np.uint8)
    found = simclr.load_encoder(before / "pretrained" / "encoder").embed(images)[:, :4]
    torch.testing.assert_close(found, torch.tensor(went_on["features"]), rtol=1e-4, atol=1e-5)


def test_an_old_registered_model_is_served(before: Path, went_on: dict[str, Any]) -> None:
    """By the loader that its MLmodel names, `pipelines.pyfunc`."""
    import mlflow.pyfunc

    assert "loader_module: pipelines.pyfunc" in (before / "registered" / "MLmodel").read_text()
    images = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), dtype=np.uint8)
    served = mlflow.pyfunc.load_model(str(before / "registered")).predict(images)
    np.testing.assert_allclose(served[:, :4], went_on["features"], rtol=1e-4, atol=1e-5)


def test_an_old_run_has_its_report_and_a_node_its_start_command(before: Path) -> None:
    text = report(Args(run=before / "pretrained")).read_text()
    assert "25.0" in text and "patterns_tiny" in text  # its kNN score and its recipe
    done = subprocess.run([sys.executable, "-m", "pipelines.notice", "nowhere"], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.returncode != 0 and "No module" not in done.stderr and "nowhere" in done.stdout + done.stderr
