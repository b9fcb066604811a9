"""A pod of a training gets SIGTERM, as Kubernetes gives it to a pod whose machine goes: it leaves with a checkpoint.

The pod is `ray start --block` as process 1 of a namespace of its own, with the manifest's own drain timeout; there is no Kubernetes.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from simclr import checkpoint
from simclr.config import Config
from simclr.recipes import recipe
from tests.conftest import Figures, Within
from tests.support import faults
from tests.support.block import Blocked, wait_for
from tests.support.paths import ROOT

pytestmark = pytest.mark.cluster
STEPS = 14


def small() -> Config:
    config = recipe("patterns_tiny")
    # Its own checkpoints are far apart: what it goes on from is the one that it writes when it leaves.
    train = replace(config.train, batch_size=60, steps=STEPS, report_every_steps=1, checkpoint_every_steps=STEPS, precision="float64")
    return replace(config, train=train, watch=replace(config.watch, every_epochs=0))


def drain_timeout() -> str:
    """What cluster/kuberay/raycluster.yaml gives to its workers."""
    cluster = yaml.safe_load((ROOT / "cluster/kuberay/raycluster.yaml").read_text())
    (worker,) = cluster["spec"]["workerGroupSpecs"][0]["template"]["spec"]["containers"]
    (found,) = (entry["value"] for entry in worker["env"] if entry["name"] == "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S")
    return str(found)


@pytest.fixture
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Blocked]:
    found = Blocked(tmp_path_factory.mktemp("b"), drain_timeout())
    try:
        yield found
    finally:
        found.close()


def test_a_pod_that_gets_sigterm_leaves_with_a_checkpoint(
    cluster: Blocked, patterns: Path, tmp_path: Path, within: Within, figures: Figures
) -> None:
    losses, tensors = faults.undisturbed(small(), patterns)
    faults.plan(tmp_path / "run-faults", step_s=0.5)
    flags = {"data": patterns, "run": tmp_path / "run", "address": cluster.address, "workers": 2, "min-workers": 1}
    flags |= {"train.batch-size": 60, "train.steps": STEPS, "train.report-every-steps": 1, "train.checkpoint-every-steps": STEPS}
    flags |= {"train.precision": "float64", "watch.every-epochs": 0}
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    command = [sys.executable, "-c", "from tests.support import faults; faults.command()", "pretrain", "patterns_tiny", *words]
    training = subprocess.Popen(command, env=cluster.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, bufsize=0)
    transcript = list[tuple[float, str]]()

    def rows() -> list[dict[str, Any]]:
        path = tmp_path / "run/metrics.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")] if path.exists() else []

    try:
        wait_for("step 5", lambda: rows() and rows()[-1]["step"] >= 5, training)
        told = time.time()
        os.kill(cluster.node.first(), signal.SIGTERM)
        ((node, deadline_ms),) = wait_for("the drain", lambda: [*cluster.draining().items()], cluster.node.process)
        transcript.append((time.time(), f"Ray: node {node[:6]} is DRAINING, deadline in {deadline_ms / 1000 - told:.1f} s"))
        assert cluster.node.process.wait(60) == 1  # Ray's own status for a node that was told to end
        transcript.append((time.time(), "the pod's processes have ended"))
        output = training.communicate(timeout=180)[0].decode()
    finally:
        training.kill()
    assert training.returncode == 0, output
    transcript[:0] = [(row["time"], f"step {row['step']} of {STEPS}") for row in rows()]
    print(*(f"{at - told:6.1f} s  {what}" for at, what in sorted(transcript)), output, sep="\n")

    assert float(drain_timeout()) - 5 < deadline_ms / 1000 - told < float(drain_timeout()) + 5
    assert re.search(r"rank [01] left with a checkpoint: rank [01] loses its node in \d+ s", output)
    assert "starting again with 1 workers, 2 before" in output
    # No step was repeated, none is missing, and each is that of the undisturbed training.
    assert [row["step"] for row in rows()] == list(range(1, STEPS + 1))
    within("loss of a step", max(abs(row["train/loss"] / losses[row["step"]] - 1) for row in rows()), 1e-9)
    newest = checkpoint.latest(tmp_path / "run/checkpoints", print)
    assert newest is not None
    state = checkpoint.read(newest)
    within("weights", max(float((state.tensors[name] - t).abs().max()) for name, t in tensors.items() if t.is_floating_point()), 1e-9)
    drained, ended = (at for at, what in transcript if "DRAINING" in what or "ended" in what)
    again = next(row["time"] for row in rows() if row["time"] > ended)
    figures("a pod gets SIGTERM, 2 → 1 workers", drained - told, again - told, 0)
