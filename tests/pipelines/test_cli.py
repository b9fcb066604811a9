"""Every command as a user types it: wrong input gets a sentence and exit code 2, before any worker starts, with nothing half-written."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import simclr as methods
from pipelines import cli, terminal
from tests.support.command import Run, refused


def listing(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


PRETRAIN = ("pretrain", "patterns_tiny", "--train.batch-size", "60", "--data")


def test_help_and_unknown_words(simclr: Run) -> None:
    code, out, _ = simclr("--help")
    assert code == 0 and all(f"  {name}" in out for name in cli.COMMANDS)
    assert simclr()[0] == 2
    refused(simclr("pretrian"), "unknown command 'pretrian'; nearest: pretrain")
    refused(simclr("pretrain", "patterns_tinny", "--data", "x"), "unknown recipe 'patterns_tinny'; nearest: patterns_tiny")
    refused(simclr("pretrain", "--data", "x"), r"which recipe\? `simclr pretrain RECIPE …`")


@pytest.mark.parametrize("command", sorted(cli.COMMANDS))
def test_every_command_has_help_with_units_and_defaults(simclr: Run, command: str) -> None:
    code, out, _ = simclr(command, "--help")
    assert code == 0 and f"usage: simclr {command}" in out and "--quiet" in out
    if command == "pretrain":
        for flag in ("--train.batch-size", "--optim.base-lr", "--workers", "--data", "--loss.temperature"):
            assert flag in out
        assert "default: 128" in out and "Learning rate per 256 images" in out


def test_a_misspelt_flag_names_the_nearest(simclr: Run, patterns: Path) -> None:
    code, out, err = simclr(*PRETRAIN, patterns, "--train.epoch", "3")
    assert code == 2 and "--train.epochs" in out + err


def test_recipes_are_listed(simclr: Run) -> None:
    code, out, _ = simclr("recipes")
    assert code == 0 and "cifar10_resnet18" in out and "imagenet_resnet152_3x_sk" in out


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda p: None, "photos"),
        (lambda p: p.mkdir(), "holds no images|no images"),
        (lambda p: (p.mkdir(), Image.new("RGB", (9, 9)).save(p / "a.png")), "1 usable image to train on; contrasting needs at least 2"),
        (lambda p: (p.mkdir(), (p / "a.txt").write_text("x")), r"\.txt"),
        (lambda p: p.write_bytes(b"no archive"), "photos"),
    ],
    ids=["missing", "empty", "one image", "no image", "a file"],
)
def test_a_source_without_images_is_named(simclr: Run, tmp_path: Path, make: Callable[[Path], Any], sentence: str) -> None:
    make(tmp_path / "photos")
    before = listing(tmp_path)
    refused(simclr("prepare", "--source", "photos", "--out", "shards"), sentence)
    assert listing(tmp_path) == before


def test_prepare_into_something_else_is_refused(simclr: Run, tmp_path: Path, patterns: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    refused(simclr("prepare", "--source", "patterns", "--out", "mine"), "mine is not empty and no dataset", "thesis.tex", "--out")
    refused(simclr("prepare", "--source", "patterns:train=9,test=3", "--out", patterns), "already holds shards", "--out")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--train.batch-size", "4", "--workers", "5"), "batch_size 4 has no image for each of 5 workers; use --workers 4 or fewer"),
        (("--train.batch-size", "242"), r"batch_size 242 is larger than the training split \(240 images\).*--train.batch-size 240"),
        (("--train.epochs", "0"), "train.epochs is 0.0; expected more than 0"),
        (("--views.size-px", "4"), "views.size_px is 4; expected 8 to 4096 pixels"),
        (("--workers", "0"), "--workers is 0; expected at least 1"),
        (("--device", "gpu"), "--device is 'gpu'; expected auto, cpu, cuda or tpu"),
        (("--tracking-uri", "htp://nowhere"), "htp://nowhere is no MLflow address"),
    ],
)
def test_pretrain_refuses_settings_that_cannot_work(
    simclr: Run, tmp_path: Path, patterns: Path, arguments: tuple[str, ...], sentence: str
) -> None:
    refused(simclr(*PRETRAIN, patterns, *arguments), sentence)
    assert listing(tmp_path) == []


def test_pretrain_refuses_data_that_is_none(simclr: Run, tmp_path: Path, patterns: Path) -> None:
    refused(simclr(*PRETRAIN, "nowhere"), "nowhere", "simclr prepare")
    other = tmp_path / "other"
    other.mkdir()
    for file in patterns.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    text = json.loads((other / "manifest.json").read_text())
    (other / "manifest.json").write_text(json.dumps(text | {"schema": 99}))
    refused(simclr(*PRETRAIN, other), "schema 99", "prepare")
    assert not (tmp_path / "runs").exists()


def test_an_mlflow_that_does_not_answer_costs_at_most_ten_seconds(simclr: Run, tmp_path: Path, patterns: Path) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    refused(
        simclr(*PRETRAIN, patterns, "--tracking-uri", f"http://127.0.0.1:{port}"), "no MLflow server at"
    )  # what it imports is there now
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        began = time.monotonic()
        port = silent.getsockname()[1]
        refused(simclr(*PRETRAIN, patterns, "--tracking-uri", f"http://127.0.0.1:{port}"), "no MLflow server at", "start it")
        assert time.monotonic() - began < 10
    assert listing(tmp_path) == []


def a_run(folder: Path, patterns: Path, **changes: object) -> Path:
    """A run directory as `simclr pretrain` leaves it when it is interrupted before the first checkpoint."""
    from dataclasses import replace

    from pipelines.runs.directory import open_run
    from simclr.recipes import recipe

    config = recipe("patterns_tiny")
    config = replace(config, train=replace(config.train, batch_size=60), **changes)  # type: ignore[arg-type]
    open_run(folder, "patterns_tiny", config, patterns).save()
    return folder


def test_a_run_of_another_config_is_refused_with_the_difference(simclr: Run, tmp_path: Path, patterns: Path) -> None:
    a_run(tmp_path / "run", patterns)
    before = (tmp_path / "run" / "run.json").read_bytes()
    different = ("--run", "run", "--loss.temperature", "0.7")
    refused(simclr(*PRETRAIN, patterns, *different), "belongs to another config: loss.temperature 0.2 there, 0.7 here; use another --run")
    assert (tmp_path / "run" / "run.json").read_bytes() == before
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("x")
    refused(simclr(*PRETRAIN, patterns, "--run", "full"), "full exists and is no run", "--run")


def test_a_checkpoint_that_does_not_fit_is_refused(simclr: Run, tmp_path: Path, patterns: Path) -> None:
    import torch

    from simclr import checkpoint

    run = a_run(tmp_path / "run", patterns)
    checkpoint.write(run / "checkpoints", checkpoint.State(3, {}, {"model.odd": torch.ones(2)}), keep=1)
    refused(simclr(*PRETRAIN, patterns, "--run", "run"), "step 3 does not fit this config: model.encoder.stem.0.weight is missing")


def test_too_little_space_is_said_before_training(simclr: Run, tmp_path: Path, patterns: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 1000, 1000))  # type: ignore[attr-defined]
    full = simclr(*PRETRAIN, patterns, "--run", "run")
    refused(full, "no space left on the disk of run", "MiB needed for 2 checkpoints", "--run on another")
    assert listing(tmp_path) == []


def test_a_disk_that_fills_up_in_prepare(simclr: Run, tmp_path: Path) -> None:
    """A real full disk: a file system of 2 MiB, if the machine lets us mount it."""
    small = tmp_path / "small"
    small.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(small)], capture_output=True).returncode:
        pytest.skip("cannot mount a file system here")
    try:
        refused(simclr("prepare", "--source", "patterns", "--out", small / "shards"), "no space left on the disk of", "--out")
        assert listing(small) == []
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_a_model_that_is_not_there(simclr: Run, tmp_path: Path) -> None:
    refused(simclr("pull", "patterns@champion", "--to", "here"), "no model 'patterns'", "simclr publish RUN")
    refused(simclr("pull", "patterns", "--to", "here"), "names no model version; expected NAME@alias")
    assert not (tmp_path / "here").exists()


def test_runs_and_encoders_that_are_none(simclr: Run, tmp_path: Path, patterns: Path) -> None:
    refused(simclr("evaluate", "nowhere"), "nowhere is neither a run nor a published encoder")
    refused(simclr("publish", "nowhere"), "nowhere is no run directory")
    refused(simclr("report", "nowhere"), "nowhere is no run directory")
    refused(simclr("evaluate", "nowhere", "--k", "0"), "--k is 0; expected at least 1")
    refused(simclr("evaluate", "nowhere", "--device", "tpu"), "--device is 'tpu'; expected auto, cpu or cuda")
    refused(simclr("bench", "loop", "--data", "nowhere"), "no directory nowhere")
    refused(simclr("demo", "--test", "0"), "--test is 0; expected at least 1")
    refused(simclr("prepare", "--source", "torchvision:", "--out", "x"), "which torchvision dataset")
    refused(simclr("embed", "nowhere", "x.png"), "no file or folder x.png|nowhere is no published encoder")
    run = a_run(tmp_path / "run", patterns)
    refused(simclr("evaluate", run), "has no encoder yet; finish it with the command that began it")
    refused(simclr("publish", run), "was not evaluated yet; `simclr evaluate")


def test_embed_takes_files_folders_and_arrays(simclr: Run, tmp_path: Path) -> None:
    from simclr.encoder.directory import write_encoder
    from simclr.methods.simclr import build_model
    from simclr.recipes import recipe

    config = recipe("patterns_tiny")
    write_encoder(dict(build_model(config).encoder.state_dict()), config, tmp_path / "encoder", {"recipe": "none"})
    rng = np.random.default_rng(0)
    (tmp_path / "photos").mkdir()
    for i, shape in enumerate([(40, 50, 3), (32, 32, 3), (40, 50, 3)]):
        Image.fromarray(rng.integers(0, 256, shape, np.uint8)).save(tmp_path / "photos" / f"{i}.png")
    code, out, _ = simclr("embed", "encoder", "photos", "--out", "f.npz")
    assert code == 0 and "f.npz: 3 × 64 features" in out
    with np.load(tmp_path / "f.npz") as file:
        features, names = file["features"], file["names"]
    assert features.shape == (3, 64) and np.isfinite(features).all() and [Path(n).name for n in names] == ["0.png", "1.png", "2.png"]
    np.save(tmp_path / "one.npy", np.asarray(Image.open(tmp_path / "photos" / "1.png"))[None])
    assert simclr("embed", "encoder", "one.npy", "--out", "g.npz")[0] == 0
    with np.load(tmp_path / "g.npz") as file:
        np.testing.assert_allclose(file["features"][0], features[1], rtol=1e-4, atol=1e-5)
    (tmp_path / "photos" / "3.png").write_bytes(b"\x89PNG no picture")
    refused(simclr("embed", "encoder", "photos/3.png", "--out", "h.npz"), r"none of the 1 files can be read as an image; .*3\.png")
    assert not list(tmp_path.glob("*h.npz*"))
    named = [f"photos/{i}.png" for i in range(4)]
    code, out, err = simclr("embed", "encoder", *named, "--out", "i.npz")  # named one by one as in a folder
    assert code == 0 and "3 × 64 features" in out and re.search(r"1 file is no image .* left out; the first: photos/3\.png", err)
    code, out, err = simclr("embed", "encoder", "photos", "--out", "h.npz")
    assert code == 0 and "3 × 64 features" in out and re.search(r"1 file is no image .* left out; the first: 3\.png", err)
    with np.load(tmp_path / "h.npz") as file:
        np.testing.assert_array_equal(file["features"], features)
    for most in (200, 900, 2000):
        Image.fromarray(rng.integers(0, most, (40, 40)).astype(np.uint16)).save(tmp_path / f"{most}.png")
    code, _, err = simclr("embed", "encoder", "200.png", "900.png", "2000.png", "--out", "d.npz", "--value-range", "0", "1000")
    assert code == 0 and "3 images were rescaled to 8 bits, integers from 0 (black) to 1,000 (white)" in err
    assert "1 of these had more than 1 % of their pixels outside this range, cut off at black or white" in err
    (tmp_path / "empty.npy").write_bytes(b"")
    refused(simclr("embed", "encoder", "empty.npy"), "empty.npy is no .npy file that can be read")
    np.save(tmp_path / "wrong.npy", np.zeros((2, 3, 8, 8), np.float32))
    refused(simclr("embed", "encoder", "wrong.npy"), r"holds float32 \(2, 3, 8, 8\); expected uint8 \(n, H, W, 3\)")


def test_what_cannot_be_written_is_found_before_anything_is_computed(simclr: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of one format is never written under the name of another."""
    monkeypatch.setattr(methods, "load_encoder", lambda *_, **__: pytest.fail("computed"))
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder.npz").mkdir()
    (tmp_path / "file").touch()
    is_file, is_folder = "is a file, where a folder is to be written", "is a folder, where a file is to be written"
    for words in (("embed", "e", "p", "--out"), ("convert", "c", "--to"), ("pull", "m@champion", "--to"), ("demo", "--out")):
        refused(simclr(*words, "file"), is_file)
    refused(simclr("curate", "f", "--diverse", "3", "--out", "file"), is_file)
    refused(simclr("evaluate", "e", "--protocol", "knn", "--out", "file"), is_file)
    refused(simclr("evaluate", "--features", "f", "--protocol", "knn", "--out", "file"), is_file)
    refused(simclr("embed", "e", "p", "--out", "folder.npz"), is_folder)
    refused(simclr("embed", "e", "p", "--out", "file/f.npz"), "a folder in the path file/f.npz is a file")
    refused(simclr("neighbours", "f", "1", "--out", "folder"), is_folder)
    refused(simclr("bench", "loss", "--profile", "folder"), is_folder)
    refused(simclr("embed", "e", "p", "--out", "f.csv"), r"f\.csv ends like a file, .* leave out \.csv, or end it with \.npz or \.parquet")
    refused(simclr("embed", "e", "p", "--out", "s3://photos/f.csv"), r"ends like a file")
    for words in (("convert", "c", "--to"), ("pull", "m@champion", "--to"), ("prepare", "--source", "patterns", "--out")):
        refused(simclr(*words, "x.safetensors"), r"ends like a file, and a folder is to be written; leave out \.safetensors")
    refused(simclr("report", "r", "--out", "r.parquet"), r"is of no kind that is written here; expected a name that ends with \.html")
    refused(simclr("bench", "loss", "--json", "r.csv"), r"expected a name that ends with \.json")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder", "folder.npz"]


def test_the_installed_command_starts_quickly_and_says_its_usage() -> None:
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-m", "pipelines.cli", "--help"], capture_output=True, text=True, check=True)
    assert "usage: simclr COMMAND" in done.stdout
    assert time.monotonic() - began < 10  # torch, ray and mlflow take longer than this together


def test_the_time_left_counts_from_the_first_step_not_from_the_start(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    with terminal.Bar("pretrain", 100, "steps") as bar:
        bar.resume_at(10)
        for clock[0], step in ((130.0, 11), (150.0, 31), (170.0, 51)):  # 30 s until the first step, then one a second
            bar.update(step, "loss 4", rate=64.0)
    assert capsys.readouterr().err.splitlines() == [
        "pretrain: 11/100 steps  64 images/s  30 s  loss 4",
        "pretrain: 31/100 steps  64 images/s  50 s  ETA 69 s  loss 4",
        "pretrain: 51/100 steps  64 images/s  70 s  ETA 49 s  loss 4",
    ]


def test_a_slow_rate_is_told_in_a_longer_unit(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """It was "0 trials/s"."""
    rates = [
        (0.0, ""),
        (64.2, "64 images/s"),
        (3.26, "3.3 images/s"),
        (1 / 30, "2 images/min"),
        (1 / 600, "6 images/h"),
        (1e-5, "0.036 images/h"),
    ]
    assert [terminal.pace(rate, "images/s") for rate, _ in rates] == [text for _, text in rates]
    clock = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    with terminal.Bar("sweep", 4, "trials", "trials/s") as bar:
        for clock[0], over in ((143.0, 0), (160.0, 1)):
            bar.update(over)
    assert capsys.readouterr().err.splitlines() == ["sweep: 0/4 trials  43 s", "sweep: 1/4 trials  1 trials/min  60 s  ETA 51 s"]


def test_a_run_finds_its_data_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, patterns: Path) -> None:
    from pipelines.runs.directory import load_run, open_run
    from simclr.recipes import recipe

    (tmp_path / "project" / "elsewhere").mkdir(parents=True)
    (tmp_path / "project" / "shards").symlink_to(patterns)
    monkeypatch.chdir(tmp_path / "project")
    config = recipe("patterns_tiny")
    open_run(Path("runs/one"), "patterns_tiny", config, Path("shards")).save()
    assert load_run(Path("runs/one")).data == Path("shards")
    monkeypatch.chdir("elsewhere")
    moved = load_run(Path("../runs/one"))
    assert moved.data == Path("../shards") and (moved.data / "manifest.json").is_file()
    assert open_run(Path("../runs/one"), "patterns_tiny", config, Path("../shards")).created == moved.created
    open_run(Path("two"), "patterns_tiny", config, patterns).save()
    assert load_run(Path("two")).data == patterns


def test_views_are_drawn_for_any_data_and_verify_names_a_damaged_shard(
    simclr: Run, tmp_path: Path, patterns: Path, photographs: Path
) -> None:
    code, out, _ = simclr("views", "patterns_tiny", "--data", patterns, "--images", "5", "--out", "a.png")
    assert code == 0 and "a.png: 5 images, each with its two views at 32 px" in out
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.size == (312, 22 + 5 * 102 + 6)
        assert len(set(picture.getdata())) > 1000
    code, out, _ = simclr("views", photographs, "--views.size-px", "64", "--out", "b.jpg")  # the recipe follows from the data
    assert code == 0 and "24 images, each with its two views at 64 px" in out
    code, out, _ = simclr("views", "patterns_tiny", "--data", patterns, "--images", "2")  # nothing is written beside what one works on
    assert code == 0 and out.startswith("runs/views-patterns_tiny.png: 2 images") and (tmp_path / "runs/views-patterns_tiny.png").is_file()
    refused(simclr("views", photographs, "--out", "c.txt"), r"c.txt has no ending of a picture; use c.txt.png")
    refused(simclr("views", photographs, "--images", "0"), "--images is 0")
    other = tmp_path / "other"
    other.mkdir()
    for file in photographs.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    code, out, _ = simclr("verify", other)
    assert code == 0 and re.fullmatch(r"train-00000.beton +\d+\.\d MiB +240 images  whole\n", out)
    shard = bytearray((other / "train-00000.beton").read_bytes())
    at = shard.index(b"\xff\xda", 1 << 21)  # the first image's scan: 200 bytes of it are wiped out
    shard[at - 100 : at + 100] = bytes(200)
    (other / "train-00000.beton").write_bytes(bytes(shard))
    code, out, err = simclr("verify", other)
    assert code == 2 and "damaged: its bytes do not have the manifest's sha256; sample 0: its JPEG cannot be decoded" in out
    assert f"1 of 1 shards of {other} are damaged" in err


def test_a_notice_to_end_is_heeded_where_ctrl_c_is_ignored(tmp_path: Path) -> None:
    """A shell starts its background jobs with SIGINT ignored; a scheduler's SIGTERM must end them all the same."""
    command = [sys.executable, "-m", "pipelines.cli", "prepare", "--source", "patterns:train=900000,test=10"]
    command += ["--out", str(tmp_path / "out")]
    ignored = partial(signal.signal, signal.SIGINT, signal.SIG_IGN)
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=ignored) as process:
        assert process.stderr is not None and process.stderr.readline().startswith("patterns:train=900000")
        while not list((tmp_path / "out").glob(".writing-*.beton")):
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 130
