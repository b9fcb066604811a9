"""One driver at a time trains a run in S3: leases, who is refused, who takes over, and what a former writer still does."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch

from pipelines.runs import lease as run_lease
from pipelines.runs import sync
from pipelines.runs.directory import open_run
from pipelines.runs.home import Ticket
from pipelines.train import driver
from pipelines.train.ray_train import Running
from pipelines.train.resources import Resources
from simclr import checkpoint
from simclr.data.s3 import lease
from simclr.data.s3.lease import Holder, Lease, Lost, Register
from simclr.data.s3.store import Store
from simclr.data.s3.uri import Address
from simclr.errors import UserError
from tests.support.command import Run
from tests.support.s3 import Proxy
from tests.support.small import TINY

HOLD = """
import sys, time
from simclr.data.s3.lease import Lease, Register
from simclr.data.s3.store import Store
from simclr.data.s3.uri import Address
held = Lease(Register(Store(), Address("photos", sys.argv[1])), "the run", 1.0, 0.2, process=sys.argv[2] if len(sys.argv) > 2 else None)
held.take("wait", print)
print(held.mine.owner, held.mine.token, flush=True)
time.sleep(60)
"""
"""A process that holds a lease of a second, at the key of its first argument."""


@contextlib.contextmanager
def another(key: str, *elsewhere: str) -> Iterator[tuple[subprocess.Popen[str], Ticket]]:
    """Another process that holds the lease at `key`, and its ticket; as if on another machine if it says that it is `elsewhere`."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, key, *elsewhere], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        owner, token = process.stdout.readline().split()
        yield process, Ticket(owner, int(token))
    finally:
        process.send_signal(signal.SIGCONT)
        process.kill()
        process.wait()


def a_lease(store: Store, key: str, length_s: float = 1.0, every_s: float = 0.2, process: str = "") -> Lease:
    """One as of another machine, unless its `process` says otherwise."""
    return Lease(Register(store, Address("photos", key)), "the run", length_s, every_s, process=process)


def test_a_second_is_refused_with_host_and_age_and_takes_over_once_the_first_ends(s3: Proxy) -> None:
    store, said = Store(), list[str]()
    first, second = (a_lease(store, "leases/refused") for _ in range(2))
    first.take("wait", said.append)
    assert said == [] and first.mine.token == 1
    with pytest.raises(UserError, match=r"the run is being written by \S+@\S+ \(process \d+, for \d+ s, last seen \d s ago\); use another"):
        second.take("use another --run", said.append)
    assert len(said) == 1 and "waiting for 1 s at most" in said[0]
    first.release()
    second.take("wait", said.append)  # at once
    assert len(said) == 1 and second.mine.token == 2
    second.release(keep=False)
    assert store.listing(Address("photos", "leases")) == []


def test_of_many_that_begin_at_once_one_gets_the_lease(s3: Proxy) -> None:
    store = Store(threads=16)
    taken, refused = list[Lease](), list[str]()

    def begin() -> None:
        mine = a_lease(store, "leases/many")
        try:
            mine.take("wait", lambda text: None)
            taken.append(mine)
        except UserError as error:
            refused.append(str(error))

    threads = [threading.Thread(target=begin) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    holders = list[Lease]()
    for mine in taken:  # moto looks and writes in two steps, and may let two write: the first one's renewal finds the other
        with contextlib.suppress(Lost):
            mine.renew()
            holders.append(mine)
    assert len(holders) == 1 and len(refused) + len(taken) == 6
    holders[0].release()


def test_after_a_kill_it_is_taken_over_elsewhere_when_it_expires_and_here_at_once(s3: Proxy) -> None:
    store, said = Store(), list[str]()
    mine = a_lease(store, "leases/killed")
    with another("leases/killed", "elsewhere") as (process, ticket):
        process.kill()
        process.wait()
        mine.take("wait", said.append)
        assert mine.mine.token == ticket.token + 1
        mine.release()
    here = a_lease(store, "leases/killed", 60.0)
    with another("leases/killed") as (process, _):  # on this machine its process is looked up
        with pytest.raises(UserError, match=rf"is being written by .*process {process.pid}"):
            here.take("wait", said.append)
        process.kill()
        process.wait()
        here.take("wait", said.append)
    assert len(said) <= 1
    here.release()


def test_who_waits_does_so_for_the_length_of_the_holders_lease(monkeypatch: pytest.MonkeyPatch) -> None:
    """By its own clock, however wrong the other machine's is, unless the store says that the sign is older."""
    now, entry = 1000.0, lease.Entry(Holder(owner="other", token=4, length_s=60.0, process="elsewhere"), "one", 0.0)

    class Still:
        """An object that nobody renews."""

        conditional = True

        def read(self) -> lease.Entry:
            return entry

        def write(self, holder: Holder, etag: str | None) -> str | None:
            return "two" if etag == "one" else None

        obeys = staticmethod(lambda holder, etag: True)

    def sleep(seconds: float) -> None:
        nonlocal now
        now += seconds

    monkeypatch.setattr(lease, "_now", lambda: now)
    monkeypatch.setattr(lease.time, "sleep", sleep)
    for silent_s, waits_s in ((0.0, 60.0), (59.0, 60.0), (61.0, 30.0)):
        entry, now = replace(entry, silent_s=silent_s), 1000.0
        mine = Lease(Still(), "the run", process="here")  # type: ignore[arg-type]
        mine.take("wait", lambda text: None)
        assert waits_s <= now - 1000.0 <= waits_s + 2 and mine.mine.token == 5
        mine.over.set()


def test_a_stopped_writer_finds_that_it_has_lost_the_lease(s3: Proxy) -> None:
    """As after a laptop's lid, or a network that was away for longer than the lease."""
    store = Store()
    old, new = a_lease(store, "leases/lost", every_s=30.0), a_lease(store, "leases/lost")
    old.take("wait", print)
    new.take("wait", lambda text: None)
    old.check()  # it does not know yet
    with pytest.raises(Lost, match=r"the run was taken over by .*; this command has stopped writing there"):
        old.renew()
    with pytest.raises(Lost):
        old.check()
    old.release()  # and leaves the new one's alone
    new.renew()
    assert Register(store, Address("photos", "leases/lost")).read().holder.owner == new.mine.owner  # type: ignore[union-attr]
    new.release(keep=False)
    with pytest.raises(Lost, match="was removed while the run was written"):
        lease.require(new.register, new.mine.owner, "the run")


def test_a_network_that_is_away_loses_no_lease_that_nobody_took(s3: Proxy) -> None:
    mine = a_lease(Store(attempts=1), "leases/away", every_s=30.0)
    mine.take("wait", print)
    s3.rate, s3.kinds = 1.0, ("answer lost",)  # S3 has written it, and nobody knows
    with pytest.raises(UserError, match="failed 1 times"):
        mine.renew()
    s3.quiet()
    mine.renew()
    mine.renew()
    mine.check()
    mine.release()


@pytest.mark.parametrize("answer", ["501", "ignored"])
def test_a_store_without_conditional_writes_says_so_once_and_goes_on(s3: Proxy, answer: str) -> None:
    """Some answer 501 NotImplemented, some ignore the headers."""
    from botocore.exceptions import ClientError

    store, said, key = Store(), list[str](), f"leases/plain-{answer}"
    put = store.client.put_object

    def plainly(**asked: object) -> object:
        conditions = {"IfMatch", "IfNoneMatch"} & asked.keys()
        if conditions and answer == "501":
            raise ClientError({"Error": {"Code": "NotImplemented"}, "ResponseMetadata": {"HTTPStatusCode": 501}}, "PutObject")
        return put(**{name: value for name, value in asked.items() if name not in conditions})

    store.client.put_object = plainly
    first, second = (a_lease(store, key) for _ in range(2))
    first.take("wait", said.append)
    assert len(said) == 1 and "the store of the run has no conditional writes" in said[0]
    first.renew()
    with pytest.raises(UserError, match="is being written by"):
        second.take("wait", lambda text: None)
    first.over.set()
    Register(store, Address("photos", key)).write(replace(first.mine, released=True), None) if answer == "ignored" else first.release()


@pytest.mark.parametrize(
    "text", [b"", b"[]", b"\xff", b'{"host": "a", "pid": 1, "time": 0.0, "token": "x"}', b'{"length_s": 1e300, "token": true}']
)
def test_what_another_hand_has_written_is_somebodys(text: bytes) -> None:
    holder = Holder.of(text)
    assert holder.who == "somebody" and holder.token == 0 and holder.length_s <= 3600 and not holder.released


# ── Checkpoints ──────────────────────────────────────────────────────────────────────────────────────────────────────


def write(home: sync.Home, step: int, value: float, keep: int = 2) -> Path:
    state = checkpoint.State(step, {}, {"model.w": torch.full((9,), value)})
    return checkpoint.write(home.path / "checkpoints", state, keep, token=home.token)


def names(home: sync.Home) -> list[str]:
    assert home.at is not None
    return sorted({o.name.split("/")[0] for o in home.store.listing(home.at / "checkpoints")})


def test_the_late_checkpoint_of_a_former_writer_is_rejected_and_removes_none(
    s3: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its driver was killed on another machine, and a worker of it still lives."""
    at = "s3://photos/runs/fenced"
    with another("runs/fenced/lease.json", "elsewhere") as (process, ticket):
        monkeypatch.setenv("SIMCLR_CACHE", str(tmp_path / "old"))
        old = sync.Home(at, ticket)
        for step in (10, 20):
            old.send_checkpoint(write(old, step, 1.0), 2)
        assert names(old) == ["step-000000010.1", "step-000000020.1"]
        late = write(old, 40, 2.0, keep=3)
        process.kill()
        process.wait()

        monkeypatch.setenv("SIMCLR_CACHE", str(tmp_path / "new"))
        new = sync.Home(at)
        with run_lease.alone(new):
            assert new.token == 2 and new.newest() == "step-000000020.1"
            s3.log.clear()
            for work in (
                lambda: old.send_checkpoint(late, 1),
                old.sync_checkpoints,
                lambda: old.later(lambda: old.send_checkpoint(late, 1)) or old.wait(),
            ):
                with pytest.raises(Lost, match=r"s3://photos/runs/fenced was taken over by .*; this command has stopped writing there"):
                    work()
            assert [path for method, path, _ in s3.log if method != "GET" and "step-" in path] == []
            assert names(new) == ["step-000000010.1", "step-000000020.1"]

            # It was stopped behind its last question, and goes on to write once the new one has written: what it does is void.
            new.send_checkpoint(write(new, 30, 3.0), 2)
            asleep = sync.Home(at, ticket)
            asleep.path = old.path
            monkeypatch.setattr(asleep, "require", lambda: None)
            asleep.send_checkpoint(late, 1)
            assert "step-000000030.2" in names(new) and new.newest() == "step-000000030.2"
            third = sync.Home(at)
            monkeypatch.setenv("SIMCLR_CACHE", str(tmp_path / "third"))
            assert torch.equal(checkpoint.read(third.checkpoint(third.newest())).tensors["model.w"], torch.full((9,), 3.0))
            # The same step as the new one's does not touch it either; the new one's next checkpoint clears up.
            asleep.send_checkpoint(write(old, 30, 4.0, keep=9), 9)
            assert checkpoint.read(third.checkpoint("step-000000030.2")).step == 30
            new.send_checkpoint(write(new, 31, 5.0), 2)
            assert names(new) == ["step-000000030.2", "step-000000031.2"]


def test_checkpoints_without_a_token_are_older_than_those_with_one(tmp_path: Path) -> None:
    """As runs have them that were begun by earlier versions, or on a disk."""
    for step, token in ((7, 0), (900, 0), (5, 2), (4, 10)):
        checkpoint.write(tmp_path, checkpoint.State(step, {}, {"model.w": torch.ones(1)}), 9, token=token)
    found = [path.name for path in checkpoint.list_checkpoints(tmp_path)]
    assert found == ["step-000000007", "step-000000900", "step-000000005.2", "step-000000004.10"]
    newest = checkpoint.latest(tmp_path, print)
    assert newest is not None and checkpoint.read(newest).step == 4
    assert checkpoint.worth_keeping(dict.fromkeys(found), 1) == {"step-000000004.10"}
    assert checkpoint.worth_keeping({**dict.fromkeys(found, 0.5)}, 1) == {"step-000000004.10"}
    newest.rename(tmp_path / "step-000000003.10")
    with pytest.raises(checkpoint.Damaged, match="says that it is of step 4"):
        checkpoint.about(tmp_path / "step-000000003.10")


def test_a_run_copied_from_s3_goes_on_on_a_disk(tmp_path: Path) -> None:
    """Its new checkpoints have no token of a lease. They were older than all others, and removed as soon as they were written."""
    state = checkpoint.State(1, {}, {"model.w": torch.ones(1)})
    for step, token in ((8, 2), (9, 2), (10, 2), (11, 0)):
        checkpoint.write(tmp_path, replace(state, step=step), 3, token=token)
    newest = checkpoint.latest(tmp_path, print)
    assert newest is not None and newest.name == "step-000000011.2"


def test_a_token_exceeds_those_of_checkpoints_whose_lease_was_removed(s3: Proxy, tmp_path: Path) -> None:
    home = sync.Home("s3://photos/runs/forgotten")
    assert home.at is not None
    (tmp_path / "checkpoint.json").write_text("{}")
    home.store.upload(tmp_path / "checkpoint.json", home.at / "checkpoints/step-000000009.6/checkpoint.json")
    with run_lease.alone(home):
        assert home.token == 7
    assert any(found.name == "lease.json" for found in home.store.listing(home.at))  # on a machine that has no copy of the run


def test_a_bit_that_flips_on_the_way_is_no_take_over(s3: Proxy) -> None:
    mine = a_lease(Store(pause_s=0.001), "leases/flipped", every_s=30.0)
    mine.take("wait", print)
    s3.quiet()
    s3.rate, s3.kinds = 0.4, ("flipped",)
    for _ in range(30):
        lease.require(mine.register, mine.mine.owner, "the run")
    assert s3.faults["flipped"] > 3
    s3.quiet()


def test_a_refused_run_leaves_nothing_in_the_bucket(s3: Proxy) -> None:
    home = sync.Home("s3://photos/runs/refused")
    with pytest.raises(UserError, match="no such thing"), run_lease.alone(home):
        assert [o.name for o in home.store.listing(home.at)] == ["lease.json"]  # type: ignore[arg-type]
        raise UserError("no such thing")
    assert home.store.listing(home.at) == []  # type: ignore[arg-type]


def test_a_second_driver_of_a_run_is_refused_before_it_writes_anything(simclr: Run, s3: Proxy, patterns: Path) -> None:
    """Nor does it read the run: what it would read changes."""
    home = sync.Home("s3://photos/runs/twice")
    with run_lease.alone(home):
        s3.log.clear()
        code, out, err = simclr("pretrain", "patterns_tiny", "--data", patterns, "--run", "s3://photos/runs/twice", "--workers", 1)
        said = " ".join(err.split())
        assert code == 2 and out == "" and "s3://photos/runs/twice is being written by" in said, err
        assert f"(process {os.getpid()}, for " in said and "or use another --run" in said
        assert {method for method, _, _ in s3.log} == {"GET"} and {path for _, path, _ in s3.log} == {"/photos/runs/twice/lease.json"}


def test_a_driver_that_lost_its_run_ends_the_training_and_leaves_the_others_mlflow_run(
    s3: Proxy, patterns: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between two messages of its workers it looks at its lease; then it sends neither files nor reports."""
    config = replace(TINY, train=replace(TINY.train, steps=3))
    home = sync.Home("s3://photos/runs/lost")
    with run_lease.alone(home):
        run = open_run(home.path, "patterns_tiny", config, patterns)
        uri, ended = f"sqlite:///{tmp_path}/mlflow.db", list[str]()
        monkeypatch.setattr(driver.Outbox, "close", lambda self, status: ended.append(status))
        monkeypatch.setattr(driver.ray_train, "connect", lambda resources: False)
        monkeypatch.setattr(driver.ray_train, "require", lambda resources: False)

        class Training:
            """One whose lease is taken while it runs."""

            checks: ClassVar = list[object]()
            stopped = False

            def reports(self) -> Iterator[object]:
                thief = a_lease(home.store, "runs/lost/lease.json")
                register = thief.register
                found = register.read()
                assert found is not None and register.write(replace(thief.mine, token=found.holder.token + 1), found.etag)
                s3.log.clear()
                home.require()
                yield from ()

            def stop(self) -> None:
                Training.stopped = True

        monkeypatch.setattr(driver.ray_train, "launch", lambda *given: Training())
        job = driver.Job(
            run=run, home=home, asked=home.path, total=3, uri=uri, resources=Resources(workers=1), publish=lambda run, method: None
        )
        with pytest.raises(Lost, match="s3://photos/runs/lost was taken over by"):
            driver.train(job, 0.0)
        assert Training.stopped and ended == [] and len(Training.checks) == 1
        assert [path for method, path, _ in s3.log if method != "GET"] == []


def test_between_two_messages_of_its_workers_the_driver_looks_at_its_lease() -> None:
    def lost() -> None:
        raise Lost("the run was taken over")

    alive = SimpleNamespace(is_alive=lambda: True)
    running = Running(alive, None, [], [], threading.Event(), SimpleNamespace(require=lambda: None), "", "", [lost])  # type: ignore[arg-type]
    with pytest.raises(Lost, match="taken over"):
        next(running.reports())
