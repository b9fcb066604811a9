"""Features are read block by block: bounds on memory, and the same numbers as of the whole matrix."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import torch
import torch.nn.functional as F

from simclr.evaluation import knn, linear, rows
from simclr.evaluation.cores import Cores
from simclr.evaluation.regression import Regression, Scale, logits
from simclr.evaluation.rows import Rows
from tests.conftest import Within
from tests.support.paths import ROOT


def test_a_row_takes_less_than_its_feature_beside_it() -> None:
    """The bank normalised, or standardised with its held rows apart, was once or twice the features, and labels 12 bytes a class:
    4.8 and 1.9 times the features of 256 numbers with 20 classes."""
    code = "from pipelines.bench.probe import probe; print([row['bytes_per_row'] / row['feature_bytes'] for row in probe((40_000, 80_000), "
    done = subprocess.run(
        [sys.executable, "-c", code + "256, 20, 2)])"],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    shares = [float(share) for share in done.stdout.splitlines()[-1].strip("[]").split(",")]
    assert len(shares) == 2 and max(shares) < 1, done.stdout


def test_moments_of_chosen_rows_are_the_matrixs(within: Within) -> None:
    torch.manual_seed(0)
    h = torch.randn(5000, 70) * torch.logspace(-3, 3, 70) + 40
    index = torch.arange(0, 5000, 3)
    for some, expected in ((Rows(h), h), (Rows(h).chosen(index), h[index]), (Rows(h, index).between(100, 900), h[index][100:900])):
        mean, std = some.moments()
        within("mean", ((mean - expected.double().mean(0)) / expected.double().std(0)).abs().max().item(), 1e-2)
        within("std", (std / expected.double().std(0) - 1).abs().max().item(), 1e-3)
        assert torch.equal(torch.cat([x for _, x in some.blocks(64)]), expected)


def test_the_objective_of_several_cores_is_the_written_out_one(within: Within) -> None:
    """Mean cross-entropy of standardised features + decay / 2 |kernel|², with autograd's gradient, in float64."""
    torch.manual_seed(0)
    h, y, weights = torch.rand(700, 9) * 5 + 2, torch.randint(0, 12, (700,)), torch.randn(12, 10)
    scale = Scale(h.mean(0), h.std(0))
    w = weights.double().requires_grad_()
    x = ((h - scale.mean) / scale.std).double()
    expected = F.cross_entropy(x @ w[:, :-1].T + w[:, -1], y) + 0.05 * w[:, :-1].square().sum()
    expected.backward()
    threads = torch.get_num_threads()
    for count in (1, 3):
        torch.set_num_threads(count)
        with Cores(torch.device("cpu")) as cores:
            regression = Regression(Rows(h), y, scale, 12, cores)
            loss, gradient = regression(weights, 0.1)
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == count
        within("loss", abs(loss.item() - expected.item()) / expected.item(), 1e-6)
        within("gradient", (gradient - w.grad).abs().max().item(), 1e-6)  # type: ignore[operator]
    torch.set_num_threads(threads)
    z = torch.cat([z for _, z in logits(Rows(h), weights, scale)])
    within("logits", (z - (x @ w[:, :-1].T + w[:, -1])).abs().max().item(), 1e-4)


def test_spans_of_cores_cover_every_row_once() -> None:
    h, y = torch.randn(1 << 13, 70), torch.zeros(1 << 13, dtype=torch.int64)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    with Cores(torch.device("cpu")) as cores:
        regression = Regression(Rows(h), y, Scale(h.mean(0), h.std(0)), 3, cores)
    torch.set_num_threads(threads)
    assert len(regression.spans) == 2 and sum(len(span.rows) for span in regression.spans) == len(h)
    assert torch.equal(torch.cat([span.rows.h for span in regression.spans]), h)


def test_rows_with_labels_are_judged_without_a_copy_of_them(within: Within) -> None:
    torch.manual_seed(0)
    h, q = torch.randn(600, 8), torch.randn(90, 8)
    y = (h[:, :3]).argmax(1)
    some = torch.arange(0, 600, 2)
    near = knn.nearest(Rows(h, some), y[some], Rows(q), 7, 0.1, bank_block=50)
    copied = knn.nearest(h[some], y[some], q, 7, 0.1)
    assert torch.equal(near.index, copied.index) and torch.allclose(near.votes, copied.votes)
    scores, decay = linear.quick_probe(Rows(h, some), y[some], q, 3)
    expected, theirs = linear.quick_probe(h[some], y[some], q, 3)
    assert decay == theirs
    within("scores", (scores - expected).abs().max().item(), 1e-4)


def test_a_matrix_beyond_a_quarter_of_the_memory_lies_in_a_file(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(rows, "memory_bytes", lambda: 1000)
    h = rows.matrix(100, 3)
    h[:] = torch.arange(300.0).view(100, 3)
    assert isinstance(h.numpy().base, np.memmap) or h.numpy().sum() == np.arange(300).sum()
    mapped = [line for line in open("/proc/self/maps") if "(deleted)" in line and "/tmp" in line]  # noqa: PTH123, SIM115
    assert mapped
