"""Checkpoints: whole or absent, read strictly, never unpickled."""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import multiprocessing
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from simclr import checkpoint
from simclr.checkpoint import State
from simclr.errors import UserError


def state(step: int, value: float = 1.0) -> State:
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    model(torch.full((1, 3), value)).sum().backward()
    optimizer.step()
    return checkpoint.capture(step, {"seed": 0}, model, optimizer)


def test_what_is_read_is_what_was_written(tmp_path: Path) -> None:
    written = state(7)
    path = checkpoint.write(tmp_path, written, keep=2)
    read = checkpoint.read(path)
    assert path.name == "step-000000007" and read.step == 7 and read.config == {"seed": 0}
    assert set(read.tensors) == {"model.weight", "model.bias", "optimizer.weight.momentum_buffer", "optimizer.bias.momentum_buffer"}
    assert all(torch.equal(t, written.tensors[name]) for name, t in read.tensors.items())
    assert sorted(p.name for p in path.iterdir()) == ["checkpoint.json", "state.safetensors"]


def test_the_newest_are_kept_and_a_repeated_step_replaces_the_old(tmp_path: Path) -> None:
    for step in (1, 2, 3, 3):
        checkpoint.write(tmp_path, state(step, float(step)), keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-000000002", "step-000000003"]
    assert checkpoint.latest(tmp_path, print) == tmp_path / "step-000000003"
    assert checkpoint.latest(tmp_path / "nowhere", print) is None


def test_it_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was flushed, in this order, and whether the name was there: both files, their directory, then the one that has the name."""
    folder, flushed, flush = tmp_path / "checkpoints", list[tuple[int, bool]](), os.fsync

    def noted(descriptor: int) -> None:
        flushed.append((os.fstat(descriptor).st_ino, (folder / "step-000000001").exists()))
        flush(descriptor)

    monkeypatch.setattr(os, "fsync", noted)
    path = checkpoint.write(folder, state(1), keep=1)
    files = {(file.stat().st_ino, False) for file in path.iterdir()}
    # The very directory that was flushed has the name now: it was renamed, not copied.
    assert len(files) == 2 and set(flushed[:2]) == files
    assert flushed[2:] == [(path.stat().st_ino, False), (folder.stat().st_ino, True)]


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: (path / "state.safetensors").write_bytes((path / "state.safetensors").read_bytes()[:-3]),
        lambda path: _flip(path / "state.safetensors", -5),
        lambda path: _flip(path / "state.safetensors", 20),
        lambda path: (path / "state.safetensors").unlink(),
        lambda path: (path / "checkpoint.json").write_text('{"schema": 1'),
        lambda path: (path / "checkpoint.json").unlink(),
    ],
    ids=["cut", "bit in the data", "bit in the header", "no tensors", "half a description", "no description"],
)
def test_a_damaged_one_is_named_and_the_one_before_is_used(tmp_path: Path, damage: Any) -> None:
    for step in (1, 2):
        checkpoint.write(tmp_path, state(step), keep=2)
    damage(tmp_path / "step-000000002")
    said: list[str] = []
    assert checkpoint.latest(tmp_path, said.append) == tmp_path / "step-000000001"
    assert len(said) == 1 and "step-000000002" in said[0] and "trying the checkpoint before it" in said[0]
    with pytest.raises(checkpoint.Damaged, match=r"step-000000002 (is not whole|does not match its checksum)"):
        checkpoint.read(tmp_path / "step-000000002")


def _flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 4
    path.write_bytes(data)


def test_another_schema_is_refused_and_not_skipped(tmp_path: Path) -> None:
    path = checkpoint.write(tmp_path, state(1), keep=1)
    text = json.loads((path / "checkpoint.json").read_text())
    (path / "checkpoint.json").write_text(json.dumps(text | {"schema": 99}))
    with pytest.raises(UserError, match=r"schema 99, this version reads 1; go on with the version that wrote it"):
        checkpoint.latest(tmp_path, print)


def test_a_full_disk_leaves_the_earlier_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint.write(tmp_path, state(1), keep=2)

    def full(tensors: Any, path: Path, *rest: Any) -> None:
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.write(tmp_path, state(2), keep=2)
    assert [p.name for p in tmp_path.iterdir()] == ["step-000000001"]


def test_names_that_do_not_fit_are_listed(tmp_path: Path) -> None:
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    good = state(1)
    before = model.weight.clone()
    for change, sentence in (
        ({"model.bias": None}, "model.bias is missing"),
        ({"model.gain": torch.ones(1)}, "model.gain is unknown"),
        ({"model.weight": torch.ones(2, 4)}, r"model.weight has shape \(2, 4\), expected \(2, 3\)"),
        ({"optimizer.bias.momentum_buffer": None}, "optimizer.bias.momentum_buffer is missing"),
    ):
        tensors = {name: t for name, t in (good.tensors | change).items() if t is not None}
        with pytest.raises(UserError, match=f"step 1 does not fit this config: {sentence}"):
            checkpoint.restore(State(1, {}, tensors), model, optimizer)
        assert torch.equal(model.weight, before) and not optimizer.state


def write_until_killed(folder: Path, told: Any) -> None:
    """Checkpoints, one after the other; `told` gets the step of each that is written."""
    for step in itertools.count(1):
        tensors = {"model.a": torch.full((300_000,), float(step)), "model.b": torch.full((3,), float(step))}
        checkpoint.write(folder, State(step, {}, tensors), keep=2)
        told.send(step)


def test_killed_while_writing_the_last_one_told_of_is_there(tmp_path: Path) -> None:
    """SIGKILL at six moments: what was reported before is read back, whole."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.simclr.test_checkpoint", "tests.simclr.test_train"])
    for part in range(6):
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=write_until_killed, args=(tmp_path / str(part), theirs))
        process.start()
        theirs.close()
        assert ours.poll(60)
        told = ours.recv()
        time.sleep(0.004 * part)
        process.kill()
        with contextlib.suppress(EOFError):
            while True:
                told = ours.recv()
        process.join()
        newest = checkpoint.latest(tmp_path / str(part), print)
        assert newest is not None
        found = checkpoint.read(newest)
        assert found.step >= told
        assert all((t == found.step).all() for t in found.tensors.values())
