"""Tar archives, plain or compressed, and tars within a tar."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import io
import itertools
import lzma
import sys
import tarfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import IO

from simclr.data.sources.members import MOST_PICTURE_BYTES, Listing, ends_of, followed, junk_in, linked, oddities, path_in
from simclr.data.sources.source import TEXT_SUFFIXES, Data, Unread, ending, is_image, too_long
from simclr.data.sources.webdataset import are_shards
from simclr.errors import UserError

ARCHIVES = (".tar", ".tar.gz", ".tgz", ".tar.xz", ".txz", ".tar.bz2")
_PACKERS: dict[bytes, Callable[[IO[bytes]], IO[bytes]]] = {
    b"\x1f\x8b": gzip.open,  # type: ignore[dict-item]
    b"BZh": bz2.open,
    b"\xfd7zXZ": lzma.open,
}
_BOMB_BYTES, _BOMB_RATIO = 256 << 20, 200  # unpacked, and as a multiple of what was read for it; pictures give less than 1.1, texts 20
_MANY, _LEAST_EACH_BYTES = 100_000, 64  # members, and what one takes in a packed archive
_HEADER_BYTES = 1 << 20  # of one member: a name of any length, a list of holes
_DEEPEST = 4  # tars in a tar in a tar
_RECORD_BYTES = 10_240  # of zeros at the end, or of anything: what tar programs write at a time
_READ_AHEAD_BYTES, _PIECE_BYTES = 1 << 17, 1 << 20
_KEPT_BYTES, _KEPT_EACH_BYTES = 256 << 20, 128
_FEW_INNER = 64  # tars within a tar that are listed whatever they hold
_FIRST = 8  # headers of each that are looked at, where there are more

_SMALL = TEXT_SUFFIXES | {".cls", ".json"}

_Place = tuple[int, int]
"""Offset in the unpacked archive, bytes."""
_Opened = Callable[[int], IO[bytes]]
"""Opens an archive anew at each call; gets the bytes to read ahead."""
_Within = tuple[str, _Opened]
"""An archive in another: what messages call it, and how it is opened."""


def tar_listing(path: Path, spec: str = "", of: int = 1) -> Listing:
    """The members of a tar archive. A plain one is listed from header to header, a compressed one unpacked once. Tars within a plain
    one are listed too, but for those of many that seem to hold loose pictures alone, as ImageNet's classes: they are listed when they are
    read. `of` archives share the memory for small files. Raises UserError for an archive that ends early or is damaged."""
    listing = _listing(spec or str(path), lambda ahead: path.open("rb", buffering=ahead), _KEPT_BYTES // of)
    listing.identity, listing.times = ends_of(path), str(path.stat().st_mtime_ns)
    return listing


def is_tar(path: Path) -> bool:
    """Whether a file begins like a tar archive, plain or compressed."""
    with path.open("rb") as file, contextlib.suppress(tarfile.TarError, OSError, EOFError, zlib.error, lzma.LZMAError, ValueError):
        start = _Stream(file, str(path)).read(tarfile.BLOCKSIZE)
        return len(start) == tarfile.BLOCKSIZE and (not start.strip(b"\0") or bool(_Header.frombuf(start, "utf-8", "surrogateescape")))
    return False


def stem(name: str) -> str:
    """`name` without an archive's ending."""
    endings = (end for end in (*ARCHIVES, ".zip") if name.lower().endswith(end))
    return name[: -len(max(endings, key=len, default="")) or None]


def stems(names: Iterable[str], spec: str) -> dict[str, str]:
    """Name without ending → name. Raises UserError where two archives of `spec` would be the same folder."""
    found: dict[str, str] = {}
    for name in names:
        if (other := found.setdefault(stem(name), name)) != name:
            raise UserError(f"{other} and {name} in {spec} would be the same folder {stem(name)}; move one of them away")
    return found


class _Header(tarfile.TarInfo):
    """A header that raises OSError if it is damaged. tarfile takes a cut or damaged header for the end of the archive: of a half-fetched
    one it silently gives the first half. Only the block of zeros at the end of every tar is the end."""

    @classmethod
    def fromtarfile(cls, tarfile_: tarfile.TarFile) -> _Header:
        try:
            return super().fromtarfile(tarfile_)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]  # the stubs leave it out
            raise
        except tarfile.HeaderError as error:
            raise OSError(str(error)) from None


@dataclass(slots=True)
class _Members:
    """What the headers of an archive say."""

    files: dict[str, _Place] = field(default_factory=dict)
    links: dict[str, str] = field(default_factory=dict)
    inner: dict[str, _Place] = field(default_factory=dict)
    """Archives within this one."""
    holes: dict[int, list[_Place]] = field(default_factory=dict)
    """Offset of a file with holes → the pieces of it that are stored: offset in the file, bytes."""
    kept: dict[int, bytes] = field(default_factory=dict)
    """Offset → content of a file that may hold labels, of a compressed archive: later, each would have to be unpacked anew."""
    room: int = 0
    """Bytes that may still be kept."""
    twice: list[str] = field(default_factory=list)
    """Files that stand in it more than once; the last counts, as for tar itself."""
    junk: Counter[str] = field(default_factory=Counter)
    ignored: Counter[str] = field(default_factory=Counter)
    count: int = 0
    hollow: int = 0
    """Bytes of files with holes."""


class _Stream:
    """The content of an archive, unpacked, as tarfile reads it. It ends with UserError where little is unpacked to very much, and with
    OSError where a header claims to be huge."""

    def __init__(self, file: IO[bytes], spec: str) -> None:
        start = file.read(6)
        file.seek(0)
        packer = next((packer for magic, packer in _PACKERS.items() if start.startswith(magic)), None)
        self.file, self.spec, self.packed = file, spec, packer is not None
        self.unpacked = packer(file) if packer else file
        self.left = sys.maxsize
        """Bytes that may still be read of a header."""

    def read(self, size: int) -> bytes:
        self.left -= size
        if self.left < 0:
            raise OSError(f"the header of one member has more than {_HEADER_BYTES >> 20} MiB")
        data = self.unpacked.read(size)
        if self.packed:
            self.require_sound(0)
        return data

    def tell(self) -> int:
        return self.unpacked.tell()

    def seek(self, to: int) -> int:
        """Of a packed archive all that lies ahead of `to` is unpacked, a piece at a time."""
        if not self.packed or to < (at := self.unpacked.tell()):
            return self.unpacked.seek(to)
        while at < to and (got := len(self.unpacked.read(min(to - at, _PIECE_BYTES)))):
            at += got
            self.require_sound(0)
        return at

    def require_sound(self, members: int, holes: int = 0) -> None:
        """Raise UserError if far more was unpacked than pictures would give, or more members than the archive has bytes for."""
        taken, given = self.file.tell(), self.unpacked.tell() + holes
        if given > _BOMB_BYTES + _BOMB_RATIO * taken or members > _MANY + taken // _LEAST_EACH_BYTES:
            raise UserError(
                f"{self.spec} unpacks to {given >> 20:,} MiB or more{f' and {members:,} files' if members else ''} from "
                f"{taken / 2**20:,.1f} MiB, which no pictures do; if it is sound, unpack it, and give the folder"
            )


class _Archive:
    """The headers of an archive, one after the other."""

    def __init__(self, stream: _Stream) -> None:
        self.stream = stream
        with self._one_header():  # tarfile reads the first one at once; its `open` would guess the compression again
            self.file = tarfile.TarFile(fileobj=stream, tarinfo=_Header)  # type: ignore[arg-type]  # it is only read

    @property
    def after(self) -> int:
        """Where the next header begins."""
        return self.file.offset

    def next(self) -> tarfile.TarInfo | None:
        """The next member. Raises OSError for a damaged header, and for one that leads back."""
        with self._one_header():
            member = self.file.next()
        self.file.members.clear()  # type: ignore[attr-defined]  # tarfile keeps all headers, a kilobyte each
        if member is not None and (self.after <= member.offset or member.size < 0 or not _holes_fit(member)):
            raise OSError(f"the header of {member.name[:80]} states an impossible size")
        return member

    @contextlib.contextmanager
    def _one_header(self) -> Iterator[None]:
        """tarfile raises nearly anything for a damaged header (ValueError, OverflowError, RecursionError …)."""
        self.stream.left = _HEADER_BYTES
        try:
            yield
        except (tarfile.TarError, OSError, UserError, EOFError, zlib.error, lzma.LZMAError):
            raise
        except Exception as error:
            raise OSError(f"{type(error).__name__}: {error}") from None
        finally:
            self.stream.left = sys.maxsize


def _holes_fit(member: tarfile.TarInfo) -> bool:
    """Whether the stored pieces of a file with holes lie within it."""
    pieces: list[_Place] = list(member.sparse or ())  # type: ignore[arg-type]
    within = all(at >= 0 and length >= 0 and at + length <= member.size for at, length in pieces)
    return within and sum(length for _, length in pieces) <= member.size


class _Window(io.RawIOBase):
    """A piece of a file, as a file. It owns that file."""

    def __init__(self, file: IO[bytes], place: _Place) -> None:
        self.file, (self.begin, self.size), self.at = file, place, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        self.at = offset + (0, self.at, self.size)[whence]
        return self.at

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        self.file.seek(self.begin + self.at)
        got = self.file.read(max(min(len(buffer), self.size - self.at), 0))
        buffer[: len(got)] = got
        self.at += len(got)
        return len(got)

    def close(self) -> None:
        self.file.close()
        super().close()


@contextlib.contextmanager
def _sound(spec: str) -> Iterator[None]:
    try:
        yield
    except (tarfile.TarError, EOFError, OSError, zlib.error, lzma.LZMAError) as error:
        raise UserError(f"{spec} ends early or is damaged ({error}); fetch it again") from None


def _listing(spec: str, opened: _Opened, room: int = 0, depth: int = 0) -> Listing:
    """The members of the archive that `opened` opens; up to `room` bytes of small files are kept."""
    with opened(io.DEFAULT_BUFFER_SIZE) as file, _sound(spec):
        stream, members = _Stream(file, spec), _Members(room=room)
        _scan(stream, members, "", depth)
        rest = stream.read((1 << 20) + 1)
    if len(rest) > 1 << 20 or (len(rest) > _RECORD_BYTES and rest.strip(b"\0")):
        raise UserError(
            f"{spec} has an end mark with more behind it, so it was fetched with holes or is several archives in one file; "
            "fetch it again, or give the archives one by one"
        )
    found, lost = followed(members.links, members.files)
    places = members.files | {link: members.files[target] for link, target in found.items()}
    sizes = {name: size for name, (_, size) in sorted(places.items(), key=lambda kv: kv[1][0])}

    def read(names: Iterable[str]) -> Iterator[tuple[str, bytes]]:
        with opened(_READ_AHEAD_BYTES) as file, _sound(spec):
            stream = _Stream(file, spec)
            before, data = None, b""
            for name in names:
                if (place := places[name]) != before:  # a link and what it leads to are read once
                    kept = members.kept.get(place[0])
                    data = _content(stream, place, members.holes.get(place[0])) if kept is None else kept
                    before = place
                yield name, data

    def within(name: str) -> _Within:
        return f"{name} in {spec}", lambda ahead: io.BufferedReader(_Window(opened(0), members.inner[name]), max(ahead, 1))

    inner = stems(sorted(members.inner, key=lambda name: members.inner[name]), spec)
    numbered = are_shards(inner)
    whole = {c for c, name in inner.items() if len(inner) <= _FEW_INNER or c in numbered or not _begins_loose(*within(name))}
    return Listing(
        spec=spec,
        sizes=sizes,
        read=read,
        seekable=not stream.packed,
        listed={called: _listing(*within(name), room // len(whole), depth + 1) for called, name in inner.items() if called in whole},
        inner={called: partial(_pictures, *within(name), depth + 1) for called, name in inner.items() if called not in whole},
        junk=members.junk,
        ignored=members.ignored + Counter({"link": len(lost)} if lost else {}),
        notes=oddities(spec, lost, members.twice),
    )


def _begins_loose(spec: str, opened: _Opened) -> bool:
    """Whether the first members of an archive are pictures in no folder."""
    with opened(io.DEFAULT_BUFFER_SIZE) as file, _sound(spec):
        first = [path_in(member.name) for member in itertools.islice(iter(_Archive(_Stream(file, spec)).next, None), _FIRST)]
    paths = [path for path in first if path]  # without ./
    return bool(paths) and all("/" not in path and is_image(path) for path in paths)


def _pictures(spec: str, opened: _Opened, depth: int) -> Iterator[tuple[str, Data]]:
    """The pictures of an archive that is listed only now."""
    yield from _all(_listing(spec, opened, depth=depth))


def _all(archive: Listing) -> Iterator[tuple[str, Data]]:
    small = [path for path, size in archive.sizes.items() if is_image(path) and size <= MOST_PICTURE_BYTES]
    yield from archive.read(small)
    for path, size in archive.sizes.items():
        if is_image(path) and size > MOST_PICTURE_BYTES:
            yield path, Unread(f"it has {size / 2**20:,.0f} MiB, more than a picture in an archive may have; unpack it")
    within = {folder: more() for folder, more in archive.inner.items()} | {folder: _all(more) for folder, more in archive.listed.items()}
    for folder, pictures in within.items():
        yield from ((f"{folder}/{path}", data) for path, data in pictures)


def _scan(stream: _Stream, found: _Members, prefix: str, depth: int, end: int | None = None) -> None:
    """Read the headers of the archive that begins where `stream` stands into `found`. Tars within a compressed one are read here as well:
    later, each would have to be unpacked with all that lies before it."""
    archive, packed = _Archive(stream), stream.packed
    while (member := archive.next()) is not None:
        begin, path, after = member.offset_data, prefix + path_in(member.name), archive.after
        if end is not None and after > end:
            raise OSError("unexpected end of data")
        found.count += 1
        if member.issparse():
            found.hollow += member.size
        if packed or found.hollow:
            stream.require_sound(found.count, found.hollow)
        if too_long(path):
            found.ignored["name too long"] += 1
            continue
        if junk := junk_in(path):
            found.junk[junk] += member.isfile() or member.issym() or member.islnk()
        elif member.islnk():
            found.links[path] = prefix + path_in(member.linkname)
        elif member.issym():
            found.links[path] = linked(path, member.linkname)
        elif not member.isfile():
            continue
        elif not path.lower().endswith(ARCHIVES):
            if found.files.pop(path, None) is not None:
                found.twice.append(path)
            found.links.pop(path, None)
            found.files[path] = (begin, member.size)
            if member.issparse():
                found.holes[begin] = list(member.sparse)  # type: ignore[arg-type]
            elif packed and member.size + _KEPT_EACH_BYTES <= found.room and ending(path) in _SMALL:
                found.kept[begin] = _content(stream, (begin, member.size), None)
                found.room -= member.size + _KEPT_EACH_BYTES
                stream.seek(after)  # tarfile would else step back a byte, which unpacks all anew
        elif depth == _DEEPEST or (packed and not path.lower().endswith(".tar")):
            found.ignored[ending(path)] += 1
        elif packed:
            stream.seek(begin)
            _scan(stream, found, f"{stem(path)}/", depth + 1, begin + member.size)
        else:
            found.inner[path] = (begin, member.size)


def _content(stream: _Stream, place: _Place, pieces: list[_Place] | None) -> bytes:
    begin, size = place
    stream.seek(begin)
    stored = size if pieces is None else sum(length for _, length in pieces)
    data = stream.read(stored)
    if len(data) != stored:
        raise OSError("unexpected end of data")
    if pieces is None:
        return data
    whole, taken = bytearray(size), 0
    for at, length in pieces:
        whole[at : at + length] = data[taken : taken + length]
        taken += length
    return bytes(whole)
