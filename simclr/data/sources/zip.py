"""Zip archives."""

from __future__ import annotations

import contextlib
import stat
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from simclr.data.sources.members import Listing, ends_of, followed, junk_in, linked, oddities, path_in
from simclr.data.sources.source import MOST_NAME, is_image, is_text, too_long
from simclr.errors import UserError

_KNOWN = {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA}
_UNIX = 3
_PIECE_BYTES = 4096
_BOMB_BYTES, _BOMB_RATIO = 256 << 20, 200  # unpacked pictures and texts, and as a multiple of the archive
_MANY, _LEAST_EACH_BYTES = 200_000, 300  # members, and what a small picture takes in an archive, with its two headers
_LONG_END_BYTES = 76  # of zip64's records, between the directory and the last record
_ENTRY = b"PK\1\2"
_LENGTH, _AT = 5, 9  # in what zipfile says of the last record: the directory's bytes, the record's place
_COUNTED_BYTES = 1 << 20  # at a time


def zip_listing(path: Path, spec: str = "") -> Listing:
    """The members of a zip archive, from the directory at its end. Archives in it are left out.

    Raises UserError for an archive that is damaged, or whose pictures are encrypted or packed by a method that Python lacks."""
    spec = spec or str(path)
    _require_few(path, spec)
    with _sound(spec):
        archive = zipfile.ZipFile(path)  # its handle is shared by all readers, under a lock of its own
    size = path.stat().st_size
    _require_modest(archive.infolist(), size, spec)
    members: dict[str, zipfile.ZipInfo] = {}
    links: dict[str, str] = {}
    junk, ignored = Counter[str](), Counter[str]()
    twice: list[str] = []
    for member in archive.infolist():
        if member.is_dir():
            continue
        # Programs of Windows write \ between folders, against the format.
        name = path_in(member.filename if member.create_system == _UNIX else member.filename.replace("\\", "/"))
        if folder := junk_in(name):
            junk[folder] += 1
            continue
        if too_long(name):
            ignored["name too long"] += 1
            continue
        link = member.create_system == _UNIX and stat.S_ISLNK(member.external_attr >> 16)
        if link or is_image(name) or is_text(name):
            _require_readable(member, name, spec)
        if link:
            if member.file_size <= MOST_NAME:
                links[name] = linked(name, _content(archive, member, spec).decode(errors="surrogateescape"))
            else:
                ignored["link"] += 1
            continue
        if name in members:
            twice.append(name)
        members[name] = member
    found, lost = followed(links, members)
    members |= {link: members[target] for link, target in found.items()}
    in_order = sorted(members, key=lambda name: members[name].header_offset)

    def read(names: Iterable[str]) -> Iterator[tuple[str, bytes]]:
        for name in names:
            yield name, _content(archive, members[name], spec)

    return Listing(
        spec=spec,
        sizes={name: members[name].file_size for name in in_order},
        read=read,
        junk=junk,
        ignored=ignored + Counter({"link": len(lost)} if lost else {}),
        notes=oddities(spec, lost, twice),
        identity=ends_of(path),
        times=str(path.stat().st_mtime_ns),
    )


def _require_readable(member: zipfile.ZipInfo, name: str, spec: str) -> None:
    if member.flag_bits & 1:
        raise UserError(f"{name} in {spec} is encrypted; unpack it with its password, and give the folder")
    if member.compress_type not in _KNOWN:
        method = zipfile.compressor_names.get(member.compress_type, "unknown")  # type: ignore[attr-defined]
        raise UserError(
            f"{name} in {spec} is packed by method {member.compress_type} ({method}), which Python lacks; unpack it, and give the folder"
        )


def _require_modest(members: Sequence[zipfile.ZipInfo], size: int, spec: str) -> None:
    """Raise UserError for an archive of `size` bytes whose members share bytes, or unpack to far more than pictures do."""
    wanted = sum(member.file_size for member in members if is_image(member.filename) or is_text(member.filename))
    packed = sum(member.compress_size for member in members)
    if packed <= size and wanted <= _BOMB_BYTES + _BOMB_RATIO * size:
        return
    raise UserError(
        f"{spec} has {size / 2**20:,.1f} MiB and states {len(members):,} files of {packed / 2**20:,.1f} MiB that unpack to "
        f"{wanted / 2**20:,.0f} MiB, which no pictures do; if it is sound, unpack it, and give the folder"
    )


def _require_few(path: Path, spec: str) -> None:
    """Raise UserError for an archive with far more entries in its directory than it has bytes for files. zipfile takes ten microseconds
    for each, before anything of them is known, and goes by the directory's size alone, not by the number that the record states."""
    size = path.stat().st_size
    with path.open("rb") as file, _sound(spec):
        # zipfile's own name for how it finds the last record: another search could find another one. A public count of entries would do.
        record: Any = zipfile._EndRecData(file)  # type: ignore[attr-defined]
        if record is None:
            return  # which is damaged
        end = record[_AT] - (_LONG_END_BYTES if record[0] == b"PK\6\6" else 0)
        place, found, last = max(end - record[_LENGTH], 0), 0, b""
        file.seek(place)
        while place < end and (piece := file.read(min(_COUNTED_BYTES, end - place))):
            found += (last + piece).count(_ENTRY)
            place, last = place + len(piece), piece[1 - len(_ENTRY) :]
    if found > _MANY + size // _LEAST_EACH_BYTES:
        raise UserError(
            f"{spec} has {size / 2**20:,.1f} MiB and states {found:,} files, more than pictures fit; if it is sound, unpack it, and give "
            "the folder"
        )


@contextlib.contextmanager
def _sound(spec: str) -> Iterator[None]:
    """zipfile and its unpackers raise nearly anything for a damaged archive (BadZipFile, struct.error, LZMAError …)."""
    try:
        yield
    except Exception as error:
        raise UserError(f"{spec} ends early or is damaged ({error}); fetch it again") from None


def _content(archive: zipfile.ZipFile, member: zipfile.ZipInfo, spec: str) -> bytes:
    # Asked for its stated size alone, so that a file which unpacks to more than it says does not fill the memory. Of what bzip2 and LZMA
    # packed, zipfile unpacks as many packed bytes as it is asked for.
    step = member.file_size if member.compress_type in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) else _PIECE_BYTES
    pieces, left = [], member.file_size
    with _sound(spec), archive.open(member) as file:
        while left > 0 and (piece := file.read(min(left, step))):
            pieces.append(piece)
            left -= len(piece)
    data = pieces[0] if len(pieces) == 1 else b"".join(pieces)
    if len(data) != member.file_size:
        raise UserError(f"{spec} is damaged: {member.filename} has {len(data):,} bytes and not {member.file_size:,}; fetch it again")
    return data
