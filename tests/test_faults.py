"""What goes wrong on a cluster, done to small trainings: each goes on, and ends where the undisturbed one does.

Steps take a quarter of a second more than they need, for a fault to have a time. Each figure is of one run, on this machine.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from pipelines import cluster, pretrain, worker
from simclr import checkpoint
from simclr.config import Config
from simclr.recipes import recipe
from tests import faults
from tests.conftest import Figures, Within
from tests.nodes import Nodes
from tests.ranks import Ranks

pytestmark = pytest.mark.cluster
STEPS, EVERY = 24, 4
Reference = tuple[dict[int, float], dict[str, Any]]


def small() -> Config:
    config = recipe("patterns_tiny")
    train = replace(config.train, batch_size=60, steps=STEPS, report_every_steps=1, checkpoint_every_steps=EVERY, precision="float64")
    return replace(config, train=train, watch=replace(config.watch, every_epochs=0))


@pytest.fixture(scope="module")
def reference(ranks: Ranks, patterns: Path) -> Reference:
    """The undisturbed training, on two ranks."""
    found: Reference = ranks(2, faults.undisturbed, small(), patterns)[0]
    return found


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    """A head and two nodes of one core each."""
    patch = pytest.MonkeyPatch()
    patch.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    patch.setenv("RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S", "0.5")
    patch.setattr(cluster, "_RESIZE_S", 2.0)
    patch.setattr(worker, "train_worker", faults.faulty_worker)
    found = Nodes(tmp_path_factory.mktemp("n"))
    try:
        found.add()
        found.add()
        cluster.connect(cluster.Resources(address=found.address))
        yield found
        cluster.disconnect()
    finally:
        found.close()
        patch.undo()


@dataclass
class Story:
    """A training and what its driver was told meanwhile."""

    run: Path
    said: list[tuple[float, str]]

    def rows(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.run / "metrics.jsonl").read_text().splitlines()]

    def first_said(self, part: str, since: float = 0.0) -> float:
        """When `part` was said, Unix time."""
        return next(at for at, text in self.said if part in text and at >= since)

    def went_on(self, since: float) -> float:
        """When the first report came of those who began again after `since`."""
        again = self.first_said("starting again", since)
        return next(float(row["time"]) for row in self.rows() if row["time"] > again)

    def repeated(self, since: float) -> int:
        """Steps that were done a second time after what happened at `since`."""
        before = max(row["step"] for row in self.rows() if row["time"] < self.went_on(since))
        again = next(row["step"] for row in self.rows() if row["time"] >= self.went_on(since))
        return int(before - again + 1)

    def equals(self, reference: Reference, within: Within, bound: float = 1e-9) -> None:
        """Every report of a step, also of one that was repeated, and the encoder are the undisturbed training's."""
        losses, tensors = reference
        rows = self.rows()
        assert {row["step"] for row in rows} == set(losses)
        within("loss of a step", max(abs(row["train/loss"] / losses[row["step"]] - 1) for row in rows), bound)
        newest = checkpoint.latest(self.run / "checkpoints", print)
        assert newest is not None
        state = checkpoint.read(newest)
        assert state.step == STEPS
        within("weights", max(float((state.tensors[name] - t).abs().max()) for name, t in tensors.items() if t.is_floating_point()), bound)


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[tuple[float, str]]:
    heard: list[tuple[float, str]] = []

    def say(text: str) -> None:
        heard.append((time.time(), text))
        print(text)

    monkeypatch.setattr(cluster, "say", say)
    return heard


def train(run: Path, patterns: Path, **resources: Any) -> None:
    config, told = small(), cluster.Resources(**{"workers": 2, **resources})
    pretrain.pretrain(pretrain.Args(data=patterns, config=config, recipe="patterns_tiny", run=run, resources=told))


def test_a_worker_that_is_killed_hangs_or_stops(
    nodes: Nodes, reference: Reference, patterns: Path, tmp_path: Path, said: list[tuple[float, str]], within: Within, figures: Figures
) -> None:
    story = Story(tmp_path / "run", said)
    faults.plan(tmp_path / "run-faults", (7, 1, "kill"), (14, 1, "hang"), (19, 0, "stop"), step_s=0.25)
    train(story.run, patterns, address=nodes.address, hang_timeout_s=4.0)
    came = faults.happened(tmp_path / "run-faults")
    assert set(came) == {7, 14, 19}
    named = {7: "a worker is killed (SIGKILL)", 14: "a worker's training thread hangs", 19: "a worker is stopped (SIGSTOP)"}
    for step, what in named.items():
        noticed, again = story.first_said("failed: ", came[step]), story.went_on(came[step])
        figures(what, noticed - came[step], again - came[step], story.repeated(came[step]))
    texts = [text for _, text in said]
    assert any("rank 1 failed: no progress for" in text and "at step 14 (" in text and "pid" in text for text in texts), texts
    assert any("rank 0 failed: no answer for" in text and "at step" in text for text in texts), texts
    story.equals(reference, within)
