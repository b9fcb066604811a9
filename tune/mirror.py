"""A sweep at s3://bucket/prefix, so that no disk is shared: its small files, which its driver keeps the same here and there.

The drivers of all trials run on the sweep's own node (`ray_tune`), and write its records in this machine's copy, as on a disk. A thread
sends what has changed. Checkpoints and encoders go between S3 and the workers' nodes alone, at trials/NAME, which is a run's address as
`simclr pretrain --run` takes it. So whoever goes on with the sweep, on whatever machine, needs its address and nothing else.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from pipelines.terminal import bug, say
from simclr import fields, files
from simclr.data.s3.store import Store
from simclr.data.s3.uri import Address, address, copy_of, locked
from simclr.errors import UserError
from tune import sweep_dir

_OWN = (
    *("sweep.json", "space.json", "plan.json", "state.json", "reports.jsonl", "population.json"),
    *("results.csv", "best_config.json", "figures.csv", "report.html"),
)
_OF_TRIAL = ("trial.json", "run.json", "metrics.jsonl")
_HEAVY = ("checkpoints", "encoder")
_NOTES = ".s3.json"  # name → ETag in S3, and size and time here, when both were the same
_EVERY_S, _AT_ONCE = 15.0, 16  # between two sends; requests at a time
_FAILED_S, _INTERRUPTED_S = 60.0, 2.0  # for the last send of a sweep that failed, or was interrupted


class Mirror:
    """The sweep at the address `at`, and its copy `path`. S3 is the truth."""

    def __init__(self, at: Address) -> None:
        self.at, self.path, self.store = at, copy_of(at, "sweeps"), Store()
        self.store.says = say
        self.losers: set[str] = set()
        self.dropped: set[str] = set()
        self.wake, self.over = threading.Event(), threading.Event()
        self.trouble: Exception | None = None  # of the last send

    # ── Files ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def fetch(self) -> None:
        """Bring the copy up to date. A file that S3 has as this copy left it stays: a driver that was killed may not have sent the last of
        it. Raises UserError if something else than a sweep lies at the address."""
        with locked(self.path):
            there = {found.name: found.etag for found in self.store.listing(self.at)}
            if there and "sweep.json" not in there:
                raise UserError(f"{self.at} has files and is no sweep (it has no sweep.json); use another --out")
            notes = self._notes()
            if self._is_of_another_sweep(there.get("sweep.json"), notes):
                for path in (path for path in self.path.iterdir() if path.name != sweep_dir.LOCK):
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
                notes = {}
            missing = [n for n in there if _is_kept(n) and not ((self.path / n).is_file() and notes.get(n, [""])[0] == there[n])]
            with ThreadPoolExecutor(_AT_ONCE) as pool:
                list(pool.map(self._download, missing))
            notes |= {name: [there[name], *_stamp(self.path / name)] for name in missing}
            if there:
                self._note(notes)

    def _download(self, name: str) -> None:
        (self.path / name).parent.mkdir(parents=True, exist_ok=True)
        self.store.download(self.at / name, self.path / name)

    def send(self) -> None:
        """Send the files that have changed here."""
        with locked(self.path):
            notes = self._notes()
            before = dict(notes)
            # The time of a file is asked before it is sent: what is written meanwhile goes with the next send.
            stamps = {path.relative_to(self.path).as_posix(): _stamp(path) for path in self._files()}
            changed = sorted(name for name, stamp in stamps.items() if notes.get(name, [])[1:] != stamp)

            def sent(name: str) -> None:
                if etag := self._upload(name):
                    notes[name] = [etag, *stamps[name]]

            try:
                with ThreadPoolExecutor(_AT_ONCE) as pool:
                    list(pool.map(sent, changed))
            finally:  # also where one was not sent: what was would else count as changed there, and be fetched over newer files
                if notes != before:
                    self._note(notes)

    def _upload(self, name: str) -> str:
        """The ETag of what was sent; "" if the file is gone: a trial that begins again moves its directory."""
        with contextlib.suppress(FileNotFoundError):
            return self.store.upload(self.path / name, self.at / name).etag
        return ""

    def _files(self) -> Iterator[Path]:
        for pattern in (*_OWN, *(f"{room}/*/{name}" for room in ("trials", "first_tries") for name in _OF_TRIAL)):
            yield from (path for path in self.path.glob(pattern) if path.is_file() and _is_kept(path.relative_to(self.path).as_posix()))

    def _notes(self) -> dict[str, list[Any]]:
        path = self.path / _NOTES
        notes: dict[str, list[Any]] = files.read_json(path, f"remove {path}") if path.is_file() else {}
        fields.require(notes, dict.fromkeys(notes, list[Any]), path, f"remove {path}")
        return notes

    def _note(self, notes: dict[str, list[Any]]) -> None:
        files.write_text(self.path / _NOTES, json.dumps(notes))

    def _is_of_another_sweep(self, etag: str | None, notes: dict[str, list[Any]]) -> bool:
        """Whether this copy is not of the sweep that S3 now has at the address, or of one that is not there any more."""
        if not self.path.is_dir() or (etag is not None and notes.get("sweep.json", [""])[0] == etag):
            return False
        mine = self.path / "sweep.json"
        return (
            etag is None
            or not mine.is_file()
            or _created(self.store.read(self.at / "sweep.json"), mine) != _created(mine.read_bytes(), mine)
        )

    # ── While trials run ───────────────────────────────────────────────────────────────────────────────────────────

    @contextlib.contextmanager
    def kept(self) -> Iterator[None]:
        """Inside, a thread sends what changes; at the end it sends the rest. Raises UserError if that fails."""
        self.send()  # before any trial: who may not write there hears of it now
        thread = threading.Thread(target=self._work, name="sweep to S3", daemon=True)
        thread.start()
        within_s: float | None = _FAILED_S
        try:
            yield
            within_s = None
        except KeyboardInterrupt:
            within_s = _INTERRUPTED_S
            raise
        finally:
            self.over.set()
            self.wake.set()
            thread.join(within_s)
        if self.trouble is not None:
            raise self.trouble

    def ended(self, losers: list[str]) -> None:
        """Send a trial's end soon, and remove the checkpoints and encoders of `losers` from S3."""
        self.losers |= set(losers)
        self.wake.set()

    def _work(self) -> None:
        while True:
            last = self.over.is_set()  # asked before sending, so that nothing written before the end is missed
            if last:
                self.dropped.clear()  # a trial that was stopped may have sent a checkpoint since
            try:
                self.send()
                self._drop()
                self.trouble = None
            except Exception as error:  # no reason to end the trials; the next send covers it
                if not isinstance(error, UserError | OSError):
                    bug(error)
                elif str(error) != str(self.trouble):
                    say(f"not sent: {error}")
                self.trouble = error
            if last:
                return
            self.wake.wait(_EVERY_S)
            self.wake.clear()

    def _drop(self) -> None:
        for name in sorted(self.losers - self.dropped):
            for folder in _HEAVY:
                remove(self.at / "trials" / name / folder, self.store)
            self.dropped.add(name)


def remove(place: Address, store: Store) -> None:
    """Remove everything below `place`."""
    for found in store.listing(place):  # checkpoint.json sorts before the weights, so no checkpoint looks whole without them
        store.delete(place / found.name)


def opened(place: Path) -> tuple[Path, str]:
    """(directory, address) of the sweep at `place`: in S3 this machine's copy, brought up to date; on disk the place itself and ""."""
    at = address(place)
    if at is None:
        return place, ""
    mirror = Mirror(at)
    mirror.fetch()
    return mirror.path, str(at)


def sent(directory: Path, at: str) -> None:
    """Send what has changed in the `directory` of `opened`."""
    place = address(at) if at else None
    if place is not None:
        mirror = Mirror(place)
        assert mirror.path == directory
        mirror.send()


def _is_kept(name: str) -> bool:
    """Whether an object of this name is one of the small files. Names in a bucket are anybody's."""
    parts = name.split("/")
    if len(parts) == 1:
        return name in _OWN
    return len(parts) == 3 and parts[0] in ("trials", "first_tries") and sweep_dir.plain(parts[1]) and parts[2] in _OF_TRIAL


def _created(sweep_json: bytes, where: object) -> float:
    text = files.json_in(sweep_json, where, sweep_dir.INSTEAD)
    fields.require(text, {"created": float}, where, sweep_dir.INSTEAD)
    return float(text["created"])


def _stamp(path: Path) -> list[int]:
    """Numbers that change when the file does."""
    found = path.stat()
    return [found.st_size, found.st_mtime_ns]
