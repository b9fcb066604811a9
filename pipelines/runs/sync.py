"""The directories of a command, on disk or at s3://bucket/prefix. Work is done on disk, for S3 in this machine's copy.

Every flag that takes a directory of shards or a run takes an address too. A flag of type Path folds the slashes of s3:// into one;
`simclr.data.s3.uri.address` reads it all the same.
"""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import socket
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from pipelines.terminal import Bar, say
from simclr import fields, files
from simclr.data.manifest import Manifest, read_manifest
from simclr.data.s3 import pins
from simclr.data.s3.uri import Address, Corrupt, Refetched, Unreachable, address, copy_of, locked
from simclr.errors import UserError

T = TypeVar("T")
# The files of a run directory or a published encoder, without checkpoints. run.json comes first: it says which run the others are of.
_PUBLISHED = ("encoder.safetensors", "head.safetensors", "classifier.safetensors", "README.md", "config.json")
_FILES = (
    *("run.json", "metrics.jsonl", "timings.json", "labels.txt", "subset.txt"),
    *(f"{folder}/{name}" for folder in ("encoder", "teacher") for name in _PUBLISHED),
    *("evaluation.json", "pictures.npz", "report.html", *_PUBLISHED),
)
_NOTES = ".s3.json"
_PATIENCE_S, _AGAIN_S, _TOLD_S = 1800.0, 20.0, 60.0


def shown(place: str | Path) -> str:
    """`place` as its user wrote it."""
    return str(address(place) or place)


def shards(place: str | Path, groups: int = 1, group: int = 0, by: str = "", tell: Callable[[str], None] = say) -> Path:
    """The directory of shards at `place`; for s3://… this machine's copy, after fetching what is missing. With several `groups` only
    the training shards of `group` are fetched. Until this process ends the copy is not evicted from the cache; `by`, by default this
    command, is who needs it, for the message to others. `tell` gets sentences: what is evicted for it, what is hashed first.

    Raises UserError if there are no shards, S3 does not give them, or there is no room for them.
    """
    at = address(place)
    if at is None:
        pins.hold(Path(place).absolute(), place, by or _command())
        return Path(place)
    from simclr.data.s3 import remote
    from simclr.data.s3.store import Store

    copy = copy_of(at, "shards")
    pins.hold(copy, at, by or _command())
    with Bar("download", None, "MiB", "MiB/s") as bar:
        remote.fetch(at, copy, mebibytes(bar) if tell is say else _minutely(at, tell), Store(), groups, group, tell)
    return copy


def manifest(place: str | Path, look: bool = True, by: str = "") -> tuple[Path, Manifest]:
    """The directory of shards at `place` and their manifest, for a process that reads no shard: of s3://… this machine gets the manifest
    alone, which is kept as `shards` keeps a copy. On disk there is a `look` at the size of each shard. Raises UserError if there are no
    shards."""
    at = address(place)
    if at is None:
        return Path(place), read_manifest(Path(place), look)
    from simclr.data.s3 import remote
    from simclr.data.s3.store import Store

    copy = copy_of(at, "shards")
    pins.hold(copy, at, by or _command())
    return copy, remote.fetch_manifest(at, copy, Store())


def _command() -> str:
    """The command of this process, without its words, which may hold what is secret."""
    return f"simclr {sys.argv[1]}" if len(sys.argv) > 1 and sys.argv[1].isalpha() else "a process"


def _minutely(at: Address, tell: Callable[[str], None]) -> Callable[[int, int], None]:
    """progress(done, total) in bytes of what is fetched from `at`, told once a minute by a process that has no terminal."""
    told = -math.inf

    def progress(done: int, total: int) -> None:
        nonlocal told
        if done < total and time.monotonic() - told >= _TOLD_S:
            told = time.monotonic()
            tell(f"fetching {at}: {done >> 20:,} of {total >> 20:,} MiB are on {socket.gethostname()}")

    return progress


def retry_unreachable(work: Callable[[], T], tell: Callable[[str], None], within_s: float = _PATIENCE_S) -> T:
    """`work()`, retried while S3 cannot be reached; `tell` gets a sentence. Raises Unreachable after `within_s` seconds. Without this,
    workers would use up their retries in an outage of minutes."""
    began = time.monotonic()
    while True:
        try:
            return work()
        except Unreachable as error:
            if time.monotonic() - began > within_s:
                raise
            tell(f"waiting for S3, for {within_s / 60:.0f} minutes at most: {error}")
            time.sleep(_AGAIN_S)


def repaired(reports: Iterator[T], place: str | Path) -> Iterator[T]:
    """`reports` of a training on the shards at `place`. If a shard of s3://… is corrupt in this machine's copy, it is fetched again, and
    Refetched is raised in place of Corrupt: a retry may succeed. On disk, or if S3's shard is corrupt too, Corrupt is raised."""
    began, at = time.time(), address(place)
    try:
        yield from reports
    except Corrupt as error:
        if at is None:
            raise
        from simclr.data.s3 import remote
        from simclr.data.s3.store import Store

        if not remote.refetch(at, copy_of(at, "shards"), error.shard, began, Store()):
            raise
        raise Refetched(f"{error.shard} was corrupt on this machine and was fetched again from {at}") from None
    finally:
        if at is not None:
            pins.touch(copy_of(at, "shards"))  # weeks may have passed since it was fetched


def mebibytes(bar: Bar) -> Callable[[int, int], None]:
    """progress(done, total) in bytes, for a bar of MiB."""

    def progress(done: int, total: int) -> None:
        bar.resize(total >> 20)
        bar.update(done >> 20)

    return progress


@contextlib.contextmanager
def directory(place: Path) -> Iterator[Path]:
    """The run or encoder directory at `place`, to read and write in. For s3://… it is the copy, and changed files are sent at the end."""
    home = Home(place)
    home.fetch()
    if home.at is not None and not home.path.is_dir():
        raise UserError(f"there is neither a run nor a published encoder at {home.at}; correct the address")
    yield home.path
    home.send()


class Home:
    """A run's directory. At s3://… it is this machine's copy, and the methods here keep both the same; on disk they do nothing.

    S3 is the truth; the copy serves while S3 is unreachable. `.s3.json` lists the files other than checkpoints as they were when both
    were the same: a file that has changed in S3 since is fetched, one that has changed here is sent. A checkpoint never changes, and
    its checkpoint.json is sent last, so a checkpoint that has one is whole.
    """

    def __init__(self, place: str | Path) -> None:
        self.at = address(place)
        self.path = Path(place)
        self.sender: ThreadPoolExecutor | None = None
        self.sending: Future[None] | None = None
        if self.at is not None:
            from simclr.data.s3.store import Store

            self.path, self.store = copy_of(self.at, "runs"), Store()
            self.store.says = say
            self.sender = ThreadPoolExecutor(1, thread_name_prefix="to S3")

    # ── Files ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def fetch(self) -> None:
        """Bring the copy up to date, without checkpoints."""
        if self.at is None:
            return
        with locked(self.path):
            there = {found.name: found.etag for found in self.store.listing(self.at) if found.name in _FILES}
            notes = self._notes()
            if self._is_of_another_run(there.get("run.json"), notes) or not there:
                shutil.rmtree(self.path, ignore_errors=True)
                notes = {}
            for name in (name for name in _FILES if name in there):
                if (self.path / name).is_file() and notes.get(name, [""])[0] == there[name]:
                    continue
                (self.path / name).parent.mkdir(parents=True, exist_ok=True)
                self.store.download(self.at / name, self.path / name)
                notes[name] = [there[name], *_stamp(self.path / name)]
                files.write_text(self.path / _NOTES, json.dumps(notes))

    def belongs_to(self, created: float) -> None:
        """Drop this copy's checkpoints if they belong to another run than the one that began at `created`. An address may be used again,
        and a worker's node has no other way to know."""
        if self.at is None:
            return
        with locked(self.path):
            mark, run = self.path / ".created", self.path / "run.json"
            known = mark.read_text() if mark.is_file() else ""
            if run.is_file():
                known = str(_created(run.read_bytes(), run))
            if known != str(created):
                shutil.rmtree(self.path / "checkpoints", ignore_errors=True)
            self.path.mkdir(parents=True, exist_ok=True)
            files.write_text(mark, str(created))

    def send(self) -> None:
        """Send the changed files of the copy, without checkpoints."""
        if self.at is None:
            return
        with locked(self.path):
            notes = self._notes()
            for name in (name for name in _FILES if (self.path / name).is_file()):
                stamp = _stamp(self.path / name)  # before sending: lines that are appended meanwhile go with the next send
                if notes.get(name, [])[1:] == stamp:
                    continue
                notes[name] = [self.store.upload(self.path / name, self.at / name).etag, *stamp]
                files.write_text(self.path / _NOTES, json.dumps(notes))

    def _notes(self) -> dict[str, list[Any]]:
        path = self.path / _NOTES
        notes: dict[str, list[Any]] = files.read_json(path, f"remove {path}") if path.is_file() else {}
        fields.require(notes, dict.fromkeys(notes, list[Any]), path, f"remove {path}")
        return notes

    def _is_of_another_run(self, etag: str | None, notes: dict[str, list[Any]]) -> bool:
        """Whether S3 now has another run at this address than the copy."""
        mine = self.path / "run.json"
        if self.at is None or etag is None or not mine.is_file() or notes.get("run.json", [""])[0] == etag:
            return False
        theirs = self.at / "run.json"
        return _created(self.store.read(theirs), theirs) != _created(mine.read_bytes(), mine)

    # ── Checkpoints ────────────────────────────────────────────────────────────────────────────────────────────────

    def sync_checkpoints(self) -> None:
        """Bring the newest whole checkpoint to both sides. If one is damaged in S3, that is said, and the previous one is taken."""
        if self.at is None:
            return
        there = self._whole()
        if not there and not (self.path / "checkpoints").is_dir():
            return
        from simclr import checkpoint
        from simclr.data.s3.answers import Damaged

        for name in reversed(there):
            try:
                self.checkpoint(name)
                break
            except Damaged as error:
                say(f"{error}; trying the checkpoint before it")
        newest = checkpoint.latest(self.path / "checkpoints", say)
        if newest is not None and newest.name not in there:  # written while S3 was unreachable
            self.send_checkpoint(newest, len(there) + 1)

    def newest(self) -> str:
        """Name of the newest whole checkpoint, here or in S3; "" if there is none."""
        from simclr import checkpoint

        self.sync_checkpoints()
        newest = checkpoint.latest(self.path / "checkpoints", say)
        return newest.name if newest is not None else ""

    def checkpoint(self, name: str) -> Path:
        """The checkpoint's directory, fetched if this machine does not have it."""
        path = self.path / "checkpoints" / name
        if self.at is None:
            return path
        with locked(self.path):
            there = self.at / "checkpoints" / name
            about = self.store.read(there / "checkpoint.json")
            if (path / "checkpoint.json").is_file() and (path / "checkpoint.json").read_bytes() == about:
                return path
            say(f"fetching checkpoint {name} from {self.at}")
            scratch = path.with_name(f".fetching-{name}")  # always the same name, so that an interrupted fetch goes on
            scratch.mkdir(parents=True, exist_ok=True)
            self.store.download(there / "state.safetensors", scratch / "state.safetensors", sha256=_sha256(about, there))
            (scratch / "checkpoint.json").write_bytes(about)
            shutil.rmtree(path, ignore_errors=True)
            scratch.rename(path)
        return path

    def send_checkpoint(self, path: Path, keep: int) -> None:
        """Send a checkpoint, then remove from S3 all but the `keep` newest and the best, and the parts of incomplete sends."""
        if self.at is None:
            return
        from simclr import checkpoint

        there, text = self.at / "checkpoints" / path.name, (path / "checkpoint.json").read_bytes()
        if path.name in self._whole() and self.store.read(there / "checkpoint.json") != text:
            self.store.delete(there / "checkpoint.json")  # left by an earlier send of this step
        self.store.upload(path / "state.safetensors", there / "state.safetensors", _sha256(text, path))
        self.store.upload(path / "checkpoint.json", there / "checkpoint.json")
        abouts = {name: self.store.read(self.at / "checkpoints" / name / "checkpoint.json") for name in self._whole()}
        kept = checkpoint.worth_keeping({name: _score(text) for name, text in abouts.items()}, keep)
        for found in self.store.listing(self.at / "checkpoints"):  # checkpoint.json sorts first, so it goes first
            if PurePosixPath(found.name).parts[0] not in kept:
                self.store.delete(self.at / "checkpoints" / found.name)

    def _whole(self) -> list[str]:
        """Names of the checkpoints in S3 that have their checkpoint.json, oldest first."""
        assert self.at is not None
        parts = [PurePosixPath(found.name).parts for found in self.store.listing(self.at / "checkpoints")]
        return sorted(p[0] for p in parts if len(p) == 2 and p[0].startswith("step-") and p[1] == "checkpoint.json")

    # ── Meanwhile ──────────────────────────────────────────────────────────────────────────────────────────────────

    def later(self, work: Callable[[], None]) -> None:
        """Send in the background by calling `work`. Only one send runs at a time; this waits for the previous one."""
        if self.sender is not None:
            self.wait()
            self.sending = self.sender.submit(work)

    def busy(self) -> bool:
        """Whether a send is running."""
        return self.sending is not None and not self.sending.done()

    def wait(self) -> None:
        """Wait for the running send. If it failed, training goes on, and the next send covers it."""
        if self.sending is not None:
            sending, self.sending = self.sending, None
            try:
                sending.result()
            except (UserError, OSError) as error:
                say(f"not sent: {error}")


def _created(run_json: bytes, where: object) -> float:
    """Unix time at which the run of this run.json began."""
    instead = "remove it, if it is this machine's copy, or bring it back from another"
    text = files.json_in(run_json, where, instead)
    fields.require(text, {"created": float}, where, instead)
    created: float = text["created"]
    return created


def _sha256(about: bytes, where: object) -> str:
    """sha256 of a checkpoint's weights, from its checkpoint.json `about`. Raises Damaged if it has none."""
    from simclr.data.s3.answers import Damaged

    instead = "remove this checkpoint"
    try:
        text = files.json_in(about, f"checkpoint.json of {where}", instead)
        fields.require(text, {"sha256": str}, f"checkpoint.json of {where}", instead)
    except UserError as error:
        raise Damaged(str(error)) from None
    return str(text["sha256"])


def _score(about: bytes) -> float | None:
    """A checkpoint's score, from its checkpoint.json `about`; None if it has none, or is not whole."""
    try:
        score = files.json_in(about, "checkpoint.json", "").get("score")
    except UserError:
        return None
    return score if fields.fits(score, float) else None


def _stamp(path: Path) -> list[int]:
    """Numbers that change when the file does."""
    found = path.stat()
    return [found.st_size, found.st_mtime_ns]
