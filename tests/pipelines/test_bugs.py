"""A bug is not a user's error: a shape error inside numpy, at any place, gives a traceback that names the place, and exit code 1. At the
same places a UserError gives one sentence, and exit code 2."""

from __future__ import annotations

import queue
import shutil
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipelines import cli
from pipelines.runs.directory import Run
from pipelines.train import messages
from simclr.errors import UserError
from tests.support.command import Run as Command
from tests.support.small import TINY
from tests.support.sweeps import a_sweep
from tune import resolve, sweep_dir

SENTENCE = "the disk is upside down; turn it"
Fails = Callable[..., Any]
THREADS: list[str] = []
"""Names of the threads that reached the place, the newest last."""


def misshapen(*given: Any, **named: Any) -> Any:
    """The bug; a traceback has to show this function's name."""
    THREADS.append(threading.current_thread().name)
    return np.ones(2) + np.ones(3)


def mistaken(*given: Any, **named: Any) -> Any:
    """An error that the user can mend."""
    raise UserError(SENTENCE)


def is_bug(text: str) -> bool:
    return "Traceback (most recent call last)" in text and "in misshapen" in text and "could not be broadcast" in text


# ── Commands ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for i in range(4):
        Image.fromarray(np.full((40, 50, 3), 40 * i, np.uint8)).save(folder / f"{i}.jpg")
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, patterns: Path, published: Path) -> Path:
    """A run that looks trained and evaluated to commands."""
    path = tmp_path_factory.mktemp("trained") / "run"
    fields: dict[str, Any] = {"recipe": "tiny", "config": TINY, "data": patterns, "data_digest": "0", "command": "", "environment": {}}
    run = Run(path=path, created=time.time(), **fields)
    run.save()
    run.append({"step": 1, "epoch": 0.1, "train/loss": 3.0})
    (path / "evaluation.json").write_text('{"scores": [{"name": "trained encoder", "knn_top1": 0.5, "rankme": 3.0}], "k": 5}')
    shutil.copytree(published, run.encoder)
    return path


PLACES = {
    "prepare": (["prepare", "--source", "patterns:train=20", "--out", "out"], "pipelines.commands.prepare.open_source"),
    "prepare, a pool's thread": (["prepare", "--source", "{photos}", "--out", "out"], "simclr.data.encode._moments"),
    "prepare, what reads photographs": (["prepare", "--source", "{photos}", "--out", "out"], "simclr.data.raster.upright_rgb"),
    "prepare, what writes a shard": (["prepare", "--source", "patterns:train=20", "--out", "out"], "simclr.data.ffcv.writer.flush"),
    "verify, a pool's thread": (["verify", "{photographs}"], "simclr.data.verify.decode"),
    "views, the loader's thread": (["views", "patterns_tiny", "--data", "{patterns}"], "simclr.keyed.shuffled"),
    "evaluate": (["evaluate", "{published}", "--data", "{patterns}", "--limit", "40", "--no-baselines"], "simclr.evaluation.knn.knn"),
    "embed": (["embed", "{published}", "{photos}"], "simclr.views.preprocessing.resize_square"),
    "embed, what reads photographs": (["embed", "{published}", "{photos}"], "simclr.data.encode._decoded_as_stored"),
    "report": (["report", "{trained}"], "pipelines.html.charts.palette"),
    "publish": (["publish", "{trained}"], "pipelines.tracking.uri._check_database"),
    "publish, a thread": (["publish", "{trained}", "--tracking-uri", "http://127.0.0.1:9"], "pipelines.tracking.server.trouble_at"),
    "runs": (["runs", "{trained}"], "pipelines.commands.runs.table"),
    "export": (["export", "{published}", "--to", "x.pt2"], "simclr.encoder.export.program"),
    "convert": (["convert", "model.ckpt", "--to", "out"], "simclr.encoder.tf_checkpoint.find"),
    "pretrain, before its workers": (["pretrain", "patterns_tiny", "--data", "{patterns}"], "simclr.config.Config.total_steps"),
    "sweep, before its trials": (["sweep", "smoke", "--recipe", "patterns_tiny", "--data", "{patterns}"], "tune.sweep.check"),
    "cluster": (["cluster", "check", "{cluster}"], "pipelines.clusterfile.rules.mistakes"),
}


@pytest.mark.parametrize("place", PLACES)
def test_a_bug_in_a_command(
    simclr: Command, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, capfd: Any, place: str
) -> None:
    words, target = PLACES[place]
    known = {"cluster": Path(__file__).parents[2] / "cluster" / "aws-gpu.yaml"}
    for i, word in enumerate(words):
        name = word.strip("{}")
        if word.startswith("{"):
            words = [*words[:i], str(known.get(name) or request.getfixturevalue(name)), *words[i + 1 :]]
    original = _resolved(target)

    def within(fails: Fails) -> Fails:
        """Fails in the place's own thread only; calls from other threads go on."""
        elsewhere = place == "prepare, a pool's thread"

        def instead(*given: Any, **named: Any) -> Any:
            if elsewhere and threading.current_thread() is threading.main_thread():
                return original(*given, **named)
            return fails(*given, **named)

        return instead

    monkeypatch.setattr(target, within(misshapen))
    THREADS.clear()
    with pytest.raises(ValueError, match="broadcast") as bug:  # leaves `main`: the interpreter prints it and ends with 1
        cli.main(words)
    assert is_bug("".join(traceback.format_exception(bug.value)))
    assert "simclr: " not in capfd.readouterr().err
    if "thread" in place or "writer" in place:
        assert THREADS[0] != "MainThread"
    monkeypatch.setattr(target, within(mistaken))
    code, _, err = simclr(*words)
    assert code == 2 and f"simclr: {SENTENCE}\n" in err and "Traceback" not in err


def _resolved(target: str) -> Any:
    from importlib import import_module

    module, _, name = target.rpartition(".")
    return getattr(_resolved(module) if module.rpartition(".")[2][0].isupper() else import_module(module), name)


def test_the_process_ends_with_exit_code_one() -> None:
    source = "import pipelines.commands.recipes as c, tests.pipelines.test_bugs as t; c.main = t.misshapen; t.cli.main(['recipes'])"
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and is_bug(done.stderr) and "simclr: " not in done.stderr


def test_a_damaged_photograph_is_still_one(simclr: Command, photos: Path, tmp_path: Path) -> None:
    """Pillow's errors at damaged files are no bugs: at each length of a truncated file, and at each changed byte."""
    folder = tmp_path / "junk"
    folder.mkdir()
    whole = (photos / "1.jpg").read_bytes()
    for i, at in enumerate(range(0, len(whole), len(whole) // 12)):
        (folder / f"cut-{i}.jpg").write_bytes(whole[:at])
        (folder / f"changed-{i}.jpg").write_bytes(whole[:at] + b"\xff\x00" + whole[at + 2 :])
    code, _, err = simclr("prepare", "--source", folder, "--out", "out")
    assert code == 2 and "cannot be read, more than 1 %" in err and "Traceback" not in err


# ── Threads of a training's driver and its first worker ────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("fails", "kind"), [(misshapen, ValueError), (mistaken, UserError)])
def test_a_bug_in_the_thread_of_the_trainer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, fails: Fails, kind: type[Exception]) -> None:
    """The thread that runs `trainer.fit` hands the error to the thread that iterates the reports."""
    ray = pytest.importorskip("ray")
    from pipelines.train import messages, ray_train

    monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(gcs_address="127.0.0.1:9"))
    monkeypatch.setattr(messages, "make", queue.Queue)
    monkeypatch.setattr(ray_train.own_ray, "begun", lambda: True)  # no other job to wait for, whether or not a Ray runs here
    monkeypatch.setattr(ray_train, "_trainer", lambda *given: SimpleNamespace(fit=fails))
    task = messages.Task(stage="pretrain", config=TINY, data="", run="")
    running = ray_train.launch(lambda task: None, task, ray_train.Resources(), tmp_path)
    with pytest.raises(kind) as raised:
        list(running.reports())
    assert is_bug("".join(traceback.format_exception(raised.value))) == (fails is misshapen)


@pytest.mark.parametrize(("fails", "kind"), [(misshapen, ValueError), (mistaken, UserError)])
def test_a_bug_in_the_thread_of_the_checkpoints(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, fails: Fails, kind: type[Exception]
) -> None:
    from pipelines.runs import sync
    from pipelines.train.checkpoints import Saver
    from simclr import checkpoint

    monkeypatch.setattr(checkpoint, "write", fails)
    saver = Saver(sync.Home(tmp_path), TINY.train, None, lambda told: None)
    state = checkpoint.State(1, {}, {})
    saver.save(SimpleNamespace(state=state, metrics={}))  # type: ignore[arg-type]
    with pytest.raises(kind) as raised:
        saver.wait()
    assert is_bug("".join(traceback.format_exception(raised.value))) == (fails is misshapen)


def test_a_bug_in_the_thread_that_sends_to_s3(tmp_path: Path, capfd: Any) -> None:
    """An error of S3 is said, and the next send covers it; a bug is raised."""
    from pipelines.runs import sync

    home = sync.Home(tmp_path)
    home.sender = ThreadPoolExecutor(1)
    home.later(mistaken)
    home.wait()
    assert f"not sent: {SENTENCE}" in capfd.readouterr().err
    home.later(misshapen)
    with pytest.raises(ValueError, match="broadcast"):
        home.wait()


# ── Sweeps ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def told(sent: list[Any]) -> Any:
    """A trial's queue to its sweep's driver, which records the messages."""
    return SimpleNamespace(actor=SimpleNamespace(put=SimpleNamespace(remote=sent.append)))


@pytest.mark.parametrize("target", ["_train", "resolve.point", "trial_in"])
def test_a_bug_in_a_trial(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, patterns: Path, target: str) -> None:
    """The trial fails, its record and its driver have the traceback, and a sweep without any score ends with it."""
    tune = pytest.importorskip("ray.tune")
    from tune import sweep as commands
    from tune import trial

    monkeypatch.setattr(tune, "get_context", lambda: SimpleNamespace(get_trial_name=lambda: "000"))
    monkeypatch.setattr(tune, "get_checkpoint", lambda: None)
    changes = {"train.batch_size": 60, "train.steps": 3}
    asked = resolve.Coded(axes=dict.fromkeys(("loss.temperature", "optim.base_lr"), 0), seed=0)
    for fails, kind in ((misshapen, RuntimeError), (mistaken, UserError)):
        sweep, sent = a_sweep(tmp_path / kind.__name__, "smoke", data=str(patterns), changes=changes), list[Any]()
        sweep.save()
        with monkeypatch.context() as patched:
            patched.setattr(f"tune.trial.{target}", fails)
            trial.drive(asked, sweep, told(sent), True, {})
        record = sweep_dir.trial_in(sweep.path / "trials" / "000")
        assert record is not None and record.status == "failed" and record.bug == sent[-1].bug
        assert is_bug(record.bug) == (fails is misshapen) and (record.reason == SENTENCE) == (fails is mistaken)
        again = (fails, target) == (misshapen, "_train")  # a bug has another try
        assert isinstance(sent[0], messages.TrialBeganAgain if again else messages.TrialFailed)
        with pytest.raises(kind, match="in misshapen" if fails is misshapen else SENTENCE):
            commands._finish(sweep, None, "")


def test_a_bug_in_the_thread_of_the_ledger(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: Any) -> None:
    """A bug is printed at once, and raised after the sweep's trials. An error in one trial's records is said, and the others go on."""
    pytest.importorskip("ray")
    from tune.trial_log import Ledger

    for fails in (misshapen, mistaken):
        inbox: queue.Queue[Any] = queue.Queue()
        with monkeypatch.context() as patched:
            patched.setattr("tune.trial_log.load_run", fails)
            ledger = Ledger(a_sweep(tmp_path, "smoke"), inbox, "sqlite:///x.db")
            inbox.put(messages.Reported(step=1, total_steps=3, metrics={}, trial="000"))
            inbox.put(messages.Said("hello", trial="000"))
            while not inbox.empty() and ledger.bug is None:
                time.sleep(0.05)
            if fails is misshapen:
                ledger.thread.join(5)
                assert is_bug(capfd.readouterr().err)
                with pytest.raises(ValueError, match="broadcast"):
                    ledger.close("FINISHED", [], {})
            else:
                ledger.close("KILLED", [], {})
                err = capfd.readouterr().err
                assert f"trial 000: {SENTENCE}" in err and "trial 000: hello" in err and "Traceback" not in err


# ── Workers ────────────────────────────────────────────────────────────────────────────────────────────────────────


def ill_worker(task: messages.Task) -> None:
    """`train_worker` whose loader's thread fails at the first batch, as the file beside the run says; each try is counted."""
    from pipelines.train.worker import train_worker
    from simclr import keyed

    folder = Path(f"{task.run}-tries")
    (folder / str(time.time_ns())).touch()
    keyed.shuffled = globals()[(folder / "how").read_text()]
    train_worker(task)


@pytest.fixture
def no_tracking(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    from pipelines.tracking import client

    monkeypatch.setattr(client, "MLflowRun", mistaken)
    yield


@pytest.mark.usefixtures("shared_ray", "no_tracking")
def test_a_bug_in_a_worker_has_another_try_and_a_mistake_has_none(
    tmp_path: Path, patterns: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    from pipelines.train import worker

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(worker, "train_worker", ill_worker)
    words = ["pretrain", "patterns_tiny", "--data", str(patterns), "--train.steps", "3", "--workers", "1", "--max-failures", "1"]

    def tries(how: str) -> int:
        return len(list((tmp_path / f"{how}-tries").iterdir())) - 1

    for how in ("misshapen", "mistaken"):
        (tmp_path / f"{how}-tries").mkdir()
        (tmp_path / f"{how}-tries" / "how").write_text(how)
    from ray.train import TrainingFailedError

    with pytest.raises(TrainingFailedError) as bug:
        cli.main([*words, "--run", "misshapen"])
    assert tries("misshapen") == 2 and is_bug("".join(traceback.format_exception(bug.value)))
    assert "simclr: " not in capfd.readouterr().err
    with pytest.raises(SystemExit) as ended:
        cli.main([*words, "--run", "mistaken"])
    assert ended.value.code == 2 and tries("mistaken") == 1 and f"simclr: {SENTENCE}\n" in capfd.readouterr().err
