"""Images below an s3:// prefix, or in an archive there."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import Future

from simclr.data.s3.uri import Address, copy_of, locked
from simclr.data.sources.folder import file_source
from simclr.data.sources.source import Item, Source
from simclr.data.sources.tar import read_tar

_OBJECTS_AT_ONCE = 16


def s3_prefix(at: Address) -> Source:
    from simclr.data.s3.store import Missing, Store

    store = Store(threads=_OBJECTS_AT_ONCE)

    def one(name: str) -> bytes:
        try:
            return store.read(at / name)
        except Missing:  # deleted since the listing: treated as a file that cannot be read
            return b""

    def read(chosen: list[str]) -> Iterator[bytes]:
        ahead: deque[Future[bytes]] = deque()
        try:
            for name in chosen:
                ahead.append(store.pool.submit(one, name))
                if len(ahead) == 4 * _OBJECTS_AT_ONCE:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            for waiting in ahead:
                waiting.cancel()

    return file_source(str(at), {found.name: found.etag for found in store.listing(at)}, read)


def s3_archive(at: Address) -> Source:
    from simclr.data.s3.store import Store

    store = Store()
    identity = store.look(at).etag
    ignored: Counter[str] = Counter()
    path = copy_of(at, "archives")

    def items() -> Iterator[Item]:
        with locked(path):
            store.download(at, path)
            try:
                yield from read_tar(path, ignored, str(at))
            finally:
                path.unlink()

    return Source(str(at), None, items, identity, ignored)
