"""What stays in a process whose Ray did not start, or was started by somebody else. No Ray is started here."""

from __future__ import annotations

import os
import queue
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray.exceptions import AuthenticationError

from pipelines.train import messages, own_ray, ray_private, ray_start, ray_train
from tests.support.small import TINY

_PRIVATE = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
Seen = list[tuple[str, dict[str, str]]]


@pytest.fixture
def place(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder for Ray's; this process is connected to none, and none of Ray's variables is set."""
    found = tmp_path_factory.mktemp("p")
    monkeypatch.setattr(own_ray, "_own", [])
    monkeypatch.setattr(own_ray, "_RAYS_BYTES", 0)  # pytest's folders have long names
    monkeypatch.setattr(ray_private, "read_token_again", lambda: None)  # the suite's own Ray keeps its token
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    for name in (*_PRIVATE, "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RAY_TMPDIR", str(found))
    yield found
    own_ray.end()


@pytest.fixture
def imports(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The imports that are over; each takes a moment."""
    over: list[str] = []

    def slow(name: str) -> None:
        time.sleep(0.2)
        over.append(name)

    monkeypatch.setattr(ray_train, "importlib", SimpleNamespace(import_module=slow))
    return over


def starts(monkeypatch: pytest.MonkeyPatch, failure: Callable[[str], BaseException | None]) -> Seen:
    """Let `ray.init` at an address fail so; returns the addresses and the private variables that it will see."""
    seen: Seen = []

    def init(address: str, **_: Any) -> None:
        seen.append((address, {name: os.environ[name] for name in _PRIVATE if name in os.environ}))
        if error := failure(address):
            raise error

    monkeypatch.setattr(ray, "init", init)
    return seen


@pytest.mark.parametrize("error", [RuntimeError("the raylet died"), KeyboardInterrupt()])
def test_a_cluster_sees_nothing_of_a_private_ray_that_did_not_start(
    place: Path, imports: list[str], monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    """Else the job joined with another token, and NCCL used the loopback on several nodes."""
    seen = starts(monkeypatch, lambda address: error if address == "local" else None)
    with pytest.raises(type(error)):
        ray_train.connect(ray_train.Resources())
    assert set(seen[0][1]) >= {"RAY_AUTH_MODE", "RAY_AUTH_TOKEN"} and seen[0][0] == "local"
    assert not own_ray.begun() and not list(place.iterdir()) and not {*_PRIVATE} & {*os.environ}
    assert ray_train.connect(ray_train.Resources(address="10.0.0.1:6379"))
    assert seen[1] == ("10.0.0.1:6379", {})
    assert len(imports) == 2 and not ray_train._imports, "a thread still imports Ray's modules"


def test_a_cluster_sees_nothing_of_a_private_ray_that_was_not_disconnected(
    place: Path, imports: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = starts(monkeypatch, lambda address: None)
    own_ray.begin()
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    assert ray_train.connect(ray_train.Resources())
    assert seen == [("auto", {})] and not list(place.iterdir())


def test_no_cluster_there_is_a_sentence_and_no_thread_goes_on(place: Path, imports: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    starts(monkeypatch, lambda address: ConnectionError("refused"))
    with pytest.raises(ray_train.UserError, match=r"no Ray cluster answers at '10\.0\.0\.1:6379' \(refused\)"):
        ray_train.connect(ray_train.Resources(address="10.0.0.1:6379"))
    assert len(imports) == 1


@pytest.mark.parametrize("mode", ["", "token"])
def test_a_refused_token_is_told_apart_from_no_cluster(place: Path, imports: list[str], monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    """Ray says why in the text of the cause, as here."""
    refused = ConnectionError("Failed to connect to Ray cluster at 10.0.0.1:6379")
    refused.__cause__ = RuntimeError("Last connection error: … ray.exceptions.AuthenticationError: RPC error: InvalidAuthToken: …")
    failures = iter([refused, AuthenticationError("Token authentication is enabled but no authentication token was found")])
    starts(monkeypatch, lambda address: next(failures))
    if mode:
        monkeypatch.setenv("RAY_AUTH_MODE", mode)
        monkeypatch.setenv("RAY_AUTH_TOKEN", "ab" * 16)
    said = r"the token of this process, from \$RAY_AUTH_TOKEN" if mode else "this process, which shows no token"
    for _ in range(2):
        with pytest.raises(ray_train.UserError, match=rf"the Ray cluster at '10\.0\.0\.1:6379' refuses {said}.* leave out --address"):
            ray_train.connect(ray_train.Resources(address="10.0.0.1:6379"))


@pytest.mark.parametrize("started_by", ["us", "the user", "the user, after us"])
def test_only_the_ray_that_we_started_is_private(place: Path, monkeypatch: pytest.MonkeyPatch, started_by: str) -> None:
    """A notebook that has joined a cluster of several nodes by itself: its workers do not meet in a file of one node."""
    ours = str(own_ray.begin()) if started_by != "the user" else ""
    folder = ours if started_by == "us" else "/tmp/ray"
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(gcs_address="127.0.0.1:9", get_temp_dir=lambda: folder))
    monkeypatch.setattr(messages, "make", queue.Queue)
    given: list[Any] = []
    monkeypatch.setattr(ray_train, "_trainer", lambda *all_: given.extend(all_) or SimpleNamespace(fit=lambda: None))
    resources = ray_train.Resources()
    assert not ray_train.connect(resources)
    assert ("RAY_AUTH_TOKEN" in os.environ) == (started_by == "us")
    running = ray_train.launch(lambda task: None, messages.Task(stage="pretrain", config=TINY, data="", run=""), resources, place)
    running.thread.join()
    assert given[5] is (started_by == "us") and running.head.patience_s == (0 if started_by == "us" else 30)


def test_each_group_of_workers_meets_in_a_file_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch's store reads what a killed group has left in its file, so no other group may have the same."""
    monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(get_temp_dir=lambda: str(tmp_path)))

    class Group:
        def __init__(self) -> None:
            self.told: list[str] = []

        def execute(self, function: Any, meeting: Any) -> None:
            self.told.append(meeting.address)

    backend, groups = ray_start.torch_config("gloo", 5, private=True).backend_cls(), (Group(), Group(), Group())
    for group in groups:
        backend.on_start(group, None)
    for group in groups:
        (store,) = group.told
        assert store.startswith(f"file://{tmp_path}/")
    assert len({group.told[0] for group in groups}) == 3
