"""The hang detector, from answers of ranks and their times: without Ray and without waiting."""

from __future__ import annotations

import os
import shutil
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipelines.train import hang, ray_train, retry
from pipelines.train.hang import HangDetector
from simclr.config import Config, Train
from simclr.data.s3.uri import Unreachable
from simclr.errors import UserError
from simclr.telemetry import progress
from simclr.telemetry.progress import Reading

AT = Reading(watched=True, beats=10, step=7, place="simclr/data/loader.py:1 _prefetched", waiting=False)
WAITS = replace(AT, place="simclr/loss.py:1 nt_xent", waiting=True)
NAMES = ["pid 10 on a (10.0.0.1)", "pid 11 on b (10.0.0.2)", "pid 12 on b (10.0.0.2)"]


def detector(*readings: Reading, timeout_s: float = 300.0) -> HangDetector:
    """After `readings`, of ranks 0, 1, … at 0 s."""
    found = HangDetector(NAMES[: len(readings)], timeout_s, 0.0)
    for rank, reading in enumerate(readings):
        found.hear(rank, reading, 0.0)
    return found


def said(to: HangDetector, now: float, *readings: Reading) -> dict[int, str]:
    for rank, reading in enumerate(readings):
        to.hear(rank, reading, now)
    return to.hung(now)


def test_the_blocking_rank_is_named_and_no_waiting_rank() -> None:
    group = detector(WAITS, AT, WAITS)
    assert said(group, 299.0, WAITS, AT, WAITS) == {}
    place = "at step 7 (simclr/data/loader.py:1 _prefetched)"
    assert said(group, 301.0, WAITS, AT, WAITS) == {1: f"no progress for 301 s in pid 11 on b (10.0.0.2), {place}"}
    late = replace(AT, step=6, waiting=True)
    assert set(said(detector(AT, late, AT), 301.0, AT, late, AT)) == {1}  # the rank behind, though it waits: GPU steps are only queued
    assert set(said(detector(WAITS, WAITS), 301.0, WAITS, WAITS)) == {0, 1}  # no rank is to blame, but none goes on


def test_a_rank_that_does_not_answer_is_named() -> None:
    group = detector(WAITS, AT)
    group.hear(0, replace(WAITS, beats=11), 301.0)
    assert group.hung(301.0) == {1: "no answer for 301 s from pid 11 on b (10.0.0.2), at step 7 (simclr/data/loader.py:1 _prefetched)"}
    assert HangDetector(NAMES[:1], 5.0, 0.0).hung(6.0) == {0: "no answer for 6 s from pid 10 on a (10.0.0.1), before its first step"}


def test_what_takes_its_time_is_no_hang() -> None:
    compiling = replace(AT, watched=False)
    assert said(detector(compiling, WAITS), 3000.0, compiling, WAITS) == {}  # rank 1 waits for rank 0, which is not watched
    assert said(detector(AT, WAITS), 301.0, replace(AT, beats=11), WAITS) == {}
    slow = detector(AT, AT)
    for now in range(0, 401, 100):  # a step of 400 s, on a machine without a GPU
        assert now > 300 or said(slow, float(now), AT, AT) == {}
        said(slow, float(now), AT, AT)
    after = [replace(AT, beats=11)] * 2
    assert said(slow, 410.0, *after) == {} and said(slow, 2300.0, *after) == {}
    assert set(said(slow, 2500.0, *after)) == {0, 1}  # five times 400 s


def test_a_process_says_where_its_thread_is(monkeypatch: pytest.MonkeyPatch) -> None:
    go, there = threading.Event(), threading.Event()

    def work() -> None:
        with progress.watched():
            for step in range(5):
                progress.beat(step)
            with progress.unwatched():
                there.set()
                go.wait(20)
                go.clear()
            there.set()
            go.wait(20)

    assert not progress.read().watched
    thread = threading.Thread(target=work)
    thread.start()
    there.wait(20)
    asleep = progress.read()
    there.clear()
    go.set()
    there.wait(20)
    awake = progress.read()
    go.set()
    thread.join()
    assert (asleep.watched, asleep.step, asleep.beats) == (False, 5, 5)
    assert (awake.watched, awake.step, awake.beats, awake.waiting) == (True, 5, 6, False)
    assert not progress.read().watched


def test_every_number_of_workers_between_two_may_share_a_batch() -> None:
    config = Config(train=Train(batch_size=96))
    assert ray_train.Resources(workers=4).counts(config) == [4]
    assert ray_train.Resources(workers=7, min_workers=2).counts(config) == [2, 3, 4, 5, 6, 7]
    grouped = Config(train=Train(batch_size=96, shard_groups=2))
    assert ray_train.Resources(workers=5, min_workers=2).counts(grouped) == [2, 3, 4, 5]
    with pytest.raises(UserError, match=r"--min-workers is 1, .* groups that the config asks for; use 2 or 3, or leave it out"):
        ray_train.Resources(workers=5, min_workers=1).counts(grouped)
    with pytest.raises(UserError, match="batch_size 96 has no image for each of 97 workers; use --workers 96 or fewer"):
        ray_train.Resources(workers=97, min_workers=1).counts(config)
    with pytest.raises(UserError, match=r"batch_size 100 does not divide over the 16 chips of a TPU slice, .*; use 96 or 112"):
        slice_ = ray_train.Resources(workers=16, device="tpu", topology="4x4", accelerator_type="TPU-V5LITEPOD")
        slice_.counts(Config(train=Train(batch_size=100)))
    with pytest.raises(UserError, match="--min-workers is 9; expected 1 to --workers 8"):
        ray_train.Resources(workers=8, min_workers=9)
    with pytest.raises(UserError, match="--hang-timeout-s is 0"):
        ray_train.Resources(hang_timeout_s=0)


# ── Which failures are retried ─────────────────────────────────────────────────────────────────────────────────────


def test_failures_count_in_a_row_and_a_new_checkpoint_begins_the_row_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.exceptions import GetTimeoutError, RayTaskError
    from ray.train import ControllerError, FailureConfig, WorkerGroupError
    from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError

    monkeypatch.setattr(hang.group, "saved", 0)
    said: list[Any] = []
    policy = retry.failure_policy(FailureConfig(max_failures=2), 16, said.append)

    def tried(error: Exception, saved: int = 0) -> bool:
        hang.group.saved = saved
        return bool(policy.make_decision(error).value == "RETRY")

    lost = WorkerGroupError("a worker was lost", {3: RuntimeError("connection closed by peer")})
    meeting = ControllerError(RayTaskError("init", "Connection reset by peer", RuntimeError()))  # rank 0 died, and the other ranks raise
    assert [tried(lost), tried(lost, saved=40), tried(lost), tried(lost)] == [True, True, True, False]
    assert [tried(meeting, saved=80), tried(meeting), tried(ControllerError(GetTimeoutError("no answer")))] == [True, True, False]
    assert [message.text.partition(":")[0] for message in said] == ["workers failed to start"] * 3
    assert not tried(ControllerError(KeyError("a mistake of Ray's")), saved=80)
    for _ in range(9):  # nodes that have not come
        assert tried(ControllerError(WorkerGroupStartupTimeoutError(16)))
    assert said[-1].text.startswith("waiting for nodes: the cluster has no room for 16 workers")
    assert tried(WorkerGroupError("left", {0: hang.Leave("there is room for 2 workers")}))
    away = WorkerGroupError("failed", {1: Unreachable("s3://b/run failed 8 times")})
    assert tried(away, saved=100) and retry.given_up(away) == "s3://b/run failed 8 times" and retry.non_retryable(away) == ""
    hung = WorkerGroupError("failed", {1: hang.Hung("no progress for 301 s in pid 7 on a (10.0.0.1)")})
    assert "than --max-failures allows, the last time so: no progress for 301 s in pid 7 on a" in retry.given_up(hung)
    assert retry.given_up(lost) == ""  # its traceback says more
    assert not tried(WorkerGroupError("failed", {0: UserError("a mistake of the user's")}), saved=120)


def test_workers_that_died_because_a_shard_shrank_are_explained(patterns: Path, tmp_path: Path) -> None:
    """The kernel kills who reads behind the end of a mapped file, so the driver looks: of the shards that this machine has."""
    from ray.exceptions import RayActorError
    from ray.train import WorkerGroupError

    failure = WorkerGroupError("failed", {0: RuntimeError("connection closed by peer"), 1: RayActorError()})
    generic = "workers failed more often in a row than --max-failures allows"
    out = tmp_path / "shards"
    shutil.copytree(patterns, out)
    (out / "test-00000.beton").unlink()  # of a group that other machines read
    for data in ("", str(out), str(tmp_path / "nowhere"), "s3://photos/not/fetched"):
        assert retry.given_up(failure, data).startswith(generic)
    os.truncate(out / "train-00000.beton", 5000)
    sentence = f"workers died as shard train-00000.beton of {out} has 5,000 bytes, the manifest says "
    assert retry.given_up(failure, str(out)).startswith(sentence)
