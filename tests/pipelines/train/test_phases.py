"""Workers that hang before, in and beside the loop: each is named with its phase, and the weights end as the undisturbed run's."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipelines.commands import pretrain
from pipelines.train import hang, ray_private, ray_train, worker
from pipelines.train.starting import Starting
from simclr import checkpoint
from simclr.config import Config
from simclr.data.s3 import remote
from simclr.data.s3.store import Store
from simclr.data.s3.uri import address
from simclr.recipes import recipe
from tests.conftest import Within
from tests.support import faults
from tests.support.paths import ROOT
from tests.support.s3 import Proxy

pytestmark = pytest.mark.cluster
STEPS = 8


def small() -> Config:
    config = recipe("patterns_tiny")
    train = replace(config.train, batch_size=60, steps=STEPS, report_every_steps=1, checkpoint_every_steps=2, precision="float64")
    return replace(config, train=train, watch=replace(config.watch, every_epochs=0))


def train(monkeypatch: pytest.MonkeyPatch, data: str, run: Path, **more: Any) -> list[str]:
    """The training on a private Ray, with faulty workers; what its driver said."""
    said: list[str] = []
    monkeypatch.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # for workers
    monkeypatch.setattr(worker, "train_worker", faults.faulty_worker)
    monkeypatch.setattr(ray_train, "say", lambda text: (said.append(text), print(text)))
    resources = ray_train.Resources(**{"workers": 2, "hang_timeout_s": 6.0, "max_failures": 9, **more})
    try:
        pretrain.pretrain(pretrain.Args(data=Path(data), config=small(), recipe="patterns_tiny", run=run, resources=resources))
    finally:
        ray_train.disconnect()
    return said


def test_a_hang_in_any_phase_is_named_and_the_weights_are_as_undisturbed(
    s3: Proxy, patterns: Path, tmp_path: Path, within: Within, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, run = "s3://photos/for-phases", tmp_path / "run"
    remote.push(patterns, address(place), lambda done, total: None, Store())  # type: ignore[arg-type]
    losses, tensors = faults.undisturbed(small(), patterns)
    named = {
        ("rendezvous", 1, "hang"): ("rank 1 failed: no progress for ", "phase rendezvous ("),
        ("fetch", 1, "stop"): ("rank 1 failed: no answer for ", "phase fetch ("),
        ("saving", 0, "disk"): ("rank 0 failed: no progress for ", "phase saving, at step 4 ("),
        ("upload", 0, "hang"): ("rank 0 failed: no progress for ", f"phase upload, at step {STEPS} ("),
    }
    faults.plan(tmp_path / "run-faults", *named)
    failed = [text for text in train(monkeypatch, place, run) if " failed: " in text]
    assert set(faults.happened(tmp_path / "run-faults")) == {at for at, _, _ in named}
    assert len(failed) == len(named)  # nobody else was blamed
    for text, (begin, phase) in zip(failed, named.values(), strict=True):
        assert text.startswith(begin) and phase in text and re.search(r"pid \d+ on \S+ \(127\.0\.0\.1\)", text), text
    newest = checkpoint.latest(run / "checkpoints", print)
    assert newest is not None
    state = checkpoint.read(newest)
    assert state.step == STEPS
    assert {row["step"] for row in state.reports} == set(losses)
    within("weights", max(float((state.tensors[name] - t).abs().max()) for name, t in tensors.items() if t.is_floating_point()), 1e-9)


# ── Before a process answers ───────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def private_ray() -> Iterator[Any]:
    import ray

    ray_train.connect(ray_train.Resources(workers=2))
    yield ray
    ray_train.disconnect()


class RayTrainWorker:
    """Of the name of Ray's own: that one's start cannot be made to hang from outside."""

    def __init__(self, stands_s: float) -> None:
        time.sleep(stands_s)

    def execute(self, function: Any, *arguments: Any) -> Any:
        return function(*arguments)


def test_a_process_that_does_not_answer_is_named_and_killed_and_no_other_is(private_ray: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """First while it is made, then while the controller waits for one of its answers; each time another process is healthy."""
    from ray.train.v2._internal.execution.worker_group.worker import Worker

    monkeypatch.setattr(hang.group, "stuck", "")
    made = private_ray.remote(num_cpus=1, max_concurrency=1)(RayTrainWorker)
    healthy = made.remote(0.0)
    pid = private_ray.get(healthy.execute.remote(os.getpid))
    stuck = made.remote(3600.0)
    watch = Starting(6.0)
    watch.start()
    with pytest.raises(private_ray.exceptions.RayActorError):
        private_ray.get(stuck.execute.remote(os.getpid), timeout=120)
    watch.join(20)
    assert re.fullmatch(r"no answer for \d+ s from pid \d+ on 127\.0\.0\.1, phase start", hang.group.stuck), hang.group.stuck
    assert f"pid {pid} " not in hang.group.stuck

    second = made.remote(0.0)
    about = [SimpleNamespace(pid=pid, hostname="a", node_ip="1"), SimpleNamespace(pid=7, hostname="b", node_ip="2")]
    workers = [Worker(actor, of, {}) for actor, of in zip((healthy, second), about, strict=True)]
    waits = second.execute.remote(time.sleep, 3600)
    watch = Starting(6.0)
    watch.born([ray_private.Worker(each) for each in workers])
    watch.start()
    with pytest.raises(private_ray.exceptions.RayActorError):
        private_ray.get(waits, timeout=120)
    watch.join(20)
    assert re.fullmatch(r"no answer for \d+ s from pid 7 on b \(2\), phase start", hang.group.stuck), hang.group.stuck
    assert private_ray.get(healthy.execute.remote(os.getpid)) == pid
