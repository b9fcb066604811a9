"""No command loads a pickle: traps lie wherever one looks, and the code has no call that would spring them.

A pickle runs code when it is loaded. Runs, sweeps, encoders, caches and buckets are handed from one person to another, so a file in one
of these is never more than data. `tests/tune/test_sweep.py` sets traps for Ray Tune as well.
"""

from __future__ import annotations

import ast
import contextlib
import hashlib
import importlib.util
import io
import json
import pickle
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import simclr
from pipelines.commands import report
from pipelines.runs.directory import Run, load_run
from pipelines.tracking.outbox import Posted
from pipelines.tracking.pyfunc import _load_pyfunc
from pipelines.train import compile_cache
from simclr import checkpoint
from simclr.data.manifest import read_manifest
from simclr.data.pixels import Unreadable
from simclr.encoder import weights
from simclr.encoder.directory import read_classifier, read_encoder, read_head
from simclr.errors import UserError
from tests.attack.use import use, with_digests
from tests.support.embedding import pictures
from tests.support.small import TINY
from tests.support.sweeps import a_sweep, trained
from tests.support.traps import Trap
from tune import plan, resolve, sweep_dir

ROOT = Path(__file__).parents[2]


@pytest.fixture
def trap(tmp_path: Path) -> Iterator[Trap]:
    found = Trap(tmp_path / "marker")
    yield found
    assert not found.marker.exists(), found.marker.read_text()


def forms(trap: Trap) -> dict[str, bytes]:
    """The trap as a pickle, and in the archives around pickles."""
    zipped, old, array, arrays = io.BytesIO(), io.BytesIO(), io.BytesIO(), io.BytesIO()
    torch.save({"stem.0.weight": trap}, zipped)
    torch.save(trap, old, _use_new_zipfile_serialization=False)
    objects = np.empty(1, object)
    objects[0] = trap
    np.save(array, objects, allow_pickle=True)
    np.savez(arrays, gallery=objects, queries=objects)
    return {"pickle": trap.content, "pt": zipped.getvalue(), "old pt": old.getvalue(), "npy": array.getvalue(), "npz": arrays.getvalue()}


FORMS = ("pickle", "pt", "old pt", "npy", "npz")


def tried(work: Callable[[], Any]) -> None:
    """Do `work`, which may refuse the file in a sentence."""
    with contextlib.suppress(UserError):
        work()


def test_the_traps_spring_if_anything_loads_them(tmp_path: Path) -> None:
    trap = Trap(tmp_path / "marker")
    made = forms(trap)
    loads: dict[str, Callable[[bytes], Any]] = {
        "pickle": pickle.loads,
        "pt": lambda content: torch.load(io.BytesIO(content), weights_only=False),
        "old pt": lambda content: torch.load(io.BytesIO(content), weights_only=False),
        "npy": lambda content: np.load(io.BytesIO(content), allow_pickle=True),
        "npz": lambda content: np.load(io.BytesIO(content), allow_pickle=True)["gallery"],
    }
    assert set(loads) == set(made) == set(FORMS)
    for form, load in loads.items():
        load(made[form])
        assert trap.marker.read_text() == "a pickle was loaded"
        trap.marker.unlink()


# ── Runs, encoders, data ───────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("form", FORMS)
def test_checkpoints(tmp_path: Path, trap: Trap, form: str) -> None:
    """The checksum fits: whoever can write the file writes its checksum."""
    content = forms(trap)[form]
    good = checkpoint.write(tmp_path / "checkpoints", checkpoint.State(1, TINY.to_dict(), {"model.x": torch.ones(2)}), 5)
    bad = shutil.copytree(good, good.with_name("step-000000002"))
    (bad / "state.safetensors").write_bytes(content)
    about = json.loads((good / "checkpoint.json").read_text()) | {"step": 2, "sha256": hashlib.sha256(content).hexdigest()}
    (bad / "checkpoint.json").write_text(json.dumps(about))
    for folder in (good, bad, tmp_path / "checkpoints"):
        for name in ("state.pt", "state.bin", "model.pkl", "optimizer.pt", ".metadata"):
            (folder / name).write_bytes(content)
    for path in (good, bad):
        for work in (checkpoint.read, checkpoint.reports, checkpoint.about):
            tried(lambda path=path, work=work: work(path))
    tried(lambda: weights.of_checkpoint(bad, TINY, ()))
    tried(lambda: checkpoint.latest(tmp_path / "checkpoints", print))
    assert torch.equal(checkpoint.read(good).tensors["model.x"], torch.ones(2))


@pytest.mark.parametrize("form", FORMS)
def test_encoders_and_weights(tmp_path: Path, trap: Trap, published: Path, form: str) -> None:
    content, folder = forms(trap)[form], tmp_path / "encoder"
    shutil.copytree(published, folder)
    for name in ("encoder.pt", "head.pt", "model.pkl", "python_model.pkl", "pytorch_model.bin"):
        (folder / name).write_bytes(content)
    assert simclr.load_encoder(folder).d_h and _load_pyfunc(str(folder)).encoder.d_h  # what lies beside changes nothing
    for name in ("encoder", "head", "classifier"):
        (folder / f"{name}.safetensors").write_bytes(content)
    for work in (read_encoder, read_head, read_classifier, weights.of_directory, simclr.load_encoder):
        tried(lambda work=work: work(folder))
    tried(lambda: _load_pyfunc(str(folder)))
    for suffix in (".pt", ".pth", ".bin", ".ckpt", ".pkl", ".npz", ".safetensors", ".tar", ""):
        (tmp_path / f"weights{suffix}").write_bytes(content)
        with pytest.raises(UserError, match=r"cannot be read as|holds no ResNet"):
            weights.of_file(tmp_path / f"weights{suffix}")


@pytest.mark.parametrize("form", FORMS)
def test_a_runs_own_files(tmp_path: Path, trap: Trap, form: str) -> None:
    content = forms(trap)[form]
    trained(a_sweep(tmp_path / "s", "smoke"), lambda point: 0.5)
    run = load_run(tmp_path / "s" / "trials" / "000-s0")
    for name in (
        "metrics.jsonl",
        "timings.json",
        "evaluation.json",
        "outbox.json",
        "pictures.npz",
        ".s3.json",
        "tuner.pkl",
        "ray/tuner.pkl",
    ):
        (run.path / name).parent.mkdir(exist_ok=True)
        (run.path / name).write_bytes(content)
    for work in (Run.history, Run.timings, Run.evaluation, report.gather):
        tried(lambda work=work: work(run))
    posted = Posted(run, "sqlite:///x.db")
    assert posted._note()["bytes"] == 0
    tried(lambda: list(posted.batches()))
    with pytest.raises(UserError, match="is damaged"):
        report._pictures(run.path / "pictures.npz", 3)
    (run.path / "run.json").write_bytes(content)
    tried(lambda: load_run(run.path))


@pytest.mark.parametrize("form", FORMS)
def test_what_embed_takes(tmp_path: Path, trap: Trap, form: str) -> None:
    content = forms(trap)[form]
    for name in ("images.npy", "images.npz", "image.jpg", "image.png", "image.tif"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises((UserError, Unreadable)):
            next(pictures(tmp_path / name))


@pytest.mark.parametrize("form", FORMS)
def test_shards(tmp_path: Path, trap: Trap, patterns: Path, form: str) -> None:
    data = shutil.copytree(patterns, tmp_path / "data")
    for shard in read_manifest(data).shards:
        content = forms(trap)[form]
        (data / shard.name).write_bytes(content + bytes(max(shard.bytes - len(content), 0)))
    (data / "manifest.json").write_bytes(with_digests((data / "manifest.json").read_bytes(), data))
    with pytest.raises(UserError):
        use(data)


def test_a_run_in_a_bucket(tmp_path: Path, trap: Trap, s3: Any) -> None:
    from pipelines.runs import sync
    from simclr.data.s3.store import Store

    trained(a_sweep(tmp_path / "s", "smoke"), lambda point: 0.5)
    folder = tmp_path / "s" / "trials" / "000-s0"
    names = {"run.json": (folder / "run.json").read_bytes()}
    names |= {f"checkpoints/step-000000009/{name}": trap.content for name in ("state.safetensors", "state.pt")}
    about = {"schema": 1, "step": 9, "sha256": hashlib.sha256(trap.content).hexdigest(), "config": {}, "score": None}
    names["checkpoints/step-000000009/checkpoint.json"] = json.dumps(about).encode()
    names |= {f"encoder/{name}": trap.content for name in ("config.json", "encoder.safetensors", "python_model.pkl")}
    names |= dict.fromkeys(("metrics.jsonl", "outbox.json", "pictures.npz", "tuner.pkl", "compiled/cpu.bin"), trap.content)
    bucket = Store().client
    for name, content in names.items():
        bucket.put_object(Bucket="photos", Key=f"run/{name}", Body=content)
    home = sync.Home("s3://photos/run")
    home.fetch()
    run = load_run(home.path)
    assert (home.path / "encoder" / "encoder.safetensors").read_bytes() == trap.content
    for work in (Run.history, report.gather, lambda run: read_encoder(run.encoder)):
        tried(lambda work=work: work(run))
    home.sync_checkpoints()
    for path in home.path.glob("checkpoints/step-*"):
        tried(lambda path=path: checkpoint.read(path))


# ── Sweeps ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("form", FORMS)
def test_sweeps(tmp_path: Path, trap: Trap, form: str) -> None:
    """What Ray Tune left, or somebody in its place; and the sweep's own files."""
    content = forms(trap)[form]
    sweep = a_sweep(tmp_path / "s", "smoke", scheduler="pbt")
    records = trained(sweep, lambda point: 0.5)
    for folder in ("tune", "tune/000-s0", "trials/000-s0/ray", "first_tries/000-s0", ".tune-x/tune", "."):
        for name in ("tuner.pkl", "trainable.pkl", "error.pkl", "experiment_state-1.json", "searcher-state-1.pkl", "study.db"):
            path = sweep.path / folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    codes = [resolve.Coded(axes={"loss.temperature": i // 2, "optim.base_lr": i % 2}, seed=0, name=f"{i:03}-s0") for i in range(8)]
    there = sweep_dir.load(sweep.path)
    replace(records[1], status="running").save(sweep.path / "trials" / records[1].name)
    assert plan.settled(there, codes) == codes and plan.left(there, codes) == [codes[1]]
    plan.say_what_stays(there)
    plan.scored(there)
    assert len(sweep_dir.write_results(there)) == 8
    from tune.report import report as drawn

    drawn(sweep.path)
    sweep_dir.prune(sweep.path, sweep.metric, 1)
    for name in ("plan.json", "population.json", "reports.jsonl", "space.json", "results.csv", "trials/000-s0/trial.json", "sweep.json"):
        (sweep.path / name).write_bytes(content)
        for work in (lambda: plan.settled(there, codes), lambda: plan.left(there, codes), lambda: sweep_dir.load(sweep.path)):
            tried(work)


# ── Caches ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_compiled_code(tmp_path: Path, trap: Trap, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only bytes that this user's key has signed reach torch, which unpickles them."""
    monkeypatch.setattr(torch.compiler, "load_cache_artifacts", lambda content: pickle.loads(content) and None)
    folder, key, other = tmp_path / "compiled", "ab" * 32, "cd" * 32
    folder.mkdir(mode=0o700)
    path, fits, lines = folder / "cpu.bin", {"torch": "2"}, list[str]()
    text = json.dumps(fits).encode() + b"\n" + trap.content
    honest = json.dumps(fits).encode() + b"\n" + pickle.dumps(None)
    signed = compile_cache._signature(key, honest)
    contents = (
        trap.content,
        text,
        b"\n" + text,
        compile_cache._signature(other, text) + b"\n" + text,
        signed + b"\n" + text,  # our own signature, of other bytes
        signed + b"\n" + honest + trap.content,
        hashlib.sha256(text).hexdigest().encode() + b"\n" + text,
    )
    for content in contents:
        path.write_bytes(content)
        path.chmod(0o600)
        assert list(compile_cache.kept(iter([1]), path, fits, key, False, lines.append)) == [1]
    assert len(lines) == len(contents) and all("the network is compiled anew" in line for line in lines)
    path.write_bytes(compile_cache._signature(key, text) + b"\n" + text)
    path.chmod(0o602)  # well signed, but others may write it
    assert list(compile_cache.kept(iter([1]), path, fits, key, False, lines.append)) == [1]
    assert "is not this user's alone" in lines[-1] and not trap.marker.exists()
    path.chmod(0o600)
    list(compile_cache.kept(iter([1]), path, fits, key, False, lines.append))
    assert trap.marker.exists()  # this is what the signature keeps from torch
    trap.marker.unlink()


def test_torchvisions_pickles_are_the_published_ones(tmp_path: Path, trap: Trap, monkeypatch: pytest.MonkeyPatch) -> None:
    """CIFAR is published as pickles. torchvision checks each file's MD5 before it loads it, in this user's own folder."""
    from torchvision.datasets import cifar

    from simclr.data.sources.open import open_source

    def away(*_: Any, **__: Any) -> None:
        raise OSError("no network")

    monkeypatch.setattr(cifar, "download_and_extract_archive", away)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name, folder in (("cifar10", "CIFAR10/cifar-10-batches-py"), ("cifar100", "CIFAR100/cifar-100-python")):
        files = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch", "batches.meta", "train", "test", "meta"]
        trap.planted(tmp_path / ".cache/simclr/datasets" / folder, *files)
        with pytest.raises(UserError, match="torchvision could not give"):
            open_source(name)


# ── The code ───────────────────────────────────────────────────────────────────────────────────────────────────────

_UNPICKLERS = {"pickle", "_pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal", "jsonpickle", "cPickle"}
_CALLS = {"can_restore", "read_pickle", "unsafe_load", "full_load", "load_all", "load_artifact", "ExperimentAnalysis", "Unpickler"}


def unpickling(source: str) -> set[str]:
    """The places in Python code that would load a pickle, or keep one for later, in words."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            module = node.module or "" if isinstance(node, ast.ImportFrom) else ""
            for name in (f"{module}.{alias.name}".strip(".") for alias in node.names):
                found |= {f"import {name}" for part in name.split(".") if part in _UNPICKLERS}
        if not isinstance(node, ast.Call):
            continue
        words, given = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
        last = words.rpartition(".")[2]
        found |= {
            f"{words}({name})"
            for name, wrong in {
                "allow_pickle": given.get("allow_pickle", "False") != "False",
                "weights_only": words == "torch.load" and given.get("weights_only") != "True",
                "Tuner.restore": words.endswith("Tuner.restore"),
                "yaml": words in ("yaml.load", "yaml.load_all"),
                "numba": last in ("njit", "jit", "vectorize", "guvectorize", "cfunc") and given.get("cache", "False") != "False",
                "call": last in _CALLS,
            }.items()
            if wrong
        }
    return found


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from ray import cloudpickle",
        "import ray.cloudpickle as cp",
        "from joblib import load",
        "np.load(p, allow_pickle=True)",
        "torch.load(p)",
        "torch.load(p, weights_only=False)",
        "yaml.load(text)",
        "tune.Tuner.restore(p, f)",
        "tune.Tuner.can_restore(p)",
        "numba.njit(cache=True)(f)",
        "pd.read_pickle(p)",
    ],
)
def test_code_that_unpickles_is_found(line: str) -> None:
    assert unpickling(line) and not unpickling("np.load(p); torch.load(p, weights_only=True); yaml.safe_load(t); numba.njit(nogil=True)(f)")


def test_no_code_loads_a_pickle() -> None:
    places = [path for room in ("simclr", "pipelines", "tune", "cluster") for path in (ROOT / room).rglob("*.py")]
    found = {str(path.relative_to(ROOT)): unpickling(path.read_text()) for path in places}
    assert {path: lines for path, lines in found.items() if lines} == {}
    # numba caches on the disk, in pickles, what is decorated so; neither does FFCV, whose pipelines it compiles.
    spec = importlib.util.find_spec("ffcv")
    assert spec is not None and spec.origin is not None
    ffcv = Path(spec.origin).parent
    assert not [path for path in ffcv.rglob("*.py") if re.search(r"cache\s*=\s*True|import pickle", path.read_text())]
