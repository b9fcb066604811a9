"""Directories of shards in S3: sent after `prepare`, fetched once by each machine that reads them.

The manifest is sent last and written last, so the shards beside a manifest, in S3 or on disk, are whole.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from simclr import files
from simclr.data.manifest import LISTS, Manifest, Shard, read_manifest
from simclr.data.s3.answers import Missing
from simclr.data.s3.hashed import Hashed, stamp
from simclr.data.s3.quota import make_room
from simclr.data.s3.store import Progress, Store, begun
from simclr.data.s3.uri import Address, locked
from simclr.errors import UserError
from simclr.telemetry.progress import moved

_AT_ONCE = 4  # shards at a time; each is transferred in parts
_CHUNK = 1 << 20
_ASIDE = ".unsure-"  # before the name of a shard that is not known to be whole; no manifest may name one so


def manifest_at(place: Address, store: Store) -> tuple[Manifest, bytes] | None:
    """The manifest at `place` and its bytes, None if there is none. Raises UserError if S3 refuses or does not answer."""
    try:
        text = store.read(place / "manifest.json", files.MOST_JSON_BYTES)
    except Missing:
        store.listing(place)  # raises if the bucket is missing
        return None
    return Manifest.from_json(text.decode(errors="replace"), place / "manifest.json"), text


def fetch(
    place: Address,
    directory: Path,
    progress: Callable[[int, int], None],
    store: Store,
    groups: int = 1,
    group: int = 0,
    says: Callable[[str], None] = lambda line: None,
) -> None:
    """Bring the shards at `place` into `directory`: whole ones stay, missing and damaged ones are fetched in parallel.

    With training shards in more than one group, only those of `group` are fetched; files of other groups stay. Several processes of a
    machine may call this at once: one fetches, the others wait. progress gets bytes so far, fetched or hashed, and in all; says gets a
    sentence where shards that lie here are hashed first, and where other datasets are evicted to make room. Raises UserError if there are
    no shards, if they do not match their manifest, or if there is too little room.

    A shard that lies here is taken as it is if this user fetched it, by this manifest, and nobody else can have written it since: its
    owner and its permissions say so, which no other user can forge. Else its bytes are hashed, which is noted for this user's other
    processes where the disk does not tell users apart; one that somebody else owns, who could change it after that, is fetched.
    """
    with locked(directory):
        manifest, text = _required(place, store)
        local = directory / "manifest.json"
        whole = _holds(local, text)
        if not whole:
            directory.mkdir(mode=0o700, exist_ok=True)
            local.unlink(missing_ok=True)
        # Without the same manifest, the files come from an interrupted fetch or from other data: then their bytes are hashed.
        sure = whole and not directory.stat().st_mode & files.OTHERS_WRITE
        mine = manifest.part(groups, group)
        hashed = Hashed(directory)
        here = {shard: state for shard in mine if (state := _found(directory / shard.name, shard)) is not None}
        there = {s for s, state in here.items() if (sure and files.only_own(state)) or hashed.has(directory / s.name, s.sha256)}
        count = _counter(sum(shard.bytes for shard in mine), progress)
        count(sum(shard.bytes for shard in there))
        if unsure := [shard for shard in here if shard not in there]:
            size = sum(shard.bytes for shard in unsure) / 2**20
            why = "others can have written them" if whole else "no manifest says that they are whole"
            says(f"hashing {len(unsure):,} shards of {directory} first ({size:,.0f} MiB), since {why}")
            there |= _hash(unsure, directory, hashed, count, store)
            open_dir = directory.stat().st_mode & files.OTHERS_WRITE
            again = any(open_dir or not files.only_own((directory / s.name).lstat()) for s in unsure if s in there)
            if again and not hashed.keep({shard.name for shard in manifest.shards}):
                says(
                    f"each process hashes them anew, since the disk of {directory} does not tell users apart, and {hashed.place}, where "
                    "it would be noted, cannot be written or is not surely this user's alone"
                )
        if not whole:
            _set_aside(directory, manifest, set(mine))
        if aside := [shard for shard in mine if shard not in there and (directory / f"{_ASIDE}{shard.name}").exists()]:
            says(f"hashing {len(aside):,} shards of {directory} first, since no manifest says that they are whole")
            there |= _taken_back(aside, directory, count, store)
        wanted = [shard for shard in mine if shard not in there]

        def confirm() -> None:  # a manifest may claim what is not there
            _each(wanted, lambda s: store.require_size(place / s.name, s.bytes), store)

        needed = sum(shard.bytes - begun(directory / shard.name) for shard in wanted)
        make_room(directory, needed, f"for the shards of {place}", says, confirm)
        _each(wanted, lambda s: store.download(place / s.name, directory / s.name, s.bytes, s.sha256, count), store)
        with files.whole(local) as scratch:
            scratch.write_bytes(text)


def fetch_manifest(place: Address, directory: Path, store: Store) -> Manifest:
    """Bring the manifest of the shards at `place` into `directory`, and no shard: for a process that reads none. Shards that lie here stay.
    Raises UserError if there are no shards at `place`."""
    with locked(directory):
        manifest, text = _required(place, store)
        local = directory / "manifest.json"
        if not _holds(local, text):
            directory.mkdir(mode=0o700, exist_ok=True)
            local.unlink(missing_ok=True)
            _set_aside(directory, manifest, set())
            with files.whole(local) as scratch:
                scratch.write_bytes(text)
        return manifest


def _required(place: Address, store: Store) -> tuple[Manifest, bytes]:
    found = manifest_at(place, store)
    if found is None:
        raise UserError(f"there are no shards at {place} (no manifest.json); `simclr prepare --source … --out {place}` puts them there")
    return found


def _holds(local: Path, text: bytes) -> bool:
    """Whether the manifest `local` is this `text`, written by this user."""
    return local.is_file() and files.is_own(local.lstat(), local.parent) and local.read_bytes() == text


def _set_aside(directory: Path, manifest: Manifest, known: set[Shard]) -> None:
    """Remove what is no shard of `manifest`, and give all shards but the `known` ones another name: no manifest has said that they are
    whole, and this one is about to lie beside them."""
    names = {shard.name for shard in manifest.shards}
    for path in directory.glob("*.beton"):
        if path.name.removeprefix(_ASIDE) not in names:
            path.unlink()
    for shard in manifest.shards:
        if shard not in known:
            with contextlib.suppress(FileNotFoundError):
                (directory / shard.name).replace(directory / f"{_ASIDE}{shard.name}")


def _taken_back(shards: list[Shard], directory: Path, count: Progress, store: Store) -> set[Shard]:
    """Those of `shards` that were set aside and turn out to be intact; others are removed."""
    found: set[Shard] = set()

    def look(shard: Shard) -> None:
        aside = directory / f"{_ASIDE}{shard.name}"
        if _intact(aside, shard, count=count):
            aside.replace(directory / shard.name)
            found.add(shard)
        aside.unlink(missing_ok=True)

    _each(shards, look, store)
    return found


def refetch(place: Address, directory: Path, name: str, since: float, store: Store) -> bool:
    """Fetch the shard `name` again if its bytes do not match the manifest. Returns whether the file has changed since Unix time `since`:
    another process may have fetched it. Raises Damaged if the bytes in S3 do not match either.
    """
    with locked(directory):
        (shard,) = (shard for shard in read_manifest(directory, look=False).shards if shard.name == name)
        path = directory / name
        if _intact(path, shard):
            return path.stat().st_mtime > since
        path.unlink(missing_ok=True)
        store.download(place / name, path, shard.bytes, shard.sha256)
        return True


def fetch_names(place: Address, directory: Path, split: str, store: Store) -> None:
    """Fetch the names of a split's images, if there are any; training does not need them."""
    name = f"names-{split}.txt"
    with locked(directory):
        if any(found.name == name for found in store.listing(place)):
            store.download(place / name, directory / name)


def push(directory: Path, place: Address, progress: Callable[[int, int], None], store: Store) -> None:
    """Send the shards in `directory` to `place`, the manifest last; shards that are in S3 already are not sent again.

    Raises UserError if a shard on disk does not match its manifest, or S3 refuses.
    """
    manifest = read_manifest(directory)
    found = manifest_at(place, store)
    if found is not None and found[1] != (directory / "manifest.json").read_bytes():
        store.delete(place / "manifest.json")
    count = _counter(sum(shard.bytes for shard in manifest.shards), progress)
    _each(list(manifest.shards), lambda s: store.upload(directory / s.name, place / s.name, s.sha256, count), store)
    for name in (*LISTS, "manifest.json"):
        if (directory / name).is_file():
            store.upload(directory / name, place / name)


def _found(path: Path, shard: Shard) -> os.stat_result | None:
    """The state of the file `path`, if it may be `shard`: a plain file of this user's and of that size."""
    try:
        found = path.lstat()
    except OSError:
        return None
    fits = stat.S_ISREG(found.st_mode) and found.st_size == shard.bytes
    return found if fits and files.is_own(found, path.parent) else None


def _hash(shards: list[Shard], directory: Path, hashed: Hashed, count: Progress, store: Store) -> set[Shard]:
    """Those of `shards` whose files are intact; count gets the bytes of each, and takes back those of one that is not."""
    found: set[Shard] = set()

    def look(shard: Shard) -> None:
        if _intact(directory / shard.name, shard, hashed, count):
            found.add(shard)

    _each(shards, look, store)
    return found


def _intact(path: Path, shard: Shard, hashed: Hashed | None = None, count: Progress = lambda amount: None) -> bool:
    """Whether the file has the bytes of `shard`. From now on nobody else may write to it."""
    if _found(path, shard) is None:
        return False
    with open(path, "rb", buffering=0, opener=files.plain) as file:
        mode = os.fstat(file.fileno()).st_mode
        if mode & files.OTHERS_WRITE:
            with contextlib.suppress(PermissionError):  # root's
                os.fchmod(file.fileno(), stat.S_IMODE(mode) & ~files.OTHERS_WRITE)
        before, digest, done, part = stamp(os.fstat(file.fileno())), hashlib.sha256(), 0, memoryview(bytearray(_CHUNK))
        while size := file.readinto(part):
            digest.update(part[:size])
            done += size
            moved()
            count(size)
        if digest.hexdigest() != shard.sha256:
            count(-done)
            return False
        if hashed is not None and stamp(os.fstat(file.fileno())) == before:
            hashed.add(path, before, shard.sha256)
        return True


def _counter(total: int, progress: Callable[[int, int], None]) -> Progress:
    """A function that adds up the bytes of several threads."""
    lock, done = threading.Lock(), 0

    def count(amount: int) -> None:
        nonlocal done
        with lock:
            done += amount
            progress(done, total)

    return count


def _each(shards: list[Shard], work: Callable[[Shard], object], store: Store) -> None:
    """`work` on every shard, several at once. The first that fails ends the others."""
    pool = ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="shards")
    try:
        for future in as_completed([pool.submit(work, shard) for shard in shards]):
            future.result()
    except BaseException as error:
        store.over.set()
        pool.shutdown(wait=isinstance(error, Exception), cancel_futures=True)  # Ctrl-C does not wait for answers
        raise
    pool.shutdown()
