"""The objects below a prefix, by many requests at once: a listing is cut into ranges of keys where its folders begin.

S3 gives a thousand keys a request and each page's successor only with the page. But a listing may begin behind any key (StartAfter), so
ranges between the names of folders are listed side by side, and however keys lie over the folders, there are no more pages than in one
listing, but for the last of each range.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

from simclr.data.s3.uri import Address
from simclr.errors import UserError

_MOST_EMPTY = 100  # pages of a listing, in a row
_RANGES, _ENOUGH = 256, 64  # that are listed, and folders from which on none are looked for deeper
_DEEPEST = 4  # levels of folders that are looked through for places to cut at
_MOST_PAGES = 200  # of folders, in one level
_NO_ORDER = "--x-s3"  # directory buckets, which list in no order and know no StartAfter


class Disordered(Exception):
    """A server whose listings are not in the order of their keys, or do not begin behind a key: they cannot be cut."""


@dataclass(frozen=True, slots=True)
class Object:
    """An object, as a listing or `look` describes it; `name` is relative to the address that was asked for."""

    name: str
    bytes: int
    etag: str
    sha256: str = ""
    """Known if we uploaded the object, and from `look` alone."""


@dataclass(slots=True)
class Page:
    """A page of a listing."""

    objects: list[Object]
    folders: list[str]
    """Prefixes, as keys below the place, where the listing stops at slashes."""
    after: str
    """Token of the next page; "" = this is the last."""


class Asks(Protocol):
    """Asks for a page of the listing of a place, as `Store.page` does."""

    def __call__(self, below: str = "", *, after: str = "", behind: str = "", folders: bool = False) -> Page: ...


@dataclass(slots=True)
class Pages:
    """What is watched of a listing's pages. Raises UserError for a listing that does not come to an end: a page again, or page after page
    with nothing in it; and for more than `most` objects."""

    place: Address
    most: int
    count: int = 0
    empty: int = 0
    seen: set[str] = field(default_factory=set)
    """First key of each page, and where each goes on."""

    def see(self, page: Page) -> None:
        self.count, self.empty = self.count + len(page.objects), 0 if page.objects else self.empty + 1
        if self.count > self.most:
            raise UserError(f"{self.place} holds more than {self.most:,} objects, which is no such directory; correct the address")
        marks = {f"key {page.objects[0].name}"} if page.objects else set()
        marks |= {f"token {page.after}"} if page.after else set()
        if marks & self.seen or self.empty > _MOST_EMPTY:
            raise UserError(f"the listing of {self.place} does not end: the server repeats itself; check the endpoint")
        self.seen |= marks


def one_after_the_other(page_of: Asks, place: Address, most: int, first: Page | None = None) -> Iterator[list[Object]]:
    """Every object below `place`/, a page at a time, as S3 lists them; the `first` page may be there already."""
    watched, page = Pages(place, most), first or page_of()
    while True:
        watched.see(page)
        yield page.objects
        if not page.after:
            return
        page = page_of(after=page.after)


@dataclass(slots=True)
class _Range:
    """Keys behind `start` up to `end`; None = from the beginning, to the end."""

    start: str | None
    end: str | None
    watched: Pages
    after: str = ""

    def take(self, page: Page) -> tuple[list[Object], bool]:
        """Those of the page's objects that belong to the range, and whether more may come. Raises Disordered."""
        self.watched.see(page)
        for found in page.objects:
            if self.start is not None and found.name <= self.start:
                raise Disordered
            self.start = found.name
        self.after = page.after
        if self.end is not None and self.start is not None and self.start > self.end:
            return [found for found in page.objects if found.name <= self.end], False
        return page.objects, bool(page.after)


def side_by_side(page_of: Asks, place: Address, most: int, pool: ThreadPoolExecutor, at_once: int) -> Iterator[list[Object]]:
    """Every object below `place`/, a page at a time, in no order: `at_once` pages are asked for in the threads of `pool`. A listing of one
    page, or without folders, is asked for as one. Raises Disordered for a server that cannot do it; then nothing that was given counts."""
    first = page_of()
    if not first.after or place.bucket.endswith(_NO_ORDER) or not (cuts := _cuts(page_of, pool)):
        yield from one_after_the_other(page_of, place, most, first)
        return
    ranges = iter([_Range(start, end, Pages(place, most)) for start, end in itertools.pairwise([None, *cuts, None])])
    asked: dict[Future[Page], _Range] = {}
    count = 0

    def ask(of: _Range) -> None:
        asked[pool.submit(page_of, after=of.after, behind="" if of.after else of.start or "")] = of

    try:
        for of in itertools.islice(ranges, at_once):
            ask(of)
        while asked:
            for done in wait(asked, return_when=FIRST_COMPLETED).done:
                of = asked.pop(done)
                objects, more = of.take(done.result())
                following = of if more else next(ranges, None)
                if following is not None:
                    ask(following)
                count += len(objects)
                if count > most:
                    raise UserError(f"{place} holds more than {most:,} objects, which is no such directory; correct the address")
                yield objects
    finally:
        for waiting in asked:
            waiting.cancel()


def _cuts(page_of: Asks, pool: ThreadPoolExecutor) -> list[str]:
    """Names of folders at which the listing is cut, ascending: of the first levels that have enough, evenly chosen."""
    found: set[str] = set()
    level = [""]
    for _ in range(_DEEPEST):
        if len(found) >= _ENOUGH:
            break
        pages = _MOST_PAGES // len(level)
        level = [name for names in list(pool.map(partial(_folders, page_of, pages), level)) for name in names]
        if not level:
            break
        found |= set(level)
    every = sorted(found)
    return every if len(every) < _RANGES else [every[at * len(every) // _RANGES] for at in range(_RANGES)]


def _folders(page_of: Asks, pages: int, folder: str) -> list[str]:
    """The folders directly below one, or the first of very many; none behind a page of objects alone."""
    found: list[str] = []
    after = ""
    for _ in range(pages):
        page = page_of(folder, after=after, folders=True)
        found += page.folders
        if not page.folders or not (after := page.after):
            break
    return found
