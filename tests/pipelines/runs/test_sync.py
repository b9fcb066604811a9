"""Commands on s3://…: shards and runs in S3 go on on another machine, which has only the address."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pipelines.commands import evaluate, prepare, report
from pipelines.runs import sync
from pipelines.runs.directory import load_run, open_run
from simclr import checkpoint
from simclr.data import shards as shard_writer
from simclr.data.s3.store import Store
from simclr.data.s3.uri import Address, address
from simclr.data.verify import damaged
from simclr.errors import UserError
from simclr.recipes import recipe
from simclr.train import Start, train
from tests.support.s3 import KEY_ID, SECRET, Proxy

Machine = Callable[[str], None]
RUN = "s3://photos/runs/one"


@pytest.fixture
def machine(s3: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """machine(name): from now on this is the machine of that name, with a cache of its own."""

    def become(name: str) -> None:
        monkeypatch.setenv("SIMCLR_CACHE", str(tmp_path / name))

    become("one")
    return become


def names(at: str) -> list[str]:
    found = address(at)
    assert found is not None
    return [o.name for o in Store().listing(found)]


def written(s3: Proxy) -> list[str]:
    return [path for method, path, _ in s3.log if method in ("PUT", "POST", "DELETE")]


def test_prepare_into_s3(s3: Proxy, machine: Machine, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = "s3://photos/prepared/patterns"
    args = prepare.Args(source="patterns:train=60,test=20", out=Path(out))
    prepare.main(args)
    assert f"{out}: train 60, test 20 images" in capfd.readouterr().out
    assert names(out) == ["manifest.json", "test-00000.beton", "train-00000.beton"]
    s3.log.clear()
    assert prepare.prepare(args).examples("train") == 60
    assert written(s3) == [] and "holds these shards already" in capfd.readouterr().err
    assert not list(tmp_path.rglob("*.beton"))  # a worker keeps no shard that it has sent
    copy = sync.shards(out)
    machine("two")
    other = sync.shards(Path(out))
    assert other != copy and other.name == "patterns" and damaged(other) == []
    assert sync.shards(copy) == copy
    with pytest.raises(UserError, match=f"{out} already holds shards made with source patterns:train=60"):
        prepare.prepare(prepare.Args(source="patterns:train=70,test=20", out=Path(out)))
    with pytest.raises(UserError, match=r"s3://photos/prepared is not empty and no dataset \(it holds patterns/manifest.json\)"):
        prepare.prepare(prepare.Args(source="patterns:train=70,test=20", out=Path("s3://photos/prepared")))
    assert not list((tmp_path / "two").rglob("staging/*/*/*"))


def test_two_processes_of_a_machine_fetch_once(s3: Proxy, machine: Machine) -> None:
    at = "s3://photos/once/patterns"
    prepare.prepare(prepare.Args(source="patterns:train=900,test=60", out=Path(at), options=shard_writer.Options(shard_mib=1)))
    machine("two")
    s3.log.clear()
    command = [sys.executable, "-c", f"from pipelines.runs import sync; print(sync.shards({at!r}))"]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate(timeout=60)[0].strip() for process in both]
    assert said[0] == said[1] and damaged(Path(said[0])) == []
    fetched = [(path, part) for _, path, part in s3.log if part]
    assert len(fetched) == len(set(fetched)) >= 3


def test_a_prepare_whose_upload_fails_goes_on(s3: Proxy, machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    args = prepare.Args(source="patterns:train=60,test=20", out=Path("s3://photos/broken/patterns"))
    with monkeypatch.context() as patch:
        patch.setattr(Store, "upload", lambda *a, **k: (_ for _ in ()).throw(UserError("no network")))
        with pytest.raises(UserError, match="no network"):
            prepare.prepare(args)
        patch.setattr(shard_writer, "prepare", None)  # the shards are not written again
        patch.undo()
    prepare.prepare(args)
    assert "manifest.json" in names("s3://photos/broken/patterns")


def test_a_command_that_needs_a_disk_says_so(s3: Proxy, machine: Machine) -> None:
    from simclr import files

    with pytest.raises(UserError, match="s3://photos/encoder is no place on a disk; give a local path here"):
        files.require_writable(Path("s3://photos/encoder"))
    with pytest.raises(UserError, match="there is neither a run nor a published encoder at s3://photos/nothing"):
        evaluate.evaluate(evaluate.Args(encoder=Path("s3://photos/nothing")))


def test_files_of_a_run_go_both_ways(s3: Proxy, machine: Machine) -> None:
    home = sync.Home(RUN)
    home.fetch()
    home.path.mkdir(parents=True)
    (home.path / "run.json").write_text('{"created": 1}')
    (home.path / "metrics.jsonl").write_text("1\n")
    (home.path / "other").write_text("stays here")
    home.send()
    s3.log.clear()
    home.send()
    assert s3.log == []  # nothing changed

    machine("two")
    there = sync.Home(Path(RUN))
    there.fetch()
    assert there.path != home.path and sorted(p.name for p in there.path.iterdir()) == [".s3.json", "metrics.jsonl", "run.json"]
    with (there.path / "metrics.jsonl").open("a") as file:
        file.write("2\n")
    there.send()

    with (home.path / "run.json").open("a") as file:  # changed here only: it stays, and is sent
        file.write("\n")
    home.fetch()
    assert (home.path / "metrics.jsonl").read_text() == "1\n2\n"
    home.send()
    there.fetch()
    assert (there.path / "run.json").read_text().endswith("}\n")

    # The run was begun anew: another machine's copy of the old run does not count.
    at = address(RUN)
    assert at is not None
    for name in names(RUN):
        Store().delete(at / name)
    home.fetch()
    assert not home.path.exists()
    home.path.mkdir()
    (home.path / "run.json").write_text('{"created": 2}')
    home.send()
    there.fetch()
    assert sorted(p.name for p in there.path.iterdir()) == [".s3.json", "run.json"]


def test_a_checkpoint_is_there_when_all_of_it_is(s3: Proxy, machine: Machine, capfd: pytest.CaptureFixture[str]) -> None:
    at = address("s3://photos/runs/checkpoints-of-one")
    assert at is not None
    home = sync.Home(str(at))

    def write(step: int) -> Path:
        tensors = {"model.w": torch.full((100,), float(step))}
        return checkpoint.write(home.path / "checkpoints", checkpoint.State(step, {}, tensors), keep=2)

    for step in (1, 2, 3):
        path = write(step)
        s3.log.clear()
        home.later(lambda path=path: home.send_checkpoint(path, 2))  # type: ignore[misc]
        home.wait()
        sent = [path.rpartition("/")[2] for method, path, _ in s3.log if method == "PUT"]
        assert sent == ["state.safetensors", "checkpoint.json"]
    assert [n for n in names(str(at)) if n.endswith("checkpoint.json")] == [f"checkpoints/step-00000000{i}/checkpoint.json" for i in (2, 3)]
    assert len(names(str(at))) == 4
    # Step 4 was sent by half, step 3 is damaged: another machine takes step 2 and says why.
    write(4)
    store = Store(pause_s=0)
    store.upload(home.path / "checkpoints" / "step-000000004" / "state.safetensors", at / "checkpoints/step-000000004/state.safetensors")
    damaged = home.path / "damaged"
    damaged.write_bytes(b"of another size")
    store.upload(damaged, at / "checkpoints/step-000000003/state.safetensors")
    machine("two")
    there = sync.Home(str(at))
    there.store = store
    there.sync_checkpoints()
    newest = checkpoint.latest(there.path / "checkpoints", print)
    assert newest is not None and newest.name == "step-000000002"
    assert torch.equal(checkpoint.read(newest).tensors["model.w"], torch.full((100,), 2.0))
    assert "step-000000003/state.safetensors failed" in capfd.readouterr().err
    # The machine that has step 4 sends it when it comes back.
    machine("one")
    home.sync_checkpoints()
    machine("two")
    assert there.checkpoint("step-000000004").is_dir()
    s3.log.clear()
    there.checkpoint("step-000000004")
    assert [path for _, path, _ in s3.log if "state" in path] == []


def test_a_sending_that_fails_does_not_end_the_training(s3: Proxy, machine: Machine, capfd: pytest.CaptureFixture[str]) -> None:
    home = sync.Home("s3://photos/runs/failing")
    home.store = Store(attempts=2, pause_s=0)
    path = checkpoint.write(home.path / "checkpoints", checkpoint.State(1, {}, {"model.w": torch.ones(3)}), keep=1)
    s3.rate, s3.kinds = 1.0, ("503",)
    home.later(lambda: home.send_checkpoint(path, 1))
    home.wait()
    assert "not sent: s3://photos/runs/failing/checkpoints failed 2 times, the last time with 503 SlowDown" in capfd.readouterr().err
    with pytest.raises(UserError, match="failed 2 times"):  # at the end the checkpoint must be in S3
        home.sync_checkpoints()
    s3.quiet()
    home.sync_checkpoints()
    assert len(names("s3://photos/runs/failing")) == 2


def test_on_disk_nothing_of_this_happens(tmp_path: Path) -> None:
    home = sync.Home(tmp_path / "run")
    home.fetch()
    home.sync_checkpoints()
    home.later(lambda: None)
    home.wait()
    home.send()
    assert home.path == tmp_path / "run" and not home.path.exists() and home.checkpoint("a") == tmp_path / "run" / "checkpoints" / "a"


@pytest.mark.cluster  # a whole job over a bad network, for a minute: the second half of .ci/run has it
def test_a_run_in_s3_goes_on_on_a_machine_that_has_nothing(
    s3: Proxy, machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Data, run and checkpoints in S3, over a network that fails. The first machine is lost at step 6 of 12."""
    monkeypatch.chdir(tmp_path)
    data, at = "s3://photos/e2e/patterns", Address("photos", "e2e/run")
    prepare.prepare(prepare.Args(source="patterns:train=240,test=60", out=Path(data)))
    config = recipe("patterns_tiny")
    settings = replace(config.train, batch_size=60, steps=12, checkpoint_every_steps=6, report_every_steps=1, keep_checkpoints=2)
    config = replace(config, train=settings)
    home = sync.Home(str(at))
    run = open_run(home.path, "patterns_tiny", config, sync.shards(data), data)
    run.save()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the worker will have: then the sums are the same
    for said in train(config, Start(sync.shards(data))):
        run.append({**said.metrics, "step": said.step})
        if said.step == 6:
            home.send()
            home.send_checkpoint(checkpoint.write(run.checkpoints, said.state, 2), 2)
    torch.set_num_threads(threads)
    uninterrupted = {name: tensor.clone() for name, tensor in said.state.tensors.items()}

    machine("two")
    command = [sys.executable, "-m", "pipelines.cli", "pretrain", "patterns_tiny", "--data", data, "--run", str(at), "--workers", "1"]
    command += ["--train.batch-size", "60", "--train.steps", "12", "--train.checkpoint-every-steps", "6"]
    command += ["--train.report-every-steps", "1", "--train.keep-checkpoints", "2"]
    s3.quiet()
    s3.rate, s3.asked_by = 0.05, []
    driver = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    out, err = driver.communicate(timeout=400)
    assert driver.returncode == 0, err
    assert "after step 6 of 12" in err and out.strip() == str(at) and s3.faults.total() > 0
    askers = {pid for _, pid in s3.asked_by}
    assert askers and driver.pid not in askers and None not in askers  # the worker fetches the shards, the driver none of them
    assert f"fetching {data}: 0 of " in err
    s3.quiet()
    steps = [json.loads(line)["step"] for line in Store().read(at / "metrics.jsonl").splitlines()]
    assert steps == list(range(1, 13))
    text = Store().read(at / "run.json").decode()
    assert json.loads(text)["data"] == data
    for said_there in (text, err, (tmp_path / "runs" / "mlflow.db").read_bytes().decode(errors="replace")):
        assert KEY_ID not in said_there and SECRET not in said_there

    # A third one, which has nothing either, finds both checkpoints whole, scores the encoder and writes the page.
    machine("three")
    home = sync.Home(str(at))
    left = json.loads(Store().read(at / "lease.json"))
    assert (left["released"], left["token"], left["pid"]) == (True, 1, driver.pid)
    tensors = checkpoint.read(home.checkpoint("step-000000012.1")).tensors  # the driver's; that of step 6 was written without a lease
    assert checkpoint.read(home.checkpoint("step-000000006")).step == 6
    assert all(torch.equal(tensors[name], tensor) for name, tensor in uninterrupted.items())
    rows = evaluate.evaluate(evaluate.Args(encoder=Path(str(at)), limit=60, baselines=False, device="cpu"))
    report.report(report.Args(run=Path(str(at))))
    assert rows[-1]["name"] == "trained encoder" and {"evaluation-limited.json", "pictures.npz", "report.html"} <= set(names(str(at)))
    with sync.directory(Path(str(at))) as here:
        assert load_run(here).origin == data and data in (here / "report.html").read_text()


def test_a_worker_does_not_go_on_from_the_checkpoints_of_an_earlier_run_at_the_address(
    s3: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its node still has a copy of them. The address was emptied and used again, which only the driver knows."""
    address = "s3://photos/runs/again"
    home = sync.Home(address)
    home.belongs_to(1.0)
    checkpoint.write(home.path / "checkpoints", checkpoint.State(100, {}, {"model.a": torch.ones(2)}), 1)
    home.sync_checkpoints()
    assert home._whole() == ["step-000000100"]
    for found in home.store.listing(home.at):  # type: ignore[arg-type]
        home.store.delete(home.at / found.name)  # type: ignore[operator]
    worker = sync.Home(address)
    worker.belongs_to(1.0)  # the same run started again: its copy stays
    assert checkpoint.latest(worker.path / "checkpoints", print) is not None
    worker.belongs_to(2.0)
    worker.sync_checkpoints()
    assert checkpoint.latest(worker.path / "checkpoints", print) is None and worker._whole() == []
