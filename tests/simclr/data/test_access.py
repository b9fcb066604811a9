"""Credentials that end, rights that lack, buckets that are public or whose readers pay: a server that grants by key and request."""

from __future__ import annotations

import functools
import re
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import botocore.session
import pytest

from simclr.data.s3.store import Store
from simclr.data.s3.uri import Address, Unreachable
from simclr.errors import UserError

PLACE = Address("photos", "some/a")
LIST = b"<ListBucketResult><Contents><Key>some/a</Key><Size>4</Size><ETag>x</ETag></Contents></ListBucketResult>"
Grant = Callable[[str, str, Any], tuple[int, str]]
"""grant(request, key id or "", headers) → (200, "") or the status and the code of a refusal; a request is GET, HEAD, PUT, DELETE, LIST."""


class Server:
    """Holds one object of four bytes, and answers each request as `grant` says. `log` has (request, key id)."""

    def __init__(self) -> None:
        self.log: list[tuple[str, str]] = []
        self.grant: Grant = lambda request, key, headers: (200, "")
        self.message = "Access Denied"
        self.region = ""
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, format: str, *args: Any) -> None: ...

            def answer(self) -> None:
                self.rfile.read(int(self.headers.get("Content-Length") or 0))
                request = "LIST" if "list-type" in self.path else self.command
                signed = re.search(r"Credential=(\w+)/", self.headers.get("Authorization", ""))
                key = signed[1] if signed else ""
                server.log.append((request, key))
                status, code = server.grant(request, key, self.headers)
                body = LIST if request == "LIST" else b"data" if request in ("GET", "HEAD") else b""
                if code:
                    body = f"<Error><Code>{code}</Code><Message>{server.message}</Message></Error>".encode()
                elif self.headers.get("Range"):
                    body, status = body[:1], 206
                self.send_response_only(status)
                self.send_header("Content-Length", str(len(body)))
                self.send_header("Content-Type", "application/xml")
                self.send_header("ETag", '"x"')
                if server.region:
                    self.send_header("x-amz-bucket-region", server.region)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body)

            do_GET = do_HEAD = do_PUT = do_DELETE = do_POST = answer

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Server]:
    """A server, and credentials in a file, as `aws sso login` or a batch system renews them."""
    server = Server()
    monkeypatch.setattr(
        botocore.session, "create_loader", functools.cache(botocore.session.create_loader)
    )  # else each client reads its models
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE", "SIMCLR_S3_REQUESTER_PAYS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{server.http.server_address[1]}")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nonexistent")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    keys(tmp_path, "FIRST")
    yield server
    server.http.shutdown()
    server.http.server_close()


def keys(folder: Path, key: str) -> None:
    (folder / "credentials").write_text(f"[default]\naws_access_key_id = {key}\naws_secret_access_key = secret\n")


def quick(**settings: Any) -> Store:
    return Store(**({"attempts": 3, "pause_s": 0, "answer_s": 5, "threads": 2} | settings))


# ── Credentials that end ───────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("code", ["ExpiredToken", "InvalidAccessKeyId"])
def test_a_new_session_is_tried_before_a_run_stops(server: Server, tmp_path: Path, code: str) -> None:
    """One store lives as long as its run. Its file of credentials is renewed meanwhile; requests of any kind go on, and none is lost."""
    store = quick(attempts=1)
    assert store.read(PLACE) == b"data"
    ended = {"FIRST"}
    server.grant = lambda request, key, headers: (400 if code == "ExpiredToken" else 403, code) if key in ended else (200, "")
    keys(tmp_path, "SECOND")
    server.log.clear()
    assert store.look(PLACE).bytes == 4
    assert server.log[-1] == ("HEAD", "SECOND") and ("HEAD", "FIRST") in server.log
    store.delete(PLACE)
    assert server.log[-1] == ("DELETE", "SECOND")
    ended.add("SECOND")
    keys(tmp_path, "THIRD")
    done = list(store.pool.map(lambda _: store.read(PLACE), range(8)))  # of several threads one looks for them
    assert done == [b"data"] * 8 and {key for _, key in server.log[-4:]} == {"THIRD"}


def test_credentials_that_come_late_are_waited_for(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = quick(attempts=4)
    store.read(PLACE)
    server.grant = lambda request, key, headers: (400, "ExpiredToken") if key == "FIRST" else (200, "")
    pauses: list[float] = []

    def pause(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == 2:
            keys(tmp_path, "SECOND")

    monkeypatch.setattr(store.over, "wait", pause)
    assert store.read(PLACE) == b"data" and len(pauses) == 2
    keys(tmp_path, "FIRST")
    server.grant = lambda request, key, headers: (400, "ExpiredToken")
    with pytest.raises(
        Unreachable, match=r"failed 4 times, the last time with credentials that have ended \(400 ExpiredToken\); renew them"
    ):
        store.read(PLACE)


def test_credentials_that_never_worked_are_refused_at_once(server: Server) -> None:
    server.grant = lambda request, key, headers: (400, "ExpiredToken")
    with pytest.raises(
        Unreachable, match=r"S3 refuses s3://photos/some/a: credentials that have ended \(400 ExpiredToken\); renew them where"
    ):
        quick().read(PLACE)
    assert len(server.log) == 1
    server.grant = lambda request, key, headers: (403, "InvalidAccessKeyId")
    with pytest.raises(UserError, match=r"to these credentials \(403 InvalidAccessKeyId\); get permission") as caught:
        quick().read(PLACE)
    assert not isinstance(caught.value, Unreachable) and len(server.log) == 2


def test_a_clock_that_is_wrong_is_named(server: Server) -> None:
    server.grant = lambda request, key, headers: (403, "RequestTimeTooSkewed")
    with pytest.raises(UserError, match=r"this machine's clock is wrong, 20\d\d-.*; set it"):
        quick().read(PLACE)


# ── Rights that lack ───────────────────────────────────────────────────────────────────────────────────────────────


def test_a_role_that_may_write_but_not_list(server: Server, tmp_path: Path) -> None:
    server.grant = lambda request, key, headers: (200, "") if request == "PUT" else (403, "AccessDenied")
    store = quick()
    with pytest.raises(UserError, match=r"\(403 AccessDenied\): they lack s3:ListBucket for the bucket photos; get that right"):
        store.listing(Address("photos", "some"))
    (tmp_path / "a").write_bytes(b"data")
    both = r"they lack s3:GetObject, or, if there is no such object, s3:ListBucket for the bucket photos; get"
    for request in (lambda: store.look(PLACE), lambda: store.read(PLACE), lambda: store.upload(tmp_path / "a", PLACE)):
        with pytest.raises(UserError, match=both):
            request()


@pytest.mark.parametrize(("request_", "right"), [("PUT", "s3:PutObject"), ("DELETE", "s3:DeleteObject")])
def test_each_right_is_named(server: Server, tmp_path: Path, request_: str, right: str) -> None:
    absent = {"HEAD": (404, "NoSuchKey")} | {request_: (403, "AccessDenied")}
    server.grant = lambda request, key, headers: absent.get(request, (200, ""))
    (tmp_path / "a").write_bytes(b"data")
    with pytest.raises(UserError, match=rf"they lack {right}; get"):
        quick().upload(tmp_path / "a", PLACE) if request_ == "PUT" else quick().delete(PLACE)


def test_the_right_is_the_one_that_s3_tells(server: Server) -> None:
    server.message = "User: arn:aws:iam::1:user/secretname is not authorized to perform: kms:Decrypt on this resource"
    server.grant = lambda request, key, headers: (403, "AccessDenied")
    with pytest.raises(UserError, match="they lack kms:Decrypt; get that right") as caught:
        quick().read(PLACE)
    assert "secretname" not in str(caught.value)


def test_a_bucket_in_another_region_is_named_with_it(server: Server) -> None:
    server.region = "eu-central-1"
    server.grant = lambda request, key, headers: (400, "IllegalLocationConstraintException")
    with pytest.raises(UserError, match=r"is in region eu-central-1 \(400 Ill.*\); set AWS_DEFAULT_REGION"):
        quick().read(PLACE)


# ── Public buckets, and those whose readers pay ────────────────────────────────────────────────────────────────────


def test_a_public_bucket_is_read_without_credentials_and_nothing_is_written(server: Server, tmp_path: Path) -> None:
    (tmp_path / "credentials").write_text("")
    store, said = quick(), list[str]()
    store.says = said.append
    assert [found.name for found in store.listing(Address("photos", "some"))] == ["a"] and store.read(PLACE) == b"data"
    assert said == ["no AWS credentials: s3://photos is read without a signature, as a public bucket"]
    assert set(server.log) == {("LIST", ""), ("GET", "")}
    server.log.clear()
    with pytest.raises(UserError, match="no AWS credentials for s3://photos/some/a; set AWS_ACCESS_KEY_ID"):
        store.delete(PLACE)
    assert server.log == []
    server.grant = lambda request, key, headers: (200, "") if key else (403, "AccessDenied")
    with pytest.raises(UserError, match=r"no AWS credentials for s3://photos/some/a, and it is not public \(403 AccessDenied\); set AWS"):
        store.read(PLACE)
    keys(tmp_path, "LATE")
    assert store.read(PLACE) == b"data" and server.log[-1] == ("GET", "LATE")
    store.delete(PLACE)
    assert len(said) == 1


def test_requests_are_paid_for_where_the_user_says_so(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    paid: list[str] = []

    def grant(request: str, key: str, headers: Any) -> tuple[int, str]:
        paid.append(headers.get("x-amz-request-payer", ""))
        return (200, "") if paid[-1] else (403, "AccessDenied")

    server.grant = grant
    with pytest.raises(UserError, match="if its readers pay for it, name the bucket in SIMCLR_S3_REQUESTER_PAYS"):
        quick().read(PLACE)
    monkeypatch.setenv("SIMCLR_S3_REQUESTER_PAYS", "others, photos")
    paid.clear()
    store = quick()
    store.listing(Address("photos"))
    store.look(PLACE)
    assert store.read(PLACE) == b"data" and paid == ["requester"] * 3
    with pytest.raises(UserError, match="s3://elsewhere/a"):  # nothing is paid for other buckets
        store.read(Address("elsewhere", "a"))
    assert paid[-1] == ""
