"""The benches print their tables on a tiny setting. A clock that the test turns on shows how they count."""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import mmap
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch

from pipelines.bench.loader import loader
from pipelines.bench.memory import memory
from pipelines.bench.result import WARM_STEPS
from pipelines.bench.views import views
from simclr.config import Views
from simclr.errors import UserError
from simclr.views.two_views import two_views

bench_loader, bench_memory, bench_views = (importlib.import_module(f"pipelines.bench.{name}") for name in ("loader", "memory", "views"))
bench_listing = importlib.import_module("pipelines.bench.listing")


class Clock:
    """Stands for `time`, and stands still but for `passes`."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def passes(self, seconds: float) -> None:
        self.now_s += seconds

    def perf_counter(self) -> float:
        return self.now_s

    monotonic = perf_counter


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    for bench in ("loader", "memory", "views"):
        monkeypatch.setattr(f"pipelines.bench.{bench}.time", found)
    return found


def printed(out: str, name: str) -> float:
    """The number in the line that begins with `name`."""
    (number,) = re.findall(rf"^{re.escape(name)} +([\d,]+) (?:images|views)/s", out, re.MULTILINE)
    return float(number.replace(",", ""))


def test_bench_loader_prints_a_row_for_each_kind_of_resize(photographs: Path, capfd: pytest.CaptureFixture[str]) -> None:
    rows = loader(photographs, batch_size=8, steps=8, trials=1, threads=1, size_px=24)
    out = capfd.readouterr().out
    assert "two crops of 24 px from each of 240 JPEGs" in out and "n = 1" in out
    assert [row["name"] for row in rows] == ["FFCV, two pipelines", "bicubic", "bilinear", "area"] and rows[0]["ratio"] == 1
    names = ("FFCV, two pipelines", "decoded once, bicubic (default)", "decoded once, bilinear", "decoded once, area")
    for name, row in zip(names, rows, strict=True):
        assert printed(out, name) == round(row["median"]) > 0
        assert row["ratio"] == row["low"] == row["high"] == pytest.approx(row["median"] / rows[0]["median"])  # of one pair


def test_bench_loader_compares_crops_of_several_sizes(photographs: Path, capfd: pytest.CaptureFixture[str]) -> None:
    rows = loader(photographs, batch_size=8, steps=8, trials=1, threads=1, crops="2x24+3x16")
    out = capfd.readouterr().out
    assert "2x24+3x16 from each of 240 JPEGs" in out and [row["name"] for row in rows][1:] == ["2x24", "2x24+3x16", "5x24"]
    for text in ("2x24+", "x24", "2x24+0x16", "2 x 24"):
        with pytest.raises(UserError, match=r"expected numbers and sizes of crops, as 2x224\+6x96"):
            loader(photographs, 8, 8, 1, 1, crops=text)


def test_the_loaders_rate_is_of_the_batches_behind_the_warm_ones(clock: Clock) -> None:
    """3 s for each batch until the queue is full, then a quarter of a second for each of 8 images; what is left is not asked for."""
    asked = []

    def stream() -> Iterator[int]:
        for step in itertools.count():
            clock.passes(3.0 if step < WARM_STEPS else 0.25)
            asked.append(step)
            yield step

    assert bench_loader._rate(stream(), WARM_STEPS + 4, 8) == 32
    assert asked == list(range(WARM_STEPS + 4))


def test_bench_loader_refuses_what_it_cannot_compare(photographs: Path, patterns: Path) -> None:
    with pytest.raises(UserError, match="holds whole images, which nothing decodes"):
        loader(patterns, 8, 8, 1, 1)
    with pytest.raises(UserError, match=r"has 240 photographs; use --batch-size 240 or less"):
        loader(photographs, 241, 8, 1, 1)


def test_bench_views_prints_both_sizes(capfd: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    rows = views(batch_size=1, steps=3, trials=1, threads=threads, device=torch.device("cpu"))
    out = capfd.readouterr().out
    assert "views of 32 px on cpu" in out and "views of 224 px on cpu" in out and out.count(" views/s") == len(rows)
    small, large = out.split("views of 224 px")
    for row in rows:
        assert printed(small if row["size_px"] == 32 else large, row["name"]) == round(row["median"]) > 0
    if importlib.util.find_spec("kornia") is None:
        assert "kornia is not installed" in out and [row["name"] for row in rows] == ["ours", "ours, BYOL's"] * 2
    else:
        assert [(row["size_px"], row["name"]) for row in rows] == [(s, n) for s in (32, 224) for n in ("ours", "ours, BYOL's", "kornia")]


def test_the_views_rate_is_of_the_median_call_behind_the_warm_ones(clock: Clock) -> None:
    """6 views in calls of 9 and 9 s, which do not count, then of 1, 2 and 4 s."""
    seconds = iter([9.0, 9.0, 1.0, 4.0, 2.0])

    def call() -> torch.Tensor:
        clock.passes(next(seconds))
        return torch.zeros(1)

    assert bench_views.WARM == 2 and bench_views._views_per_s(call, 6, 5) == 3
    crops = torch.randint(0, 256, (2, 2, 32, 32, 3), dtype=torch.uint8)
    ours = bench_views._ours(crops, Views(size_px=32), torch.device("cpu"))()
    assert torch.equal(ours, two_views(crops, torch.arange(2), 0, Views(size_px=32), 0))


def test_the_memorys_rate_is_of_all_epochs_so_far(patterns: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten batches of 24 an epoch: two seconds a batch in the first, one in the others. What is resident is asked at an epoch's end."""
    from simclr.data import loader as data_loader

    batches, ends = data_loader.batches, []

    def timed(*given: Any) -> Iterator[data_loader.Batch]:
        for batch in batches(*given):
            clock.passes(2.0 if batch.epoch == 0 else 1.0)
            ends.append(batch.step)
            yield batch

    monkeypatch.setattr(data_loader, "batches", timed)
    monkeypatch.setattr(bench_memory, "_resident", lambda: (float(ends[-1]), 7.0))
    rows = bench_memory._run(str(patterns), 24, 3, 1, "page")
    assert rows == [(1, 9.0, 7.0, 12.0), (2, 19.0, 7.0, 16.0), (3, 29.0, 7.0, 18.0)]


def test_what_is_resident_grows_by_what_is_written_to() -> None:
    before, _ = bench_memory._resident()
    # Memory of its own: malloc may give some that this process has written to before.
    written = np.frombuffer(mmap.mmap(-1, 64 << 20, flags=mmap.MAP_PRIVATE), np.uint8)
    written[:] = 1
    after, _ = bench_memory._resident()
    assert 60 < after - before < 80 and written[-1] == 1  # MiB


@pytest.mark.parametrize("cache", ["page", "process"])
def test_bench_memory_looks_at_the_ends_of_epochs(patterns: Path, cache: Literal["page", "process"]) -> None:
    rows = bench_memory._run(str(patterns), 24, 3, 1, cache)
    assert [row[0] for row in rows] == [1, 2, 3] and all(min(row[1:]) > 0 for row in rows)
    assert max(row[1] for row in rows) - min(row[1] for row in rows) < 20  # MiB
    with pytest.raises(UserError, match="--epochs is 0"):
        memory(patterns, 24, 0, 1)
    with pytest.raises(UserError, match="has 240 training images; use that or less"):
        memory(patterns, 241, 1, 1)


@pytest.mark.parametrize("how", ["planned", "one after the other", "side by side"])
def test_bench_listing_lists_every_key_of_its_bucket(how: str) -> None:
    row = bench_listing._measured(30_000, 0.0, how)  # which counts them
    assert 0 < row["peak_mib"] < 300 and row["keys_per_s"] > 0
    assert row.get("portions", 30) == 30


def test_bench_order_takes_the_peak_of_an_epochs_first_batch() -> None:
    from pipelines.bench.order import _ids

    sort, walk = (_ids(200_000, "sort", 64, 1), _ids(10**9, "by size", 64, 1))
    assert sort["peak_mib"] > 200_000 * 8 / 2**20 and walk["peak_mib"] < 1
    assert (sort["images"], walk["images"]) == (200_000, 10**9)


def test_bench_order_reads_a_made_up_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipelines.bench import order
    from simclr.data.loader import labels

    monkeypatch.setattr(order, "_SHARD", 200)
    assert (labels(order.made(tmp_path / "made", 3)) == -1).sum() == 600
