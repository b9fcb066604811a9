"""`simclr evaluate --protocol`: its files, for encoders of runs, directories and the registry."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipelines import cli
from pipelines.evaluation.confusion import confusion_picture
from pipelines.evaluation.inputs import default_out
from pipelines.evaluation.protocols import summary
from simclr.encoder.directory import write_encoder
from simclr.evaluation.features import embed
from simclr.evaluation.knn import knn
from simclr.methods.simclr import build_model
from simclr.recipes import recipe


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = recipe("patterns_tiny")
    path = tmp_path_factory.mktemp("published") / "encoder"
    write_encoder(build_model(config).encoder.state_dict(), config, path, {})
    return path


def test_every_protocol_writes_its_scores_classes_and_picture(encoder: Path, patterns: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["evaluate", str(encoder), "--data", str(patterns), "--resamples", "100", "--epochs", "0.5", "--k", "20", "--batch-size", "60"]
    cli.main([*words, "--protocol", "knn", "probe", "lbfgs", "sgd"])
    said = capsys.readouterr().out
    assert "knn: k 20, temperature 0.1; 240 training and 60 test images" in said
    assert "lbfgs: lambda" in said and "sgd: epochs 0.5, batch_size 60, peak_lr 0.02344, weight_decay 0" in said
    for protocol in ("knn", "probe", "lbfgs", "sgd"):
        told = json.loads((encoder / f"evaluation/{protocol}.json").read_text())
        table = np.array(told["confusion"])
        assert table.sum() == 60 and abs(np.trace(table) / 60 - told["top1"]) < 1e-6
        assert told["top1_interval"]["low"] <= told["top1"] <= told["top1_interval"]["high"] and told["top5"] >= told["top1"]
        assert len(told["per_class"]) == 10
        with Image.open(encoder / f"evaluation/{protocol}.png") as picture:
            assert picture.width > 400

    # The command's kNN is the function's.
    from simclr.data.loader import in_order
    from simclr.views.preprocessing import Preprocessing

    config = recipe("patterns_tiny")
    seen = Preprocessing.of(config.views)
    frozen = build_model(config).encoder.eval()
    train, test = (embed(frozen, in_order(patterns, s, seen, 256), seen) for s in ("train", "test"))
    told = json.loads((encoder / "evaluation/knn.json").read_text())
    assert abs(told["top1"] - knn(train.h, train.y, test.h, test.y, 20, 0.1)["top1"]) < 1e-6


def test_a_class_without_test_images_is_null() -> None:
    found = summary(torch.eye(3), torch.tensor([0, 1, 0]), ["a", "b", "c"], 100)
    assert found["per_class"] == {"a": 0.5, "b": 1.0, "c": None} and found["mean_per_class"] == 0.75


def test_the_picture_is_blue_on_the_diagonal_and_red_off_it() -> None:
    image = np.asarray(confusion_picture(np.array([[9, 1], [0, 10]]), ["cat", "dog"], "a title"))
    corners = {tuple(c) for c in image.reshape(-1, 3).tolist()}
    assert (31, 95, 168) in corners  # a whole row of right answers
    assert any(r > 200 and g < 230 and b < 230 for r, g, b in corners)
    assert confusion_picture(np.eye(300, dtype=np.int64), ["x"] * 300, "wide").width < 1500


def test_results_of_a_copy_go_beside_the_runs(tmp_path: Path) -> None:
    assert default_out(tmp_path) == tmp_path / "evaluation"
    assert default_out(Path("patterns@champion")) == Path("runs/evaluation/patterns-champion")
    assert default_out(Path("s3:/lab/runs/one")) == Path("runs/evaluation/lab-runs-one")


def test_an_encoder_of_the_registry_is_pulled_and_left_nowhere(
    encoder: Path, patterns: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import shutil

    from pipelines.tracking import registry
    from pipelines.tracking import uri as mlflow_uri

    def pull(uri: str, spec: str, to: Path, progress: object) -> None:
        assert spec == "patterns@champion" and uri.startswith("sqlite:")
        shutil.copytree(encoder, to)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(mlflow_uri, "check", lambda uri: None)
    monkeypatch.setattr(registry, "pull", pull)
    cli.main(["evaluate", "patterns@champion", "--data", str(patterns), "--protocol", "knn", "--resamples", "100"])
    assert (tmp_path / "runs/evaluation/patterns-champion/knn.json").is_file()
    assert [p.name for p in tmp_path.iterdir()] == ["runs"]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--protocol", "knn", "--k", "0"), "--k is 0; expected at least 1"),
        (("--protocol", "knn", "--temperature", "0"), "--temperature is 0.0; expected more than 0"),
        (("--protocol", "sgd", "--limit", "10"), "leave one of them out"),
        (("--protocol", "knn", "--suite", "transfer"), "--suite transfer has a protocol of its own"),
    ],
)
def test_mistakes_are_told_in_a_sentence(
    encoder: Path, patterns: Path, words: tuple[str, ...], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["evaluate", str(encoder), "--data", str(patterns), *words])
    assert ended.value.code == 2 and sentence in capsys.readouterr().err


def test_photographs_without_labels_are_refused(encoder: Path, photographs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["evaluate", str(encoder), "--data", str(photographs), "--protocol", "knn"])
    assert "has no labels" in capsys.readouterr().err
