"""`preemption` against simulated metadata services of EC2 and Google Cloud, and a head that records each drain."""

from __future__ import annotations

import json
import os
import select
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipelines.clusterfile import preemption
from tests.support.paths import ROOT

HERE = ROOT / "cluster"
NOW_S = 1_700_000_000.0  # 2023-11-14 22:13:20 UTC
NODE = preemption.Raylet(7, "ab" * 28, "10.0.0.5:6379")
ACTION = "/latest/meta-data/spot/instance-action"


class Metadata(ThreadingHTTPServer):
    """A metadata service that serves `pages`; as EC2's version 2, only to requests with the current token."""

    def __init__(self, tokens: bool) -> None:
        super().__init__(("127.0.0.1", 0), Page)
        self.base = f"http://127.0.0.1:{self.server_port}"
        self.tokens, self.day = tokens, 1
        self.pages: dict[str, str | int] = {}
        """Path → the page there, or a status."""
        self.asked: list[str] = []

    def answer(self, method: str, path: str, headers: Any) -> str | int:
        self.asked.append(f"{method} {path}")
        if self.tokens and (method, path) == ("PUT", "/latest/api/token"):
            return f"token-{self.day}" if headers["X-aws-ec2-metadata-token-ttl-seconds"] == "21600" else 400
        if self.tokens and headers["X-aws-ec2-metadata-token"] != f"token-{self.day}":
            return 401
        if not self.tokens and headers["Metadata-Flavor"] != "Google":
            return 403
        return self.pages.get(path, 404) if method == "GET" else 405


class Page(BaseHTTPRequestHandler):
    server: Metadata

    def do_GET(self) -> None:
        said = self.server.answer(self.command, self.path, self.headers)
        if said == 0:  # closes the connection without an answer
            return
        text = said.encode() if isinstance(said, str) else b"<html>"
        self.send_response(200 if isinstance(said, str) else said)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    do_PUT = do_GET

    def log_message(self, format: str, *args: Any) -> None: ...


@pytest.fixture
def metadata(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Metadata]:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # a user's proxy; nothing listens there
    server = Metadata(request.param == "aws")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


class Head:
    """Ray's head: it answers drains in turn with `answers`, and accepts all later ones."""

    def __init__(self, *answers: Any) -> None:
        self.answers, self.told = list(answers), list[tuple[Any, ...]]()

    def __call__(self, address: str) -> Head:
        self.address = address
        return self

    def drain_node(self, *what: Any, timeout: float) -> tuple[bool, str]:
        self.told.append((self.address, *what))
        answer = self.answers.pop(0) if self.answers else (True, "")
        if isinstance(answer, Exception):
            raise answer
        return answer


@pytest.fixture
def head(monkeypatch: pytest.MonkeyPatch) -> Head:
    made = Head()
    monkeypatch.setattr("ray._raylet.GcsClient", made)
    monkeypatch.setattr(preemption.time, "time", lambda: NOW_S)
    return made


def watch(service: Any, *meanwhile: Any, polls: int = 20) -> bool:
    """`preemption.watch` without waiting: between two polls one of `meanwhile` happens; the raylet ends after `polls`."""
    happen, left = list(meanwhile), [polls]

    def alive() -> bool:
        left[0] -= 1
        return left[0] >= 0

    def sleep(seconds: float) -> None:
        assert seconds == 2.0
        if happen:
            happen.pop(0)()

    return bool(preemption.watch(service, NODE, alive=alive, sleep=sleep))


def spot(action: str, time: str) -> str:
    return json.dumps({"action": action, "time": time})


# ── EC2 ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("metadata", ["aws"], indirect=True)
def test_ec2_takes_a_node_back(metadata: Metadata, head: Head, capsys: pytest.CaptureFixture[str]) -> None:
    """No notice, a token that expires, a rebalance recommendation, the notice; the head refuses, is away, accepts."""
    head.answers = [(False, "not now"), ConnectionError("away")]
    recommended = {"/latest/meta-data/events/recommendations/rebalance": json.dumps({"noticeTime": "2023-11-14T22:13:20Z"})}

    def expires() -> None:
        metadata.day = 2

    def comes() -> None:
        assert not head.told
        metadata.pages[ACTION] = spot("terminate", "2023-11-14T22:15:10Z")  # in 110 s

    def silent() -> None:
        metadata.pages[ACTION] = 503  # a notice is not forgotten

    assert watch(preemption.Aws(metadata.base), expires, lambda: metadata.pages.update(recommended), comes, silent)
    # 2 = DRAIN_NODE_REASON_PREEMPTION; the deadline in milliseconds.
    assert head.told == [("10.0.0.5:6379", "ab" * 28, 2, "EC2 says terminate", 1_700_000_110_000)] * 3
    token, get = "PUT /latest/api/token", f"GET {ACTION}"
    assert metadata.asked == [token, get, get, token, get, get, get]  # once for a token, once more when that had expired
    said = capsys.readouterr().out.splitlines()
    assert ["not now" in said[0], "away" in said[1], "in 110 s: Ray drains node abab" in said[2]] == [True] * 3 and len(said) == 3


@pytest.mark.parametrize("metadata", ["aws"], indirect=True)
@pytest.mark.parametrize(
    ("answer", "in_s"),
    [
        (spot("stop", "2023-11-14T22:14:00Z"), 40),
        (spot("hibernate", "2023-11-14T22:13:20Z"), 0),
        (spot("terminate", "2023-11-14T22:05:20Z"), 0),  # by a clock of ours that is ten minutes fast
        (spot("terminate", "2023-11-14T22:25:20Z"), 120),  # and slow
        (spot("terminate", "soon"), 120),
        ('{"action": "terminate"}', 120),
    ],
)
def test_the_deadline_is_within_ec2s_two_minutes(metadata: Metadata, answer: str, in_s: int) -> None:
    metadata.pages[ACTION] = answer
    assert preemption.Aws(metadata.base).ask(NOW_S).deadline_s == NOW_S + in_s


@pytest.mark.parametrize("metadata", ["aws"], indirect=True)
def test_no_odd_answer_ends_it(metadata: Metadata, head: Head, capsys: pytest.CaptureFixture[str]) -> None:
    odd = ["<html>", "[]", "null", "{}", spot("noop", "x"), "[" * 4096, 500, 0, 403, 401]

    def says(answer: str | int) -> Any:
        return lambda: metadata.pages.update({ACTION: answer})

    service = preemption.Aws(metadata.base)
    assert watch(service, *map(says, [*odd, 404, spot("terminate", "2023-11-14T22:15:20Z")]))
    assert [told[-1] for told in head.told] == [1_700_000_120_000]
    said = capsys.readouterr().out.splitlines()
    assert any("JSONDecodeError" in line for line in said) and any("answers again" in line for line in said)
    assert len(said) <= len(odd) + 2


def test_a_silent_service_is_said_once_and_nothing_stays_when_ray_ends(head: Head, capsys: pytest.CaptureFixture[str]) -> None:
    assert not watch(preemption.Aws("http://127.0.0.1:9"))  # nothing listens there
    first, last = capsys.readouterr().out.splitlines()
    assert "the metadata service gives no answer" in first and "the raylet has ended" in last
    assert not head.told


@pytest.mark.parametrize("metadata", ["aws"], indirect=True)
def test_a_full_disk_does_not_end_it(metadata: Metadata, head: Head, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(preemption, "print", full, raising=False)
    metadata.pages[ACTION] = 500
    assert watch(preemption.Aws(metadata.base), lambda: metadata.pages.update({ACTION: spot("stop", "2023-11-14T22:14:00Z")}))
    assert len(head.told) == 1


# ── Google Cloud ───────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("metadata", ["gcp"], indirect=True)
@pytest.mark.parametrize(
    ("name", "answer", "in_s"), [("preempted", "TRUE\n", 30), ("maintenance-event", "TERMINATE_ON_HOST_MAINTENANCE", 60)]
)
def test_google_takes_a_node_back(metadata: Metadata, head: Head, name: str, answer: str, in_s: int) -> None:
    where = "/computeMetadata/v1/instance/"
    metadata.pages = {f"{where}preempted": "FALSE", f"{where}maintenance-event": "NONE"}

    def moves() -> None:  # to another host, unharmed
        metadata.pages[f"{where}maintenance-event"] = "MIGRATE_ON_HOST_MAINTENANCE"

    def unknown() -> None:
        del metadata.pages[f"{where}maintenance-event"]

    assert watch(preemption.Gcp(metadata.base), moves, unknown, lambda: metadata.pages.update({where + name: answer}))
    ((address, node, reason, why, deadline_ms),) = head.told
    assert (address, node, reason, deadline_ms) == ("10.0.0.5:6379", "ab" * 28, 2, (1_700_000_000 + in_s) * 1000)
    assert why.startswith("Google Cloud ")


# ── Which node, and how the files start it ─────────────────────────────────────────────────────────────────────────


def process(proc: Path, pid: int, name: str, *words: str) -> None:
    (proc / str(pid)).mkdir(parents=True)
    (proc / str(pid) / "comm").write_text(f"{name}\n")
    (proc / str(pid) / "cmdline").write_text("\0".join([f"/x/{name}", *words, ""]))


def test_a_node_is_found_by_its_raylet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert preemption.find_raylet(tmp_path) is None
    flags = ["--node_id=0a", "--agent=python agent.py --node_id=9 --gcs-address=9:9", "--gcs-address=10.0.0.5:6379"]
    process(tmp_path, 20, "raylet", *flags)
    process(tmp_path, 9, "raylet", "--node_id=08", "--gcs-address=10.0.0.4:6379")
    process(tmp_path, 30, "python", *flags)
    process(tmp_path, 40, "raylet")  # a zombie
    (tmp_path / "self").mkdir()
    assert preemption.find_raylet(tmp_path) == preemption.raylet(20, tmp_path) == preemption.Raylet(20, "0a", "10.0.0.5:6379")
    assert [preemption.raylet(pid, tmp_path) for pid in (30, 40, 50)] == [None] * 3
    monkeypatch.setattr(preemption.os, "getuid", lambda: os.geteuid() + 1)
    assert preemption.find_raylet(tmp_path) is None  # another user's


@pytest.mark.parametrize(("name", "cloud"), [("aws-gpu", "aws"), ("gcp-gpu", "gcp"), ("gcp-tpu-pod", "gcp")])
def test_workers_start_it_after_ray_and_hold_no_shell(name: str, cloud: str, tmp_path: Path) -> None:
    cluster = yaml.safe_load((HERE / f"{name}.yaml").read_text())
    assert not any("notice" in command for command in cluster["head_start_ray_commands"])
    stops, starts, asks = cluster["worker_start_ray_commands"]
    assert "ray stop" in stops and "ray start" in starts
    # A stand-in for Python that writes its arguments and ids, then stays, as the real one does, until this test releases it.
    python, told, go = tmp_path / "simclr/.venv/bin/python", tmp_path / "told", tmp_path / "go"
    python.parent.mkdir(parents=True)
    who = 'echo "$@" $RAY_AUTH_MODE $$ $(cut -d " " -f 6 /proc/$$/stat)'
    python.write_text(f"#!/bin/sh\nexec 3<>~/go\n{who}\necho >~/told\nread -r word <&3\n")
    python.chmod(0o755)
    for pipe in (told, go):
        os.mkfifo(pipe)
    with told.open("r+b", buffering=0) as saying, go.open("r+b", buffering=0) as letting:
        # With pipes for its output: this returns when no process holds them.
        home = {**os.environ, "HOME": str(tmp_path)}
        done = subprocess.run(["bash", "-c", asks], env=home, capture_output=True, stdin=subprocess.DEVNULL, timeout=20)
        assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
        assert select.select([saying], [], [], 20)[0]
        *script, which, mode, pid, session = (tmp_path / "simclr/notice.log").read_text().split()
        letting.write(b"\n")
    assert (script, which, mode) == (["-m", "pipelines.clusterfile.preemption"], cloud, "token")
    assert pid == session  # its own session: it does not end with a terminal
