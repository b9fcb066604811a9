"""What tests share: one pool of gloo processes, one Ray, one S3, one small dataset."""

from __future__ import annotations

import dataclasses
import faulthandler
import math
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.support.command import Run
from tests.support.ranks import Ranks
from tests.support.s3 import KEY_ID, SECRET, Proxy, serve

_WITH_RAY = {"test_bugs", "test_cli", "test_demo", "test_distill", "test_own_ray", "test_page", "test_quick", "test_run", "test_storage"}
_WITH_RAY |= {"test_sweep"}
_WORST: dict[tuple[str, str], tuple[float, float]] = {}
Within = Callable[[str, float, float], None]
"""within(what, deviation, bound) fails where the deviation is larger; the largest of each test are listed at the end."""


@pytest.fixture
def within(request: pytest.FixtureRequest) -> Within:
    def check(what: str, deviation: float, bound: float) -> None:
        key = (f"{request.node.path.stem}::{request.node.originalname}", what)
        _WORST[key] = max(_WORST.get(key, (0.0, bound)), (float(deviation), bound), key=lambda found: found[0] / found[1])
        assert deviation <= bound, f"{what} deviates by {deviation:.2e}, more than {bound:.0e}"

    return check


_FIGURES: list[tuple[str, float, float, int]] = []
Figures = Callable[[str, float, float, int], None]
"""figures(fault, seconds until it is noticed, seconds until training goes on, steps repeated): a table of all is at the end."""


@pytest.fixture(scope="session")
def figures() -> Figures:
    return lambda *row: _FIGURES.append(row)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of two processes that run tests one has all that start Ray, which take both cores' time in turns and not at once; files else
    stay whole, for their fixtures. Of tests on clusters of their own, those that begin with the shared Ray come last: a process that is
    connected to it joins no other cluster, and dies with it."""
    for item in items:
        item.add_marker(pytest.mark.xdist_group("ray" if item.path.stem in _WITH_RAY else item.path.stem))
    items.sort(key=_place)


def _place(item: pytest.Item) -> int:
    if item.get_closest_marker("cluster"):
        return 2 + ("shared_ray" in getattr(item, "fixturenames", ()))
    return int(item.path.stem not in _WITH_RAY)


def pytest_configure() -> None:
    """Where somebody ends a run that hangs, each process says in which line it was."""
    faulthandler.register(signal.SIGTERM, os.dup(2), chain=True)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_node_collection_finished(node: Any, ids: list[str]) -> None:
    """pytest-xdist writes a test's group into its name. Where pytest does not read it (9.2), tests would be dealt out one by one."""
    if node.config.option.dist == "loadgroup" and not all("@" in name for name in ids):
        raise pytest.UsageError("this pytest does not keep groups of tests together under this pytest-xdist")


def pytest_sessionfinish(session: pytest.Session) -> None:
    if (out := getattr(session.config, "workeroutput", None)) is not None:
        out["worst"] = [[*key, *value] for key, value in _WORST.items()]
        out["figures"] = _FIGURES


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    for test, what, deviation, bound in getattr(node, "workeroutput", {}).get("worst", []):
        _WORST[test, what] = (deviation, bound)
    _FIGURES.extend(getattr(node, "workeroutput", {}).get("figures", []))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if _WORST:
        terminalreporter.section("largest deviations")
        for (test, what), (deviation, bound) in sorted(_WORST.items()):
            terminalreporter.write_line(f"{deviation:8.1e} of {bound:.0e}  {test}  {what}")
    if _FIGURES:
        terminalreporter.section("faults: noticed, gone on after, steps repeated")
        for what, noticed_s, again_s, repeated in _FIGURES:
            noticed = "        –" if math.isnan(noticed_s) else f"{noticed_s:7.1f} s"
            terminalreporter.write_line(f"{noticed} {again_s:7.1f} s {repeated:5d}  {what}")


@pytest.fixture(scope="session", autouse=True)
def _own_environment() -> Iterator[None]:
    """Nothing of the developer's cluster or tracking server may be touched."""
    patch = pytest.MonkeyPatch()
    for name in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI"):
        patch.delenv(name, raising=False)
    yield
    patch.undo()


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """A sum's last bits depend on the number of threads, and a bench in an earlier test may have set it: each test begins with one."""
    torch.set_num_threads(1)
    yield


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    pool = Ranks()
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def shared_ray() -> Iterator[None]:
    """The one Ray of the suite, with two cores. The environment of `make test-torch211` has none, like hosts that only benchmark."""
    pytest.importorskip("ray")
    from pipelines.train import ray_train

    assert ray_train.connect(ray_train.Resources(workers=2))
    yield
    ray_train.disconnect()


@pytest.fixture(scope="session")
def s3_proxy() -> Iterator[Proxy]:
    with serve() as upstream:
        proxy = Proxy(upstream)
        yield proxy
        proxy.close()


@pytest.fixture
def s3(s3_proxy: Proxy, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Proxy:
    """An S3 with the bucket `photos`, which boto3 finds through its environment, and a cache of the test's own."""
    import moto.s3.models

    monkeypatch.setattr(moto.s3.models, "S3_UPLOAD_PART_MIN_SIZE", 1)
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nonexistent")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY_ID)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", s3_proxy.url)
    monkeypatch.setenv("SIMCLR_CACHE", str(tmp_path_factory.mktemp("cache")))
    from simclr.data.s3.store import Store

    s3_proxy.quiet()
    Store().client.create_bucket(Bucket="photos")
    s3_proxy.log.clear()
    return s3_proxy


@pytest.fixture(scope="session")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """JPEG shards of 240 rendered images of 72 × 96 px, without labels."""
    from PIL import Image

    from simclr.data import shards
    from simclr.data.sources.open import open_source
    from simclr.data.sources.patterns import render

    folder = tmp_path_factory.mktemp("photographs")
    images, _ = render(np.arange(240), 0, 96, True)
    for i, image in enumerate(images):
        Image.fromarray(image[:72]).save(folder / f"{i:03}.jpg", quality=90)
    shards.prepare(open_source(str(folder)), folder / "shards", shards.Options(), 2, lambda done: None)
    return folder / "shards"


@pytest.fixture(scope="session")
def patterns(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of 240 + 60 pattern images of 32 px."""
    from simclr.data import shards
    from simclr.data.sources.open import open_source

    out = tmp_path_factory.mktemp("patterns") / "shards"
    shards.prepare(open_source("patterns:train=240,test=60"), out, shards.Options(), 2, lambda done: None)
    return out


@pytest.fixture(scope="session")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An encoder with a head of three layers, as pretraining publishes it."""
    from simclr.encoder.directory import write_encoder
    from simclr.methods.simclr import build_model
    from tests.support.small import TINY, TUNED

    model = build_model(dataclasses.replace(TINY, head=TUNED.head, seed=5))
    out = tmp_path_factory.mktemp("published") / "encoder"
    write_encoder(model.encoder.state_dict(), dataclasses.replace(TINY, head=TUNED.head), out, {}, head=model.head.state_dict())
    return out


@pytest.fixture
def simclr(capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """simclr(*arguments) in an empty folder → (exit code, standard output, standard error). Starting Ray fails the test."""
    from pipelines import cli, terminal
    from pipelines.train import ray_train

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(terminal, "_QUIET", False)

    def no_ray(*asked: Any) -> bool:
        raise AssertionError("Ray was started")

    monkeypatch.setattr(ray_train, "connect", no_ray)

    def run(*arguments: object) -> tuple[int, str, str]:
        try:
            cli.main([str(a) for a in arguments])
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        return code, *capfd.readouterr()

    return run
