"""The figures of a sweep against given numbers, and the published numbers against the means that the paper prints."""

from __future__ import annotations

import csv
import itertools
import math
import re
from pathlib import Path
from typing import Any

import pytest

from simclr.optim import lr_peak
from tests.conftest import Within
from tests.support.sweeps import a_sweep, trained
from tune import drawing, paper_numbers, spaces
from tune.report import agreement, report
from tune.resolve import Point

FEWER: dict[str, dict[str, list[Any]]] = {
    "temperature-lr": {"train.batch_size": [128]},
    "augmentation-pairs": {"views.operations": ["crop", "blur"]},
}


def formula(point: Point) -> float:
    """τ = 0.1 is best, then the nearer the learning rate is to 2; a seed adds 0.01."""
    c = point.config
    lr = lr_peak(c.optim.base_lr, c.train.batch_size, c.optim.scaling)
    return 0.8 - 0.1 * abs(math.log10(c.loss.temperature / 0.1)) - 0.02 * abs(math.log2(lr / 2)) + 0.01 * point.seed


def table(path: Path) -> dict[tuple[str, str], list[str]]:
    rows = list(csv.reader((path / "figures.csv").open()))
    assert rows[0] == ["metric", "what", "mean", "lowest_seed", "highest_seed", "n", "published"]
    return {(row[0], row[1]): row[2:] for row in rows[1:]}


def test_published_numbers_have_the_means_that_the_paper_prints(within: Within) -> None:
    for row, mean in zip(paper_numbers.FIG_5, paper_numbers.FIG_5_MEANS, strict=True):
        within("row of Fig. 5, rounded", abs(sum(row) / 7 - mean), 0.1)
    assert len(paper_numbers.FIG_5) == len(paper_numbers.FIG_5_OPERATIONS) == 7 and set(paper_numbers.FIG_5_OPERATIONS) == set(
        spaces.OPERATIONS
    )
    assert max(paper_numbers.TABLE_5, key=lambda k: paper_numbers.TABLE_5[k]) == ("nt_xent", 0.1)


def test_spearman_by_hand() -> None:
    assert drawing.spearman([1, 2, 3, 4], [10, 30, 20, 40]) == pytest.approx(0.8)  # 1 − 6 · 2 / (4 · 15)
    assert drawing.spearman([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    assert drawing.spearman([1, 1, 2], [1, 2, 3]) == pytest.approx(math.sqrt(3) / 2)  # ranks 0.5, 0.5, 2 against 0, 1, 2
    assert math.isnan(drawing.spearman([1, 1], [1, 2])) and math.isnan(drawing.spearman([1], [1]))


def test_temperature_and_learning_rate(tmp_path: Path) -> None:
    sweep = a_sweep(tmp_path / "s", "temperature-lr", seeds=2)
    trained(sweep, formula)
    page = report(sweep.path).read_text()
    rows = table(sweep.path)
    # At N = 128 the recipe's lr is 4 · 128 / 256 = 2 by both rules: 2 rules × 2 seeds.
    assert rows["eval/probe_top1", "N 128, τ 0.1, lr 2"] == ["80.5", "80.0", "81.0", "4", ""]
    best = rows["eval/probe_top1", "τ 0.1, best"]
    assert best[:3] == ["80.5", "80.0", "81.0"] and best[4] == "64.4"
    assert rows["eval/knn_top1", "τ 0.1, best"][0] == "72.45" and rows["eval/knn_top1", "τ 0.1, best"][4] == ""
    # At N = 256 the linear rule gives 4, the square root 2 · √2.
    assert rows["eval/probe_top1", "N 256, τ 1, lr 2.828"][0] == "69.5" and "√N" in page and "both rules" in page
    assert page.count('class="panel"') == 2 * 4 + 3  # three batch sizes and τ, by probe and by kNN; three scores against the probe
    for rho, n in agreement([*(t for t in trained(sweep, formula))]).values():
        assert rho == pytest.approx(1) and n == 144


def test_pairs_of_operations(tmp_path: Path) -> None:
    only = {"views.operations": ["crop", "colour", "blur", "noise"]}
    sweep = a_sweep(tmp_path / "s", "augmentation-pairs", only=only)
    at = {op: i for i, op in enumerate(paper_numbers.FIG_5_OPERATIONS)}

    def theirs(point: Point) -> float:
        ops = point.config.views.operations or ()
        return paper_numbers.FIG_5[at[ops[0]]][at[ops[-1]]] / 100

    trained(sweep, theirs)
    page = report(sweep.path).read_text()
    rows = table(sweep.path)
    assert rows["eval/probe_top1", "crop + colour"][0] == rows["eval/probe_top1", "crop + colour"][4] == "56.3"
    assert rows["eval/probe_top1", "blur"] == ["2.6", "2.6", "2.6", "1", "2.6"]
    assert "Spearman's ρ with the paper's 16 values: 1.00" in page
    assert re.search(r'class="deep" style="--p:100%" title="crop, then colour: 56.3">56.3<small>56.3</small>', page)
    assert "sobel" not in re.sub(r"<style>.*</style>", "", page, flags=re.S)


# Plots of a space by one metric; below them stand three clouds, of the scores without labels.
PLOTS = dict.fromkeys(spaces.SPACES, 1) | {"smoke": 2, "temperature-lr": 2, "search": 3}
ROWS_OF_A_TRIAL = dict.fromkeys(spaces.SPACES, 1) | {"search": 3, "labels-fraction": 3}  # three axes, three shares of the labels


@pytest.mark.parametrize("name", sorted(spaces.SPACES))
def test_every_space_has_its_figure(tmp_path: Path, name: str) -> None:
    """Trial i scores 50 + i / 10 %: every trial is in the figures, none twice, and none beside its score."""
    only: dict[str, list[Any]] = FEWER.get(name, {})
    sweep = a_sweep(tmp_path / "s", name, search="random" if name == "search" else "grid", only=only)
    numbers = itertools.count()
    found = trained(sweep, lambda point: 0.5 + next(numbers) / 1000)
    page = report(sweep.path).read_text()
    heated, panels = page.count('<figure class="heated">'), page.count('<figure class="panel">')
    drawn = 1 if name == "labels-fraction" else 2  # of what is scored with few labels the probe alone is drawn
    assert heated == (2 if name == "augmentation-pairs" else 0) and heated + panels == drawn * PLOTS[name] + 3
    assert "nan" not in re.sub(r"<(style|script).*?</\1>", "", page, flags=re.S)
    assert len(list(csv.reader((sweep.path / "results.csv").open()))) == 1 + len(found) > 3
    rows = [row for (metric, what), row in table(sweep.path).items() if metric == "eval/probe_top1" and not what.endswith(", best")]
    counts, means = ([float(row[column]) for row in rows] for column in (3, 0))
    assert sum(counts) == ROWS_OF_A_TRIAL[name] * len(found)
    # Of 60, 80 and 100 % of a score, which shares of the labels have in `trained`, the mean is 80 %.
    expected = (50 + (len(found) - 1) / 20) * (0.8 if name == "labels-fraction" else 1)
    assert sum(n * mean for n, mean in zip(counts, means, strict=True)) / sum(counts) == pytest.approx(expected)
    assert "http://" not in page.replace("http://www.w3.org", "")  # needs nothing from anywhere
