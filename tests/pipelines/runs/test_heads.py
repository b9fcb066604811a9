"""A resumed run reads its checkpoint once per node, and its driver reads the step without the weights."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pipelines.runs import lease
from pipelines.runs.directory import open_run
from pipelines.runs.home import HEADS, Home
from pipelines.train import driver
from simclr import checkpoint
from simclr.data.s3.store import Store
from tests.support.s3 import Proxy
from tests.support.small import TINY

ROWS = 1 << 18  # of float32: a mebibyte of weights


def state(step: int, rows: int = ROWS) -> checkpoint.State:
    return checkpoint.State(step, {}, {"model.w": torch.full((rows,), float(step))}, [{"step": step, "train/loss": 1.0}])


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the folders whose file of tensors was hashed since it was written."""
    found, real = list[str](), checkpoint._sha256

    def counted(path: Path) -> str:
        found.append(path.parent.name)
        return real(path)

    monkeypatch.setattr(checkpoint, "_sha256", counted)
    monkeypatch.setattr(checkpoint, "_FRESH_NS", 0)
    return found


def as_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on this is another process, which knows of no file's sha256."""
    monkeypatch.setattr(checkpoint, "_digests", {})


def bytes_of(s3: Proxy) -> int:
    """Bytes of tensors that were asked for."""
    ranges = [part.removeprefix("bytes=").split("-") for method, path, part in s3.log if method == "GET" and "state.safetensors" in path]
    assert all(len(part) == 2 for part in ranges)
    return sum(int(end) - int(begin) + 1 for begin, end in ranges)


def test_the_ranks_of_a_node_fetch_a_checkpoint_once_and_hash_it_at_most_once(
    s3: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hashed: list[str]
) -> None:
    home = Home("s3://photos/heads/node")
    with lease.alone(home):
        home.send_checkpoint(checkpoint.write(home.path / "checkpoints", state(3), 2, token=home.token), 2)
        size = (home.path / "checkpoints/step-000000003.1/state.safetensors").stat().st_size
        monkeypatch.setenv("SIMCLR_CACHE", str(tmp_path / "node"))

        def ranks(count: int, first: Callable[[Home], object] = lambda home: None) -> None:
            s3.log.clear()
            hashed.clear()
            for _ in range(count):
                as_process(monkeypatch)
                rank = Home("s3://photos/heads/node", home.ticket)
                first(rank)
                assert checkpoint.read(rank.checkpoint("step-000000003.1")).step == 3

        ranks(3, lambda rank: rank.newest())
        assert bytes_of(s3) == size and hashed == []  # the fetch itself has compared it
    with lease.alone(home):  # another day, on a node that has it
        ranks(3)
        assert bytes_of(s3) == 0 and hashed == ["step-000000003.1"]
        copy = rank_copy = Home("s3://photos/heads/node", home.ticket).path / "checkpoints/step-000000003.1/state.safetensors"
        data = bytearray(rank_copy.read_bytes())
        data[-1] ^= 1
        copy.write_bytes(data)  # this node's disk has damaged it
        ranks(2)
        assert bytes_of(s3) == size


def test_ranks_on_a_disk_take_the_word_of_the_one_that_looked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hashed: list[str]) -> None:
    checkpoint.write(tmp_path / "checkpoints", state(3), 2)
    hashed.clear()
    as_process(monkeypatch)
    home = Home(tmp_path)
    name = home.newest()
    assert checkpoint.read(home.checkpoint(name)).step == 3 and hashed == [name]
    for _ in range(2):
        as_process(monkeypatch)
        assert torch.equal(checkpoint.read(Home(tmp_path).checkpoint(name)).tensors["model.w"], state(3).tensors["model.w"])
    assert hashed == [name]


def test_a_file_that_changes_is_hashed_again(tmp_path: Path) -> None:
    path = checkpoint.write(tmp_path, state(3), 2)
    checkpoint.about(path)
    file = path / "state.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)  # within a tick of the disk's clock, perhaps
    with pytest.raises(checkpoint.Damaged, match="does not match its checksum"):
        checkpoint.about(path)


def test_the_driver_reads_the_step_without_the_weights(s3: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = Home("s3://photos/heads/driver")
    with lease.alone(home):
        for step in (3, 4):
            home.send_checkpoint(checkpoint.write(home.path / "checkpoints", state(step), 2, token=home.token), 2)
        monkeypatch.setenv("SIMCLR_CACHE", str(tmp_path / "elsewhere"))
        there = Home("s3://photos/heads/driver", home.ticket)
        s3.log.clear()
        there.look_at_newest()
        assert 0 < bytes_of(s3) < 1000
        (found,) = (there.path / HEADS).iterdir()
        said = checkpoint.newest_head([found], print)
        assert said is not None and said.step == 4 and said.reports == state(4).reports
        assert said.tensors["model.w"].is_meta and said.tensors["model.w"].shape == (ROWS,)
        assert not (there.path / "checkpoints").exists()
        # The newest was cut short: it is said, and the one before it counts.
        cut = tmp_path / "cut"
        cut.write_bytes((home.path / "checkpoints/step-000000004.1/state.safetensors").read_bytes()[:-100])
        Store().upload(cut, there.at / "checkpoints/step-000000004.1/state.safetensors")  # type: ignore[operator]
        lines = list[str]()
        there.says = lines.append
        there.look_at_newest()
        assert [path.name for path in (there.path / HEADS).iterdir()] == ["step-000000003.1"]
        assert len(lines) == 1 and "step-000000004.1 is not whole" in lines[0]


def test_on_a_disk_the_driver_hashes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file with a hole of 8 GiB in place of its weights takes milliseconds, and no memory."""
    rows = 1 << 31
    path = checkpoint.write(tmp_path / "checkpoints", state(7, 1), 2)
    header = b'{"model.w":{"dtype":"F32","shape":[%d],"data_offsets":[0,%d]}}' % (rows, 4 * rows)
    header += b" " * (-len(header) % 8)
    with (path / "state.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + 4 * rows)
    monkeypatch.setattr(hashlib, "file_digest", None)
    before = resident_kib()
    found = checkpoint.newest_head([path], print)
    assert found is not None and found.step == 7 and found.tensors["model.w"].shape == (rows,)
    assert resident_kib() - before < 64 << 10


def resident_kib() -> int:
    return next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS"))


def test_a_run_whose_last_checkpoint_is_damaged_is_not_complete(patterns: Path, tmp_path: Path) -> None:
    """The driver reads the step without the weights; before it says that nothing is left to do, it reads them."""
    run = open_run(tmp_path / "run", "patterns_tiny", TINY, patterns)
    method = driver.shapes_of(run)
    tensors = {f"model.{name}": torch.zeros(t.shape, dtype=t.dtype) for name, t in method.network.state_dict().items()}
    for step in (2, 3):
        path = checkpoint.write(run.checkpoints, checkpoint.State(step, TINY.to_dict(), tensors), 2) / "state.safetensors"
    assert driver._steps_done(run) == driver._steps_done(run, whole=True) == 3
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    assert driver._steps_done(run) == 3 and driver._steps_done(run, whole=True) == 2
