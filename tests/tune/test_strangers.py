"""A sweep that somebody else wrote: what is refused of it before anything is trained, removed or followed."""

from __future__ import annotations

import contextlib
import json
import queue
from pathlib import Path
from typing import Any

import pytest

from simclr.data.manifest import read_manifest
from simclr.errors import UserError
from tests.support.command import Run, refused
from tests.support.sweeps import a_sweep, trained
from tune import plan, spaces, sweep_dir, trial, validate
from tune.sweep_dir import Sweep, Trial
from tune.trial_log import Ledger

BATCH = {"train.batch_size": 60}


def planted(sweep: Sweep, file: str, change: Any) -> None:
    """Change the JSON in `file` of the sweep's directory."""
    text = json.loads((sweep.path / file).read_text())
    change(text)
    (sweep.path / file).write_text(json.dumps(text))


def test_a_space_that_has_changed_is_refused(tmp_path: Path) -> None:
    """A code is a value's number: with other values, trials of two spaces would be in one table."""
    for name in spaces.SPACES:
        sweep = a_sweep(tmp_path / name, name)
        sweep.save()
        plan.keep_space(sweep)
        plan.keep_space(sweep)
    sweep = a_sweep(tmp_path / "smoke", "smoke")
    planted(sweep, "space.json", lambda text: text["axes"][0]["values"].reverse())
    with pytest.raises(
        UserError, match=r"\[1.0, 0.5, 0.2, 0.1\] there, \[0.1, 0.2, 0.5, 1.0\] here\); go on with the version that wrote it"
    ):
        plan.keep_space(sweep)


@pytest.mark.parametrize(
    ("field", "value", "sentence"),
    [
        ("search", "pickle", "search is 'pickle', expected one of grid, random, mixed, optuna"),
        ("scheduler", "rm", "scheduler is 'rm', expected one of none, asha, median, pbt"),
        ("space", "../x", "unknown space"),
        ("seeds", 10**12, "seeds of s is 1000000000000; expected 1 to 100,000"),
        ("keep", 0, "keep of s is 0; expected 1 to"),
        ("trials", "many", "trials is 'many'"),
        ("resources", {"workers": 1, "command": "rm"}, "has an unknown field 'command'"),
        (
            "resources",
            {"workers": 1, "address": "ray://evil:10001"},
            r"on the Ray cluster at ray://evil:10001; .* add --address ray://evil:10001",
        ),
        ("only", {"head.layers": [1]}, "does not vary head.layers"),
        ("changes", {"__class__": 1}, "the config has no field"),
    ],
)
def test_a_sweep_that_says_something_else_is_refused(
    simclr: Run, tmp_path: Path, patterns: Path, field: str, value: Any, sentence: str
) -> None:
    sweep = a_sweep(Path("s"), "smoke", data=str(patterns), changes=BATCH)
    trained(sweep, lambda point: 0.5)
    planted(sweep, "sweep.json", lambda text: text.update({field: value}))
    refused(simclr("sweep", "--resume", "s"), sentence)


def test_records_that_lead_elsewhere_are_refused(tmp_path: Path, patterns: Path) -> None:
    """Files are removed and written by a trial's name: it must be its directory's, and that must lie in the sweep's."""
    theirs = tmp_path / "theirs" / "checkpoints" / "step-1"
    theirs.mkdir(parents=True)
    sweep = a_sweep(tmp_path / "s", "smoke", changes=BATCH, keep=1)
    found = trained(sweep, lambda point: 0.5)
    codes = plan.settled(sweep, validate.check(sweep, read_manifest(patterns)))
    first = sweep.path / "trials" / found[0].name
    planted(sweep, f"trials/{first.name}/trial.json", lambda text: text.update(name="../../theirs"))
    with pytest.raises(UserError, match=r"it is of trial '../../theirs'"):
        sweep_dir.prune(sweep.path, sweep.metric, 1)
    found[0].save(first)
    planted(sweep, f"trials/{first.name}/trial.json", lambda text: text["values"].update({"train.epochs": 3}))
    with pytest.raises(UserError, match=r"a value of train.epochs, which smoke does not vary"):
        plan.left(sweep, codes)
    found[0].save(first)
    (first / "checkpoints").symlink_to(theirs.parent)
    with pytest.raises(UserError, match="checkpoints is a symbolic link, to"):
        sweep_dir.prune(sweep.path, sweep.metric, 1)
    (first / "checkpoints").unlink()
    (sweep.path / "trials" / "999-s0").symlink_to(theirs.parent.parent)
    with pytest.raises(UserError, match="999-s0 is a symbolic link"):
        sweep_dir.prune(sweep.path, sweep.metric, 1)
    (sweep.path / "trials" / "999-s0").unlink()
    Trial(name="x", values={}, seed=0).save(first.rename(sweep.path / "trials" / "x"))
    with pytest.raises(UserError, match="x is no trial of this sweep"):
        plan.left(sweep, codes)
    (sweep.path / "trials").rename(tmp_path / "moved")
    (sweep.path / "trials").symlink_to(tmp_path / "moved")
    with pytest.raises(UserError, match="trials is a symbolic link"):
        sweep_dir.load(sweep.path)
    assert theirs.exists()


def test_first_tries_that_lead_elsewhere_are_refused(tmp_path: Path) -> None:
    """Another user's run would be sent to MLflow, and marked as sent."""
    sweep, mine = a_sweep(tmp_path / "s", "smoke", changes=BATCH), a_sweep(tmp_path / "mine", "smoke", changes=BATCH)
    sweep.save()
    first = trained(mine, lambda point: 0.5)[0].name
    sweep_dir.first_try(sweep.path, first).parent.mkdir()
    sweep_dir.load(sweep.path)
    sweep_dir.first_try(sweep.path, first).symlink_to(mine.path / "trials" / first)
    with pytest.raises(UserError, match=f"{first} is a symbolic link, to"):
        sweep_dir.load(sweep.path)
    with pytest.raises(UserError, match=f"{first} is a symbolic link, to"):  # it came while the sweep ran
        Ledger(sweep, queue.Queue(), "sqlite:///x.db").close("FINISHED", [], {})


def test_a_password_in_the_record_of_a_sweep_is_not_read(tmp_path: Path) -> None:
    words = "simclr sweep smoke --tracking-uri http://ada:{}@host"
    sweep = a_sweep(tmp_path / "s", "smoke", command=words.format("lovelace"), tracking_uri="http://ada:lovelace@host")
    sweep.save()
    found = sweep_dir.load(sweep.path)
    assert "lovelace" not in f"{found}" and found.command.startswith("simclr sweep smoke")


@pytest.mark.parametrize(
    ("mode", "scheduler", "address", "is_refused"),
    [
        (0o777, "pbt", "auto", True),
        (0o1777, "pbt", "auto", False),
        (0o2775, "pbt", "auto", False),
        (0o777, "asha", "auto", False),
        (0o777, "pbt", None, False),
    ],
)
def test_pbt_on_a_cluster_needs_a_directory_that_is_not_everybodys(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: int, scheduler: str, address: str | None, is_refused: bool
) -> None:
    """Ray Tune's folder lies in it, and another user could exchange it. A group that shares a directory may."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    sweep = a_sweep(tmp_path / "s", "smoke", scheduler=scheduler, resources={"workers": 1, "address": address})
    sweep.save()
    sweep.path.chmod(mode)
    with pytest.raises(UserError, match=r"every user may write in .* `chmod o-w ") if is_refused else contextlib.nullcontext():
        validate.require_closed(sweep)


def test_such_a_directory_is_refused_before_the_cluster_is_joined(simclr: Run, tmp_path: Path, patterns: Path) -> None:
    resources = {"workers": 1, "address": "auto"}
    sweep = a_sweep(tmp_path / "s", "smoke", data=str(patterns), changes=BATCH, scheduler="pbt", resources=resources)
    trained(sweep, lambda point: 0.5)
    sweep.path.chmod(0o777)
    refused(simclr("sweep", "--resume", "s", "--address", "auto"), "every user may write in .*/s, where pbt on a cluster keeps")


@pytest.mark.parametrize(
    "change",
    [
        {"name": "../../x"},
        {"name": ".."},
        {"axes": {"loss.temperature": 99, "optim.base_lr": 0}},
        {"axes": {"loss.temperature": 0.5, "optim.base_lr": 0}},
        {"axes": {"loss.temperature": 0}},
        {"seed": 5},
        {"name": "001-s0"},
    ],
)
def test_a_plan_that_names_other_trials_is_refused(tmp_path: Path, patterns: Path, change: dict[str, Any]) -> None:
    sweep = a_sweep(tmp_path / "s", "smoke", changes=BATCH)
    sweep.save()
    codes = plan.settled(sweep, validate.check(sweep, read_manifest(patterns)))
    planted(sweep, "plan.json", lambda text: text["trials"][0].update(change))
    with pytest.raises(UserError, match=r"plan.json is damaged"):
        plan.settled(sweep, codes)


def test_a_note_of_pbt_names_a_trial(tmp_path: Path) -> None:
    class Note:
        @contextlib.contextmanager
        def as_directory(self) -> Any:
            yield tmp_path

    for text, donor in (('{"trial": "a"}', ""), ('{"trial": "b"}', "b")):
        (tmp_path / "from.json").write_text(text)
        assert trial._donor(Note(), "a") == donor
    (tmp_path / "from.json").write_text('{"trial": "../../b"}')
    with pytest.raises(UserError, match="no name"):
        trial._donor(Note(), "a")
