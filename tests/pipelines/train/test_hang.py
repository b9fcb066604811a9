"""The hang detector, from answers of ranks and their times: without Ray and without waiting."""

from __future__ import annotations

import os
import shutil
import socket
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pipelines.train import hang, ray_train, retry
from pipelines.train.hang import HangDetector
from pipelines.train.starting import Debts
from simclr.config import SimCLR, Train
from simclr.data.s3.uri import Unreachable
from simclr.errors import UserError
from simclr.telemetry import progress
from simclr.telemetry.progress import PHASES, Reading

AT = Reading(phase="training", beats=10, step=7, place="simclr/data/loader.py:1 _prefetched", waiting=False)
WAITS = replace(AT, place="simclr/loss.py:1 nt_xent", waiting=True)
NAMES = ["pid 10 on a (10.0.0.1)", "pid 11 on b (10.0.0.2)", "pid 12 on b (10.0.0.2)"]


class Told:
    """A detector on a pretended clock: each rank answers as it was last told to, None = not at all."""

    def __init__(self, *readings: Reading | None, timeout_s: float = 300.0) -> None:
        self.detector, self.readings, self.now = HangDetector(NAMES[: len(readings)], timeout_s, 0.0), list(readings), 0.0
        self.hear()

    def hear(self) -> None:
        for rank, reading in enumerate(self.readings):
            self.detector.asks(rank, self.now)
            if reading is not None:
                self.detector.hear(rank, reading, self.now)

    def until(self, now: float, *readings: Reading | None, every_s: float = 10.0) -> dict[int, str]:
        """Go on until `now`; the ranks that were found on the way, if any."""
        self.readings = list(readings) or self.readings
        while self.now < now:
            self.now = min(self.now + every_s, now)
            self.hear()
            if found := self.detector.hung(self.now):
                return found
        return {}


def test_the_blocking_rank_is_named_and_no_waiting_rank() -> None:
    group = Told(WAITS, AT, WAITS)
    assert group.until(300.0) == {}
    place = "phase training, at step 7 (simclr/data/loader.py:1 _prefetched)"
    assert group.until(301.0) == {1: f"no progress for 301 s in pid 11 on b (10.0.0.2), {place}"}
    late = replace(AT, step=6, waiting=True)
    assert set(Told(AT, late, AT).until(310.0)) == {1}  # the rank behind, though it waits: GPU steps are only queued
    assert set(Told(WAITS, WAITS).until(310.0)) == {0, 1}  # no rank is to blame, but none goes on


def test_a_rank_that_does_not_answer_is_named() -> None:
    group = Told(WAITS, AT)
    moving = [replace(WAITS, beats=beats) for beats in range(40)]
    for at, reading in enumerate(moving):
        if found := group.until(10.0 * at, reading, None):
            break
    assert found == {1: "no answer for 310 s from pid 11 on b (10.0.0.2), phase training, at step 7 (simclr/data/loader.py:1 _prefetched)"}
    assert group.now == 310.0
    found = Told(None, timeout_s=5.0).until(200.0, every_s=1.0)  # a start takes what it takes on a loaded machine
    assert found == {0: "no answer for 121 s from pid 10 on a (10.0.0.1), phase start, before its first answer"}


@pytest.mark.parametrize("phase", PHASES)
def test_a_rank_is_found_in_every_phase_after_its_own_patience(phase: str) -> None:
    """Silent, and with a thread that stands still, each alone: while no other rank is slower, and while another one goes on."""
    stands = replace(AT, phase=phase, step=0)
    others = replace(WAITS, phase=phase, step=0)
    patience = 300.0 * (hang.PATIENCE[phase] if phase != "lock" else 1)
    for ranks in ([None, others], [stands, others]):
        group = Told(stands, others)
        found = group.until(9000.0, *ranks)
        if phase == "lock" and ranks[0] is not None:  # it answers, and whom it waits for may take days; people are told
            assert found == {} and group.detector.waits_for_others().startswith("waiting for 9000 s for another process")
            assert "(pid 10 on a (10.0.0.1), pid 11" in group.detector.waits_for_others()
            continue
        assert set(found) == {0} and patience < group.now <= patience + 10, (ranks, group.now)
        assert f"pid 10 on a (10.0.0.1), phase {phase}" in found[0]
        if phase != "lock":
            assert group.detector.waits_for_others() == ""


def test_who_is_alone_in_a_phase_is_found_while_others_go_on() -> None:
    """One rank fetches terabytes, the other hangs in its import; it would have kept the first one waiting for ever at the end."""
    imports, group = replace(AT, phase="import", step=0), Told(AT, AT)
    for at in range(0, 700, 10):
        if found := group.until(float(at), replace(AT, phase="fetch", step=0, beats=at), imports):
            break
    assert set(found) == {1} and "phase import" in found[1] and 600 < group.now <= 620


def test_a_long_transfer_is_no_hang_and_a_waiting_rank_is_not_blamed() -> None:
    waits = replace(WAITS, phase="fetch", step=0)
    group = Told(AT, waits)
    for at in range(0, 100_000, 100):  # a day of bytes
        assert group.until(float(at), replace(AT, phase="fetch", step=0, beats=at), waits, every_s=50) == {}
    assert set(group.until(200_000.0)) == {0}


def test_a_slow_checkpoint_keeps_the_others_waiting_for_longer_than_a_step_may() -> None:
    saves, waits = replace(AT, phase="saving"), replace(WAITS, step=8)
    assert Told(saves, waits).until(600.0) == {}
    assert set(Told(saves, waits).until(610.0)) == {0}
    assert Told(replace(AT, phase="first batch", step=1), replace(WAITS, phase="first batch", step=1)).until(1800.0) == {}


def test_what_takes_its_time_is_no_hang() -> None:
    slow = Told(AT, AT)
    assert slow.until(290.0) == {}
    after = [replace(AT, beats=11)] * 2  # a step of 290 s, on a machine without a GPU
    assert slow.until(300.0, *after) == {} and slow.until(300.0 + 5 * 290.0, *after) == {}
    assert set(slow.until(300.0 + 5 * 290.0 + 20, *after)) == {0, 1}  # five times 290 s
    starved = HangDetector(NAMES[:1], 300.0, 0.0)
    starved.hear(0, AT, 0.0)
    starved.asks(0, 0.0)
    for now in range(0, 251, 50):  # its machine is under such a load that an answer takes 250 s
        assert starved.hung(now) == {}
    starved.hear(0, AT, 250.0)
    for now in range(300, 1501, 50):
        assert starved.hung(now) == {}
    assert set(starved.hung(1510.0)) == {0}
    imports = HangDetector(NAMES[:1], 300.0, 0.0)
    imports.asks(0, 0.0)
    for now in range(0, 251, 50):
        assert imports.hung(now) == {}
    imports.hear(0, replace(AT, phase="fetch"), 250.0)  # a process that is made answers late, which says nothing about later
    assert [set(imports.hung(now)) for now in (300.0, 360.0, 420.0, 480.0, 540.0, 551.0)] == [*[set()] * 5, {0}]


def test_a_controller_that_slept_has_seen_no_hang() -> None:
    """A laptop was closed, or a machine paused, for an hour: the clock has jumped, and the answers have not come yet."""
    group = Told(AT, WAITS)
    group.until(100.0)
    for jump in range(3):
        group.now += 3600.0
        assert group.detector.hung(group.now) == {}, jump
        assert group.until(group.now + 50.0, replace(AT, beats=20 + jump), replace(WAITS, beats=20 + jump)) == {}
    assert group.until(group.now + 300.0) == {} and set(group.until(group.now + 210.0)) == {0}  # then it is found as ever
    backwards = HangDetector(NAMES[:1], 5.0, 100.0)
    assert backwards.hung(0.0) == {} and backwards.hung(0.1) == {}


def test_somebody_at_a_breakpoint_is_left_alone() -> None:
    there = replace(AT, stopped=True)
    group = Told(there, WAITS)
    assert group.until(4000.0) == {}
    assert group.until(4290.0, AT, WAITS) == {} and set(group.until(4310.0)) == {0}  # the pause does not count as a long step


def test_a_process_says_where_its_thread_is(monkeypatch: pytest.MonkeyPatch) -> None:
    go, there = threading.Event(), threading.Event()
    seen: list[Reading] = []

    def work() -> None:
        with progress.watched():
            seen.append(progress.read())
            progress.enter("first batch")
            for step in range(5):
                progress.beat(step)
                seen.append(progress.read())
            with progress.within("saving"):
                there.set()
                go.wait(20)
                go.clear()
            there.set()
            go.wait(20)

    assert progress.read().phase == ""
    thread = threading.Thread(target=work)
    thread.start()
    there.wait(20)
    saves = progress.read()
    progress.moved()  # by another thread
    progress.enter("upload")
    also = progress.read()
    there.clear()
    go.set()
    there.wait(20)
    awake = progress.read()
    progress.moved()
    same = progress.read()
    go.set()
    thread.join()
    assert [reading.phase for reading in seen] == ["import", *["first batch"] * 3, *["training"] * 2]
    assert (saves.phase, saves.step, also.phase, also.beats - saves.beats) == ("saving", 5, "saving", 1)
    assert (awake.phase, awake.step, awake.waiting) == ("training", 5, False) and same == awake  # bytes are no steps
    assert progress.read().phase == ""


def test_a_file_that_grows_is_progress_and_so_is_each_try_at_s3(tmp_path: Path) -> None:
    from botocore.exceptions import ClientError

    from simclr import checkpoint
    from simclr.data.s3.store import Store
    from simclr.data.s3.uri import Address

    with progress.watched():
        progress.enter("saving")
        path = tmp_path / "state"
        with progress.grows(path):
            before = progress.read().beats
            path.write_bytes(bytes(7))
            assert progress.read().beats == before + 7
        before = progress.read().beats
        checkpoint.write(tmp_path, checkpoint.State(1, {}, {"a": torch.zeros(1 << 20)}), 1)
        assert progress.read().beats >= before + 4  # it is hashed in pieces
        before = progress.read().beats
        store = Store(attempts=3, pause_s=0.001)

        def busy(**_: Any) -> None:
            raise ClientError({"Error": {"Code": "SlowDown"}, "ResponseMetadata": {"HTTPStatusCode": 503}}, "GetObject")

        store.access.client = SimpleNamespace(get_object=busy, meta=SimpleNamespace(endpoint_url="https://s3.example.com"))
        with pytest.raises(Unreachable):
            store.read(Address("hang", "nothing"))
        assert progress.read().beats == before + 3


def test_an_upload_that_nobody_answers_ends_with_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server takes the connection and is silent for ever, so each try ends by its own timeout; training goes on meanwhile."""
    from pipelines.runs import home as homes
    from pipelines.runs import sync
    from simclr import checkpoint
    from simclr.data.s3.store import Store

    said: list[str] = []
    monkeypatch.setattr(homes, "say", said.append)
    for name, value in {"ACCESS_KEY_ID": "a", "SECRET_ACCESS_KEY": "b", "EC2_METADATA_DISABLED": "true", "REGION": "us-east-1"}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    monkeypatch.setenv("SIMCLR_CACHE", str(tmp_path))
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{silent.getsockname()[1]}")
        home = sync.Home("s3://hang/run")
        home.store = Store(attempts=2, pause_s=0.01, answer_s=0.2)
        written = checkpoint.write(tmp_path / "checkpoints", checkpoint.State(1, {}, {"a": torch.zeros(2)}), 1)
        home.later(lambda: home.send_checkpoint(written, 2))
        home.wait()
    assert not home.busy() and len(said) == 1
    assert said[0].startswith("not sent: s3://hang/run/checkpoints failed 2 times, the last time with no answer in time; check the network")


def test_who_waits_for_a_lock_says_so(tmp_path: Path) -> None:
    from simclr.data.s3.uri import locked

    copy, entered, seen = tmp_path / "copy", threading.Event(), list[str]()

    def work() -> None:
        with progress.watched():
            progress.enter("fetch")
            entered.set()
            with locked(copy):
                seen.append(progress.read().phase)

    with locked(copy):
        thread = threading.Thread(target=work)
        thread.start()
        entered.wait(20)
        while progress.read().phase == "fetch":
            time.sleep(0.001)
        assert progress.read().phase == "lock"
    thread.join()
    assert seen == ["fetch"]


def test_a_process_that_owes_a_sign_of_life_is_late_after_the_patience_alone() -> None:
    debts = Debts(600.0, 0.0)
    debts.owes("a", 0.0)
    for now in range(0, 601, 30):
        debts.owes("a", now)
        assert debts.late(now) == {}
    debts.owes("b", 600.0)
    assert debts.late(630.0) == {"a": 630.0}
    debts.paid("a")
    assert debts.late(5000.0) == {} and debts.late(5150.0) == {}  # b: of the jump only a quarter of the patience counts
    assert set(debts.late(5300.0) | debts.late(5450.0)) == {"b"}


def test_every_number_of_workers_between_two_may_share_a_batch() -> None:
    config = SimCLR(train=Train(batch_size=96))
    assert ray_train.Resources(workers=4).counts(config) == [4]
    assert ray_train.Resources(workers=7, min_workers=2).counts(config) == [2, 3, 4, 5, 6, 7]
    grouped = SimCLR(train=Train(batch_size=96, shard_groups=2))
    assert ray_train.Resources(workers=5, min_workers=2).counts(grouped) == [2, 3, 4, 5]
    with pytest.raises(UserError, match=r"--min-workers is 1, .* groups that the config asks for; use 2 or 3, or leave it out"):
        ray_train.Resources(workers=5, min_workers=1).counts(grouped)
    with pytest.raises(UserError, match="batch_size 96 has no image for each of 97 workers; use --workers 96 or fewer"):
        ray_train.Resources(workers=97, min_workers=1).counts(config)
    with pytest.raises(UserError, match=r"batch_size 100 does not divide over the 16 chips of a TPU slice, .*; use 96 or 112"):
        slice_ = ray_train.Resources(workers=16, device="tpu", topology="4x4", accelerator_type="TPU-V5LITEPOD")
        slice_.counts(SimCLR(train=Train(batch_size=100)))
    with pytest.raises(UserError, match="--min-workers is 9; expected 1 to --workers 8"):
        ray_train.Resources(workers=8, min_workers=9)
    with pytest.raises(UserError, match="--hang-timeout-s is 0"):
        ray_train.Resources(hang_timeout_s=0)


# ── Which failures are retried ─────────────────────────────────────────────────────────────────────────────────────


def test_failures_count_in_a_row_and_a_new_checkpoint_begins_the_row_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.exceptions import GetTimeoutError, RayTaskError
    from ray.train import ControllerError, FailureConfig, WorkerGroupError
    from ray.train.v2._internal.exceptions import WorkerGroupStartupFailedError, WorkerGroupStartupTimeoutError

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
    assert "not answer; run the same" in retry.given_up(ControllerError(WorkerGroupStartupFailedError("it did not answer")))
    assert retry.given_up(meeting) == ""  # its traceback says more
    hang.group.stuck = "no answer for 600 s from pid 7 on a, phase start"
    ended = ControllerError(WorkerGroupStartupFailedError("One of the worker actors failed\nto start"))
    assert [tried(ended, saved=80), tried(ended), tried(ended)] == [True, True, False]  # Ray would try for ever
    assert said.pop().text == said.pop().text == said.pop().text == f"workers failed to start: {hang.group.stuck}"
    hang.group.stuck = ""
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
