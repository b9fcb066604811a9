"""`simclr pretrain --start` and `--extend`: which weights they find, which run they make, and what is said where they cannot."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipelines.commands import pretrain as command
from pipelines.commands.report import gather
from pipelines.runs import directory
from pipelines.runs.directory import Run, load_run, open_run
from pipelines.tracking import card, outbox, record, registry
from pipelines.train import driver, messages, retry, warm_start
from simclr import checkpoint
from simclr.config import Config, Train
from simclr.data.manifest import read_manifest
from simclr.encoder.directory import read_text, write_encoder
from simclr.encoder.export import torchvision_name
from simclr.errors import UserError
from simclr.methods.classifier import build_classifier
from simclr.recipes import recipe
from simclr.stages import FineTune
from tests.support import command as commands
from tests.support.command import refused
from tests.support.s3 import Proxy
from tests.support.small import TINY
from tests.support.small import run as trained

CONFIG = dataclasses.replace(TINY, train=dataclasses.replace(TINY.train, precision="float32", steps=3, checkpoint_every_steps=3))


def complete(folder: Path, patterns: Path, config: Config = CONFIG) -> Run:
    """A run of three steps as `simclr pretrain` leaves it."""
    run = open_run(folder, "patterns_tiny", config, patterns)
    run.save()
    for step, report in trained(config, patterns, run.checkpoints).items():
        run.append({**report.metrics, "step": step, "total_steps": report.total_steps})
    command.publish_newest(run, read_manifest(patterns).classes)
    return run


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory, patterns: Path) -> Run:
    return complete(tmp_path_factory.mktemp("parent") / "run", patterns)


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch) -> list[driver.Job]:
    """The jobs that `simclr pretrain` would have trained."""
    found: list[driver.Job] = []

    def train(job: driver.Job, began: float) -> Run:
        found.append(job)
        return job.run

    monkeypatch.setattr(driver, "train", train)
    return found


TINY_FLAGS = (
    *("--encoder.cifar-stem", "--head.d-out", "16", "--views.size-px", "32", "--train.batch-size", "24"),
    *("--train.steps", "3", "--workers", "1", "--encoder.depth", "8"),
)


def pretrain(simclr: commands.Run, patterns: Path, *more: object) -> str:
    """What the command says."""
    code, _, err = simclr("pretrain", "patterns_tiny", "--data", patterns, *TINY_FLAGS, *more)
    assert code == 0, err
    return err


def tensors(run: Run) -> dict[str, torch.Tensor]:
    return checkpoint.read(run.checkpoints / "step-000000000").tensors


# ── Which weights ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_run_begins_with_the_weights_of_a_run(simclr: commands.Run, parent: Run, patterns: Path, jobs: list[driver.Job]) -> None:
    """run.json, MLflow's tags, the report, the published encoder and its card name them; the same command finds the same run."""
    said = pretrain(simclr, patterns, "--start", parent.path)
    run = load_run(jobs[0].run.path)
    start = run.start
    assert start["from"] == str(parent.path) and start["step"] == 3 and not start["extends"] and len(start["sha256"]) == 64
    count = len(load_file(parent.encoder / "encoder.safetensors"))
    assert start["taken"] == f"{count} of {count} encoder tensors; head: taken; classifier: taken"
    assert f"begins with {parent.path}, step 3 (sha256 {start['sha256'][:12]}…): {start['taken']}" in " ".join(said.split())
    newest = checkpoint.read(parent.checkpoints / "step-000000003").tensors
    began = tensors(run)
    assert all(torch.equal(t, newest[name]) for name, t in began.items()) and not any("optimizer" in name for name in began)
    assert run.begun and checkpoint.read(run.checkpoints / "step-000000000").config == run.config.to_dict()

    stamp = (run.checkpoints / "step-000000000").stat().st_mtime_ns
    assert "begins with" not in pretrain(simclr, patterns, "--start", parent.encoder)  # the same weights, elsewhere
    assert jobs[1].run.path == run.path and (run.checkpoints / "step-000000000").stat().st_mtime_ns == stamp
    assert load_run(run.path).start == start

    assert gather(run).facts["began with"] == f"{run.began_with}: {start['taken']}"
    command.publish_newest(run, read_manifest(patterns).classes)
    published = read_text(run.encoder)["published"]
    assert published["start"] == start | {"from": "run"}  # no path of this machine
    assert f"| Began with | run (weights of sha256 {start['sha256'][:12]}…) |" in card.write_card(run.encoder, "x", record.Record(), "none")


def test_mlflow_has_the_start_as_tags(parent: Run, patterns: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start = warm_start.described(parent.path, command.weights_at(parent.path, None), True)
    run = open_run(tmp_path / "run", "patterns_tiny", CONFIG, patterns, start=start)
    made: list[Any] = []
    monkeypatch.setattr(outbox.client, "MLflowRun", lambda *args: made.append(args))
    outbox.open_run(run, f"sqlite:///{tmp_path}/mlflow.db", {}, lambda found: None)
    tags = made[0][4]
    assert tags["start_from"] == str(parent.path) and tags["start_sha256"] == start["sha256"] and tags["start_extends"] == "True"


def test_an_unfinished_run_gives_its_newest_checkpoint(parent: Run, patterns: Path, tmp_path: Path) -> None:
    shutil.copytree(parent.path, tmp_path / "run")
    shutil.rmtree(tmp_path / "run/encoder")
    found, whole = command.weights_at(tmp_path / "run", None), command.weights_at(parent.path, None)
    assert found.sha256 == whole.sha256 and found.step == 3 and found.classes == whole.classes == read_manifest(patterns).classes
    shutil.rmtree(tmp_path / "run/checkpoints")
    with pytest.raises(UserError, match="has neither an encoder nor a checkpoint yet; go on with it first"):
        command.weights_at(tmp_path / "run", None)


def test_a_file_and_the_registry_give_weights(
    simclr: commands.Run, parent: Run, patterns: Path, tmp_path: Path, jobs: list[driver.Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = load_file(parent.encoder / "encoder.safetensors")
    save_file({torchvision_name(name): t for name, t in encoder.items()} | {"fc.bias": torch.ones(3)}, tmp_path / "w.safetensors")
    said = " ".join(pretrain(simclr, patterns, "--start", "w.safetensors").split())
    assert "head: new, none was given; classifier: new, none was given; not used: fc.bias" in said
    assert "does not say how its images were normalised; torchvision's own weights want --views.mean 0.485 0.456 0.406" in said
    began = tensors(jobs[0].run)
    assert all(torch.equal(began[f"model.encoder.{name}"], t) for name, t in encoder.items())
    assert jobs[0].run.start["from"] == str(tmp_path / "w.safetensors") and jobs[0].run.start["step"] is None

    def pull(uri: str, spec: str, to: Path, progress: Any) -> None:
        assert spec == "photos@champion"
        shutil.copytree(parent.encoder, to)

    monkeypatch.setattr(registry, "pull", pull)
    said = " ".join(pretrain(simclr, patterns, "--start", "photos@champion", "--views.mean", "0.5", "0.5", "0.5").split())
    assert "begins with photos@champion, step 3" in said
    assert "images were normalised by --views.mean 0 0 0 --views.std 1 1 1, this run has --views.mean 0.5 0.5 0.5" in said


def test_runs_in_s3_give_weights_and_begin_with_them(
    simclr: commands.Run, parent: Run, patterns: Path, s3: Proxy, jobs: list[driver.Job]
) -> None:
    from simclr.data.s3.store import Store

    for path in parent.path.rglob("*"):
        if path.is_file():
            Store().client.put_object(Bucket="photos", Key=f"runs/parent/{path.relative_to(parent.path)}", Body=path.read_bytes())
    pretrain(simclr, patterns, "--start", "s3://photos/runs/parent", "--run", "s3://photos/runs/child")
    run = jobs[0].run
    assert run.start["from"] == "s3://photos/runs/parent" and run.start["sha256"] == command.weights_at(parent.path, None).sha256
    jobs[0].home.ticket = None  # the command that held the lease is over
    jobs[0].home.send()
    jobs[0].home.sync_checkpoints()  # as `driver.train` does before any worker starts
    keys = {found.name for found in Store().listing(jobs[0].home.at) if "step-" in found.name}  # type: ignore[arg-type]
    assert keys == {"checkpoints/step-000000000/state.safetensors", "checkpoints/step-000000000/checkpoint.json"}
    different = simclr("pretrain", "patterns_tiny", "--data", patterns, *TINY_FLAGS, "--run", "s3://photos/runs/child")
    refused(different, "first weights s3://photos/runs/parent, step 3 .* there, those of its seed here", "--start s3://photos/runs/child")


def test_places_without_weights_are_refused(simclr: commands.Run, parent: Run, patterns: Path, tmp_path: Path) -> None:
    begin = ("pretrain", "patterns_tiny", "--data", patterns)
    for where in ("nowhere", "w.safetensors"):
        refused(simclr(*begin, "--start", where), f"{where} is not there; --start takes a run, a published encoder, .*NAME@alias")
    refused(simclr(*begin, "--start", patterns), "is no published encoder")
    refused(
        simclr(*begin, "--start", parent.path, "--extend", parent.path), "--extend has the recipe of its run; leave out 'patterns_tiny'"
    )
    refused(simclr("pretrain", "--start", parent.path, "--extend", parent.path), "both say what to begin with")
    refused(simclr(*begin, "--start", parent.path, "--encoder.depth", "18"), "do not fit the encoder: .*would fit: --encoder.depth 8")
    assert not list(tmp_path.iterdir())


# ── Which run ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_directory_tells_starts_apart(patterns: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    starts: list[dict[str, Any] | None] = [None]
    starts += [
        {"from": name, "step": None, "sha256": 64 * digit, "extends": False, "taken": ""} for name, digit in (("a", "a"), ("b", "b"))
    ]
    runs = [open_run(None, "patterns_tiny", CONFIG, patterns, start=start) for start in starts]
    assert len({run.path for run in runs}) == 3
    assert runs[0].path == open_run(None, "patterns_tiny", CONFIG, patterns).path
    for run in runs:
        run.save()
    assert ("start" in json.loads((runs[0].path / "run.json").read_text()), load_run(runs[1].path).start) == (False, starts[1])
    moved = {**starts[1], "from": "elsewhere", "extends": True}  # type: ignore[dict-item]
    assert open_run(runs[1].path, "patterns_tiny", CONFIG, patterns, start=moved).start == starts[1]  # the same weights
    for there in runs:
        for here, start in zip(runs, starts, strict=True):
            if here is not there:
                with pytest.raises(UserError, match=r"belongs to another config: first weights .* there, .* here; use another --run"):
                    open_run(there.path, "patterns_tiny", CONFIG, patterns, start=start)


def test_a_damaged_start_in_run_json_is_a_sentence(patterns: Path, tmp_path: Path) -> None:
    run = open_run(tmp_path / "run", "patterns_tiny", CONFIG, patterns)
    run.save()
    text = json.loads((run.path / "run.json").read_text())
    (run.path / "run.json").write_text(json.dumps(text | {"start": {"from": "a"}}))
    with pytest.raises(UserError, match=r"start in .*run\.json is damaged: it has no 'step'"):
        load_run(run.path)


def test_a_run_that_began_with_weights_never_begins_without_a_checkpoint(
    parent: Run, patterns: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither its driver nor a worker goes on with the seed's weights when every checkpoint is damaged."""
    weights = command.weights_at(parent.path, None)
    run = open_run(tmp_path / "run", "patterns_tiny", CONFIG, patterns, start=warm_start.described(parent.path, weights, False))
    run = warm_start.begin(run, weights, weights.classes)
    assert driver._steps_done(run) == 0
    path = run.checkpoints / "step-000000000/state.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(UserError, match=r"no checkpoint in .* is whole; remove that folder, and the same command begins again"):
        driver._steps_done(run, whole=True)  # else it looks at sizes
    tuned = dataclasses.replace(run, start={}, config=FineTune(encoder_sha256="a"), stage="finetune")
    assert tuned.begun and not dataclasses.replace(tuned, config=FineTune()).begun
    pytest.importorskip("ray")
    import ray.train.torch

    from pipelines import allocator
    from pipelines.train.worker import train_worker

    monkeypatch.setenv("AWS_METADATA_SERVICE_NUM_ATTEMPTS", "8")  # the worker sets both for its process
    monkeypatch.setattr(allocator, "keep_freed_memory", lambda: None)
    monkeypatch.setattr(ray.train, "get_context", lambda: SimpleNamespace(get_world_rank=lambda: 0, get_world_size=lambda: 1))
    monkeypatch.setattr(ray.train.torch, "get_device", lambda: torch.device("cpu"))
    told: list[messages.Said] = []
    inbox = SimpleNamespace(actor=SimpleNamespace(put=SimpleNamespace(remote=told.append)))
    task = messages.Task(stage="pretrain", config=CONFIG, data=str(patterns), run=str(run.path), begun=run.begun, inbox=inbox)
    with pytest.raises(UserError, match="began with given weights, and no checkpoint in it is whole"):
        train_worker(task)
    assert "does not match its checksum" in told[0].text  # the driver, which has not read it, says so


# ── Longer ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_complete_run_is_extended(simclr: commands.Run, parent: Run, patterns: Path, jobs: list[driver.Job], tmp_path: Path) -> None:
    """By its recipe, config and data, from its weights, on another seed, in a new run that names it."""
    extended = simclr("pretrain", "--extend", parent.path, "--train.epochs", "1.5", "--workers", "1")
    assert extended[0] == 0, extended[2]
    run = load_run(jobs[0].run.path)
    assert run.path.name.startswith("patterns_tiny-") and run.path.resolve().parent == (tmp_path / "runs").resolve()
    assert run.start["extends"] and run.start["from"] == str(parent.path) and run.start["step"] == 3
    assert run.data.resolve() == patterns.resolve()
    train = dataclasses.replace(parent.config.train, epochs=1.5, steps=None)
    assert run.config == dataclasses.replace(parent.config, seed=parent.config.seed + 1, train=train)
    assert jobs[0].total == 16  # 240 images, 1.5 epochs of batches of 24, and one
    began, newest = tensors(run), checkpoint.read(parent.checkpoints / "step-000000003").tensors
    assert all(torch.equal(t, newest[name]) for name, t in began.items())
    assert gather(run).facts["extends"].startswith(f"{parent.path}, step 3 (sha256 ")
    assert simclr("pretrain", f"--extend={parent.path}", "--train.epochs", "1.5", "--workers", "1")[0] == 0
    assert jobs[1].run.path == jobs[0].run.path
    assert simclr("pretrain", "--extend", parent.path, "--seed", "7", "--workers", "1")[0] == 0
    assert jobs[2].run.config == dataclasses.replace(parent.config, seed=7) and jobs[2].total == 3


def test_only_a_complete_pretraining_is_extended(simclr: commands.Run, parent: Run, patterns: Path, tmp_path: Path) -> None:
    refused(simclr("pretrain", "--extend", "nowhere"), "nowhere is no run directory")
    refused(simclr("pretrain", "--extend", parent.encoder), "is no run directory")
    shutil.copytree(parent.path, tmp_path / "half")
    with (tmp_path / "half/metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "total_steps": 9}\n')
    refused(simclr("pretrain", "--extend", "half"), "half is not complete; finish it with .*, or begin with .* --start half")
    open_run(tmp_path / "tuned", "finetune-x", FineTune(), patterns, stage="finetune").save()
    refused(simclr("pretrain", "--extend", "tuned"), "tuned was made by `simclr finetune`, .* use --start tuned")


def test_refusals_name_both_ways_and_they_are_accepted(simclr: commands.Run, parent: Run, patterns: Path, jobs: list[driver.Job]) -> None:
    same = ("pretrain", "patterns_tiny", "--data", patterns, "--run", parent.path, *TINY_FLAGS)
    longer = simclr(*same, "--train.epochs", "9")
    refused(longer, "belongs to another config: ", "use another --run; to train on from its weights in a new run: ")
    (advised,) = re.findall(r"`simclr (pretrain --extend .+) N`", longer[2])
    assert simclr(*advised.split(), "9", "--workers", "1")[0] == 0
    assert longer[2].strip().endswith(f"or a recipe with --start {parent.path}")
    pretrain(simclr, patterns, "--start", parent.path)
    assert [job.run.start["extends"] for job in jobs] == [True, False]


def test_a_complete_run_says_how_to_go_on(parent: Run, capfd: pytest.CaptureFixture[str]) -> None:
    home = driver.sync.Home(parent.path)
    resources = driver.ray_train.Resources(workers=1)
    job = driver.Job(run=parent, home=home, asked=parent.path, total=3, uri="", resources=resources, publish=lambda run, method: None)
    driver.train(job, 0.0)
    said = " ".join(capfd.readouterr().err.split())
    assert f"3 of 3 steps; nothing to do; {directory.ways_on(parent.path)}" in said and "--extend" in said and "--start" in said


def test_a_command_writes_nothing_into_a_run_that_another_trains(
    simclr: commands.Run, parent: Run, patterns: Path, tmp_path: Path, jobs: list[driver.Job]
) -> None:
    """Where two start at once, the second one is refused before it writes run.json, step 0, labels.txt or the teacher."""
    model = build_classifier(TINY, 10, 0)
    parts, linear = dict(model.encoder.state_dict()), dict(model.classifier.state_dict())
    classes = list(read_manifest(patterns).classes)
    write_encoder(parts, TINY, tmp_path / "teacher", {}, classifier=linear, classes=classes)
    for words, written in (
        (("pretrain", "patterns_tiny", *TINY_FLAGS, "--start", parent.path), "checkpoints"),
        (("finetune", parent.path, "--batch-size", 20, "--workers", 1), "labels.txt"),
        (("distill", tmp_path / "teacher", "--batch-size", 20, "--workers", 1), "teacher"),
    ):
        code, _, said = simclr(*words, "--data", patterns)
        assert code == 0, said
        run = jobs[-1].run
        assert (run.path / written).exists()
        for path in run.path.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name not in ("run.json", ".training"):
                path.unlink()
        stamp = (run.path / "run.json").stat().st_mtime_ns
        with run.alone():
            refused(simclr(*words, "--data", patterns), "another process is training ", "wait for it, end it, or use another --run")
        assert {path.name for path in run.path.iterdir()} == {"run.json", ".training"}
        assert (run.path / "run.json").stat().st_mtime_ns == stamp
    assert [job.run.stage for job in jobs] == ["pretrain", "finetune", "distill"]


# ── Too little memory ──────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("stage", "config", "workers"),
    [
        ("pretrain", recipe("imagenet_resnet50"), 8),
        ("pretrain", recipe("patterns_tiny"), 1),
        ("pretrain", dataclasses.replace(CONFIG, train=dataclasses.replace(CONFIG.train, micro_batch=4)), 2),
        ("pretrain", dataclasses.replace(CONFIG, train=dataclasses.replace(CONFIG.train, batch_size=6, shard_groups=2)), 2),
        ("pretrain", dataclasses.replace(CONFIG, loss=dataclasses.replace(CONFIG.loss, memory=96)), 2),
        ("finetune", FineTune(), 4),
    ],
)
def test_what_an_out_of_memory_sentence_advises_is_accepted(
    patterns: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str, config: Config, workers: int
) -> None:
    """More workers by the same run; a piece or a batch that the config takes, in a new run, since the same one refuses it."""
    monkeypatch.chdir(tmp_path)
    oom = type("OutOfMemoryError", (RuntimeError,), {"__module__": "torch"})("tried to allocate 3 GiB")
    failure = type("Group", (Exception,), {"worker_failures": {0: oom}})()
    said = retry.non_retryable(failure, retry.less_memory(stage, config, workers))
    assert said.startswith("a worker's device is out of memory (tried to allocate 3 GiB); ")
    run = open_run(tmp_path / "mine", "r", config, patterns, stage=stage)
    run.save()
    more = re.search(r"the same command with --workers (\d+) goes on with this run; ", said)
    assert (more is None) == (config.train.micro_batch is not None)
    if more:
        assert int(more[1]) > workers and retry.shares(config, int(more[1]))
        assert open_run(run.path, "r", config, patterns, stage=stage).created == run.created
    other = re.search(r"--(?:train\.)?(micro-batch|batch-size) (\d+) is for a new run: add another --run, or leave --run out$", said)
    assert other
    name, value = other[1].replace("-", "_"), int(other[2])
    assert (name == "micro_batch") == (stage == "pretrain" and not config.loss.memory)
    assert value < (config.train.micro_batch or config.images_per_rank(workers) if name == "micro_batch" else config.train.batch_size)
    changed = dataclasses.replace(config, train=dataclasses.replace(config.train, **{name: value}))
    assert retry.shares(changed, workers)
    assert open_run(None, "r", changed, patterns, stage=stage).config == changed
    assert open_run(tmp_path / "another", "r", changed, patterns, stage=stage).config == changed
    with pytest.raises(UserError, match=rf"train\.{name} .* there, {value} here; use another --run"):
        open_run(run.path, "r", changed, patterns, stage=stage)


@pytest.mark.parametrize(
    ("batch", "workers", "advised"),
    [
        (8, 4, "a smaller network is for a new run"),  # 8 workers would have an image each, and so would 4 of a batch of 4
        (16, 8, "a smaller network is for a new run"),
        (16, 4, "--workers 6 goes on with this run, with other numbers: BatchNorm then normalises over 2 images; --train.micro-batch 3"),
        (24, 4, "--workers 5 goes on with this run, with other numbers: BatchNorm then normalises over 4 images; --train.micro-batch 5"),
    ],
)
def test_no_advice_leaves_batchnorm_a_single_image(batch: int, workers: int, advised: str) -> None:
    own = dataclasses.replace(TINY.encoder, batchnorm="per_worker")
    config = dataclasses.replace(CONFIG, encoder=own, train=dataclasses.replace(CONFIG.train, batch_size=batch))
    assert retry.less_memory("pretrain", config, workers).removeprefix("the same command with ").startswith(advised)


def test_a_frozen_network_has_the_same_numbers_on_more_workers() -> None:
    frozen = FineTune(encoder=dataclasses.replace(TINY.encoder, batchnorm="per_worker"), train=Train(batch_size=8), linear=True)
    said = retry.less_memory("finetune", frozen, 4)
    assert said.startswith("the same command with --workers 8 goes on with this run; --batch-size 4 is for a new run")
