"""A real S3 endpoint (moto's server) and, between it and boto3, a proxy that breaks requests."""

from __future__ import annotations

import contextlib
import http.client
import logging
import random
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import psutil

KEY_ID, SECRET = "AKIDOFTHETESTS12", "a/secret+that/no+message/may/hold"
_STALL_S = 0.05
_ANSWERS = {
    "500": (500, b"<Error><Code>InternalError</Code><Message>We encountered an internal error.</Message></Error>"),
    "503": (503, b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"),
    # In AWS's words: with the key's id and the signed text.
    "403": (
        403,
        f"<Error><Code>SignatureDoesNotMatch</Code><Message>The Signature of {KEY_ID} does not match.</Message>"
        f"<AWSAccessKeyId>{KEY_ID}</AWSAccessKeyId><StringToSign>AWS4-HMAC-SHA256 {SECRET}</StringToSign></Error>".encode(),
    ),
}
ANY = ("500", "503", "reset before", "answer lost")
REFUSED = "403"
WITH_BODY = ("reset in body", "truncated", "flipped")


@contextlib.contextmanager
def serve() -> Iterator[str]:
    """moto's threaded server; yields host:port."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"{host}:{port}"
    server.stop()


class Proxy:
    """Forwards to `upstream`. With a `rate`, that share of the requests fails in one of the ways above, or stalls; the choice is
    drawn from `seed`. `faults` counts the faults, `log` holds (method, path, Range header) of every request; `asked_by`, where it is a
    list, gets (path, pid of the process) of every GET of a shard."""

    def __init__(self, upstream: str) -> None:
        self.upstream = upstream
        self.rate, self.kinds, self.cut_after = 0.0, (*ANY, *WITH_BODY), -1
        self.faults: Counter[str] = Counter()
        self.log: list[tuple[str, str, str]] = []
        self.asked_by: list[tuple[str, int | None]] | None = None
        self.random, self.lock = random.Random(0), threading.Lock()
        proxy = self

        class Handler(_Handler):
            owner = proxy

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def quiet(self) -> None:
        """Switch faults off and reset the counts."""
        self.rate, self.kinds, self.cut_after = 0.0, (*ANY, *WITH_BODY), -1
        self.faults.clear()
        self.log.clear()
        self.asked_by = None
        self.random.seed(0)

    def fault(self, method: str, path: str, body: bytes) -> str:
        """The fault of a request, "" = none."""
        object_body = (method == "GET" and "list-type" not in path) or (method == "PUT" and body)
        with self.lock:
            self.cut_after -= 1
            if self.cut_after == 0:  # no answer from now on
                self.rate, self.kinds = 1.0, ("reset before",)
            if self.random.random() >= self.rate:
                return ""
            kinds = [k for k in self.kinds if k in (*ANY, REFUSED) or object_body]
            kind = self.random.choice([*kinds, "stall"] if self.rate < 1 else kinds) if kinds else ""
            if kind == "flipped" and len(kinds) > 1 and self.random.random() < 0.6:  # it costs a whole object
                kind = "truncated"
            if kind:
                self.faults[kind] += 1
            return kind


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    owner: Proxy

    def log_message(self, format: str, *args: Any) -> None: ...

    def handle_any(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        with self.owner.lock:
            self.owner.log.append((self.command, self.path, self.headers.get("Range", "")))
        if self.owner.asked_by is not None and self.command == "GET" and ".beton" in self.path:
            self.owner.asked_by.append((self.path, _process_at(self.client_address)))
        kind = self.owner.fault(self.command, self.path, body)
        if kind == "stall":
            time.sleep(_STALL_S)
        if kind == "reset before":
            return self._reset()
        if kind in _ANSWERS:
            return self._answer(_ANSWERS[kind][0], [], _ANSWERS[kind][1])
        if kind == "flipped" and body:
            body, kind = _flipped(body, self.owner.random), ""
        upstream = http.client.HTTPConnection(self.owner.upstream, timeout=20)
        upstream.request(self.command, self.path, body, dict(self.headers.items()))
        answer = upstream.getresponse()
        headers = [(k, v) for k, v in answer.getheaders() if k.lower() not in ("connection", "transfer-encoding", "content-length")]
        length = answer.getheader("Content-Length")
        data = answer.read()
        upstream.close()
        if kind == "answer lost":
            return self._reset()
        if kind == "flipped" and data and answer.status < 300:
            data = _flipped(data, self.owner.random)
        sent = data[: len(data) // 2] if kind in ("truncated", "reset in body") else data
        self._answer(answer.status, headers, sent, int(length) if self.command == "HEAD" and length else len(data))
        if kind == "truncated":
            self.close_connection = True
        if kind == "reset in body":
            return self._reset()
        return None

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = handle_any

    def _answer(self, status: int, headers: list[tuple[str, str]], data: bytes, length: int | None = None) -> None:
        self.send_response_only(status)
        for name, value in headers:
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data) if length is None else length))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)
        self.wfile.flush()

    def _reset(self) -> None:
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # RST instead of FIN
        self.connection.close()
        self.close_connection = True


def _process_at(address: Any) -> int | None:
    """The process on this machine whose connection has this address."""
    for _ in range(5):  # a connection may be younger than the list of its process's files
        for found in psutil.net_connections("tcp"):
            if found.laddr == address and found.pid is not None:
                return int(found.pid)
    return None


def _flipped(data: bytes, chance: random.Random) -> bytes:
    at = chance.randrange(len(data))
    return data[:at] + bytes([data[at] ^ 0x40]) + data[at + 1 :]
