"""Publishing that fails in the middle: no version without files, none twice, no model without a version, no files without a version."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipelines.tracking import registry
from pipelines.tracking.client import MLflowRun
from pipelines.tracking.record import Record
from simclr.errors import UserError
from tests.pipelines.tracking.conftest import Database
from tests.pipelines.tracking.test_trust import an_encoder


@pytest.fixture
def run(database: Database) -> MLflowRun:
    run = MLflowRun(database("runs"), "patterns", "r", {}, {})
    run.end()
    return run


@pytest.fixture
def encoder(tmp_path: Path) -> Path:
    return an_encoder(tmp_path / "encoder")


def files(run: MLflowRun) -> list[str]:
    folder = Path(run._mlflow.get_run(run.run_id).info.artifact_uri.removeprefix("file://"))
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def during(monkeypatch: pytest.MonkeyPatch, name: str, act: Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]) -> None:
    """Let `act(request, args, kwargs)` stand for the client's request `name`."""
    from mlflow.tracking import MlflowClient

    request = getattr(MlflowClient, name)
    monkeypatch.setattr(MlflowClient, name, lambda *args, **kwargs: act(request, args, kwargs))


def lost(*_: Any) -> Any:
    from mlflow.exceptions import MlflowException

    raise MlflowException("API request failed with exception RemoteDisconnected")


def test_an_upload_that_fails_leaves_nothing(run: MLflowRun, encoder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks(request: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        request(*args, **kwargs)
        assert files(run)
        lost()

    during(monkeypatch, "log_artifact", breaks)
    with pytest.raises(UserError, match="RemoteDisconnected"):
        registry.register(run._uri, run.run_id, encoder, "photos", Record())
    assert not files(run) and not run._mlflow.search_registered_models()


def test_a_version_that_is_refused_leaves_nothing(run: MLflowRun, encoder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        during(patch, "create_model_version", lost)
        with pytest.raises(UserError, match="RemoteDisconnected"):
            registry.register(run._uri, run.run_id, encoder, "photos", Record())
    assert not files(run) and not run._mlflow.search_registered_models()
    assert registry.register(run._uri, run.run_id, encoder, "photos", Record()) == 1
    during(monkeypatch, "create_model_version", lost)
    before = files(run)
    with pytest.raises(UserError, match="RemoteDisconnected"):
        registry.register(run._uri, run.run_id, encoder, "photos", Record())
    assert files(run) == before and [v.version for v in run._mlflow.search_model_versions("name='photos'")] == [1]  # what was there stays


def test_a_version_whose_answer_is_lost_is_found(run: MLflowRun, encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unanswered(request: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        request(*args, **kwargs)
        lost()

    during(monkeypatch, "create_model_version", unanswered)
    assert registry.register(run._uri, run.run_id, encoder, "photos", Record(scores={"knn_top1": 0.5})) == 1
    assert registry.pull(run._uri, "photos/1", tmp_path / "new")["scores"] == {"knn_top1": 0.5}


def test_a_version_that_was_asked_for_twice_is_one(run: MLflowRun, encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """MLflow sends a request again whose answer is lost."""

    def again(request: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        request(*args, **kwargs)
        return request(*args, **kwargs)

    during(monkeypatch, "create_model_version", again)
    version = registry.register(run._uri, run.run_id, encoder, "photos", Record())
    assert [v.version for v in run._mlflow.search_model_versions("name='photos'")] == [version]
    registry.pull(run._uri, f"photos/{version}", tmp_path / "new")
