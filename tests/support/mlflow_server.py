"""A fake server: as much of MLflow's REST interface as one run needs."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


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
