"""One writer below a prefix of S3: an object there says who writes, and is renewed while it does. That is a lease.

Who takes or renews it writes the object on the condition that nobody else has written it since (If-None-Match, If-Match), so of several
one succeeds. Clocks of machines are not compared. A writer counts as gone when its object has stayed the same for the lease's length: by
the clock of who waits, or by the store's, which dates the object and its own answer. A process of the same machine is looked up.

A store without conditional writes gets plain ones that are read back, which is said: of two writers that begin within a second both
may go on until the next renewal.
"""

from __future__ import annotations

import base64
import contextlib
import getpass
import hashlib
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from email.utils import parsedate_to_datetime
from typing import Any

from simclr import fields
from simclr.data.s3.answers import Changed, Missing, Unsupported, md5_of
from simclr.data.s3.store import Store, body_of
from simclr.data.s3.uri import Address
from simclr.errors import UserError
from simclr.processes import lives, this_process

LENGTH_S, EVERY_S = 60.0, 15.0
"""After how long without a sign a writer counts as gone, and how often it gives one."""
_LOOK_S, _AGAIN_S = 2.0, 5.0  # between two looks of who waits; before a renewal that failed is tried again
_RELEASE_S = 1.0  # that the end of a command waits for the release; without it the next writer waits for the lease's length
_MOST_BYTES, _MOST_S = 1 << 16, 3600.0


class Lost(UserError):
    """Somebody else has taken the lease: this process may not write there any more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Holder:
    """Who holds a lease, as the object says it."""

    owner: str = ""
    """Drawn by each process anew."""
    token: int = 0
    """The fencing token: it grows with each process that takes the lease, so what a former one writes late can be told."""
    who: str = "somebody"
    """user@host."""
    pid: int = 0
    process: str = ""
    """Tells the process on its machine: boot, pid namespace, pid, its start."""
    held_s: float = 0.0
    """For how long, at the last renewal, by the holder's clock."""
    length_s: float = LENGTH_S
    renewals: int = 0
    released: bool = False

    @classmethod
    def of(cls, data: bytes) -> Holder:
        """The holder in an object; what another version or hand has written is somebody's."""
        try:
            found = {k: v for k, v in json.loads(data).items() if k in cls.__dataclass_fields__}
            known = {f.name: type(f.default) for f in cls.__dataclass_fields__.values()}
            fields.require(found, {name: known[name] for name in found}, "", "")
            holder = cls(**found)
        except (ValueError, TypeError, AttributeError, RecursionError, UserError):
            return cls()
        return replace(holder, length_s=min(max(holder.length_s, 0.0), _MOST_S))

    def described(self, silent_s: float) -> str:
        """Host, process and age, for people."""
        return f"{self.who} (process {self.pid}, for {_ago(self.held_s + silent_s)}, last seen {silent_s:.0f} s ago)"


@dataclass(frozen=True, slots=True)
class Entry:
    """The object as it was read."""

    holder: Holder
    etag: str
    silent_s: float
    """Seconds since it was written, by the store's own clock; 0 where the store does not say."""


class Register:
    """The object at `at` in S3."""

    def __init__(self, store: Store, at: Address) -> None:
        self.store, self.at = store, at
        self.conditional = True

    def read(self) -> Entry | None:
        """What the object says; None if there is none."""

        def request(client: Any) -> Entry:
            answer = client.get_object(Bucket=self.at.bucket, Key=self.at.key)
            data = body_of(answer, self.at, _MOST_BYTES)
            silent = 0.0
            with contextlib.suppress(KeyError, TypeError, ValueError):
                date = parsedate_to_datetime(answer["ResponseMetadata"]["HTTPHeaders"]["date"])
                silent = (date - answer["LastModified"]).total_seconds()
            return Entry(Holder.of(data), str(answer["ETag"]), max(silent, 0.0))

        try:
            return self.store.ask(self.at, request)
        except Missing:
            return None

    def write(self, holder: Holder, etag: str | None) -> str | None:
        """Write the object if it still has this `etag`, or, for None, if there is none. Returns its new ETag; None = it was refused."""
        condition = {} if not self.conditional else {"IfMatch": etag} if etag else {"IfNoneMatch": "*"}
        data = (json.dumps(asdict(holder)) + "\n").encode()
        about: dict[str, Any] = {"Bucket": self.at.bucket, "Key": self.at.key, "ContentMD5": base64.b64encode(md5_of(data)).decode()}
        about["Metadata"] = {"sha256": hashlib.sha256(data).hexdigest()}
        try:
            return self.store.ask(self.at, lambda client: str(client.put_object(**about, Body=data, **condition)["ETag"]))
        except Unsupported:
            if not condition:
                raise
            self.conditional = False
            return self.write(holder, etag)
        except (Changed, Missing):
            # Of a write that succeeded the answer may have been lost; its second try is refused. No two writes are the same.
            now = self.read()
            return now.etag if now is not None and now.holder == holder else None

    def obeys(self, holder: Holder, etag: str) -> bool:
        """Whether the store refuses what it has to: it is asked to write what is there already, on conditions that do not hold."""
        if not self.conditional:
            return False
        probe = replace(holder, renewals=holder.renewals + 1)
        return self.write(probe, None) is None and self.write(probe, f'"{md5_of(etag.encode()).hex()}"') is None

    def remove(self) -> None:
        self.store.delete(self.at)


def require(register: Register, owner: str, what: str) -> Entry:
    """The object, if the lease of `what` is still that of `owner`; raises Lost if it is not."""
    found = register.read()
    if found is None:
        raise Lost(f"{register.at} was removed while {what} was written; this command has stopped writing there")
    if found.holder.owner != owner:
        raise Lost(f"{what} was taken over by {found.holder.described(found.silent_s)}; this command has stopped writing there")
    return found


class Lease:
    """The lease of this process. A thread renews it from `take` to `release`."""

    def __init__(
        self,
        register: Register,
        what: str,
        length_s: float = LENGTH_S,
        every_s: float = EVERY_S,
        process: str | None = None,
        least: Callable[[], int] = int,
    ) -> None:
        """`what` is written below it, for messages. `process` is this one, as `this_process` has it. `least`: a token that the lease's
        must exceed, as its object may have been removed; it is asked once the lease can be had."""
        self.register, self.what, self.every_s, self.least = register, what, every_s, least
        process = this_process() if process is None else process
        self.mine = Holder(owner=secrets.token_hex(16), who=_who(), pid=os.getpid(), process=process, length_s=length_s)
        self.etag, self.lost, self.began = "", "", 0.0
        self.over, self.lock = threading.Event(), threading.Lock()
        self.thread = threading.Thread(target=self._renew_always, name="lease", daemon=True)

    def take(self, instead: str, says: Callable[[str], None]) -> None:
        """Take the lease, at once where nobody has it. If its holder may be dead, wait until it is known, for the lease's length at most,
        which `says` gets as a sentence. Raises UserError if the holder lives; `instead` tells the user what to do."""
        seen, since = "", 0.0
        while True:
            found, now = self.register.read(), _now()
            if found is None or self._is_free(found) or (found.etag == seen and now - since >= _wait_s(found)):
                if self._took(found):
                    break
                continue  # another one was faster
            if (seen and found.etag != seen) or lives(found.holder.process):
                left = max(found.holder.length_s - found.silent_s, 0.0)
                raise UserError(
                    f"{self.what} is being written by {found.holder.described(found.silent_s)}; {instead}; if that process is gone, "
                    f"its lease ends in {left:.0f} s without a sign of it, and then the same command takes over"
                )
            if not seen:
                seen, since = found.etag, now
                says(
                    f"{self.what} was being written by {found.holder.described(found.silent_s)}; waiting for {found.holder.length_s:.0f} s "
                    "at most, to see whether it still is"
                )
            time.sleep(min(_LOOK_S, found.holder.length_s / 4))
        if not self.register.conditional:
            says(f"the store of {self.what} has no conditional writes: two commands that begin in the same second are not kept apart")
        self.thread.start()

    def check(self) -> None:
        """Raise Lost if a renewal has found that somebody else has the lease. Asks nobody."""
        if self.lost:
            raise Lost(self.lost)

    def renew(self) -> None:
        """Give a sign. Raises Lost if somebody else has the lease, UserError if S3 does not answer: then it may still be ours."""
        with self.lock:
            self.check()
            if self.over.is_set():
                return
            new = replace(self.mine, renewals=self.mine.renewals + 1, held_s=round(_now() - self.began, 1))
            try:
                if not self.register.conditional:
                    self._require()
                etag = self.register.write(new, self.etag) or self.register.write(new, self._require().etag)
            except Lost as error:
                self.lost = str(error)
                raise
            if etag is None:
                raise UserError(f"{self.register.at} changes without its owner")
            self.mine, self.etag = new, etag

    def release(self, keep: bool = True) -> None:
        """Let the next one take it at once. The object stays, for its token; without `keep` it is removed."""
        self.over.set()

        def let_go() -> None:
            with contextlib.suppress(UserError, OSError), self.lock:
                found = self._require()
                if keep:
                    self.register.write(replace(self.mine, renewals=self.mine.renewals + 1, released=True), found.etag)
                else:
                    self.register.remove()

        thread = threading.Thread(target=let_go, name="release", daemon=True)
        thread.start()
        thread.join(_RELEASE_S)

    def _is_free(self, found: Entry) -> bool:
        holder = found.holder
        return holder.released or lives(holder.process) is False

    def _took(self, found: Entry | None) -> bool:
        self.began = _now()
        self.mine = replace(self.mine, token=max(found.holder.token if found else 0, self.least()) + 1)
        etag = self.register.write(self.mine, found.etag if found else None)
        if etag is not None and not self.register.obeys(self.mine, etag):
            self.register.conditional = False
            time.sleep(self.every_s / 30)  # another one that begins now has written by then
            now = self.register.read()
            etag = now.etag if now is not None and now.holder.owner == self.mine.owner else None
        self.etag = etag or ""
        return etag is not None

    def _require(self) -> Entry:
        return require(self.register, self.mine.owner, self.what)

    def _renew_always(self) -> None:
        pause = self.every_s
        while not self.over.wait(pause):
            try:
                self.renew()
                pause = self.every_s
            except Lost:
                return
            # S3 is away: nobody can take the lease there either, or it will be found taken. Whatever else it is, the thread must go on.
            except Exception:
                pause = min(_AGAIN_S, self.every_s)


def _wait_s(found: Entry) -> float:
    """For how many seconds an unchanged lease must be watched before its holder counts as gone. Half as long where the store says that it
    has been silent for its length: that alone is no proof, since a proxy before the store may have another clock than the store's."""
    return found.holder.length_s / (2 if found.silent_s > found.holder.length_s else 1)


@contextlib.contextmanager
def alone(lease: Lease, instead: str, says: Callable[[str], None]) -> Iterator[Lease]:
    """Inside, this process holds `lease`, and `lease.check` says whether it still does; at the end the object is removed."""
    lease.take(instead, says)
    try:
        yield lease
    finally:
        lease.release(keep=False)


def _who() -> str:
    try:
        return f"{getpass.getuser()}@{socket.gethostname()}"
    except (KeyError, OSError):  # a container's user without a name
        return f"{os.geteuid()}@{socket.gethostname()}"


def _now() -> float:
    """Seconds that also pass while a laptop sleeps."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def _ago(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.0f} h"
