"""A folder of whole files, on disk or below an s3:// prefix: where a job by parts puts its outputs."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from simclr import files
from simclr.data.s3.uri import address
from simclr.errors import UserError

if TYPE_CHECKING:
    from simclr.data.s3.store import Store


class Place:
    """A folder that holds a file whole or not at all. Several processes may write different files to it, and the same file twice."""

    def __init__(self, place: str | Path) -> None:
        self.at = address(place)
        self.path = Path(place)
        self._store: Store | None = None

    def __str__(self) -> str:
        return str(self.at or self.path)

    @property
    def store(self) -> Store:
        """S3's, made when it is first needed."""
        if self._store is None:
            from simclr.data.s3.store import Store

            self._store = Store()
        return self._store

    def names(self) -> dict[str, int]:
        """Name → bytes of every file that lies here, not in folders below; {} where there is no such folder."""
        if self.at is not None:
            return {found.name: found.bytes for found in self.store.listing(self.at) if "/" not in found.name}
        if not self.path.exists():
            return {}
        if not self.path.is_dir():
            raise UserError(f"{self.path} is a file; expected a folder")
        found = {}
        with os.scandir(self.path) as entries:
            for entry in entries:
                with contextlib.suppress(FileNotFoundError):  # removed meanwhile
                    if entry.is_file(follow_symlinks=False):
                        found[entry.name] = entry.stat(follow_symlinks=False).st_size
        return found

    def put(self, name: str, file: Path) -> None:
        """Move the `file` of this machine here, as `name`."""
        if self.at is not None:
            self.store.upload(file, self.at / name)
            file.unlink()
            return
        self.path.mkdir(parents=True, exist_ok=True)
        with files.whole(self.path / name) as scratch:  # the file may lie on another disk
            shutil.copyfile(file, scratch)
            with scratch.open("rb") as written:
                os.fsync(written.fileno())
        file.unlink()

    def read(self, name: str, most: int = files.MOST_JSON_BYTES) -> bytes | None:
        """The bytes of a small file; None if there is none. Raises UserError for more than `most`."""
        if self.at is not None:
            from simclr.data.s3.answers import Missing

            try:
                return self.store.read(self.at / name, most)
            except Missing:
                return None
        path = self.path / name
        if not path.is_file():
            return None
        files.require_small(path, "remove it", most)
        with open(path, "rb", opener=files.plain) as file:
            return file.read()

    def write(self, name: str, data: bytes) -> None:
        """A small file."""
        with tempfile.TemporaryDirectory(prefix="simclr-") as scratch:
            (Path(scratch) / name).write_bytes(data)
            self.put(name, Path(scratch) / name)

    def get(self, name: str, folder: Path) -> Path:
        """The file on this machine: where it lies, or, from S3, fetched into `folder`."""
        if self.at is None:
            return self.path / name
        path = folder / name
        if not path.is_file():
            self.store.download(self.at / name, path)
        return path

    def remove(self, name: str) -> None:
        """Remove a file, if it is there."""
        if self.at is not None:
            self.store.delete(self.at / name)
        else:
            (self.path / name).unlink(missing_ok=True)
