"""Servers of MLflow's: a fake one, with as much of its REST interface as one run needs, and a real one, with a proxy ahead of it."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit


class Server(ThreadingHTTPServer):
    """As much of MLflow's REST interface as one run needs; `metrics` are those that it received, in order."""

    allow_reuse_address = True

    def __init__(self, port: int = 0) -> None:
        self.metrics: list[tuple[str, int, float]] = []
        self.calls: list[str] = []
        super().__init__(("127.0.0.1", port), Answer)
        self.uri = f"http://user:secret@127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self) -> None:
        self.shutdown()
        self.server_close()


class Answer(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.reply({"experiment": {"experiment_id": "1", "name": "e", "lifecycle_stage": "active"}})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.calls.append(self.path.removeprefix("/api/2.0/mlflow/"))
        self.server.metrics += [(m["key"], m["step"], m["value"]) for m in body.get("metrics", [])]
        info = {"run_id": "ab12", "run_uuid": "ab12", "experiment_id": "1", "status": "RUNNING", "lifecycle_stage": "active"}
        self.reply({"run": {"info": info, "data": {}}, "run_info": info} if "/runs/" in self.path else {})

    def reply(self, content: dict[str, Any]) -> None:
        text = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_: object) -> None:
        pass


@contextlib.contextmanager
def started(folder: Path, *flags: str) -> Iterator[int]:
    """A `mlflow server` process with its database and artifacts in `folder`; gives its port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mlflow = Path(sys.executable).with_name("mlflow")
    places = ["--backend-store-uri", f"sqlite:///{folder}/mlflow.db", "--artifacts-destination", str(folder / "artifacts")]
    command = [str(mlflow), "server", *places, "--host", "127.0.0.1", "--port", str(port), "--workers", "1", *flags]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            began = time.monotonic()
            while not _healthy(port):
                assert process.poll() is None and time.monotonic() < began + 120, (folder / "log").read_text()
                time.sleep(0.2)
            yield port
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _healthy(port: int) -> bool:
    asked = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    with contextlib.suppress(OSError), contextlib.closing(asked):
        asked.request("GET", "/health")
        return asked.getresponse().status == 200
    return False


class Between(ThreadingHTTPServer):
    """An HTTP proxy that knows one server, on `port` of this machine, under every name. `loses` and `cuts` are ends of paths: the answer to
    such a request is not passed on, or half of its body is."""

    def __init__(self, port: int) -> None:
        self.behind, self.loses, self.cuts = port, "", ""
        super().__init__(("127.0.0.1", 0), _Passing)
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self) -> None:
        self.shutdown()
        self.server_close()


class _Passing(BaseHTTPRequestHandler):
    server: Between

    def do_GET(self) -> None:
        at, length = urlsplit(self.path), int(self.headers.get("Content-Length", 0))
        self.close_connection = True
        if self.server.cuts and at.path.endswith(self.server.cuts):
            self.rfile.read(length // 2)
            return
        behind = http.client.HTTPConnection("127.0.0.1", self.server.behind)
        behind.request(self.command, f"{at.path}?{at.query}", self.rfile.read(length), dict(self.headers.items()))
        answer = behind.getresponse()
        body = answer.read()
        if self.server.loses and at.path.endswith(self.server.loses):
            return
        self.send_response(answer.status)
        self.send_header("Content-Type", answer.headers.get("Content-Type", ""))
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_POST = do_PUT = do_PATCH = do_DELETE = do_GET

    def log_message(self, *_: object) -> None:
        pass
