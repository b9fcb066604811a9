"""`simclr bench probe`: bytes that kNN and the quick probe take for a row, beside the features themselves."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from pipelines.bench.result import Row
from simclr.evaluation import knn, linear

_TEST = 50_000  # ImageNet's validation images
_TRAIN = 1_281_167
_QUERIES, _K = 200, 200


def probe(sizes: tuple[int, int], d: int, classes: int, iterations: int = 11) -> list[Row]:
    """Print and return, for kNN and the probe, the peak of the process's own memory at two numbers of rows, the bytes of a further row,
    and what follows for ImageNet's. The features, which the caller has, are not in it; `iterations` fill L-BFGS's history.
    """
    rows = []
    for name, work in (("kNN", _knn), ("probe", _probe)):
        few, many = (_peak(work, n, d, classes, iterations) for n in sizes)
        per_row = (many - few) / (sizes[1] - sizes[0])
        # kNN also keeps its queries of unit length, and twice, where it merges, 12 bytes for each neighbour.
        queries = (4 * d + 24 * _K) * _TEST if name == "kNN" else 4 * classes * _TEST
        imagenet = 4 * d * (_TRAIN + _TEST) + queries + max(few + per_row * (_TRAIN - sizes[0]), few)
        row: Row = {"name": name, "d": d, "classes": classes, "bytes_per_row": per_row, "feature_bytes": 4 * d}
        row |= {f"peak_mib_{n}": peak / 2**20 for n, peak in zip(sizes, (few, many), strict=True)} | {"imagenet_gib": imagenet / 2**30}
        print(
            f"{name}: {few / 2**20:,.0f} MiB at {sizes[0]:,} rows, {many / 2**20:,.0f} at {sizes[1]:,}: {per_row:,.0f} bytes a row beside "
            f"the {4 * d:,} of its feature; ImageNet's {_TRAIN:,} and {_TEST:,} rows: {imagenet / 2**30:.1f} GiB with their features"
        )
        rows.append(row)
    return rows


def _knn(h: torch.Tensor, y: torch.Tensor, test_h: torch.Tensor, classes: int, iterations: int) -> None:
    knn.nearest(h, y, test_h, _K, 0.1)


def _probe(h: torch.Tensor, y: torch.Tensor, test_h: torch.Tensor, classes: int, iterations: int) -> None:
    linear.quick_probe(h, y, test_h, classes, (1.0, 0.1), iterations)


def _peak(work: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, int, int], None], n: int, d: int, classes: int, iterations: int) -> int:
    """Bytes by which the process's own memory rises at most."""
    torch.manual_seed(0)
    h, y, test_h = torch.randn(n, d), torch.arange(n) % classes, torch.randn(_QUERIES, d)
    work(h[: 8 * classes], y[: 8 * classes], test_h, classes, 1)  # what a first call keeps is not a row's
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten (proc(5))
    before = _kib("VmRSS")
    work(h, y, test_h, classes, iterations)
    return (_kib("VmHWM") - before) * 1024


def _kib(field: str) -> int:
    return int(dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())[field].split()[0])
