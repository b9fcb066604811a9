"""A server that somebody else owns: it keeps what it was sent, and answers like as much of MLflow as a registry's client asks for."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

_ARTIFACTS = "/api/2.0/mlflow-artifacts/artifacts"


class Ears(ThreadingHTTPServer):
    """`heard` has the path and the Authorization of every request; `source` is where version 1 of every model lies; `files` are what lies
    in its encoder folder, as (bytes that are listed, bytes that are sent); to `elsewhere` every request is sent on."""

    def __init__(self, source: str = "mlflow-artifacts:/here", elsewhere: str = "") -> None:
        super().__init__(("127.0.0.1", 0), _Answer)
        self.heard: list[tuple[str, str]] = []
        self.source, self.elsewhere = source, elsewhere
        self.files: dict[str, tuple[int | None, bytes]] = {}
        self.tags: dict[str, str] = {}
        self.runs: list[str] = []
        self.endless, self.sent = False, 0
        self.uri = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def told(self) -> list[str]:
        """The credentials that it was sent."""
        return [authorization for _, authorization in self.heard if authorization]

    def stop(self) -> None:
        self.endless = False
        self.shutdown()
        self.server_close()


class _Answer(BaseHTTPRequestHandler):
    server: Ears

    def do_GET(self) -> None:
        at, ears = urlsplit(self.path), self.server
        ears.heard.append((self.path, self.headers.get("Authorization", "")))
        if ears.elsewhere:
            self.send_response(302)
            self.send_header("Location", ears.elsewhere + self.path)
            self.end_headers()
            return
        version = {"name": "m", "version": "1", "run_id": "ab12", "tags": [{"key": k, "value": v} for k, v in ears.tags.items()]}
        if at.path == _ARTIFACTS:
            file = parse_qs(at.query)["path"][0].rpartition("/")[2]
            listed = [{"path": n, "is_dir": False, **({} if s is None else {"file_size": s})} for n, (s, _) in ears.files.items()]
            self.reply({"files": listed if file == "encoder" else []})
        elif at.path.startswith(_ARTIFACTS):
            self.send_response(200)
            self.end_headers()
            with contextlib.suppress(ConnectionError):  # of one who has heard enough
                self.wfile.write(ears.files[at.path.rpartition("/")[2]][1])
                while ears.endless:
                    self.wfile.write(bytes(1 << 16))
                    ears.sent += 1
                    time.sleep(0.001)
        elif at.path.endswith("runs/get"):
            asked = parse_qs(at.query)["run_id"][0]
            if asked in ears.runs:
                self.reply({"run": {"info": {"run_id": asked, "artifact_uri": ears.source}, "data": {}}})
            else:
                self.reply({"error_code": "RESOURCE_DOES_NOT_EXIST", "message": "no such run"}, 404)
        elif at.path.endswith("registered-models/get"):
            self.reply({"registered_model": {"name": "m"}})
        elif at.path.endswith("model-versions/get"):
            self.reply({"model_version": version})
        elif at.path.endswith("model-versions/get-download-uri"):
            self.reply({"artifact_uri": ears.source})
        else:
            self.reply({})

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.do_GET()

    def reply(self, content: dict[str, Any], status: int = 200) -> None:
        text = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_: object) -> None:
        pass
