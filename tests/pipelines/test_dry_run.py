"""What a command says before any work: its usual flags, its version, a config that is a file, and what a run would take."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from pipelines import cli
from tests.pipelines.test_cli import PRETRAIN, a_run, listing
from tests.pipelines.train.test_warm_start import TINY_FLAGS, complete
from tests.support.command import Run, refused


def test_pretrains_help_begins_with_ten_usual_flags(simclr: Run) -> None:
    _, out, _ = simclr("pretrain", "imagenet_resnet50", "--help")
    head = out.partition("╭")[0]
    flags = ("RECIPE", "--data", "--run", "--workers", "--train.epochs", "--train.batch-size", "--encoder.depth", "--optim.base-lr")
    assert re.findall(r"^  (\S+)", head, re.MULTILINE) == [*flags, "--loss.temperature", "--tracking-uri"]
    assert re.search(r"--train.batch-size .*N, images per step over all workers \(4096\)", head)


def test_the_version_is_one_line_and_quick() -> None:
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-m", "pipelines.cli", "--version"], capture_output=True, text=True, check=True)
    assert time.monotonic() - began < 10  # torch and ray are not imported
    assert re.fullmatch(r"simclr \d\S*( \(commit [0-9a-f]+(, changed)?\))?, torch \d\S*, ray \d\S*, Python 3\S+\n", done.stdout)


@pytest.mark.parametrize("words", [["--help"], ["pretrain", "--help"], ["recipes", "patterns_tiny"]])
def test_a_reader_that_ends_early_gets_no_traceback(words: list[str]) -> None:
    read, write = os.pipe()
    os.close(read)  # as `| head` does, once it has its lines
    done = subprocess.run([sys.executable, "-m", "pipelines.cli", *words], stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert done.stderr == "" and done.returncode in (0, 141)


def test_a_config_may_be_a_file_which_flags_change(simclr: Run, tmp_path: Path, patterns: Path) -> None:
    code, out, _ = simclr("recipes", "patterns_tiny")
    (tmp_path / "run.yaml").write_text(out)
    assert code == 0
    parsed = cli.parse("pretrain", _args("pretrain"), ["--config", "run.yaml", "--data", "x", "--loss.temperature", "0.7"])
    plain = cli.parse("pretrain", _args("pretrain"), ["patterns_tiny", "--data", "x", "--loss.temperature", "0.7"])
    assert (parsed.recipe, parsed.config) == (plain.recipe, plain.config) and parsed.config.loss.temperature == 0.7
    refused(simclr("pretrain", "patterns_tiny", "--config", "run.yaml", "--data", "x"), "'patterns_tiny' and --config run.yaml each have")
    refused(simclr("pretrain", "--config=none.yaml", "--data", "x"), "--config none.yaml is no file")
    (tmp_path / "run.yaml").write_text(out.replace("temperature: 0.2", "temprature: 0.2"))
    refused(
        simclr("pretrain", "--config", "run.yaml", "--data", "x"), r"run.yaml, line \d+: unknown field loss.temprature; nearest: loss.temp"
    )
    refused(simclr("finetune", "x", "--config", "run.yaml"), "run.yaml, line .*: unknown field")
    refused(simclr("sweep", "lr", "--config", "run.yaml", "--data", "x"), "run.yaml, line .*: unknown field loss.temprature")


def _args(name: str) -> Any:
    import importlib

    return importlib.import_module(f"pipelines.commands.{name}").Args


def test_a_dry_run_starts_and_writes_nothing(simclr: Run, tmp_path: Path, patterns: Path) -> None:
    words = (*PRETRAIN, patterns, "--workers", "2", "--dry-run", "--device", "cpu")
    code, out, err = simclr(*words)
    assert code == 0 and listing(tmp_path) == [] and "ray" not in err
    rows = dict(line.split(maxsplit=1) for line in out.splitlines() if line[:1].strip())
    assert rows["config"] == "patterns_tiny, train.batch_size 60" and re.fullmatch(r"runs/patterns_tiny-\w{8}, a new one", rows["run"])
    assert rows["steps"].startswith("49, 12.25 epochs of 4 steps of N = 60 of 240 images") and rows["workers"] == "2, 30 images each"
    assert re.match(r"about 1\.\d\d GiB a worker, of a process on the CPU: activations", rows["memory"])
    assert rows["time"].startswith("no measured rate") and "of 1 MiB; the newest 2 and the best stay" in rows["checkpoints"]
    assert "nothing was started or written" in out


def test_a_dry_run_takes_its_time_from_a_run_like_it(tmp_path: Path, patterns: Path) -> None:
    from dataclasses import replace

    from pipelines.runs.directory import load_run
    from pipelines.train import plan

    run = load_run(a_run(tmp_path / "runs" / "one", patterns))
    for step, rate in enumerate((1.0, 1.0, 1.0, 90.0, 100.0, 110.0), 1):
        run.append({"step": step, "speed/images_per_s": rate})
    config = replace(run.config, optim=replace(run.config.optim, base_lr=9.0))
    assert "about 29 s at 100 images/s" in plan.duration(config, 240, 2, "cpu", tmp_path / "runs")  # 49 steps of 60 images
    assert "no measured rate" in plan.duration(config, 240, 4, "cpu", tmp_path / "runs")
    wider = replace(config, encoder=replace(config.encoder, width=2))
    assert "no measured rate" in plan.duration(wider, 240, 2, "cpu", tmp_path / "runs")


def test_a_dry_run_speaks_of_batchnorm_only_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    from pipelines.train import plan
    from simclr import footprint, sense
    from simclr.family import DINO
    from tests.support.small import TINY

    room, most = plan.Room("cpu", 1, "this machine's memory"), footprint.footprint(TINY)
    monkeypatch.setattr(footprint, "fitting", lambda *_: 2)
    monkeypatch.setattr(footprint, "footprint", lambda *_: most)
    vit = replace(TINY.encoder, vit="micro", patch_px=8)
    dino = DINO(encoder=vit, views=TINY.views, optim=TINY.optim, train=TINY.train)
    assert not sense.normalises(dino) and "BatchNorm" not in "".join(plan.memory(dino, 1, 0, room))
    assert "with BatchNorm over a piece of every worker" in "".join(plan.memory(TINY, 1, 0, room))


def test_a_dry_run_refuses_weights_that_the_run_would_refuse(simclr: Run, tmp_path: Path, patterns: Path) -> None:
    given = complete(tmp_path / "given", patterns).path
    words = ("pretrain", "patterns_tiny", "--data", patterns, *TINY_FLAGS, "--device", "cpu", "--start", given, "--dry-run")
    refused(simclr(*words, "--encoder.depth", "14"), "do not fit the encoder: .*; would fit: --encoder.depth 8")
    code, out, _ = simclr(*words)
    assert code == 0 and f"begins with  {given}, step 3" in out
