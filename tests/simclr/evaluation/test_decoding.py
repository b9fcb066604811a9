"""Pictures that are decoded ahead, in threads and in processes: the same ones, whatever dies meanwhile."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from simclr.config import Resize
from simclr.data import limits
from simclr.data.depth import Rule
from simclr.data.sources.source import Item, Unread
from simclr.errors import UserError
from simclr.evaluation import decoding
from simclr.evaluation.decoding import Picture, Processes, Threads, ahead
from simclr.views import preprocessing as views
from simclr.views.preprocessing import Preprocessing
from tests.support.paths import ROOT
from tests.support.processes import alive, children
from tests.support.resize import reference

SEEN = Preprocessing(size_px=32, centre_crop=0.875, resize="bicubic", mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))
ONCE = b"deadly once: "
"""Bytes that kill the process that decodes them the first time, and are unreadable the second time; behind it the path of a mark."""
PROGRAM = (
    f"""
import os, pathlib
import simclr.evaluation.decoding as d
real = d.decoded
def decoded(data, rule):
    if not data.startswith({ONCE!r}):
        return real(data, rule)
    mark = pathlib.Path(data[{len(ONCE)}:].decode())
    if not mark.exists():
        mark.touch()
        os.kill(os.getpid(), 9)
    raise d.Unreadable("it was read in the end")
d.decoded = decoded
"""
    + decoding._PROGRAM
)


def encoded(kind: str, height: int, width: int) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(height).integers(0, 256, (height, width, 3), np.uint8)
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def items(folder: Path) -> list[Item]:
    """Of every kind that sources give."""
    (folder / "a.jpg").write_bytes(encoded("JPEG", 50, 40))
    data = [
        folder / "a.jpg",
        folder / "missing.jpg",
        encoded("PNG", 33, 90),
        encoded("PNG", 33, 90)[:200],
        np.full((60, 70, 3), 9, np.uint8),
        Unread("not fetched"),
        np.full((32, 32, 3), 7, np.uint8),
        Image.new("L", (2100, 2000), 5),
    ]
    buffer = io.BytesIO()
    data[-1].save(buffer, "PNG")  # type: ignore[union-attr]
    data[-1] = buffer.getvalue()
    return [Item("train", f"class{i}", f"{i}", one) for i, one in enumerate(data)]  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def processes() -> Iterator[Processes]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoding, "_PROGRAM", PROGRAM)
        patch.setattr(limits.ROOM, "pixels", 4 << 20)
        made = Processes(2, 8, SEEN, Rule())
        yield made
        rest, (one, _) = limits.ROOM.pixels, made._all
        made._end()
        assert limits.ROOM.pixels == rest + 2 * made._told[3] and one.process.poll() is not None


def kept(pictures: Iterator[Picture]) -> list[Picture]:
    return [replace(found, x=None if found.x is None else found.x.clone()) for found in pictures]


@pytest.mark.parametrize("kernel", ["bicubic", "bilinear", "area"])
@pytest.mark.parametrize(("height", "width"), [(41, 37), (20, 30), (60, 64), (32, 32), (150, 200)])
def test_one_picture_is_cut_as_a_batch_is(monkeypatch: pytest.MonkeyPatch, kernel: Resize, height: int, width: int) -> None:
    seen = replace(SEEN, resize=kernel)
    pixels = torch.randint(0, 256, (height, width, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(height))
    expected = seen(pixels[None])[0]
    bound = 1e-6 * float(expected.abs().max())
    torch.testing.assert_close(seen.of_picture(pixels), expected, rtol=0, atol=bound)
    monkeypatch.setattr(views, "_LARGE_PX", 100)
    torch.testing.assert_close(seen.of_picture(pixels), expected, rtol=0, atol=bound)
    if height == 41:
        plain = replace(seen, mean=(0.0,) * 3, std=(1.0,) * 3).of_picture(pixels).permute(1, 2, 0)
        box = seen.boxes(np.array([(height, width)]))[0]
        assert np.abs(255 * plain.numpy() - reference(pixels.numpy(), box, 32, kernel)).max() < 1e-3


def test_processes_give_what_threads_give(processes: Processes, tmp_path: Path) -> None:
    some = items(tmp_path)
    expected = kept(ahead(iter(some), Threads(2, 8, SEEN, Rule())))
    assert [bool(found.reason) for found in expected] == [False, True, False, True, False, True, False, False]
    found = kept(ahead(iter(some * 9), processes))  # more than lie ready at once
    assert len(found) == 72
    for one, other in zip(found, expected * 9, strict=True):
        assert replace(one, x=None) == replace(other, x=None)
        assert (one.x is None) == (other.x is None) and (one.x is None or torch.equal(one.x, other.x))  # type: ignore[arg-type]
    assert "memfd:simclr-pictures" in Path("/proc/self/maps").read_text()  # /dev/shm may be full
    assert len(processes._free) == processes.most and not processes._berths


def test_a_process_that_dies_is_replaced(processes: Processes, tmp_path: Path) -> None:
    once = Item("train", None, "once", ONCE + str(tmp_path / "mark").encode())
    some = [*items(tmp_path), once, *items(tmp_path)]
    found = kept(ahead(iter(some), processes))
    assert (tmp_path / "mark").exists() and found[8].reason == "it was read in the end"
    for one, other in zip(found[:8], found[9:], strict=True):
        assert replace(one, x=None) == replace(other, x=None) and (one.x is None or torch.equal(one.x, other.x))  # type: ignore[arg-type]
    assert len(processes._free) == processes.most and len(processes._all) == 2


class Deadly:
    """A process that a picture called bad kills."""

    began = 0

    def __init__(self, memory: int, told: tuple[Any, ...]) -> None:
        Deadly.began += 1

    def ask(self, first: int, items: Sequence[Item]) -> tuple[list[Picture], str, str]:
        if any(item.name == "bad" for item in items):
            raise EOFError
        return [Picture(item, "", 0, 0, None, "no picture") for item in items], "", ""

    def end(self) -> str:
        return "SIGSEGV"


def test_the_picture_that_kills_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "_Process", Deadly)
    made = Processes(2, 8, SEEN, Rule())
    named = [Item("train", None, name, b"x") for name in ("a", "b", "bad", "c", "d")]
    with pytest.raises(UserError, match=r"each process that decoded bad died \(SIGSEGV\): out of memory, or a picture that crashes"):
        list(ahead(iter(named), made))
    assert Deadly.began == 5  # one for all four, two for that picture alone
    assert [found.item.name for found in ahead(iter(named[:2]), made)] == ["a", "b"] and len(made._free) == made.most
    made._all.clear()  # they are none
    made._end()


def test_a_bug_and_a_sentence_come_back(processes: Processes) -> None:
    with pytest.raises(RuntimeError, match=r"(?s)in a process that decodes pictures:\nTraceback .*\nTypeError"):
        list(ahead(iter([Item("train", None, "x", 5)]), processes))  # type: ignore[arg-type]
    assert (
        decoding._answered(lambda at, item: (_ for _ in ()).throw(UserError("a sentence")), 0, [Item("", None, "", b"")])[1] == "a sentence"
    )


def test_large_inputs_bound_what_lies_ready() -> None:
    class Made(Processes):
        def _start(self) -> None:
            pass

    for size in (32, 224, 1024, 4096):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(decoding, "_mapped", lambda memory, places: torch.empty(places, device="meta"))
            patch.setattr(decoding, "_shared", lambda size: os.open(os.devnull, os.O_RDONLY))
            made = Made(15, 64, replace(SEEN, size_px=size), Rule())
        made._end()
        taken = made._x.numel() * 4
        assert made.bundle >= 1 and made.most >= 15 and (taken <= 256 << 20 or made.most * made.bundle == 15), (size, taken)
        if size <= 224:
            assert made.bundle == 4 and made.most * 4 >= 64 + 15 * 4


def test_no_process_outlives_the_one_that_began_it() -> None:
    program = (
        "import sys, time; from simclr.evaluation.decoding import *; from tests.simclr.evaluation.test_decoding import SEEN\n"
        "d = Processes(1, 8, SEEN, Rule()); some = [Item('', None, '', np.zeros((900, 900, 3), np.uint8))] * 9\n"
        "while True: print(len(list(ahead(iter(some), d))), flush=True)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    assert process.stdout is not None and process.stdout.readline() == b"9\n"
    below = children(process.pid)
    assert len(below) == 1
    process.kill()
    process.stdout.read()
    process.wait(30)
    until = time.monotonic() + 30
    while any(alive(pid) for pid in below):
        assert time.monotonic() < until
        time.sleep(0.05)
