"""A played Hugging Face Hub: repositories in memory, and as much of the interface as publishing and fetching need."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

TOKEN = "hf_of_the_user"


class Hub(ThreadingHTTPServer):
    """`repositories`: name → commits, oldest first, each path → bytes. Who writes shows `TOKEN`, who reads what is in `private`, too."""

    daemon_threads = True

    def __init__(self) -> None:
        self.repositories: dict[str, list[dict[str, bytes]]] = {}
        self.private, self.gated = set[str](), set[str]()
        self.large: dict[str, bytes] = {}
        """What came by LFS: sha256 → bytes."""
        self.heard: list[str] = []
        super().__init__(("127.0.0.1", 0), _Answer)
        self.uri = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self) -> None:
        self.shutdown()
        self.server_close()


def oid(repository: str, commit: int) -> str:
    return hashlib.sha1(f"{repository} {commit}".encode()).hexdigest()


class _Answer(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.read: bytes | None = None
        path = urlsplit(self.path).path
        self.server.heard.append(f"{self.command} {path}")
        for pattern, method in (
            (r"/api/repos/create", self.create),
            (r"/api/validate-yaml", self.validate),
            (r"/api/models/(\w+/[\w.-]+)/preupload/main", self.preupload),
            (r"/(\w+/[\w.-]+)\.git/info/lfs/objects/batch", self.batch),
            (r"/lfs/(\w+)", self.lfs),
            (r"/api/models/(\w+/[\w.-]+)/commit/main", self.commit),
            (r"/api/models/(\w+/[\w.-]+)/(?:revision|tree)/([\w.-]+)", self.listed),
            (r"/api/models/(\w+/[\w.-]+)()", self.listed),
            (r"/(\w+/[\w.-]+)/resolve/([\w.-]+)/(.+)", self.resolve),
        ):
            if found := re.fullmatch(pattern, path):
                method(*found.groups())
                return
        self.refuse(404, "EntryNotFound")

    do_POST = do_PUT = do_HEAD = do_GET

    @property
    def known(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def body(self) -> bytes:
        """What was sent, however often it is asked for."""
        if self.read is None:
            self.read = self.received()
        return self.read

    def received(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def create(self) -> None:
        asked = json.loads(self.body())
        name = f"{asked['organization']}/{asked['name']}"
        if not self.known:
            self.refuse(401, "")
            return
        self.server.repositories.setdefault(name, [])
        if asked.get("visibility") == "private":
            self.server.private.add(name)
        self.reply({"url": f"{self.server.uri}/{name}", "name": name, "id": "1"})

    def validate(self) -> None:
        self.reply(
            {"errors": [], "warnings": []} if json.loads(self.body())["content"].startswith("---\n") else {"errors": [{"message": "none"}]}
        )

    def preupload(self, repository: str) -> None:
        if self.seen(repository):
            found = [(file["path"], file["path"].endswith(".safetensors")) for file in json.loads(self.body())["files"]]
            self.reply({"files": [{"path": p, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False} for p, large in found]})

    def batch(self, repository: str) -> None:
        objects = json.loads(self.body())["objects"]
        for one in objects:
            one["actions"] = {"upload": {"href": f"{self.server.uri}/lfs/{one['oid']}", "header": {}}}
        self.reply({"transfer": "basic", "objects": objects})

    def lfs(self, sha: str) -> None:
        body = self.body()
        assert hashlib.sha256(body).hexdigest() == sha
        self.server.large[sha] = body
        self.reply({})

    def commit(self, repository: str) -> None:
        lines = [json.loads(line) for line in self.body().splitlines()]
        if not self.known:
            self.refuse(401, "")
            return
        commits = self.server.repositories[repository]
        files = dict(commits[-1]) if commits else {}
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.large[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        commits.append(files)
        made = oid(repository, len(commits) - 1)
        self.reply({"success": True, "commitOid": made, "commitUrl": f"{self.server.uri}/{repository}/commit/{made}"})

    def seen(self, repository: str) -> bool:
        """Whether who asks may see the repository; says so to whom may not."""
        if repository not in self.server.repositories or (repository in self.server.private and not self.known):
            self.refuse(404 if self.known else 401, "RepoNotFound")
            return False
        if repository in self.server.gated:
            self.refuse(403, "GatedRepo")
            return False
        return True

    def at(self, repository: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        commits = self.server.repositories[repository]
        named = {oid(repository, i): i for i in range(len(commits))} | {"main": len(commits) - 1, "": len(commits) - 1}
        if revision not in named:
            self.refuse(404, "RevisionNotFound")
            return None
        return oid(repository, named[revision]), commits[named[revision]] if commits else {}

    def listed(self, repository: str, revision: str) -> None:
        if self.seen(repository) and (found := self.at(repository, revision)):
            commit, files = found
            rows = [{"type": "file", "path": p, "size": len(b), "oid": hashlib.sha1(b).hexdigest()} for p, b in files.items()]
            about = {"id": repository, "sha": commit, "private": repository in self.server.private, "tags": [], "downloads": 0, "likes": 0}
            self.reply(rows if "/tree/" in self.path else about | {"siblings": [{"rfilename": p} for p in files]})

    def resolve(self, repository: str, revision: str, path: str) -> None:
        if not self.seen(repository) or not (found := self.at(repository, revision)):
            return
        commit, files = found
        if path not in files:
            self.refuse(404, "EntryNotFound", commit)
            return
        self.send_response(200)
        self.send_header("X-Repo-Commit", commit)
        self.send_header("ETag", f'"{hashlib.sha256(files[path]).hexdigest()}"')
        self.send_header("Content-Length", str(len(files[path])))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(files[path])

    def refuse(self, status: int, code: str, commit: str = "") -> None:
        self.body()
        self.send_response(status)
        for name, value in (("X-Error-Code", code), ("X-Repo-Commit", commit), ("Content-Length", "0")):
            if value:
                self.send_header(name, value)
        self.end_headers()

    def reply(self, content: Any) -> None:
        text = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(text)

    def log_message(self, *_: object) -> None:
        pass
