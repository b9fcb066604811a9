"""`simclr pretrain --subset`: a run sees the listed images alone, is found by them, and goes on bitwise."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from pipelines.commands import pretrain as command
from pipelines.commands.report import gather
from pipelines.runs.directory import Run, load_run
from pipelines.tracking import card
from pipelines.tracking.record import Record
from pipelines.train import driver
from simclr import checkpoint
from simclr.data import labels, loader
from simclr.data.manifest import read_manifest
from simclr.encoder.directory import read_text
from simclr.errors import UserError
from simclr.methods.simclr import build_model
from simclr.train import Start, train
from tests.support import command as commands
from tests.support.command import refused
from tests.support.s3 import Proxy
from tests.support.small import TINY

FLAGS = (
    *("--encoder.cifar-stem", "--head.d-out", "16", "--views.size-px", "32", "--train.batch-size", "8"),
    *("--train.steps", "1", "--workers", "1", "--encoder.depth", "8"),
)
IDS = np.arange(0, 60, 2)


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch) -> list[driver.Job]:
    """The jobs that `simclr pretrain` would have trained."""
    found: list[driver.Job] = []

    def train(job: driver.Job, began: float) -> Run:
        job.run.save()
        found.append(job)
        return job.run

    monkeypatch.setattr(driver, "train", train)
    return found


@pytest.fixture
def listed(tmp_path: Path) -> Path:
    """A list of 30 of the 240 photographs, by name and in no order."""
    path = tmp_path / "list.txt"
    path.write_text("# a note\n" + "".join(f"{i:03}.jpg\n" for i in IDS[::-1]))
    return path


def test_a_run_trains_on_the_listed_images_alone(
    simclr: commands.Run, photographs: Path, listed: Path, jobs: list[driver.Job], tmp_path: Path
) -> None:
    """Unlabelled ones, by name or sample id; run.json, subset.txt, the report, the encoder and its card say which."""
    same = ("pretrain", "patterns_tiny", "--data", photographs, *FLAGS)
    code, _, err = simclr(*same, "--subset", listed)
    assert code == 0, err
    job, run = jobs[0], load_run(jobs[0].run.path)
    assert job.given["ids"].tolist() == IDS.tolist() and job.total == 1
    assert run.subset == {"from": str(listed), "images": 30, "sha256": labels.digest(IDS)}
    kept = (run.path / "subset.txt").read_text().splitlines()
    assert [line for line in kept if line[0] != "#"] == [f"{i:03}.jpg" for i in IDS]
    assert gather(run).facts["images"].startswith(f"30 of {listed} (sha256 ")

    (tmp_path / "ids.txt").write_text("\n".join(map(str, IDS)))  # the same images: the same run
    assert simclr(*same, "--subset", tmp_path / "ids.txt")[0] == 0 and jobs[1].run.path == run.path
    assert simclr(*same)[0] == 0 and jobs[2].run.path != run.path and not jobs[2].given and not load_run(jobs[2].run.path).subset
    (tmp_path / "ids.txt").write_text("\n".join(map(str, IDS + 1)))
    assert simclr(*same, "--subset", tmp_path / "ids.txt")[0] == 0 and jobs[3].run.path not in (run.path, jobs[2].run.path)
    refused(simclr(*same, "--run", run.path), "images 30 of .*list.txt .* there, all of the training split here")
    refused(simclr(*same, "--run", jobs[2].run.path, "--subset", listed), "images all of the training split there, 30 of .*list.txt")


def test_the_length_of_a_run_is_that_of_its_subset(simclr: commands.Run, photographs: Path, listed: Path, jobs: list[driver.Job]) -> None:
    flags = [*FLAGS, "--train.epochs", "8", "--train.steps", "None"]
    assert simclr("pretrain", "patterns_tiny", "--data", photographs, *flags, "--subset", listed)[0] == 0
    assert jobs[0].total == 30 * 8 // 8 + 1


def test_lists_that_do_not_fit_are_refused(simclr: commands.Run, photographs: Path, listed: Path, tmp_path: Path) -> None:
    same = ("pretrain", "patterns_tiny", "--data", photographs, *FLAGS, "--subset")
    refused(simclr(*same, "nowhere.txt"), "there is no list of images nowhere.txt")
    refused(
        simclr(*same, listed, "--train.batch-size", "32"), r"batch_size 32 is larger than the subset \(30 images of .*--train.batch-size 30"
    )
    refused(simclr(*same, listed, "--train.shard-groups", "2"), "--subset and --train.shard-groups 2 do not go together")
    for text, sentence in (
        ("cat.jpg", "line 1: no image of the training split has the name 'cat.jpg'"),
        ("240", "no sample 240"),
        ("", "lists no image"),
    ):
        (tmp_path / "wrong.txt").write_text(text)
        refused(simclr(*same, tmp_path / "wrong.txt"), sentence)
    assert not (tmp_path / "runs").exists()


def test_training_on_a_subset_is_the_loop_over_its_ids_and_goes_on_bitwise(patterns: Path, tmp_path: Path) -> None:
    """Every batch has images of the subset alone, in the whole set's order; a run cut at step 1 ends as one that was not."""
    ids = np.arange(3, 240, 4)
    config = dataclasses.replace(TINY, train=dataclasses.replace(TINY.train, batch_size=6, steps=2, checkpoint_every_steps=1))
    stream = loader.batches(config, patterns, 0, 0, 1, ids=ids)
    assert all(set(next(stream).ids.tolist()) <= set(ids.tolist()) for _ in range(4))
    stream.close()
    states = []
    for folder, until in (("whole", 2), ("cut", 1), ("cut", 2)):
        found = checkpoint.latest(tmp_path / folder, print) if (tmp_path / folder).exists() else None
        for report in train(config, Start(patterns, checkpoint=found, ids=ids)):
            if report.due:
                checkpoint.write(tmp_path / folder, report.state, 3)
            if report.step == until:
                states.append({name: t.clone() for name, t in report.state.tensors.items()})
                break
    assert all(torch.equal(t, states[2][name]) for name, t in states[0].items()) and states[0].keys() == states[2].keys()
    assert not all(torch.equal(t, states[1][name]) for name, t in states[0].items())


def test_an_extension_sees_the_images_of_its_run(simclr: commands.Run, photographs: Path, listed: Path, jobs: list[driver.Job]) -> None:
    """Also where the list is gone: the run keeps it. The encoder and its card name the list."""
    assert simclr("pretrain", "patterns_tiny", "--data", photographs, *FLAGS, "--subset", listed)[0] == 0
    run = load_run(jobs[0].run.path)
    tensors = {f"model.{name}": t for name, t in build_model(run.config).state_dict().items()}
    checkpoint.write(run.checkpoints, checkpoint.State(1, run.config.to_dict(), tensors), 1)
    run.append({"step": 1, "total_steps": 1})
    command.publish_newest(run, read_manifest(photographs).classes)
    assert read_text(run.encoder)["published"]["subset"] == run.subset | {"from": "list.txt"}
    assert "| Images | 30 of the data's, listed in list.txt (sha256 " in card.write_card(run.encoder, "x", Record(), "none")
    listed.unlink()
    code, _, err = simclr("pretrain", "--extend", run.path, "--workers", "1")
    assert code == 0, err
    assert jobs[1].given["ids"].tolist() == IDS.tolist() and load_run(jobs[1].run.path).subset["sha256"] == run.subset["sha256"]


def test_names_of_shards_in_s3_are_fetched(
    simclr: commands.Run, photographs: Path, listed: Path, s3: Proxy, jobs: list[driver.Job]
) -> None:
    from simclr.data.s3.store import Store

    for path in photographs.iterdir():
        if path.is_file():
            Store().client.put_object(Bucket="photos", Key=f"shards/{path.name}", Body=path.read_bytes())
    code, _, err = simclr("pretrain", "patterns_tiny", "--data", "s3://photos/shards", *FLAGS, "--subset", listed)
    assert code == 0, err
    assert jobs[0].given["ids"].tolist() == IDS.tolist()


def test_a_whole_name_means_its_image_where_it_is_the_end_of_others(tmp_path: Path) -> None:
    """What a list of ours names comes back: a.jpg beside b/a.jpg."""
    names = ["a.jpg", "b/a.jpg", "c/b/a.jpg"]
    labels.write(tmp_path / "list.txt", np.array([0, 1]), names, {})
    assert labels.read_subset(tmp_path / "list.txt", 3, names).tolist() == [0, 1]
    (tmp_path / "list.txt").write_text("a.jpg\n")
    with pytest.raises(UserError, match="more than one image has the name"):
        labels.read_subset(tmp_path / "list.txt", 2, names[1:])
