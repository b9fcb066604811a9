"""Databases of MLflow's, quickly."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from pipelines.tracking import client
from pipelines.tracking.uri import default_uri

Database = Callable[[str], str]
"""The address of a new database in a folder of the test's."""


@pytest.fixture(scope="session")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty database. MLflow takes seconds to make one."""
    uri = default_uri(tmp_path_factory.mktemp("tables"))
    client.connect(uri)
    return Path(uri.removeprefix("sqlite:///"))


@pytest.fixture(scope="session")
def database_in(tables: Path) -> Callable[[Path], str]:
    """Makes a database in a folder, and gives its address."""

    def made(folder: Path) -> str:
        folder.mkdir(exist_ok=True)
        shutil.copy(tables, folder)
        return default_uri(folder)

    return made


@pytest.fixture
def database(database_in: Callable[[Path], str], tmp_path: Path) -> Database:
    return lambda folder: database_in(tmp_path / folder)
