"""A server that speaks S3 and means harm: listings and bodies without an end, sizes that are not true, answers without their parts."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from simclr.data.s3.answers import Damaged, TooLarge
from simclr.data.s3.store import Store
from simclr.data.s3.uri import Address
from simclr.data.sources.s3 import s3_prefix
from simclr.errors import UserError

PLACE = Address("photos", "some")
MOST_REQUESTS = 3000  # after these the server ends what it began, and the test fails


class Server:
    """Answers GET and HEAD by `answer(query, headers)` → (status, headers, body)."""

    def __init__(self) -> None:
        self.asked = 0
        self.answer: Callable[[dict[str, list[str]], Any], tuple[int, dict[str, str], bytes]] = lambda query, headers: (404, {}, b"")
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, format: str, *args: Any) -> None: ...

            def do_GET(self) -> None:
                server.asked += 1
                status, headers, body = server.answer(parse_qs(urlsplit(self.path).query), self.headers)
                self.send_response_only(status if server.asked < MOST_REQUESTS else 403)
                for name, value in ({"Content-Length": str(len(body))} | headers).items():
                    self.send_header(name, value)
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(body)
                self.close_connection = True

            do_HEAD = do_GET

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    server = Server()
    for name, value in {
        "AWS_ENDPOINT_URL_S3": f"http://127.0.0.1:{server.http.server_address[1]}",
        "AWS_ACCESS_KEY_ID": "AKIDOFTHETESTS12",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_CONFIG_FILE": "/nonexistent",
        "AWS_SHARED_CREDENTIALS_FILE": "/nonexistent",
    }.items():
        monkeypatch.setenv(name, value)
    yield server
    server.http.shutdown()
    server.http.server_close()


@pytest.fixture
def store(server: Server) -> Store:
    return Store(attempts=2, pause_s=0, answer_s=5, part_bytes=1 << 10, threads=2)


def page(keys: list[str], token: str | None) -> tuple[int, dict[str, str], bytes]:
    listed = "".join(f"<Contents><Key>some/{key}</Key><Size>1</Size><ETag>x</ETag></Contents>" for key in keys)
    more = f"<IsTruncated>true</IsTruncated><NextContinuationToken>{token}</NextContinuationToken>" if token else ""
    return 200, {"Content-Type": "application/xml"}, f"<ListBucketResult>{more}{listed}</ListBucketResult>".encode()


# ── Listings ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_listing_that_repeats_itself_ends_at_once(server: Server, store: Store) -> None:
    numbers = itertools.count()
    for answer in (
        lambda query, headers: page([f"{next(numbers):09}"], "again"),  # the same token
        lambda query, headers: page(["a", "b"], str(next(numbers))),  # the same objects
        lambda query, headers: page([f"{next(numbers):09}"], ("a", "b", "c")[next(numbers) % 3]),  # tokens in a circle
    ):
        server.asked, server.answer = 0, answer
        with pytest.raises(UserError, match=r"the listing of s3://photos/some does not end: the server repeats itself; check the endpoint"):
            store.listing(PLACE)
        assert server.asked < 8
        with pytest.raises(UserError, match="does not end"):
            s3_prefix(PLACE)  # pictures, of which there may be hundreds of millions


def test_a_listing_without_an_end_has_a_bound(server: Server, store: Store) -> None:
    numbers = itertools.count()
    server.answer = lambda query, headers: page([f"{next(numbers):09}" for _ in range(100)], str(next(numbers)))
    with pytest.raises(UserError, match="s3://photos/some holds more than 2,000 objects, which is no such directory; correct the address"):
        store.listing(PLACE, most=2000)
    assert server.asked == 21
    server.answer = lambda query, headers: page([], str(next(numbers)))
    with pytest.raises(UserError, match="does not end"):
        store.listing(PLACE)


def test_a_listing_of_several_pages_is_read(server: Server, store: Store) -> None:
    pages = {"": page(["b", "c/"], "1"), "1": page([], "2"), "2": page(["a"], None)}
    server.answer = lambda query, headers: pages[query.get("continuation-token", [""])[0]]
    assert [found.name for found in store.listing(PLACE)] == ["a", "b"]


def refused(call: Callable[[], object]) -> str:
    """The sentence of an answer that came: now and then this machine resets a connection to the server, and every try of it."""
    for _ in range(8):
        with pytest.raises(UserError) as error:
            call()
        if "a connection that was reset" not in str(error.value):
            break
    return str(error.value)


def test_an_answer_without_its_parts_is_one_sentence(server: Server, store: Store) -> None:
    server.answer = lambda query, headers: (200, {}, b"<ListBucketResult><IsTruncated>true</IsTruncated></ListBucketResult>")
    said = refused(lambda: store.listing(PLACE))
    assert "s3://photos/some failed 2 times, the last time with an answer without 'NextContinuationToken'" in said
    server.answer = lambda query, headers: (200, {}, b"")
    assert "an answer without 'ETag'" in refused(lambda: store.look(PLACE))


# ── Bodies ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_small_object_that_is_large_is_not_read(server: Server, store: Store) -> None:
    server.answer = lambda query, headers: (200, {"Content-Length": str(40 << 30), "ETag": '"x"'}, b"")
    with pytest.raises(TooLarge, match=r"s3://photos/some has 42,949,672,960 bytes or more, expected 268,435,456 at most"):
        store.read(PLACE)
    assert server.asked == 1


def test_a_body_may_be_no_longer_than_its_head_says(server: Server, store: Store, tmp_path: Path) -> None:
    endless = b"ffff\r\n" + b"a" * 0xFFFF + b"\r\n"
    chunked = {"Transfer-Encoding": "chunked", "ETag": '"x"'}
    server.answer = lambda query, headers: (200, chunked | {"Content-Length": "100"}, endless * 64)
    with pytest.raises(UserError, match="has 1,001 bytes or more, expected 1,000 at most"):
        store.read(PLACE, most=1000)

    def ranged(query: dict[str, list[str]], headers: Any) -> tuple[int, dict[str, str], bytes]:
        if asked := headers.get("Range"):
            begin, end = map(int, asked.removeprefix("bytes=").split("-"))
            said = {"Content-Range": f"bytes {begin}-{end}/3000", "Content-Length": "4194304", "ETag": '"x"'}
            return 206, said, bytes([begin // 1024 + 1]) * (4 << 20)
        return 200, {"Content-Length": "3000", "ETag": '"x"'}, b"" if headers.get("Range") else b"x" * 3000

    server.answer = ranged
    store.download(PLACE, tmp_path / "one")
    content = (tmp_path / "one").read_bytes()
    assert content == b"\1" * 1024 + b"\2" * 1024 + b"\3" * 952


def test_room_is_asked_for_before_it_is_taken(server: Server, store: Store, tmp_path: Path) -> None:
    server.answer = lambda query, headers: (200, {"Content-Length": str(1 << 60), "ETag": '"x"'}, b"")
    with pytest.raises(UserError, match=r"no space left on the disk of .*1,099,511,627,776 MiB needed for s3://photos/some"):
        store.download(PLACE, tmp_path / "one")
    with pytest.raises(Damaged, match="has 1,152,921,504,606,846,976 bytes, expected 3,000; upload it again"):
        store.download(PLACE, tmp_path / "one", 3000)
    assert not list(tmp_path.iterdir())
