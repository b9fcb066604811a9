"""s3:// ⇄ disk: parallel, resumable, checksummed, atomic. With `access` the door to boto3.

One object at a time; directories of shards are in `remote`. A server answers 503, a connection is reset, a body ends early, a byte is
wrong: boto3 retries requests but not bodies, and reports neither its tries nor their errors. So its retries are off, and every request is
retried here with its body. Bytes are checked before a file gets its name, and a transfer resumes where it stopped, in this process or the
next.

Credentials, region and endpoint come from boto3's own chain: environment, profile, role; AWS_ENDPOINT_URL_S3 for MinIO and
others. Our messages contain boto3's codes and types, but none of its text, which may hold a signature.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import os
import random
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from botocore import exceptions as boto

from simclr import files, proxy
from simclr.data.s3 import answers
from simclr.data.s3.access import Access
from simclr.data.s3.answers import Changed, Damaged, Missing, Retry, TooLarge
from simclr.data.s3.listing import Object, Page, one_after_the_other, side_by_side
from simclr.data.s3.quota import make_room, warned
from simclr.data.s3.uri import Address, Unreachable
from simclr.errors import UserError
from simclr.telemetry.progress import moved

T = TypeVar("T")
Progress = Callable[[int], None]
"""Gets the bytes done since the last call; a negative number if bytes have to be fetched again. Called from several threads."""
_PAUSE_MOST_S = 20.0
_MOST_PARTS = 10_000  # of one upload, by S3's rules
_CHUNK = 1 << 18
_MOST_OBJECTS = 1_000_000
"""In a directory of ours: shards of a gibibyte, or checkpoints, never come near it."""


def body_of(answer: dict[str, Any], place: Address, most: int) -> bytes:
    """The body of a GET's answer, checked as `Store.read` says; to be called inside `Store.ask`, which asks again for a damaged one."""
    with contextlib.closing(answer["Body"]) as body:
        size: int = answer["ContentLength"]
        data: bytes = body.read(most + 1) if size <= most else b""  # the body may be longer than its head says
    if size > most or len(data) > most:
        raise TooLarge(f"{place} has {max(size, len(data)):,} bytes or more, expected {most:,} at most; correct the address")
    sha256, md5 = answer.get("Metadata", {}).get("sha256", ""), answers.md5_in(answer)
    if len(data) != size:
        raise Retry("a body that ended early")
    if (sha256 and hashlib.sha256(data).hexdigest() != sha256) or (md5 and answers.md5_of(data).hex() != md5):
        raise Retry("bytes that do not match their checksum")
    return data


class Store:
    """boto3's S3 client with our own retries. Several threads may use it at once.

    Every method raises UserError: Missing; at once if S3 refuses; after `attempts` tries, naming the object and the last error.
    """

    def __init__(
        self, *, attempts: int = 8, pause_s: float = 0.25, answer_s: float = 20.0, part_bytes: int = 16 << 20, threads: int = 8
    ) -> None:
        """`pause_s`: the first pause, doubled with each retry; `answer_s`: timeout of an answer; `part_bytes`: of a request; `threads`:
        parts at a time."""
        self.attempts, self.pause_s, self.part_bytes, self.threads = attempts, pause_s, part_bytes, threads
        self.says: Callable[[str], None] = warned  # gets a sentence where a download evicts datasets from the cache
        self.over = threading.Event()  # set it to end the transfers of other threads
        self.access = Access(answer_s, 4 * threads)
        self.pool = ThreadPoolExecutor(threads, thread_name_prefix="s3")

    @property
    def client(self) -> Any:
        """boto3's, with the credentials of now."""
        return self.access.client

    # ── Requests ───────────────────────────────────────────────────────────────────────────────────────────────────

    def listing(self, place: Address, most: int = _MOST_OBJECTS) -> list[Object]:
        """Every object below `place`/, sorted by name. Raises UserError for more than `most` of them."""
        return sorted(self.listed(place, most), key=lambda o: o.name)

    def listed(self, place: Address, most: int) -> Iterator[Object]:
        """Every object below `place`/, as S3 lists them. Markers of folders (names that end with a slash) are left out.

        Raises UserError for more than `most` objects, and for a listing that does not come to an end: a page again, or page after page
        with nothing in it.
        """
        for page in one_after_the_other(partial(self.page, place), place, most):
            yield from filter(_is_no_marker, page)

    def listed_side_by_side(self, place: Address, most: int) -> Iterator[Object]:
        """As `listed`, in no order, with many requests at once. Raises Disordered where the server cannot do it: list anew then."""
        for page in side_by_side(partial(self.page, place), place, most, self.pool, self.threads):
            yield from filter(_is_no_marker, page)

    def page(self, place: Address, below: str = "", *, after: str = "", behind: str = "", folders: bool = False) -> Page:
        """A page of the listing of `place`/`below`: the one that the token `after` stands for, or the first, of keys `behind` one.
        `folders`: what lies in folders is not listed, only they are."""
        prefix = f"{place.key}/" if place.key else ""
        asked = {"ContinuationToken": after} if after else {"StartAfter": prefix + behind} if behind else {}
        asked |= {"Delimiter": "/"} if folders else {}

        def once() -> Page:
            page = self.client.list_objects_v2(Bucket=place.bucket, Prefix=prefix + below, **asked)
            objects = [Object(o["Key"].removeprefix(prefix), o["Size"], o["ETag"]) for o in page.get("Contents", ())]
            within = [found["Prefix"].removeprefix(prefix) for found in page.get("CommonPrefixes", ())]
            return Page(objects, within, page["NextContinuationToken"] if page.get("IsTruncated") else "")

        return self._tried(place, once)

    def look(self, place: Address) -> Object:
        """Size, ETag and sha256 of the object at `place`, without its bytes."""

        def once() -> Object:
            try:
                answer = self.client.head_object(Bucket=place.bucket, Key=place.key)
            except boto.ClientError as error:
                raise self.access.worded(place, error) from None
            return Object(place.name, answer["ContentLength"], answer["ETag"], answer.get("Metadata", {}).get("sha256", ""))

        return self._tried(place, once)

    def require_size(self, place: Address, size: int) -> None:
        """Raise Damaged if the object at `place` does not have this size."""
        if (found := self.look(place)).bytes != size:
            raise Damaged(f"{place} has {found.bytes:,} bytes, expected {size:,}; upload it again")

    def held(self, place: Address, size: int, sha256: str) -> Object | None:
        """The object at `place`, if it has these bytes and we uploaded it."""
        try:
            found = self.look(place)
        except Missing:
            return None
        return found if (found.bytes, found.sha256) == (size, sha256) else None

    def delete(self, place: Address) -> None:
        """Remove the object at `place`, if there is one."""
        with contextlib.suppress(Missing):
            self._tried(place, lambda: self.client.delete_object(Bucket=place.bucket, Key=place.key))

    def ask(self, place: Address, request: Callable[[Any], T]) -> T:
        """The result of `request`, which gets boto3's client, tried as every request here."""
        return self._tried(place, lambda: request(self.client))

    # ── Fetching ───────────────────────────────────────────────────────────────────────────────────────────────────

    def read(self, place: Address, most: int = files.MOST_JSON_BYTES) -> bytes:
        """A small object's bytes, checked against the sha256 that we uploaded with it, or the MD5 that S3 has of most objects. Raises
        TooLarge for more than `most` bytes."""

        def once() -> bytes:
            answer = self.client.get_object(Bucket=place.bucket, Key=place.key)
            return body_of(answer, place, most)

        return self._tried(place, once)

    def download(self, place: Address, path: Path, size: int | None = None, sha256: str = "", progress: Progress = lambda n: None) -> None:
        """Fetch the object to `path`, in parts, several at a time; a file under that name is whole and checked.

        `sha256` defaults to the one that it was uploaded with. Parts are collected in a file beside `path`, and a later call resumes with
        them if the object is unchanged. Raises Damaged if the object has another size, or wrong bytes in every try.
        """
        partial, log = path.with_name(f".{path.name}.partial"), path.with_name(f".{path.name}.parts")
        reason, counted = "", [0]

        def count(amount: int) -> None:
            counted.append(amount)
            progress(amount)

        for attempt in range(self.attempts):
            self._pause(attempt)
            progress(-sum(counted))
            counted.clear()
            found = self.look(place)
            if size is not None and found.bytes != size:
                raise Damaged(f"{place} has {found.bytes:,} bytes, expected {size:,}; upload it again")
            if size is None:  # else the caller has asked for room, and S3 alone states the size
                make_room(path, found.bytes - begun(path), f"for {place}", self.says)
            try:
                self._fetch_parts(place, found, partial, log, count)
            except Changed as error:
                reason = str(error)
                continue
            expected = sha256 or found.sha256
            with open(partial, "rb", opener=files.plain) as file:
                right = not expected or answers.sha256_of(file) == expected
            log.unlink(missing_ok=True)
            if right:
                partial.replace(path)
                return
            partial.unlink()
            reason = "bytes that do not match their sha256"
        raise Damaged(f"{place} failed {self.attempts} times, the last time with {reason}; upload it again")

    def _fetch_parts(self, place: Address, found: Object, partial: Path, log: Path, progress: Progress) -> None:
        """Fill `partial` with the parts that `log` does not list. Raises Changed."""
        head = json.dumps([found.etag, found.bytes, self.part_bytes])
        done = _done(partial, log, head)
        if not done:
            partial.unlink(missing_ok=True)
            with open(log, "w", opener=files.plain) as listed:
                listed.write(f"{head}\n")
        parts = [(begin, min(begin + self.part_bytes, found.bytes)) for begin in range(0, found.bytes, self.part_bytes)]
        progress(sum(end - begin for i, (begin, end) in enumerate(parts) if i in done))
        lock = threading.Lock()
        with open(partial, "r+b" if done else "x+b", opener=files.private) as file, open(log, "a", opener=files.plain) as listed:
            file.truncate(found.bytes)

            def fetch(index: int) -> None:
                self.fetch_part(place, found.etag, *parts[index], file.fileno(), progress)
                with lock:
                    listed.write(f"{index}\n")
                    listed.flush()

            self._all([self.pool.submit(fetch, i) for i in range(len(parts)) if i not in done])
            os.fsync(file.fileno())

    def fetch_part(self, place: Address, etag: str, begin: int, end: int, file: int, progress: Progress) -> None:
        """Bytes begin … end − 1 of the object into `file`; a retry continues after the last byte that came."""

        def once() -> None:
            nonlocal begin
            answer = self.client.get_object(Bucket=place.bucket, Key=place.key, Range=f"bytes={begin}-{end - 1}", IfMatch=etag)
            with contextlib.closing(answer["Body"]) as body:
                if not answer.get("ContentRange", "").startswith(f"bytes {begin}-{end - 1}/"):
                    raise Retry("another range of bytes than asked for")
                while begin < end and (chunk := body.read(min(_CHUNK, end - begin))):
                    self._check_over()
                    os.pwrite(file, chunk, begin)
                    begin += len(chunk)
                    moved()
                    progress(len(chunk))
            if begin < end:
                raise Retry("a body that ended early")

        self._tried(place, once)

    # ── Sending ────────────────────────────────────────────────────────────────────────────────────────────────────

    def upload(self, path: Path, place: Address, sha256: str = "", progress: Progress = lambda n: None) -> Object:
        """Send the file as it is now with its sha256, in parts if it is large, unless S3 has the same bytes already.

        Raises Damaged if `sha256` is given and the file has another. S3 shows an object only when all of it is there. A failed upload
        removes its parts; the bucket's lifecycle rule removes those of a killed process.
        """
        with path.open("rb") as file:
            size, hashed = os.fstat(file.fileno()).st_size, hashlib.sha256()
            for at in range(0, size, _CHUNK):  # not to the end of the file: another process may be appending
                hashed.update(os.pread(file.fileno(), min(_CHUNK, size - at), at))
                moved()
            digest = hashed.hexdigest()
            if sha256 and digest != sha256:
                raise Damaged(f"{path} does not match its sha256; make it again")
            if found := self.held(place, size, digest):
                progress(size)
                return found
            about = {"Bucket": place.bucket, "Key": place.key}
            if size <= self.part_bytes:
                data = os.pread(file.fileno(), size, 0)
                self._send(place, data, lambda **body: self.client.put_object(**about, **body, Metadata={"sha256": digest}))
                progress(size)
            else:
                self._send_parts(place, about, file.fileno(), size, digest, progress)
        if sent := self.held(place, size, digest):
            return sent
        raise Damaged(f"{place} is not what was uploaded; something else writes there: use another prefix")

    def _send(self, place: Address, data: bytes, request: Callable[..., Any]) -> str:
        """Send one body with its MD5, which the server checks, and check the server's answer. Returns the ETag."""
        md5 = answers.md5_of(data)

        def once() -> str:
            self._check_over()
            answer = request(Body=data, ContentMD5=base64.b64encode(md5).decode())
            if answers.md5_in(answer) not in ("", md5.hex()):
                raise Retry("a checksum of other bytes than were sent")
            return str(answer["ETag"])

        return self._tried(place, once)

    def _send_parts(self, place: Address, about: dict[str, str], file: int, size: int, digest: str, progress: Progress) -> None:
        started = self._tried(place, lambda: self.client.create_multipart_upload(**about, Metadata={"sha256": digest}))
        about = about | {"UploadId": started["UploadId"]}
        each = max(self.part_bytes, -(-size // _MOST_PARTS))

        def send(number: int) -> dict[str, Any]:
            data = os.pread(file, min(each, size - (number - 1) * each), (number - 1) * each)
            etag = self._send(place, data, lambda **body: self.client.upload_part(**about, **body, PartNumber=number))
            progress(len(data))
            return {"PartNumber": number, "ETag": etag}

        def complete() -> None:
            try:
                self.client.complete_multipart_upload(**about, MultipartUpload={"Parts": parts})
            except boto.ClientError as error:
                # The try before this one succeeded, and its answer was lost.
                if error.response.get("Error", {}).get("Code") != "NoSuchUpload" or not self.held(place, size, digest):
                    raise

        try:
            parts = self._all([self.pool.submit(send, number) for number in range(1, -(-size // each) + 1)])
            self._tried(place, complete)
        except BaseException:
            with contextlib.suppress(UserError):  # the first error is the one to report
                self._tried(place, lambda: self.client.abort_multipart_upload(**about))
            raise

    # ── Retries ────────────────────────────────────────────────────────────────────────────────────────────────────

    def _tried(self, place: Address, request: Callable[[], T]) -> T:
        """The result of `request`, tried up to `attempts` times. Raises Changed if an If-Match does not hold."""
        reason = ""
        for attempt in range(self.attempts):
            self._pause(attempt)
            moved()
            try:
                return self.access.ask(request, place, self.says)
            except Changed:
                raise
            except Retry as error:
                reason = str(error)
            except boto.ClientError as error:
                reason = answers.reason_of(error, place, self.access.signs, self.access.works)
            except answers.CREDENTIALS as error:
                reason = answers.lacking(error, place, self.access.works)
            except KeyError as error:
                reason = f"an answer without {error}"
            except answers.TRANSPORT as error:
                reason = next(words for kind, words in answers.WORDS.items() if isinstance(error, kind))
                if isinstance(error, boto.EndpointConnectionError):
                    reason += f" to {urlsplit(self.client.meta.endpoint_url).hostname}"
            except boto.BotoCoreError as error:
                raise UserError(f"{place} cannot be asked for ({type(error).__name__}); check the address and the AWS settings") from None
        raise Unreachable(
            f"{place} failed {self.attempts} times, the last time with {reason}{self._by_proxy()}; {answers.cure_of(reason)}, "
            "then run the same command again: it goes on where it stopped"
        )

    def _by_proxy(self) -> str:
        return proxy.hint(self.client.meta.endpoint_url)

    def _all(self, futures: list[Future[T]]) -> list[T]:
        """The results of `futures`. If one fails, those that have not begun are cancelled, and running ones are waited for."""
        try:
            return [future.result() for future in futures]
        except BaseException as error:
            left = [future for future in futures if not future.cancel()]
            if isinstance(error, Exception):
                wait(left)
            else:  # Ctrl-C does not wait for answers
                self.over.set()
            raise

    def _pause(self, attempt: int) -> None:
        """Pause before a retry: twice as long each time, with jitter, so that clients do not retry all at once."""
        if attempt:
            self.over.wait(min(self.pause_s * 2 ** (attempt - 1), _PAUSE_MOST_S) * random.uniform(0.5, 1))
        self._check_over()

    def _check_over(self) -> None:
        if self.over.is_set():
            raise UserError("the transfer was ended")


def begun(path: Path) -> int:
    """Bytes on the disk of a download to `path` that was interrupted."""
    partial = path.with_name(f".{path.name}.partial")
    return partial.lstat().st_blocks * 512 if partial.exists() else 0


def _is_no_marker(found: Object) -> bool:
    """Whether an object is none of those that consoles make for folders: the listed one's own has no name in it."""
    return bool(found.name) and not found.name.endswith("/")


def _done(partial: Path, log: Path, head: str) -> set[int]:
    """The parts of the object of this `head` that `partial` holds, by its `log`. Files that others can have written count for nothing."""
    try:
        with open(log, opener=files.plain) as listed, open(partial, opener=files.plain) as file:
            if not all(files.is_own(os.fstat(opened.fileno()), log.parent) for opened in (listed, file)):
                return set()
            lines = listed.read().split("\n")[:-1]  # the last may be half a line
    except (OSError, UserError, UnicodeDecodeError):
        return set()
    return {int(line) for line in lines[1:] if line.isdecimal() and len(line) < 10} if lines[:1] == [head] else set()
