"""What is said of the settings of fine-tuning and distilling, which siblings of SimCLR come to with other networks and views."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pipelines import cli
from pipelines.commands import distill, finetune
from pipelines.evaluation import protocols
from pipelines.runs.directory import Run
from pipelines.train import driver
from simclr.config import Encoder, Optim, Train, Views
from simclr.data.manifest import read_manifest
from simclr.encoder.directory import write_encoder
from simclr.evaluation import linear
from simclr.evaluation.features import Features
from simclr.methods.classifier import build_classifier
from simclr.papers import unscored
from simclr.stages import Distill, FineTune
from tests.simclr.test_sense import notes
from tests.support.small import TINY

VIT = {"encoder": Encoder(vit="micro", patch_px=4), "views": Views(size_px=32)}
AUTHORS = Optim(name="adamw", base_lr=1e-3, weight_decay=0.05, layer_decay=0.75, warmup_epochs=5)  # arXiv:2111.06377, Tab. 9


def test_the_command_for_an_encoder_of_mae_has_its_authors_whole_setting() -> None:
    """With less than that, AdamW runs at LARS's rate, 0.16 for 1024 images, without decay and without a warm-up."""
    words = shlex.split(unscored("mae").partition(": ")[2])
    assert words[:2] == ["simclr", "finetune"]
    args = cli.parse("finetune", finetune.Args, words[2:])
    assert args.optim == AUTHORS and args.encoder.pool == "mean" and unscored("dino") == ""


@pytest.mark.parametrize(("stage", "peak", "base"), [(FineTune, 0.16, "1e-3"), (Distill, 6.4, "2.5e-4")])
def test_adamw_at_the_rate_of_lars_is_said(stage: type[FineTune | Distill], peak: float, base: str) -> None:
    given = replace(stage().optim, name="adamw")
    (said,) = notes(stage(**VIT, optim=given))  # type: ignore[arg-type]
    assert said.startswith(f"AdamW's rate rises to {peak:.2g}, as LARS's may") and f"--optim.base-lr {base} --optim.scaling linear" in said
    assert notes(stage(**VIT, optim=AUTHORS)) == ()  # type: ignore[arg-type]
    most = replace(AUTHORS, base_lr=0.02, warmup_epochs=0)
    assert notes(stage(**VIT, optim=most, train=Train(batch_size=256))) == ()  # type: ignore[arg-type]
    assert len(notes(stage(**VIT, optim=most, train=Train(batch_size=320)))) == 1  # type: ignore[arg-type]


# ── Crops of the pretraining ───────────────────────────────────────────────────────────────────────────────────────

MILD = replace(TINY, views=replace(TINY.views, area=(0.9, 1.0), flip_p=0.0))  # as CLIP's
SAID = "crops cover 90 to 100 % of an image and no image is mirrored, as in the training of the given network"


@pytest.fixture
def jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[driver.Job]:
    """The jobs that commands would train."""
    found: list[driver.Job] = []

    def train(job: driver.Job, began: float) -> Run:
        found.append(job)
        return job.run

    monkeypatch.setattr(driver, "train", train)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    return found


@pytest.mark.parametrize("stage", ["finetune", "distill"])
def test_crops_of_the_pretraining_are_said_and_may_be_changed(
    stage: str, jobs: list[driver.Job], patterns: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = build_classifier(TINY, 10, 0)
    parts, about = [dict(part.state_dict()) for part in (model.encoder, model.classifier)], list(read_manifest(patterns).classes)
    for name, config in (("mild", MILD), ("usual", TINY)):
        write_encoder(parts[0], config, tmp_path / name, {}, classifier=parts[1], classes=about)

    def run(given: str, *more: str) -> Run:
        words = [given, "--data", str(patterns), "--batch-size", "24", *(["--tap", "0"] if stage == "finetune" else []), *more]
        module = {"finetune": finetune, "distill": distill}[stage]
        args = cli.parse(stage, module.Args, words)
        (finetune.finetune if stage == "finetune" else distill.distill)(args)
        return jobs[-1].run

    kept, said = run("mild"), capsys.readouterr().err
    assert SAID in " ".join(said.split()) and "--views.area 0.08 1 and --views.flip-p 0.5" in " ".join(said.split())
    assert kept.config.views == MILD.views and [note for note in kept.notes if note.startswith(SAID)]
    changed = run("mild", "--views.area", "0.2", "1", "--views.flip-p", "0.5")
    assert changed.config.views == replace(MILD.views, area=(0.2, 1.0), flip_p=0.5) and changed.path != kept.path
    assert SAID[:12] not in "".join(changed.notes)
    flipped = run("mild", "--views.flip-p", "0.5")
    assert (
        flipped.config.views.area == (0.9, 1.0) and "mirrored" not in "".join(flipped.notes) and "crops cover 90" in "".join(flipped.notes)
    )
    usual = run("usual")
    assert usual.config.views == TINY.views and not [note for note in usual.notes if "crops cover" in note]

    changed.save()  # and the file of a run repeats it, with whatever encoder
    again = run("usual", "--config", str(changed.path))
    assert (again.config.views.area, again.config.views.flip_p) == ((0.2, 1.0), 0.5)


def test_the_protocol_with_crops_says_those_of_the_pretraining(
    patterns: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(linear, "sgd_probe", lambda *given, **more: torch.nn.Linear(4, 10))
    settings = protocols.Settings(k=None, temperature=None, epochs=1, batch_size=None, resamples=1, limit=None, threads=1)
    test = Features(torch.zeros(2, 4), torch.zeros(2, dtype=torch.long), torch.arange(2))
    for config, said in ((MILD, True), (TINY, False)):
        protocols._sgd(None, patterns, config, torch.device("cpu"), settings, 10, test)
        err = " ".join(capsys.readouterr().err.split())
        assert ("sgd: crops cover 90 to 100 % of an image and no image is mirrored, as in the encoder's training" in err) == said
