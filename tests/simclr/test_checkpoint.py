"""Checkpoints: whole or absent, read strictly, never unpickled."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import json
import multiprocessing
import os
import time
from functools import partial
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


def test_a_checkpoint_is_read_as_it_was_written(tmp_path: Path) -> None:
    written = state(7)
    path = checkpoint.write(tmp_path, written, keep=2)
    read = checkpoint.read(path)
    assert path.name == "step-000000007" and read.step == 7 and read.config == {"seed": 0}
    assert set(read.tensors) == {"model.weight", "model.bias", "optimizer.weight.momentum_buffer", "optimizer.bias.momentum_buffer"}
    assert all(torch.equal(t, written.tensors[name]) for name, t in read.tensors.items())
    assert sorted(p.name for p in path.iterdir()) == ["checkpoint.json", "state.safetensors"]
    assert len({p.stat().st_mode for p in path.iterdir()}) == 1


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
    """Write checkpoints, one after the other; `told` gets the step of each when it is written."""
    for step in itertools.count(1):
        tensors = {"model.a": torch.full((300_000,), float(step)), "model.b": torch.full((3,), float(step))}
        checkpoint.write(folder, State(step, {}, tensors), keep=2)
        told.send(step)


def test_after_a_kill_the_last_reported_checkpoint_is_whole(tmp_path: Path) -> None:
    """SIGKILL at six times: the checkpoint reported before it is read back whole."""
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


@pytest.mark.parametrize("text", ["[]", '{"schema": 1}', '{"schema": 1, "step": "two", "sha256": "", "config": {}}', "\udc80"])
def test_a_description_that_is_not_whole_is_damage_and_the_checkpoint_before_is_used(tmp_path: Path, text: str) -> None:
    for step in (1, 2):
        checkpoint.write(tmp_path, State(step, {}, {"model.w": torch.ones(2)}), 2, score=0.5)
    (tmp_path / "step-000000002" / "checkpoint.json").write_bytes(text.encode(errors="surrogateescape"))
    said: list[str] = []
    assert checkpoint.latest(tmp_path, said.append) == tmp_path / "step-000000001" and "step-000000002 is not whole" in said[0]
    assert checkpoint.score_of(tmp_path / "step-000000002") is None and checkpoint.score_of(tmp_path / "step-000000001") == 0.5


def test_any_optimizers_state_is_kept_and_goes_on_bitwise() -> None:
    """Moments, and counts of steps, of which fused optimizers keep one beside each parameter."""
    for make in (torch.optim.AdamW, partial(torch.optim.AdamW, fused=True), partial(torch.optim.AdamW, amsgrad=True), torch.optim.Adagrad):
        torch.manual_seed(0)
        models = [torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2)) for _ in range(2)]
        models[1].load_state_dict(models[0].state_dict())
        optimizers = [make(m.parameters(), lr=0.1) for m in models]
        x = torch.randn(5, 3)

        def step(model: torch.nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor = x) -> None:
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()

        step(models[0], optimizers[0])
        step(models[0], optimizers[0])
        state = checkpoint.capture(2, {}, models[0], optimizers[0])
        copied = State(2, {}, {name: t.clone() for name, t in state.tensors.items()})
        assert any(name.endswith(".step") for name in copied.tensors)
        checkpoint.restore(copied, models[1], optimizers[1])
        for _ in range(2):
            for model, optimizer in zip(models, optimizers, strict=True):
                step(model, optimizer)
        assert all(torch.equal(a, b) for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True))


def test_an_optimizers_tensor_of_nobody_or_of_another_shape_is_refused() -> None:
    model = torch.nn.Linear(3, 2)
    good = {f"model.{name}": t for name, t in model.state_dict().items()}
    moments = {f"optimizer.{name}.exp_avg": torch.zeros_like(p) for name, p in model.named_parameters()}
    for change, sentence in (
        ({"optimizer.other.exp_avg": torch.zeros(2)}, "optimizer.other.exp_avg is unknown"),
        ({"optimizer.bias.exp_avg": torch.zeros(3)}, r"optimizer.bias.exp_avg has shape \(3,\), expected \(2,\)"),
        ({"state.rows": torch.zeros(2)}, "state.rows is unknown"),
    ):
        with pytest.raises(UserError, match=sentence):
            checkpoint.check(State(1, {}, good | moments | change), model)
    with pytest.raises(UserError, match=r"optimizer.bias.exp_avg is missing"):
        checkpoint.check(State(1, {}, good | {"optimizer.weight.exp_avg": torch.zeros(2, 3)}), model)


def _signed(path: Path, **about: Any) -> None:
    """Give checkpoint `path` the checksum of what is in it now, as somebody would who changed it on purpose."""
    text = json.loads((path / "checkpoint.json").read_text())
    text["sha256"] = hashlib.sha256((path / "state.safetensors").read_bytes()).hexdigest()
    (path / "checkpoint.json").write_text(json.dumps(text | about))


def _header(path: Path, change: Any) -> None:
    """Change the header of the tensors' file in checkpoint `path`."""
    data = (path / "state.safetensors").read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    change(header)
    text = json.dumps(header).encode()
    (path / "state.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: (path / "state.safetensors").write_bytes(b"\xff" * 64),
        lambda path: (path / "state.safetensors").write_bytes(b""),
        lambda path: _header(path, lambda header: header["model.weight"].update(shape=[10**12, 10**12])),
        lambda path: _header(path, lambda header: header["model.weight"].pop("dtype")),
        lambda path: _header(path, lambda header: header["__metadata__"].update(reports="no JSON")),
        lambda path: _header(path, lambda header: header["__metadata__"].update(reports='{"step": 2}')),
        lambda path: _header(path, lambda header: header["__metadata__"].update(reports='[{"loss": 2}]')),
        lambda path: _header(path, lambda header: header["__metadata__"].update(reports="[" * 100_000)),
    ],
)
def test_damage_with_the_right_checksum_is_damage_and_the_checkpoint_before_is_used(tmp_path: Path, damage: Any) -> None:
    first, second = (checkpoint.write(tmp_path, state(step), keep=2) for step in (1, 2))
    damage(second)
    _signed(second)
    said: list[str] = []
    assert checkpoint.latest(tmp_path, said.append) == first and "is not whole" in said[0]


@pytest.mark.parametrize("step", [-5, 1, 10**12])
def test_a_step_that_its_name_does_not_have_is_damage(tmp_path: Path, step: int) -> None:
    """A step beyond the end would make a run complete."""
    path = checkpoint.write(tmp_path, state(2), keep=2)
    _signed(path, step=step)
    said: list[str] = []
    assert checkpoint.latest(tmp_path, said.append) is None and f"says that it is of step {step:,}" in said[0]


def test_whole_numbers_in_place_of_weights_are_refused(tmp_path: Path) -> None:
    found = state(1)
    model = nn.Linear(3, 2)
    found.tensors["model.weight"] = torch.ones(2, 3, dtype=torch.int64)
    with pytest.raises(UserError, match=r"model.weight is of torch.int64, expected torch.float32"):
        checkpoint.restore(found, model, torch.optim.SGD(model.parameters(), 0.1, momentum=0.9))
