"""Tar archives, plain or compressed, and tars within a tar."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import io
import lzma
import tarfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from simclr.data.sources.members import Listing, ends_of, followed, junk_in, linked, oddities, path_in
from simclr.data.sources.source import ending, is_image
from simclr.errors import UserError

ARCHIVES = (".tar", ".tar.gz", ".tgz", ".tar.xz", ".txz", ".tar.bz2")
_PACKERS: dict[bytes, Callable[[IO[bytes]], IO[bytes]]] = {
    b"\x1f\x8b": gzip.open,  # type: ignore[dict-item]
    b"BZh": bz2.open,
    b"\xfd7zXZ": lzma.open,
}
_RECORD_BYTES = 10_240  # of zeros at the end, or of anything: what tar programs write at a time
_READ_AHEAD_BYTES = 1 << 17

_Place = tuple[int, int]
"""Offset in the unpacked archive, bytes."""


def tar_listing(path: Path, spec: str = "") -> Listing:
    """The members of a tar archive. A plain one is listed from header to header, a compressed one unpacked once. Of tars within it, those
    in a plain one are listed only when they are read. Raises UserError for an archive that ends early or is damaged."""
    listing = _listing(spec or str(path), lambda ahead: path.open("rb", buffering=ahead))
    listing.identity, listing.times = ends_of(path), str(path.stat().st_mtime_ns)
    return listing


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
    twice: list[str] = field(default_factory=list)
    """Files that stand in it more than once; the last counts, as for tar itself."""
    junk: Counter[str] = field(default_factory=Counter)
    ignored: Counter[str] = field(default_factory=Counter)


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


def _unpacked(file: IO[bytes]) -> tuple[IO[bytes], bool]:
    """The stream that `file` holds, and whether it is compressed."""
    start = file.read(6)
    file.seek(0)
    packer = next((packer for magic, packer in _PACKERS.items() if start.startswith(magic)), None)
    return (packer(file), True) if packer else (file, False)


def _listing(spec: str, opened: Callable[[int], IO[bytes]]) -> Listing:
    """The members of the archive that `opened(bytes to read ahead)` opens anew at each call."""
    with opened(io.DEFAULT_BUFFER_SIZE) as file, _sound(spec):
        stream, packed = _unpacked(file)
        members = _Members()
        _scan(stream, members, "", packed)
        rest = stream.read((1 << 20) + 1)
    if len(rest) > 1 << 20 or (len(rest) > _RECORD_BYTES and rest.strip(b"\0")):
        raise UserError(
            f"{spec} has an end mark with more behind it, so it was fetched with holes or is several archives in one file; "
            "fetch it again, or give the archives one by one"
        )
    found, lost = followed(members.links, members.files)
    places = members.files | {link: members.files[target] for link, target in found.items()}
    sizes = {name: size for name, (_, size) in sorted(places.items(), key=lambda kv: kv[1][0])}

    def read(names: Sequence[str]) -> Iterator[tuple[str, bytes]]:
        with opened(_READ_AHEAD_BYTES) as file, _sound(spec):
            stream, _ = _unpacked(file)
            for name in names:
                yield name, _content(stream, places[name], members.holes.get(places[name][0]))

    def within(name: str) -> Callable[[], Iterator[tuple[str, bytes]]]:
        place = members.inner[name]

        def pictures() -> Iterator[tuple[str, bytes]]:
            archive = _listing(f"{name} in {spec}", lambda ahead: io.BufferedReader(_Window(opened(0), place), max(ahead, 1)))
            yield from archive.read([path for path in archive.sizes if is_image(path)])
            for folder, more in archive.inner.items():
                yield from ((f"{folder}/{path}", data) for path, data in more())

        return pictures

    return Listing(
        spec=spec,
        sizes=sizes,
        read=read,
        seekable=not packed,
        inner={called: within(name) for called, name in stems(sorted(members.inner, key=lambda name: members.inner[name]), spec).items()},
        junk=members.junk,
        ignored=members.ignored + Counter({"link": len(lost)} if lost else {}),
        notes=oddities(spec, lost, members.twice),
    )


def _scan(stream: IO[bytes], found: _Members, prefix: str, packed: bool, end: int | None = None) -> None:
    """Read the headers of the archive that begins where `stream` stands into `found`. Tars within a compressed one are read here as well:
    later, each would have to be unpacked with all that lies before it."""
    archive = tarfile.TarFile(fileobj=stream, tarinfo=_Header)  # not `open`, which would guess the compression again
    while (member := archive.next()) is not None:
        archive.members.clear()  # type: ignore[attr-defined]  # tarfile keeps all headers, a kilobyte each
        begin, path = member.offset_data, prefix + path_in(member.name)
        if end is not None and archive.offset > end:
            raise OSError("unexpected end of data")
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
        elif packed and not path.lower().endswith(".tar"):
            found.ignored[ending(path)] += 1
        elif packed:
            stream.seek(begin)
            _scan(stream, found, f"{stem(path)}/", packed, begin + member.size)
        else:
            found.inner[path] = (begin, member.size)


def _content(stream: IO[bytes], place: _Place, pieces: list[_Place] | None) -> bytes:
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
