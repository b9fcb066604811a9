"""The records of a sweep in S3 and their copies on the machines of its drivers."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from pipelines import cli
from simclr.data.manifest import read_manifest
from simclr.data.s3.store import Store
from simclr.data.s3.uri import Address
from simclr.errors import UserError
from tests.support.s3 import Proxy
from tests.support.sweeps import a_sweep, trained
from tune import mirror, sweep_dir, trial, validate
from tune.mirror import Mirror

pytestmark = pytest.mark.usefixtures("s3")


def machine(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """From now on this process is on another machine."""
    monkeypatch.setenv("SIMCLR_CACHE", str(folder))


def begun(at: Address) -> tuple[Mirror, sweep_dir.Sweep]:
    """A sweep of two trials that are over, sent."""
    kept = Mirror(at)
    kept.fetch()
    only = {"optim.base_lr": [1], "loss.temperature": [0.2, 0.5]}
    found = a_sweep(kept.path, "smoke", at=str(at), only=only)
    trained(found, lambda point: point.values["loss.temperature"] / 10)
    kept.send()
    return kept, found


def test_any_machine_has_the_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, s3: Proxy) -> None:
    at = Address("photos", "mirror/any")
    kept, found = begun(at)
    s3.log.clear()
    kept.send()
    kept.fetch()
    assert not [entry for entry in s3.log if entry[0] == "PUT"] and len(s3.log) == 1  # a listing: nothing has changed
    machine(monkeypatch, tmp_path / "two")
    path, where = mirror.opened(Path(str(at)))
    assert path != kept.path and where == str(at)
    there = sweep_dir.load(path, where)
    assert there == dataclasses.replace(found, path=path, resources=there.resources)
    assert sweep_dir.trials(path) == sweep_dir.trials(kept.path) != []
    cli.main(["sweep", "report", str(at)])
    assert b"000-s0" in kept.store.read(at / "report.html")


def test_what_a_killed_driver_did_not_send_stays_and_what_another_wrote_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    at = Address("photos", "mirror/both")
    kept, _ = begun(at)
    one, two = (kept.path / f"trials/00{i}-s0/trial.json" for i in (0, 1))
    one.write_text(one.read_text().replace("finished", "stopped"))  # and killed
    kept.fetch()
    assert "stopped" in one.read_text()
    machine(monkeypatch, tmp_path / "two")
    other = Mirror(at)
    other.fetch()
    theirs = other.path / two.relative_to(kept.path)
    theirs.write_text(theirs.read_text().replace("finished", "failed"))
    other.send()
    kept.fetch()
    assert "failed" in two.read_text() and "stopped" in one.read_text()
    kept.send()
    assert b"stopped" in kept.store.read(at / "trials/000-s0/trial.json") and b"failed" in kept.store.read(at / "trials/001-s0/trial.json")


def test_a_copy_of_an_earlier_sweep_at_the_address_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    at = Address("photos", "mirror/again")
    kept, _ = begun(at)
    mirror.remove(at, kept.store)
    kept.fetch()
    assert sweep_dir.trials(kept.path) == [] and not (kept.path / "sweep.json").exists()
    begun(at)
    (kept.path / "trials/000-s0/trial.json").write_text("old")
    mine = os.environ["SIMCLR_CACHE"]
    machine(monkeypatch, tmp_path / "two")
    mirror.remove(at, kept.store)
    _, theirs = begun(at)
    machine(monkeypatch, Path(mine))
    kept.fetch()
    assert sweep_dir.load(kept.path, str(at)).created == theirs.created and len(sweep_dir.trials(kept.path)) == 2


def test_what_is_no_sweep_is_refused_and_foreign_names_are_left_alone() -> None:
    at, store = Address("photos", "mirror/foreign"), Store()
    store.client.put_object(Bucket="photos", Key="mirror/foreign/photo.jpg", Body=b"x")
    with pytest.raises(
        UserError, match=r"s3://photos/mirror/foreign has files and is no sweep \(it has no sweep.json\); use another --out"
    ):
        mirror.opened(Path(str(at)))
    store.delete(at / "photo.jpg")
    kept, _ = begun(at)
    for name in ("trials/.x/trial.json", "trials/a/b/trial.json", "trials/a/tuner.pkl", "trials/../../x/trial.json", "core/a/trial.json"):
        store.client.put_object(Bucket="photos", Key=f"mirror/foreign/{name}", Body=b"x")
    before = sorted(kept.path.parent.rglob("*"))
    kept.fetch()
    assert sorted(kept.path.parent.rglob("*")) == before


def test_a_trials_end_is_sent_at_once_and_only_the_best_keep_their_weights(capfd: Any, s3: Proxy) -> None:
    at = Address("photos", "mirror/ends")
    kept, found = begun(at)
    for name in ("000-s0", "001-s0"):
        for part in ("checkpoints/step-000000009/checkpoint.json", "checkpoints/step-000000009/state.safetensors", "encoder/config.json"):
            kept.store.client.put_object(Bucket="photos", Key=f"{at.key}/trials/{name}/{part}", Body=b"x")
    with kept.kept():
        record = sweep_dir.trials(found.path)[1]
        dataclasses.replace(record, step=8).save(found.path / "trials" / record.name)
        kept.ended(["000-s0"])
        until = time.monotonic() + 30
        while json.loads(kept.store.read(at / f"trials/{record.name}/trial.json"))["step"] != 8 or _heavy(kept) != {"001-s0"}:
            assert time.monotonic() < until
            time.sleep(0.02)
    assert _heavy(kept) == {"001-s0"}


def test_a_trial_that_begins_again_has_no_checkpoint_of_its_first_try() -> None:
    kept, found = begun(Address("photos", "mirror/first"))
    kept.store.client.put_object(Bucket="photos", Key="mirror/first/trials/000-s0/checkpoints/step-000000009/checkpoint.json", Body=b"x")
    trial._set_aside(found, found.path / "trials/000-s0")
    assert {o.name.split("/")[1] for o in kept.store.listing(kept.at) if o.name.startswith("trials/")} == {"001-s0"}
    kept.send()
    assert {o.name for o in kept.store.listing(kept.at) if "000-s0" in o.name} == {f"first_tries/000-s0/{n}.json" for n in ("run", "trial")}


def _heavy(kept: Mirror) -> set[str]:
    return {found.name.split("/")[1] for found in kept.store.listing(kept.at) if "/checkpoints/" in found.name or "/encoder/" in found.name}


def test_pbt_is_refused(patterns: Path) -> None:
    asked = a_sweep(Path("x"), "smoke", scheduler="pbt", at="s3://photos/mirror/pbt", changes={"train.batch_size": 60})
    with pytest.raises(UserError, match=r"pbt copies checkpoints between trials on a disk, and s3://photos/mirror/pbt is in S3; use asha"):
        validate.check(asked, read_manifest(patterns))
