"""Where a prepare leaves what it makes: a folder, which every machine at work sees, or a prefix in S3. Until the manifest is there, a
shard in a folder has a temporary name, and the notes of the parts that are done lie beside the shards, in S3 below .parts/."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from simclr import files
from simclr.data import agreement, note
from simclr.data.agreement import NOTES, SHARD
from simclr.data.manifest import LISTS, Manifest, Shard
from simclr.data.note import Note
from simclr.data.options import Options
from simclr.data.s3.uri import Address, address, copy_of, own
from simclr.data.sources.source import Source
from simclr.errors import UserError

if TYPE_CHECKING:
    from simclr.data.s3.lease import Lease

_LOCK, CHOICE = ".writing-lock", ".writing-choice.json"
_PARTS = ".parts"
_MOST_SMALL_BYTES = 1 << 20
_AT_ONCE = 8


class Folder:
    """A folder on a disk."""

    def __init__(self, out: Path) -> None:
        self.out = self.scratch = out

    def __str__(self) -> str:
        return str(self.out)

    def existing(self, source: Source, options: Options, identity: agreement.Identity) -> Manifest | None:
        """As `agreement.existing`."""
        return agreement.existing(source, self.out, options, identity)

    @contextlib.contextmanager
    def alone(self, says: Callable[[str], None]) -> Iterator[None]:
        """Keep a second prepare out, and leave no folder behind that nothing came into. `says` gets a sentence if this waits."""
        made = not self.out.exists()
        self.out.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(files.locked(self.out / _LOCK, wait=False))
            except BlockingIOError:
                raise UserError(f"another prepare is writing to {self.out}; wait for it, or use another --out") from None
            stack.callback((self.out / _LOCK).unlink, missing_ok=True)
            try:
                yield
            finally:
                if made and not (self.out / "manifest.json").exists() and not list(self.out.glob(f"{NOTES}*.parquet")):
                    shutil.rmtree(self.out)

    def require_seen(self) -> None:
        """Raise UserError where the process that runs the prepare sees another folder: it holds a lock in its own."""
        if not (self.out / _LOCK).exists():
            raise UserError(
                f"{socket.gethostname()} does not see {self.out} as the node does that runs this; give --out on a disk that all nodes "
                "share, or s3://bucket/prefix"
            )

    def choice(self) -> Path:
        """The file with what a sample decided, which may not be there."""
        return self.out / CHOICE

    def keep_choice(self) -> None:
        """Called when `choice` was written."""

    def require_space(self, needed: int) -> None:
        """Raise UserError where the disk is surely too small."""
        files.require_space(self.out, needed, "at least", "use another --out")

    def keep(self, path: Path, shard: Shard) -> None:
        """Take a whole shard from the scratch folder."""
        path.replace(self.out / f".writing-{shard.name}")

    def end(self) -> None:
        """End transfers."""

    def keep_note(self, number: int) -> Path:
        """Where the note of a part is to be written; `sent` is to be called then."""
        return self.out / f"{NOTES}{number:05d}.parquet"

    def sent(self, number: int) -> None:
        """Called when the note of a part was written."""

    def notes(self, key: str, numbers: Sequence[int]) -> dict[int, Note]:
        """Number → note of each of these parts that is done."""
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            found = pool.map(lambda number: note.opened(self.keep_note(number), key, number), numbers)
            known = {n: one for n, one in zip(numbers, found, strict=True) if one is not None}
        return {n: one for n, one in known.items() if all(self._is_there(shard) for shard in one.about.whole())}

    def _is_there(self, shard: Shard) -> bool:
        try:
            return self._path(shard).lstat().st_size == shard.bytes
        except OSError:
            return False

    def _path(self, shard: Shard) -> Path:
        """Where the shard lies: a prepare may have been killed while it gave shards their names."""
        named = self.out / shard.name
        return named if not (self.out / f".writing-{shard.name}").exists() else self.out / f".writing-{shard.name}"

    @contextlib.contextmanager
    def changing(self, shard: Shard) -> Iterator[Path]:
        """The file of a shard that is to be changed in place."""
        yield self._path(shard)

    def kept(self, shard: Shard) -> None:
        """Called when a shard was changed."""

    def unfinished(self) -> int:
        """Bytes of all that an unfinished prepare left."""
        return sum(path.lstat().st_size for path in agreement.unfinished(self.out))

    def has_shards(self) -> bool:
        """Whether an unfinished prepare, also one of an earlier version, had finished a part."""
        return any(self.out.glob(f"{NOTES}*.parquet")) or any(self.out.glob(".writing-*.beton.json"))

    def clear(self, kept: Mapping[int, Note], everything: bool = False) -> None:
        """Remove what an unfinished prepare left, but for the notes and shards of `kept`; or everything, the choice too."""
        keep = {_LOCK} if everything else {_LOCK, CHOICE}
        for number, one in kept.items():
            keep |= {self.keep_note(number).name} | {self._path(shard).name for shard in one.about.whole()}
        for path in agreement.unfinished(self.out):
            if path.name not in keep:
                path.unlink(missing_ok=True)

    def finish(self, shards: tuple[Shard, ...]) -> Path:
        """Give the shards their names. Returns the folder for the lists and the manifest, behind which comes `finished`."""
        for shard in shards:
            self._path(shard).replace(self.out / shard.name)
        return self.out

    def finished(self, manifest: Manifest) -> None:
        """Remove what is of no use once the manifest is written."""
        for path in agreement.unfinished(self.out):
            if ".writing-" in path.name and path.name != _LOCK:
                path.unlink()


class Prefix:
    """A prefix in S3. A process that makes shards has a scratch folder in this machine's cache, for one shard of each split."""

    def __init__(self, at: Address, scratch: Path) -> None:
        from simclr.data.s3.store import Store

        self.at, self.scratch, self.store = at, scratch, Store()
        self.lease: Lease | None = None

    def __str__(self) -> str:
        return str(self.at)

    def existing(self, source: Source, options: Options, identity: agreement.Identity) -> Manifest | None:
        """As `agreement.existing`."""
        from simclr.data.s3 import remote

        found = remote.manifest_at(self.at, self.store)
        if found is not None:
            return agreement.agreed(found[0], source, self.at, options, identity)
        # Shards without a manifest are ours, from a prepare that was not finished.
        names = [o.name for o in self.store.listing(self.at)]
        left = [name for name in names if name not in LISTS and not name.endswith(".beton") and not name.startswith(f"{_PARTS}/")]
        if left:
            raise UserError(f"{self.at} is not empty and no dataset (it holds {', '.join(left[:3])}); use another --out")
        return None

    @contextlib.contextmanager
    def alone(self, says: Callable[[str], None]) -> Iterator[None]:
        """Keep a second prepare out by a lease in the bucket."""
        from simclr.data.s3 import lease

        self.lease = lease.Lease(lease.Register(self.store, self.at / _PARTS / "writer.json"), str(self.at))
        with lease.alone(self.lease, "wait for it, or use another --out", says):
            yield

    def require_seen(self) -> None:
        """A bucket is the same everywhere."""

    def choice(self) -> Path:
        """The file with what a sample decided, which may not be there."""
        from simclr.data.s3.answers import Missing

        path = self.scratch / CHOICE
        with contextlib.suppress(Missing):
            path.write_bytes(self.store.read(self.at / _PARTS / "choice.json", _MOST_SMALL_BYTES))
        return path

    def keep_choice(self) -> None:
        """Called when `choice` was written."""
        self.store.upload(self.scratch / CHOICE, self.at / _PARTS / "choice.json")

    def require_space(self, needed: int) -> None:
        """A bucket has room."""

    def keep(self, path: Path, shard: Shard) -> None:
        """Send a whole shard from the scratch folder, and remove it there."""
        self.store.upload(path, self.at / shard.name, shard.sha256)
        path.unlink()

    def end(self) -> None:
        """End transfers."""
        self.store.over.set()

    def keep_note(self, number: int) -> Path:
        """Where the note of a part is to be written; `sent` is to be called then."""
        return self.scratch / f"part-{number:05d}.parquet"

    def sent(self, number: int) -> None:
        """Send the note of a part, behind its shards."""
        path = self.keep_note(number)
        self.store.upload(path, self.at / _PARTS / path.name)

    def notes(self, key: str, numbers: Sequence[int]) -> dict[int, Note]:
        """Number → note of each of these parts that is done."""
        sizes = {o.name: o.bytes for o in self.store.listing(self.at)}
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            found = pool.map(lambda number: self._note(number, key, sizes), numbers)
            return {number: one for number, one in zip(numbers, found, strict=True) if one is not None}

    def _note(self, number: int, key: str, sizes: Mapping[str, int]) -> Note | None:
        path = self.keep_note(number)
        size = sizes.get(f"{_PARTS}/{path.name}")
        if size is None:
            return None
        path.unlink(missing_ok=True)  # another process may have written it anew
        self.store.download(self.at / _PARTS / path.name, path, size)
        one = note.opened(path, key, number)
        return one if one is not None and all(sizes.get(s.name) == s.bytes for s in one.about.whole()) else None

    @contextlib.contextmanager
    def changing(self, shard: Shard) -> Iterator[Path]:
        """The file of a shard that is to be changed; `kept` is to be called then."""
        path = self.scratch / f".changing-{shard.name}"
        self.store.download(self.at / shard.name, path, shard.bytes)
        yield path
        path.unlink(missing_ok=True)

    def kept(self, shard: Shard) -> None:
        """Send a shard that was changed."""
        self.store.upload(self.scratch / f".changing-{shard.name}", self.at / shard.name, shard.sha256)

    def unfinished(self) -> int:
        """Bytes in the scratch folder."""
        return sum(path.stat().st_size for path in self.scratch.iterdir())

    def has_shards(self) -> bool:
        """Whether an unfinished prepare, also one of an earlier version, had sent something."""
        return any(SHARD.fullmatch(o.name) for o in self.store.listing(self.at))

    def clear(self, kept: Mapping[int, Note], everything: bool = False) -> None:
        """Remove what an unfinished prepare sent, but for the notes and shards of `kept`; or everything, the choice too."""
        keep = {f"{_PARTS}/writer.json"} | (set() if everything else {f"{_PARTS}/choice.json"})
        for number, one in kept.items():
            keep |= {f"{_PARTS}/{self.keep_note(number).name}"} | {shard.name for shard in one.about.whole()}
        self._remove(keep)

    def finish(self, shards: tuple[Shard, ...]) -> Path:
        """Returns the folder for the lists and the manifest, behind which comes `finished`."""
        return self.scratch

    def finished(self, manifest: Manifest) -> None:
        """Send lists and manifest, the manifest last; then remove the notes. Raises Lost if another prepare has taken over."""
        if self.lease is not None:
            self.lease.renew()
        for name in (*LISTS, "manifest.json"):
            if (self.scratch / name).is_file():
                self.store.upload(self.scratch / name, self.at / name)
        self._remove({shard.name for shard in manifest.shards} | {f"{_PARTS}/writer.json"})

    def _remove(self, keep: set[str]) -> None:
        for o in self.store.listing(self.at):
            if o.name not in keep and (o.name.startswith(f"{_PARTS}/") or SHARD.fullmatch(o.name)):
                self.store.delete(self.at / o.name)


Output = Folder | Prefix


@contextlib.contextmanager
def opened(out: str | Path) -> Iterator[Output]:
    """The output at `out`, with a scratch folder of this process's own where it is in S3, which goes at the end."""
    at = address(out)
    if at is None:
        yield Folder(Path(out))
        return
    scratch = scratch_for(at)
    try:
        yield Prefix(at, scratch)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def enter(folder: str) -> None:
    """Make `folder` the working directory, as it is of the process that runs the job, where this machine has it: paths may be relative."""
    with contextlib.suppress(OSError):
        os.chdir(folder)


def scratch_for(at: Address) -> Path:
    """A new folder of this process in this machine's cache. Those that processes left that were killed are removed."""
    above = copy_of(at, "staging")
    own(above)
    above.mkdir(mode=0o700, exist_ok=True)
    here = socket.gethostname()  # several machines may share a cache
    for left in above.glob(f"{here}.*.*"):
        if (pid := left.name.split(".")[-2]).isdecimal() and not Path(f"/proc/{pid}").exists():
            shutil.rmtree(left, ignore_errors=True)
    scratch = above / f"{here}.{os.getpid()}.{secrets.token_hex(4)}"
    scratch.mkdir(mode=0o700)
    return scratch
