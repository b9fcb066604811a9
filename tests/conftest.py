"""What tests share: one pool of gloo processes, one Ray, one small dataset."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.ranks import Ranks


@pytest.fixture(scope="session", autouse=True)
def _own_environment() -> Iterator[None]:
    """Nothing of the developer's cluster or tracking server may be touched."""
    patch = pytest.MonkeyPatch()
    for name in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI"):
        patch.delenv(name, raising=False)
    yield
    patch.undo()


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    pool = Ranks()
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def shared_ray() -> Iterator[None]:
    """The one Ray of the suite, with two cores."""
    from pipelines import cluster

    assert cluster.connect(cluster.Resources(workers=2))
    yield
    cluster.disconnect()


@pytest.fixture(scope="session")
def patterns(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of 240 + 60 pattern images of 32 px."""
    from simclr.data import shards
    from simclr.data.sources import open_source

    out = tmp_path_factory.mktemp("patterns") / "shards"
    shards.prepare(open_source("patterns:train=240,test=60"), out, shards.Options(), 2, lambda done: None)
    return out
