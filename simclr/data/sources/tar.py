"""Images in a tar archive, read in one pass."""

from __future__ import annotations

import tarfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from simclr.data.sources.source import Item, digest, ending, is_image, place
from simclr.errors import UserError

ARCHIVES = (".tar", ".tar.gz", ".tgz", ".tar.xz", ".txz", ".tar.bz2")


_END_BYTES = 1 << 20


def ends_of(path: Path) -> str:
    """A hash of an archive's size, first and last MiB, which identifies it without reading all of it."""
    size = path.stat().st_size
    with path.open("rb") as file:
        first = file.read(_END_BYTES)
        file.seek(max(size - _END_BYTES, 0))
        return digest(str(size), first, file.read())


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


def read_tar(path: Path, ignored: Counter[str], spec: str = "") -> Iterator[Item]:
    ignored.clear()
    try:
        with tarfile.open(path, "r|*", tarinfo=_Header) as archive:
            for member in archive:
                if not member.isfile():
                    continue
                if not is_image(member.name):
                    ignored[ending(member.name)] += 1
                    continue
                parts = tuple(p for p in PurePosixPath(member.name).parts if p not in ("", ".", "/"))
                split, label = place(parts)
                file = archive.extractfile(member)
                yield Item(split, label, member.name, file.read() if file is not None else b"")
    except (tarfile.TarError, EOFError, OSError) as error:
        raise UserError(f"{spec or path} ends early or is damaged ({error}); fetch it again") from None
