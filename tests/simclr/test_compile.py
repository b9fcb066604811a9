"""Compiled training: ranks compiled by Inductor compute what they do uncompiled, in one graph; compiled code is used again, and never
taken from another user."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch._dynamo
import torch.distributed as dist
from torch import Tensor
from torch._dynamo.utils import counters

from pipelines.train import compile_cache
from simclr.collectives import rank
from simclr.config import Config, Encoder, Head, Loss, Train
from simclr.errors import UserError
from simclr.family import MoCo
from simclr.stages import FineTune
from simclr.train import Start, train
from tests.conftest import Within
from tests.simclr.methods import test_byol, test_dino, test_mae, test_mocov3, test_swav
from tests.support.ranks import Ranks
from tests.support.small import TINY

# ── The loop, compiled by Inductor ─────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def patient() -> Iterator[Ranks]:
    """Ranks that wait for each other's compilers."""
    pool = Ranks(patience_s=1200)
    yield pool
    pool.close()


Found = tuple[list[float], dict[str, Tensor], list[tuple[int, int]], int]


def ten_steps(config: Config, compile: bool, data: str) -> Found:
    """Losses of ten steps, the final state, after each step how many graphs there were and how many breaks between them, and into how
    many the graphs were cut."""
    settings = dataclasses.replace(config.train, compile=compile, steps=10, checkpoint_every_steps=10)
    losses, state, seen = [], {}, []
    torch._dynamo.reset()
    counters.clear()
    with torch._dynamo.config.patch(error_on_recompile=config.train.micro_batch is None):  # type: ignore[attr-defined]
        for report in train(dataclasses.replace(config, train=settings), Start(Path(data))):
            losses.append(report.metrics["train/loss"])
            seen.append((counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())))
            if report.due:
                state = {name: t.clone() for name, t in report.state.tensors.items()}
    return losses, state, seen, counters["aot_autograd"]["total"]


def deviations(a: Found, b: Found) -> tuple[float, float]:
    """The largest difference of losses, and of weights, momentum and statistics."""
    assert len(a[0]) == len(b[0]) == 10 and a[1].keys() == b[1].keys() and any(name.startswith("optimizer.") for name in a[1])
    states = max(float((t.double() - b[1][name].double()).abs().max()) for name, t in a[1].items())
    return float(np.abs(np.subtract(a[0], b[0])).max()), states


def in_precision(precision: str, **changed: Any) -> Config:
    return dataclasses.replace(TINY, train=dataclasses.replace(TINY.train, precision=precision, **changed))


@pytest.mark.compile
def test_two_compiled_ranks_compute_what_they_do_uncompiled(patient: Ranks, within: Within, patterns: Path) -> None:
    """One graph each, without a break, and none after the first step: `error_on_recompile` raises there."""
    config = in_precision("float64")
    expected = patient(2, ten_steps, config, False, str(patterns))[0]
    for found in patient(2, ten_steps, config, True, str(patterns)):
        loss, states = deviations(found, expected)
        within("loss", loss, 1e-12)
        within("weights, momentum, statistics", states, 1e-12)
        assert found[2] == [(1, 0)] * 10 and found[3] == 1


MOCO = MoCo(encoder=TINY.encoder, views=TINY.views, train=TINY.train, watch=TINY.watch, queue=96, ema=0.9, d_out=16, symmetric=True)
VIT = Encoder(vit="micro", patch_px=8, drop_path=0.0)


@pytest.mark.compile
@pytest.mark.parametrize(
    ("config", "graphs"),
    [
        (MOCO, 2),
        (test_mocov3.SMALL, 2),
        (test_byol.SMALL, 2),
        (test_swav.SMALL, 1),
        (dataclasses.replace(test_dino.SMALL, encoder=VIT), 2),
        (test_mae.SMALL, 1),
        (dataclasses.replace(TINY, loss=Loss(temperature=0.2, memory=96)), 2),
    ],
    ids=["MoCo", "MoCo v3", "BYOL", "SwAV", "DINO", "MAE", "SimCLR with a queue"],
)
def test_a_method_compiles_to_one_graph_and_its_average_to_another(config: Config, graphs: int, within: Within, patterns: Path) -> None:
    """Of two crop sizes too: the network's passes, and those of a moving average, all in the first step."""
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, precision="float64", batch_size=24))
    expected, found = (ten_steps(config, compile, str(patterns)) for compile in (False, True))
    loss, states = deviations(found, expected)
    within("loss", loss, 1e-12)
    within("weights, momentum, statistics, averages", states, 1e-10)  # SwAV's assignments make 1e-11 of the orders of sums
    assert found[2] == [(graphs, 0)] * 10


@pytest.mark.compile
def test_a_graph_is_cut_where_a_bucket_of_gradients_is_full(patient: Ranks, within: Within, patterns: Path) -> None:
    """So that a bucket travels while the rest of the backward pass goes on: torch does it for a network compiled inside of DDP."""
    config = dataclasses.replace(in_precision("float64", bucket_mib=1.0), encoder=Encoder(depth=8, cifar_stem=True, width=2))
    expected = patient(2, ten_steps, config, False, str(patterns))[0]
    for found in patient(2, ten_steps, config, True, str(patterns)):
        loss, states = deviations(found, expected)
        within("loss", loss, 1e-12)
        within("weights, momentum, statistics", states, 1e-12)
        assert found[2] == [(1, 0)] * 10 and found[3] > 1


@pytest.mark.compile
def test_float32_is_as_far_from_float64_compiled_as_it_is_uncompiled(patient: Ranks, within: Within, patterns: Path) -> None:
    """Ten steps amplify the rounding of the first; the uncompiled run shows by how much. Other orders of sums round otherwise, so the two
    agree in magnitude alone: factors of 2.6 (loss) and 11.5 (weights) were seen."""
    exact, plain, compiled = (
        patient(2, ten_steps, in_precision(precision), compile, str(patterns))[0]
        for precision, compile in (("float64", False), ("float32", False), ("float32", True))
    )
    deviating = zip(deviations(compiled, exact), deviations(plain, exact), strict=True)
    for what, (ours, theirs) in zip(("loss", "weights, momentum, statistics"), deviating, strict=True):
        assert theirs > 1e-6  # else nothing was rounded
        within(f"{what}, over the uncompiled run's deviation from float64", ours / theirs, 100.0)
    assert compiled[2] == [(1, 0)] * 10


@pytest.mark.compile
def test_pieces_compile_two_graphs_and_evaluation_none(patient: Ranks, within: Within, patterns: Path) -> None:
    """A piece is embedded without gradient and then with it: two graphs, both in the first step."""
    config = in_precision("float64", micro_batch=6)
    expected = patient(2, ten_steps, config, False, str(patterns))[0]
    for found in patient(2, ten_steps, config, True, str(patterns)):
        assert max(deviations(found, expected)) < 1e-12 and found[2] == [(2, 0)] * 10
    scores = [patient(1, fine_tuned, compile, str(patterns))[0] for compile in (False, True)]
    within("fine-tuning's loss", abs(scores[0][0] - scores[1][0]), 1e-12)
    assert scores[1][1] == scores[0][1] and scores[1][2] == 1


def fine_tuned(compile: bool, data: str) -> tuple[float, float, int]:
    """The last loss of four steps on one rank, test accuracy, which comes twice, and how many graphs were compiled."""
    settings = Train(batch_size=24, steps=4, precision="float64", report_every_steps=1, compile=compile)
    watch = dataclasses.replace(TINY.watch, every_epochs=0.2)
    config = FineTune(encoder=TINY.encoder, head=TINY.head, views=TINY.views, train=settings, watch=watch)
    torch._dynamo.reset()
    counters.clear()
    found = [report.metrics for report in train(config, Start(Path(data), ids=np.arange(240)))]
    scored = [metrics["eval/top1"] for metrics in found if "eval/top1" in metrics]
    assert len(scored) == 2
    return found[-1]["train/loss"], scored[-1], counters["stats"]["unique_graphs"]


# ── Compiled code that is kept ─────────────────────────────────────────────────────────────────────────────────────

KEY = "ab" * 32
FITS = {"torch": "2", "workers": 2}


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """The kept code that torch was given; it makes b"code", named a and b."""
    found: list[bytes] = []
    info = SimpleNamespace(inductor_artifacts=["a"], aot_autograd_artifacts=["b"])

    def load(content: bytes) -> SimpleNamespace:
        found.append(content)
        return info

    monkeypatch.setattr(torch.compiler, "save_cache_artifacts", lambda: (b"code", info))
    monkeypatch.setattr(torch.compiler, "load_cache_artifacts", load)
    return found


def told(path: Path, fits: dict[str, Any] = FITS, key: str = KEY, writes: bool = True) -> list[str]:
    """The messages of a training that keeps its compiled code in `path`; its reports arrive."""
    lines: list[str] = []
    assert list(compile_cache.kept(iter([1, 2, 3]), path, fits, key, writes, lines.append)) == [1, 2, 3]
    return lines


def test_compiled_code_is_written_once_and_read_by_processes_that_it_fits(tmp_path: Path, given: list[bytes]) -> None:
    path = tmp_path / "compiled" / "cpu.bin"
    old = os.umask(0o002)  # a user whose umask lets the group write everything
    try:
        assert told(path, writes=False) == [] and not path.exists()
        assert told(path) == [] and given == []
    finally:
        os.umask(old)
    assert path.stat().st_mode & 0o777 == 0o600 and path.parent.stat().st_mode & 0o777 == 0o700
    before = path.stat()
    assert told(path) == told(path, writes=False) == [] and given == [b"code"] * 2
    assert path.stat().st_mtime_ns == before.st_mtime_ns and path.stat().st_ino == before.st_ino  # it contained all code that was made
    (line,) = told(path, FITS | {"torch": "3"})
    assert line == f"the network is compiled anew: {path} is of torch 2, here it is 3"
    assert len(given) == 2 and told(path, FITS | {"torch": "3"}) == [] and len(given) == 3  # it was written for the new facts


@pytest.mark.parametrize("damage", ["cut", "empty", "one bit", "garbage", "other key", "folder", "link"])
def test_code_that_is_damaged_or_not_signed_by_this_user_is_not_read(tmp_path: Path, given: list[bytes], damage: str) -> None:
    path = tmp_path / "compiled" / "cpu.bin"
    told(path)
    whole = path.read_bytes()
    if damage == "other key":
        path.unlink()
        told(path, key="cd" * 32)
    elif damage == "folder":
        path.unlink()
        path.mkdir()
    elif damage == "link":
        path.rename(tmp_path / "elsewhere")
        path.symlink_to(tmp_path / "elsewhere")
    else:
        flipped = whole[:-1] + bytes([whole[-1] ^ 1])
        path.write_bytes({"cut": whole[:-1], "empty": b"", "one bit": flipped, "garbage": os.urandom(999)}[damage])
    lines = told(path)
    assert given == [] and lines[0].startswith("the network is compiled anew: ") and str(path) in lines[0]
    if damage == "folder":
        assert lines[1].startswith("compiled code is not kept for a restart: ") and len(lines) == 2
        return
    assert len(lines) == 1 and not path.is_symlink() and path.read_bytes() == whole  # written anew


@pytest.mark.parametrize("whose", ["file of another user", "file of a group", "folder of everybody"])
def test_code_that_others_could_have_written_is_not_read(
    tmp_path: Path, given: list[bytes], monkeypatch: pytest.MonkeyPatch, whose: str
) -> None:
    path = tmp_path / "compiled" / "cpu.bin"
    told(path)
    if whose == "file of another user":
        me = os.geteuid()
        monkeypatch.setattr(os, "geteuid", lambda: me + 1)
    else:
        path.chmod(0o620) if whose == "file of a group" else path.parent.chmod(0o777)
    lines = told(path)
    assert given == [] and "is not this user's alone" in lines[0] and "the network is compiled anew" in lines[0]
    if whose != "file of a group":  # and we write nothing into such a folder
        assert len(lines) == 2 and lines[1].startswith("compiled code is not kept for a restart: ")


def test_torch_may_refuse_and_a_disk_may_be_full(tmp_path: Path, given: list[bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "compiled" / "cpu.bin"
    told(path)

    def refuse(content: bytes) -> None:
        raise RuntimeError("an artifact of an unknown type")

    monkeypatch.setattr(torch.compiler, "load_cache_artifacts", refuse)
    assert told(path) == ["the network is compiled anew: an artifact of an unknown type"]
    path.unlink()
    monkeypatch.setattr(Path, "write_bytes", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    (line,) = told(path)
    assert "is not kept for a restart" in line and "No space left" in line and list(path.parent.iterdir()) == []


def test_the_secret_is_one_users_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    lines: list[str] = []
    key = compile_cache.secret(lines.append)
    (path,) = (p for p in tmp_path.rglob("*") if p.is_file())
    assert len(bytes.fromhex(key)) == 32 and compile_cache.secret(lines.append) == key and lines == []
    assert path.stat().st_mode & 0o777 == 0o600 and path.parent.stat().st_mode & 0o777 == 0o700
    path.chmod(0o666)
    assert compile_cache.secret(lines.append) == "" and "is not this user's alone" in lines[0]


def test_facts_are_what_shapes_the_network_and_nothing_else() -> None:
    cpu, base = torch.device("cpu"), compile_cache.facts(TINY, 2, torch.device("cpu"))
    assert base["torch"] == torch.__version__ and base["train.batch_size"] == 24 and base["encoder.depth"] == 8
    other = dataclasses.replace(TINY, seed=7, optim=dataclasses.replace(TINY.optim, base_lr=1.0), loss=Loss(temperature=0.3))
    assert compile_cache.facts(other, 2, cpu) == base and compile_cache.facts(TINY, 4, cpu) != base
    deeper = dataclasses.replace(TINY, head=Head(layers=3, d_out=16))
    for changed in (in_precision("float32"), in_precision("float64", batch_size=48), deeper):
        assert compile_cache.facts(changed, 2, cpu) != base
    assert {"tap", "linear"} <= compile_cache.facts(FineTune(), 1, cpu).keys()


def test_a_bucket_that_torch_cannot_cut_at_is_refused() -> None:
    with pytest.raises(UserError, match=r"train\.bucket_mib is 0\.5; with train\.compile expected at least 1"):
        Train(bucket_mib=0.5, compile=True)
    assert Train(bucket_mib=0.5).bucket_mib == 0.5


def second_hand(path: str, disk: str) -> tuple[float, dict[str, int]]:
    """Rank 0 compiles and writes, then rank 1 compiles; each has a disk of its own, as on another node. Returns the loss, and which ranks
    compiled."""
    before = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = f"{disk}-{rank()}"
    try:
        if rank():
            dist.barrier()
        torch._dynamo.reset()
        counters.clear()
        lines: list[str] = []
        (loss,) = compile_cache.kept(one_step(), Path(path), FITS, KEY, not rank(), lines.append)
        if not rank():
            dist.barrier()
    finally:
        os.environ.pop("TORCHINDUCTOR_CACHE_DIR") if before is None else os.environ.update(TORCHINDUCTOR_CACHE_DIR=before)
    assert lines == [], lines
    return loss, {name: counters[part][name] for part in ("inductor", "aot_autograd") for name in counters[part] if "_cache_" in name}


def one_step() -> Iterator[float]:
    """Two products of matrices, which need no C++."""
    torch.manual_seed(0)
    network = torch.compile(torch.nn.Linear(6, 4, bias=False))
    loss = network(torch.ones(3, 6)).square().sum()
    loss.backward()
    yield loss.item()


def test_a_second_process_compiles_nothing(ranks: Ranks, tmp_path: Path) -> None:
    (loss, first), (same, second) = ranks(2, second_hand, str(tmp_path / "compiled" / "cpu.bin"), str(tmp_path / "disk"))
    assert same == loss
    assert first["fxgraph_cache_miss"] == 2 and first["autograd_cache_miss"] == 1 and "autograd_cache_hit" not in first  # both ways
    assert second["autograd_cache_hit"] == 1 and second["fxgraph_cache_hit"] == 2 and not any("miss" in name for name in second), second


@pytest.mark.compile
def test_the_commands_keep_what_they_compiled(patterns: Path, tmp_path: Path) -> None:
    """Two workers train, lose their last step, and go on from the checkpoint before it with an empty disk of torch's, as on other nodes:
    the run has all code that they need, so nothing is written there. Fine-tuning keeps its own code."""
    pytest.importorskip("ray")
    run, tuned, compiled = tmp_path / "run", tmp_path / "tuned", Path("compiled", "cpu.bin")
    words = ["pretrain", "patterns_tiny", "--data", patterns, "--run", run, "--workers", 2, "--train.compile", "--train.batch-size", 24]
    words += ["--train.steps", 2, "--train.checkpoint-every-steps", 1]
    command(tmp_path, "one", *words)
    before = (run / compiled).stat()
    assert before.st_mode & 0o777 == 0o600
    shutil.rmtree(max((run / "checkpoints").glob("step-*")))
    said = command(tmp_path, "two", *words)
    after = (run / compiled).stat()
    assert "after step 1 of 2" in said and "anew" not in said and "not kept" not in said, said
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert json.loads(max((run / "checkpoints").glob("step-*")).joinpath("checkpoint.json").read_text())["step"] == 2
    command(tmp_path, "one", "finetune", run, "--run", tuned, "--workers", 2, "--compile", "--epochs", 1, "--batch-size", 60)
    facts = json.loads((tuned / compiled).read_bytes().splitlines()[1])
    assert facts["workers"] == 2 and facts["train.batch_size"] == 60 and "tap" in facts


def command(folder: Path, disk: str, *words: object) -> str:
    """The output of `simclr` for a user whose home is in `folder`, on a machine where torch has its `disk`."""
    environment = os.environ | {"HOME": str(folder), "TORCHINDUCTOR_CACHE_DIR": str(folder / disk)}
    arguments = [sys.executable, "-m", "pipelines.cli", *map(str, words)]
    done = subprocess.run(arguments, env=environment, cwd=folder, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stderr
