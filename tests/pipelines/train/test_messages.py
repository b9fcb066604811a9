"""The types between processes: picklable by Ray, frozen, and cheap to import, since the queue's own process reads them too."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

from pipelines.runs.directory import open_run
from pipelines.train import messages
from pipelines.train.messages import Reported, Saved, Task
from simclr.recipes import recipe
from simclr.stages import STAGES


def test_the_module_is_light() -> None:
    code = "import sys, pipelines.train.messages; print(sorted({'ray', 'torch', 'numpy', 'mlflow', 'simclr'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_tasks_and_messages_survive_ray() -> None:
    from ray import cloudpickle

    said: dict[type, object] = {
        Reported: Reported(step=3, total_steps=9, metrics={"train/loss": 0.5}, stragglers="rank 1 on a", trial="000-s0"),
        Saved: Saved(step=3, held_s=0.1, written_s=0.2, every_s=60.0),
        messages.Said: messages.Said("rank 0: waiting for S3"),
        messages.WorkerFailed: messages.WorkerFailed(rank=1, error="killed"),
        messages.TrainingOver: messages.TrainingOver(),
        messages.TrialBeganAgain: messages.TrialBeganAgain(trial="000-s0", reason="the loss is not finite"),
        messages.TrialFailed: messages.TrialFailed(trial="000-s0", reason="the loss is not finite"),
        messages.TrialOver: messages.TrialOver(trial="000-s0", status="FINISHED"),
    }
    assert set(said) == set(get_args(messages.Message))
    config = STAGES["finetune"].from_dict(STAGES["finetune"]().to_dict())
    for value in (*said.values(), Task(stage="finetune", config=config, data="s3://b/d", run="r", given={"ids": [1, 2]})):
        assert cloudpickle.loads(cloudpickle.dumps(value)) == value
        with pytest.raises((dataclasses.FrozenInstanceError, TypeError)):
            value.trial = "another"  # type: ignore[attr-defined]


def test_a_line_of_metrics_jsonl_is_as_it_was(tmp_path: Path, patterns: Path) -> None:
    """Readers of a run directory know these keys; a run that is no trial has no mark."""
    run = open_run(tmp_path / "run", "patterns_tiny", recipe("patterns_tiny"), patterns)
    run.save()
    report = Reported(step=3, total_steps=9, metrics={"train/loss": 0.5, "epoch": 1.0}, stragglers="rank 1 on a", trial="000-s0")
    run.append(report.line())
    run.append(dataclasses.replace(report, step=4, stragglers="").line())
    first, second = run.history()
    assert list(first) == ["time", "train/loss", "epoch", "stragglers", "step", "total_steps"] and first["stragglers"] == "rank 1 on a"
    assert list(second) == ["time", "train/loss", "epoch", "step", "total_steps"] and second["step"] == 4
