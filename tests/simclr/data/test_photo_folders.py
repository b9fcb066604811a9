"""Photograph folders as people have them (no labels, some labels, no test split): from shards to a pulled encoder."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pipelines.commands import evaluate, publish, pull
from pipelines.commands.report import Args as ReportArgs
from pipelines.commands.report import report
from pipelines.evaluation import quick
from pipelines.runs import directory
from pipelines.tracking import client, outbox
from pipelines.tracking.uri import default_uri
from simclr.data import shards
from simclr.data.sources.open import open_source
from simclr.data.sources.patterns import render
from simclr.encoder.directory import write_encoder
from simclr.errors import UserError
from simclr.methods.simclr import build_model
from simclr.recipes import recipe


def a_run(folder: Path, places: Sequence[str]) -> directory.Run:
    """A run, its encoder untrained, over shards of pattern images; image i lies in the subfolder places[i]."""
    images, _ = render(np.arange(len(places)), 0, 32, False)
    for i, (place, image) in enumerate(zip(places, images, strict=True)):
        (folder / "photos" / place).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / "photos" / place / f"{i:03}.png")
    shards.prepare(open_source(str(folder / "photos")), folder / "mine", shards.Options(), 1, lambda done: None)
    config = recipe("patterns_tiny")
    small = replace(config, train=replace(config.train, batch_size=8))
    run = directory.open_run(folder / "runs" / "one", "patterns_tiny", small, folder / "mine")
    run.save()
    write_encoder(dict(build_model(config).encoder.state_dict()), config, run.encoder, {"recipe": "none"})
    for step in (1, 2, 3):
        run.append({"step": step, "epoch": step / 5, "train/loss": 4.0 - step})
    return run


def test_without_labels_the_effective_rank_is_the_score_and_the_encoder_is_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    run = a_run(tmp_path, [""] * 40)
    rows = evaluate.evaluate(evaluate.Args(encoder=run.path))
    assert [set(row) for row in rows] == [{"name", "rankme"}] * 2 and 1 < rows[1]["rankme"] <= 4  # of the tenth held back
    assert "RankMe" in quick.table(rows)
    # It was never logged, as if MLflow had always been unreachable: publishing logs it.
    done = publish.publish(publish.Args(run=run.path))
    assert done["champion"] and done["name"] == "mine"
    run = directory.load_run(run.path)
    logged = client.connect(default_uri(tmp_path / "runs")).get_metric_history(run.tracking_run, "train/loss")
    assert [(m.step, m.value) for m in logged] == [(1, 3.0), (2, 2.0), (3, 1.0)]
    page = report(ReportArgs(run=run.path)).read_text()
    assert "RankMe" in page and "unlabelled" in page.lower()
    capsys.readouterr()
    pull.main(pull.Args(model="mine@champion", to=tmp_path / "here"))
    told = f"mine version 1 (rankme {rows[1]['rankme']:.3g} on 4 images of a held-back tenth of the training split of "
    assert told in capsys.readouterr().out
    assert "of a held-back tenth of the training split of" in (tmp_path / "here" / "README.md").read_text()


def test_without_a_test_split_a_tenth_is_held_back(tmp_path: Path) -> None:
    run = a_run(tmp_path, [("stripes", "dots")[i % 2] for i in range(60)])
    rows = evaluate.evaluate(evaluate.Args(encoder=run.path, k=3))
    assert [row["name"] for row in rows] == ["raw pixels", "untrained encoder", "trained encoder"]
    sixths = [6 * row["knn_top1"] for row in rows]  # of six images, a whole number of which is right
    assert all(0 <= found <= 6 for found in sixths) and sixths == pytest.approx([round(found) for found in sixths], abs=1e-5)


def test_images_without_a_label_count_for_nothing(tmp_path: Path) -> None:
    """Forty labelled images and twenty unlabelled ones: the same scores as without the twenty."""
    some = ["train/a", "train/b", "test/a", "test/b"] * 10
    whole = evaluate.evaluate(evaluate.Args(encoder=a_run(tmp_path / "some", some).path, k=3))
    more = evaluate.evaluate(evaluate.Args(encoder=a_run(tmp_path / "more", [*some, *["train", "test"] * 10]).path, k=3))
    assert len(whole) == 3
    for a, b in zip(whole[1:], more[1:], strict=True):  # raw pixels too, but for the data's own mean
        assert a["knn_top1"] == b["knn_top1"] and a["probe_top1"] == b["probe_top1"]


def test_neighbours_without_a_label_have_no_vote() -> None:
    from simclr.evaluation.knn import nearest

    bank, query = torch.eye(3), torch.tensor([[1.0, 0.1, 0.0]])
    votes = nearest(bank, torch.tensor([-1, 1, 0]), query, 3, 0.1).votes
    assert votes.shape == (1, 2) and votes.argmax() == 1


def test_half_a_line_of_metrics_is_left_out(tmp_path: Path) -> None:
    run = a_run(tmp_path, [""] * 4)
    with (run.path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "train/lo')
    run.append({"step": 4, "train/loss": 0.5})
    assert [(row["step"], row["train/loss"]) for row in run.history()] == [(1, 3.0), (2, 2.0), (3, 1.0), (4, 0.5)]


def test_a_tracker_that_opens_at_the_third_try_has_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = a_run(tmp_path, [""] * 4)
    uri, tries = default_uri(tmp_path / "runs"), []
    real = outbox.open_run

    def at_the_third(run: directory.Run, uri: str, *more: Any) -> client.MLflowRun:
        tries.append(uri)
        if len(tries) < 3:
            raise UserError("MLflow is away")
        return real(run, uri, *more)

    monkeypatch.setattr(outbox, "open_run", at_the_third)
    monkeypatch.setattr(outbox, "_EVERY_S", 0.01)
    box = outbox.Outbox(uri)
    posted = box.follow(run)
    box.start()
    until = time.monotonic() + 30
    while posted.mlflow is None and time.monotonic() < until:
        time.sleep(0.01)
    # Known before the job ends: a job that is killed now resumes in the same MLflow run.
    known = json.loads((run.path / "run.json").read_text())["tracking_run"]
    assert len(tries) == 3 and known
    box.close("FINISHED")
    assert posted.run.tracking_run == known
    assert len(client.connect(uri).get_metric_history(known, "train/loss")) == 3
