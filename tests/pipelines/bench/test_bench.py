"""The benches print their tables on a tiny setting. No test checks a measured figure."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Literal

import pytest
import torch

from pipelines.bench.loader import loader
from pipelines.bench.memory import _run, memory
from pipelines.bench.views import views
from simclr.errors import UserError


def test_bench_loader_prints_a_row_for_each_kind_of_resize(photographs: Path, capfd: pytest.CaptureFixture[str]) -> None:
    rows = loader(photographs, batch_size=8, steps=8, trials=1, threads=1, size_px=24)
    out = capfd.readouterr().out
    assert "two crops of 24 px from each of 240 JPEGs" in out and "n = 1" in out
    assert [row["name"] for row in rows] == ["FFCV, two pipelines", "bicubic", "bilinear", "area"] and rows[0]["ratio"] == 1
    for name in ("FFCV, two pipelines", "bicubic (default)", "bilinear", "area"):
        assert any(name in line and "images/s" in line for line in out.splitlines())


def test_bench_loader_refuses_what_it_cannot_compare(photographs: Path, patterns: Path) -> None:
    with pytest.raises(UserError, match="holds whole images, which nothing decodes"):
        loader(patterns, 8, 8, 1, 1)
    with pytest.raises(UserError, match=r"has 240 photographs; use --batch-size 240 or less"):
        loader(photographs, 241, 8, 1, 1)


def test_bench_views_prints_both_sizes(capfd: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    rows = views(batch_size=1, steps=3, trials=1, threads=threads, device=torch.device("cpu"))
    out = capfd.readouterr().out
    assert "views of 32 px on cpu" in out and "views of 224 px on cpu" in out and out.count(" views/s") >= 2
    if importlib.util.find_spec("kornia") is None:
        assert "kornia is not installed" in out and [row["name"] for row in rows] == ["ours", "ours"]
    else:
        assert [(row["size_px"], row["name"]) for row in rows] == [(s, n) for s in (32, 224) for n in ("ours", "kornia")]


@pytest.mark.parametrize("cache", ["page", "process"])
def test_bench_memory_looks_at_the_ends_of_epochs(patterns: Path, cache: Literal["page", "process"]) -> None:
    rows = _run(str(patterns), 24, 3, 1, cache)
    assert [row[0] for row in rows] == [1, 2, 3] and all(min(row[1:]) > 0 for row in rows)
    assert max(row[1] for row in rows) - min(row[1] for row in rows) < 20  # MiB
    with pytest.raises(UserError, match="--epochs is 0"):
        memory(patterns, 24, 0, 1)
    with pytest.raises(UserError, match="has 240 training images; use that or less"):
        memory(patterns, 241, 1, 1)
