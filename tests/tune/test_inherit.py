"""A pbt trial that takes over another's weights, and is killed at any point of it."""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pipelines.runs.directory import Run, load_run
from simclr import checkpoint
from simclr.errors import UserError
from tests.support.sweeps import a_sweep, trained
from tune import inherit, resolve, sweep_dir, trial
from tune.sweep_dir import Sweep

BATCH = {"train.batch_size": 60}


def two(path: Path) -> tuple[Sweep, Run, Run]:
    """A sweep, and two of its trials with a checkpoint of their own each: the first one has step 3, the second one step 7."""
    sweep = a_sweep(path, "smoke", changes=BATCH, scheduler="pbt")
    first, second = (load_run(sweep.path / "trials" / record.name) for record in trained(sweep, lambda point: 0.5)[:2])
    for run, step in ((first, 3), (second, 7)):
        checkpoint.write(run.checkpoints, checkpoint.State(step, run.config.to_dict(), {"t": torch.tensor([step])}), 1)
    assert first.config != second.config
    return sweep, first, second


class Kill(BaseException):
    pass


CHANGES = ((os, "mkdir"), (os, "rename"), (os, "replace"), (os, "rmdir"), (os, "unlink"), (shutil, "copytree"))


def killed(work: Callable[[], Any], at: int) -> bool:
    """Whether `work` ended before its change of the disk number `at`; else it is killed there."""
    count = 0

    def counted(real: Callable[..., Any], *given: Any, **more: Any) -> Any:
        nonlocal count
        count += 1
        if count > at:
            raise Kill
        return real(*given, **more)

    with pytest.MonkeyPatch.context() as patched:
        for module, name in CHANGES:
            patched.setattr(module, name, partial(counted, getattr(module, name)))
        try:
            work()
        except Kill:
            return False
    return True


def steps(run: Run) -> list[str]:
    return [path.name for path in run.checkpoints.iterdir()]


def test_a_trial_killed_at_any_point_has_weights_that_fit_its_values(tmp_path: Path) -> None:
    """Its own with its own, or the other's with the new; also if it is killed again while that is sorted out."""
    seen, at, over = [], 0, False
    while not over:
        sweep, own, other = two(tmp_path / str(at))
        over = killed(lambda: inherit.take(own, other.config, other.path), at)  # noqa: B023  called in this turn
        again = 0
        while not killed(lambda: inherit.settle(own.path), again):  # noqa: B023  # each time a little later
            again += 1
        config = load_run(own.path).config
        assert steps(own) == (["step-000000003"] if config == own.config else ["step-000000007"])
        assert config in (own.config, other.config) and not list(own.path.glob(".taking-*"))
        assert steps(other) == ["step-000000007"]
        seen.append(config == other.config)
        shutil.rmtree(sweep.path)
        at += 1
    assert seen == sorted(seen) and seen.count(False) >= 5 and seen[-1]


def test_an_exchange_of_an_earlier_version_goes_on_with_the_copy(tmp_path: Path) -> None:
    """It wrote run.json first; killed between its two renamings, it would begin from step 0."""
    _, own, other = two(tmp_path)
    shutil.copytree(other.checkpoints, own.path / ".inherited")
    own.checkpoints.rename(own.path / ".outlived")
    assert inherit.settle(own.path) == "" and steps(own) == ["step-000000007"]
    assert not list(own.path.glob(".[io]*"))


@pytest.mark.parametrize("link", [".inherited", ".outlived", ".taking-x", ".taking-y/old", "checkpoints"])
def test_a_planted_link_is_not_written_through(tmp_path: Path, link: str) -> None:
    """The other trial's step would lie in somebody's folder, and the next checkpoint would remove what that has."""
    _, own, other = two(tmp_path / "s")
    _, victim, _ = two(tmp_path / "victim")
    if link == "checkpoints":
        shutil.rmtree(own.checkpoints)
    (own.path / link).parent.mkdir(exist_ok=True)
    (own.path / link).symlink_to(victim.checkpoints)
    with pytest.raises(UserError, match="is a symbolic link, to"):
        inherit.take(own, other.config, other.path)
    assert steps(victim) == ["step-000000003"] and load_run(own.path).config == own.config


def test_a_trial_says_whose_weights_it_took_before_it_was_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It died before its record said so: the score of the weights that it had is not that of these."""
    tune = pytest.importorskip("ray.tune")
    monkeypatch.setattr(tune, "get_checkpoint", lambda: None)
    sweep, own, other = two(tmp_path / "s")
    name = own.path.name
    monkeypatch.setattr(tune, "get_context", lambda: SimpleNamespace(get_trial_name=lambda: name))
    record = sweep_dir.trial_in(own.path)
    assert record is not None and record.scores
    dataclasses.replace(record, status="running").save(own.path)
    inherit.take(own, other.config, other.path)
    began: list[sweep_dir.Trial] = []
    monkeypatch.setattr(trial, "_open", lambda *_: load_run(own.path))
    monkeypatch.setattr(trial, "_train", lambda sweep, run, record, *_: began.append(record) or record)
    asked = resolve.Coded(axes=resolve.codes_of(sweep.restricted, sweep.base, other.config) or {}, seed=0)
    trial.drive(asked, sweep, None, True, {})
    later = dataclasses.replace(began[0], scores={"eval/knn_top1": 0.75})
    later.save(own.path)
    trial.drive(asked, sweep, None, True, {})
    assert [(t.donor, t.scores) for t in began] == [(other.path.name, {}), (other.path.name, later.scores)]
