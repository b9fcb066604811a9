"""A run's directory, on disk or at s3://bucket/prefix: its files, its checkpoints, and who may write them."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from pipelines.terminal import say
from simclr import fields, files
from simclr.data.s3.uri import address, copy_of, locked
from simclr.errors import UserError

if TYPE_CHECKING:
    from simclr.data.s3.lease import Register

# The files of a run directory or a published encoder, without checkpoints. run.json comes first: it says which run the others are of.
_PUBLISHED = ("encoder.safetensors", "head.safetensors", "towers.safetensors", "classifier.safetensors", "README.md", "config.json")
_FILES = (
    *("run.json", "metrics.jsonl", "state.json", "timings.json", "labels.txt", "subset.txt"),
    *(f"{folder}/{name}" for folder in ("encoder", "teacher") for name in _PUBLISHED),
    *("evaluation.json", "evaluation-limited.json", "pictures.npz", "report.html", *_PUBLISHED),
)
_NOTES = ".s3.json"
HEADS = "heads"
_MOST_HEADER_BYTES = 100_000_000  # by the format's own rule
LEASE = "lease.json"
"""Beside run.json in S3: who trains the run."""


@dataclass(frozen=True, slots=True)
class Ticket:
    """What whoever writes for a driver knows of its lease (see `pipelines.runs.lease`). Ray pickles it."""

    owner: str
    token: int


class Home:
    """A run's directory. At s3://… it is this machine's copy, and the methods here keep both the same; on disk they do nothing.

    S3 is the truth; the copy serves while S3 is unreachable. `.s3.json` lists the files other than checkpoints as they were when both
    were the same: a file that has changed in S3 since is fetched, one that has changed here is sent. A checkpoint never changes, and
    its checkpoint.json is sent last, so a checkpoint that has one is whole.
    """

    def __init__(self, place: str | Path, ticket: Ticket | None = None) -> None:
        """`ticket` is that of the driver that this process works for; without one it reads the run, but for scores and its page."""
        self.at = address(place)
        self.path = Path(place)
        self.ticket = ticket
        self.says: Callable[[str], None] = say  # of a worker's damaged checkpoints, which a driver has not read, people must hear
        self.check: Callable[[], None] = lambda: None  # raises Lost once this process knows that another has the lease
        self.sender: ThreadPoolExecutor | None = None
        self.sending: Future[None] | None = None
        if self.at is not None:
            from simclr.data.s3.store import Store

            self.path, self.store = copy_of(self.at, "runs"), Store()
            self.store.says = say
            self.sender = ThreadPoolExecutor(1, thread_name_prefix="to S3")

    def require(self) -> None:
        """Raise Lost if another driver has taken the run over: then nothing may be written there."""
        if self.at is not None and self.ticket is not None:
            from simclr.data.s3 import lease

            self.check()
            lease.require(self.register(), self.ticket.owner, str(self.at))

    def register(self) -> Register:
        """The object of the lease of a run in S3."""
        from simclr.data.s3.lease import Register

        assert self.at is not None
        return Register(self.store, self.at / LEASE)

    def is_lost(self) -> bool:
        """Whether another driver has taken the run over."""
        from simclr.data.s3.lease import Lost

        try:
            self.require()
        except Lost:
            return True
        except UserError:  # S3 does not say
            pass
        return False

    def is_begun(self) -> bool:
        """Whether S3 has a run here, as far as this copy knows."""
        return "run.json" in self._notes()

    def highest_token(self) -> int:
        """The highest fencing token among the checkpoints in S3, which a new writer's must exceed: the lease that had it may be gone."""
        from simclr import checkpoint

        return max((checkpoint.order(name)[0] for name in self._whole()), default=0)

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
            # Stamps from before the sending: lines that are appended meanwhile go with the next send.
            stamps = {name: _stamp(self.path / name) for name in _FILES if (self.path / name).is_file()}
            changed = {name: stamp for name, stamp in stamps.items() if notes.get(name, [])[1:] != stamp}
            if changed:
                self.require()
            for name, stamp in changed.items():
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
        there = self.fetch_newest()
        if not there and not (self.path / "checkpoints").is_dir():
            return
        from simclr import checkpoint

        newest = checkpoint.latest(self.path / "checkpoints", self.says)
        if newest is not None and newest.name not in there:  # written while S3 was unreachable
            self.send_checkpoint(newest, len(there) + 1)

    def fetch_newest(self) -> list[str]:
        """Bring the newest whole checkpoint in S3 here. Returns the names of all of them there, oldest first."""
        there = self._whole() if self.at is not None else []
        self._first_whole(there, self.checkpoint)
        return there

    def look_at_newest(self) -> None:
        """Bring the `heads` of the newest whole checkpoint in S3 here, for a process that needs no weights yet: step, reports, names and
        shapes. A checkpoint that was written here while S3 was unreachable is sent."""
        if self.at is None:
            return
        from simclr import checkpoint

        there = self._whole()
        here = [path.name for path in checkpoint.list_checkpoints(self.path / "checkpoints")]
        if here and max(map(checkpoint.order, here)) > max(map(checkpoint.order, there), default=(0, -1)):
            self.sync_checkpoints()
        else:
            self._first_whole(there, self._head)

    def _first_whole(self, names: list[str], fetch: Callable[[str], object]) -> None:
        from simclr.data.s3.answers import Damaged

        for name in reversed(names):
            try:
                fetch(name)
                break
            except Damaged as error:
                self.says(f"{error}; trying the checkpoint before it")

    def newest(self) -> str:
        """Name of the newest whole checkpoint, here or in S3; "" if there is none."""
        from simclr import checkpoint

        self.sync_checkpoints()
        newest = checkpoint.latest(self.path / "checkpoints", self.says)
        return newest.name if newest is not None else ""

    def checkpoint(self, name: str) -> Path:
        """The directory of a checkpoint that `newest` has found, here or in another process of the training; fetched if this machine does
        not have it. Of a node's processes one fetches it, or compares what is there with its checksum, and the others take its word."""
        from simclr import checkpoint

        path = self.path / "checkpoints" / name
        if self.at is None:
            with contextlib.suppress(OSError, UserError):  # the one that reads it says what is wrong
                checkpoint.vouch(path)
            return path
        with locked(self.path):
            there = self.at / "checkpoints" / name
            about = self.store.read(there / "checkpoint.json")
            if (path / "checkpoint.json").is_file() and (path / "checkpoint.json").read_bytes() == about and self._is_compared(path):
                return path
            say(f"fetching checkpoint {name} from {self.at}")
            scratch = path.with_name(f".fetching-{name}")  # always the same name, so that an interrupted fetch goes on
            scratch.mkdir(parents=True, exist_ok=True)
            self.store.download(there / "state.safetensors", scratch / "state.safetensors", sha256=_sha256(about, there))
            (scratch / "checkpoint.json").write_bytes(about)
            shutil.rmtree(path, ignore_errors=True)
            scratch.rename(path)
            checkpoint.vouch(path)  # it was compared as it came
            self._note_compared(path)
        return path

    def _is_compared(self, path: Path) -> bool:
        """Whether this copy of a checkpoint matches its checksum. It is compared once for a driver, and a note says so to others."""
        from simclr import checkpoint

        note = path.with_name(f".compared-{path.name}")
        mine = [self.ticket.owner if self.ticket is not None else "", *_stamp(path / "state.safetensors")]
        with contextlib.suppress(OSError, UserError):
            if mine[0] and files.read_json(note, "").get("by") == mine:
                checkpoint.vouch(path)
                return True
        try:
            checkpoint.about(path)
        except checkpoint.Damaged as error:
            self.says(f"{error}; fetching it again")
            return False
        self._note_compared(path)
        return True

    def _note_compared(self, path: Path) -> None:
        for old in path.parent.glob(".compared-*"):
            old.unlink(missing_ok=True)
        if self.ticket is not None:
            stamp = [self.ticket.owner, *_stamp(path / "state.safetensors")]
            files.write_text(path.with_name(f".compared-{path.name}"), json.dumps({"by": stamp}))

    def _head(self, name: str) -> None:
        """Bring the head of a checkpoint in S3: its checkpoint.json, and of its tensors' file the header, with a hole for what follows."""
        assert self.at is not None
        from simclr import checkpoint
        from simclr.data.s3.answers import Damaged

        folder, there = self.path / HEADS, self.at / "checkpoints" / name
        with locked(self.path):
            about = self.store.read(there / "checkpoint.json")
            if (self.path / "checkpoints" / name / "checkpoint.json").is_file():
                if (self.path / "checkpoints" / name / "checkpoint.json").read_bytes() == about:
                    return
                shutil.rmtree(self.path / "checkpoints" / name)  # another one of this step
            shutil.rmtree(folder, ignore_errors=True)
            (folder / name).mkdir(parents=True)
            (folder / name / "checkpoint.json").write_bytes(about)
            found = self.store.look(there / "state.safetensors")
            with (folder / name / "state.safetensors").open("x+b") as file:
                length = min(found.bytes, 8)
                self.store.fetch_part(there / "state.safetensors", found.etag, 0, length, file.fileno(), lambda done: None)
                end = length + min(int.from_bytes(file.read(8), "little"), _MOST_HEADER_BYTES, found.bytes - length)
                self.store.fetch_part(there / "state.safetensors", found.etag, length, end, file.fileno(), lambda done: None)
                file.truncate(found.bytes)
            try:
                checkpoint.head(folder / name)
            except checkpoint.Damaged as error:
                shutil.rmtree(folder)
                raise Damaged(str(error)) from None

    def send_checkpoint(self, path: Path, keep: int) -> None:
        """Send a checkpoint, then remove from S3 all but the `keep` newest and the best, and the parts of incomplete sends. Raises Lost,
        with nothing done, if another driver has taken the run over."""
        if self.at is None:
            return
        from simclr import checkpoint

        self.require()
        there, text = self.at / "checkpoints" / path.name, (path / "checkpoint.json").read_bytes()
        if path.name in self._whole() and self.store.read(there / "checkpoint.json") != text:
            self.store.delete(there / "checkpoint.json")  # left by an earlier send of this step
        self.store.upload(path / "state.safetensors", there / "state.safetensors", _sha256(text, path))
        self.require()  # sending gigabytes takes minutes
        self.store.upload(path / "checkpoint.json", there / "checkpoint.json")
        abouts = {name: self.store.read(self.at / "checkpoints" / name / "checkpoint.json") for name in self._whole()}
        kept = checkpoint.worth_keeping({name: _score(text) for name, text in abouts.items()}, keep)
        self.require()
        for found in self.store.listing(self.at / "checkpoints"):  # checkpoint.json sorts first, so it goes first
            if PurePosixPath(found.name).parts[0] not in kept:
                self.store.delete(self.at / "checkpoints" / found.name)

    def _whole(self) -> list[str]:
        """Names of the checkpoints in S3 that have their checkpoint.json, oldest first."""
        from simclr import checkpoint

        assert self.at is not None
        parts = [PurePosixPath(found.name).parts for found in self.store.listing(self.at / "checkpoints")]
        whole = (p[0] for p in parts if len(p) == 2 and p[0].startswith("step-") and p[1] == "checkpoint.json")
        return sorted(whole, key=checkpoint.order)

    # ── Meanwhile ──────────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def token(self) -> int:
        """The fencing token of the checkpoints that are written for this driver; 0 on disk."""
        return self.ticket.token if self.ticket is not None else 0

    def later(self, work: Callable[[], None]) -> None:
        """Send in the background by calling `work`. Only one send runs at a time; this waits for the previous one."""
        if self.sender is not None:
            self.wait()
            self.sending = self.sender.submit(work)

    def busy(self) -> bool:
        """Whether a send is running."""
        return self.sending is not None and not self.sending.done()

    def wait(self) -> None:
        """Wait for the running send. If it failed, training goes on, and the next send covers it; Lost is raised."""
        if self.sending is not None:
            from simclr.data.s3.lease import Lost

            sending, self.sending = self.sending, None
            try:
                sending.result()
            except Lost:
                raise
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
