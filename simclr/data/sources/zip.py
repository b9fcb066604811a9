"""Zip archives."""

from __future__ import annotations

import stat
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from simclr.data.sources.members import Listing, ends_of, followed, junk_in, linked, oddities, path_in
from simclr.data.sources.source import is_image, is_text
from simclr.errors import UserError

_KNOWN = {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA}
_UNIX = 3
_DAMAGE = (zipfile.BadZipFile, EOFError, OSError, zlib.error, ValueError, NotImplementedError)


def zip_listing(path: Path, spec: str = "") -> Listing:
    """The members of a zip archive, from the directory at its end. Archives in it are left out.

    Raises UserError for an archive that is damaged, or whose pictures are encrypted or packed by a method that Python lacks."""
    spec = spec or str(path)
    try:
        archive = zipfile.ZipFile(path)  # its handle is shared by all readers, under a lock of its own
    except _DAMAGE as error:
        raise UserError(f"{spec} ends early or is damaged ({error}); fetch it again") from None
    members: dict[str, zipfile.ZipInfo] = {}
    links: dict[str, str] = {}
    junk: Counter[str] = Counter()
    twice: list[str] = []
    for member in archive.infolist():
        if member.is_dir():
            continue
        # Programs of Windows write \ between folders, against the format.
        name = path_in(member.filename if member.create_system == _UNIX else member.filename.replace("\\", "/"))
        if folder := junk_in(name):
            junk[folder] += 1
            continue
        link = member.create_system == _UNIX and stat.S_ISLNK(member.external_attr >> 16)
        if link or is_image(name) or is_text(name):
            _require_readable(member, name, spec)
        if link:
            links[name] = linked(name, _content(archive, member, spec).decode(errors="surrogateescape"))
            continue
        if name in members:
            twice.append(name)
        members[name] = member
    found, lost = followed(links, members)
    members |= {link: members[target] for link, target in found.items()}
    in_order = sorted(members, key=lambda name: members[name].header_offset)

    def read(names: Sequence[str]) -> Iterator[tuple[str, bytes]]:
        for name in names:
            yield name, _content(archive, members[name], spec)

    return Listing(
        spec=spec,
        sizes={name: members[name].file_size for name in in_order},
        read=read,
        junk=junk,
        ignored=Counter({"link": len(lost)} if lost else {}),
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


def _content(archive: zipfile.ZipFile, member: zipfile.ZipInfo, spec: str) -> bytes:
    try:
        with archive.open(member) as file:
            # Asked for its stated size alone, so that a file which unpacks to more than it says does not fill the memory.
            data = file.read(member.file_size)
    except _DAMAGE as error:
        raise UserError(f"{spec} ends early or is damaged ({error}); fetch it again") from None
    if len(data) != member.file_size:
        raise UserError(f"{spec} is damaged: {member.filename} has {len(data):,} bytes and not {member.file_size:,}; fetch it again")
    return data
