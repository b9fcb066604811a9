"""The report page: its text, that it is self-contained, and that odd runs have one too."""

from __future__ import annotations

import base64
import io
import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from pipelines.html import charts
from pipelines.html.neighbours import Neighbours
from pipelines.html.page import FeatureMap, ReportData, Score, headline, render, write

CLASSES = tuple(f"kind {i}" for i in range(10))
NBSP = "\N{NO-BREAK SPACE}"


def noise(*shape: int) -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)


def a_run(side: int = 8, points: int = 50, **changes: Any) -> ReportData:
    """Four queries with three neighbours each, of which the last of the first query is wrong; every tenth point is wrong."""
    labels = np.arange(points) % 10
    query_labels = np.arange(4)
    neighbour_labels = np.repeat(query_labels[:, None], 3, axis=1)
    neighbour_labels[0, 2] = 7
    history = [
        {"step": s, "epoch": s / 10, "train/loss": 6 - s / 50, "train/contrastive_top1": s / 200, "train/lr": 0.3} for s in range(1, 101)
    ]
    history[49] |= {"eval/knn_top1": 0.5, "health/rankme": 31.25}
    history[99] |= {"eval/knn_top1": 0.913, "health/rankme": 62.5}
    data = ReportData(
        title="SimCLR on kinds",
        command="simclr pretrain kinds --data 'runs/my kinds'",
        config={"seed": 0, "optim.base_lr": 0.3, "train.batch_size": 256, "train.steps": None, "train.compile": False},
        facts={"machine": "2 cores"},
        scores=[
            Score(name="raw pixels", knn_top1=0.381, probe_top1=0.297),
            Score(name="untrained encoder", knn_top1=0.213, probe_top1=0.402),
            Score(name="trained encoder", knn_top1=0.913, probe_top1=0.932),
        ],
        history=history,
        classes=CLASSES,
        gallery=noise(8, 3, side, side),
        neighbours=Neighbours(
            queries=noise(4, side, side),
            query_labels=query_labels,
            images=noise(4, 3, side, side),
            labels=neighbour_labels,
            similarity=np.tile([0.98, 0.9, -0.25], (4, 1)),
        ),
        map=FeatureMap(
            xy=np.random.default_rng(1).normal(size=(points, 2)),
            labels=labels,
            predicted=np.where(np.arange(points) % 10 == 3, 0, labels),
            thumbs=noise(points, min(side, 32), min(side, 32)),
        ),
        timings=[("prepare", 15.0), ("pretrain", 105.0)],
    )
    return replace(data, **changes)


def unlabelled() -> ReportData:
    data = a_run(scores=[], classes=())
    neighbours = replace(data.neighbours, query_labels=np.full(4, -1), labels=np.full((4, 3), -1))
    return replace(data, neighbours=neighbours, map=replace(data.map, labels=np.full(50, -1)))


class Page(HTMLParser):
    """Elements, their attributes and texts; asserts that every element is closed in order."""

    VOID = ("meta", "link", "img", "input", "path", "circle", "br", "wbr")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("script", "style") and data.strip():
            self.texts.append(data.strip())

    def all(self, tag: str, kind: str = "") -> list[dict[str, str | None]]:
        return [a for t, a in self.elements if t == tag and (not kind or kind in (a.get("class") or "").split())]

    def has(self, text: str) -> bool:
        return text in " ".join(self.texts).replace(NBSP, " ")


def readings(text: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)
    assert found
    numbers: dict[str, Any] = json.loads(found[1])
    return numbers


def test_headline_is_the_ratio_of_the_scores() -> None:
    lead, rest = headline(a_run())
    assert lead.replace(NBSP, " ") == "kNN 91.3 %"  # 0.913 / 0.381 = 2.396, / 0.213 = 4.286, / 0.1 = 9.13
    assert rest.replace(NBSP, " ") == (
        "2.4 × raw pixels, 4.3 × untrained encoder and 9.1 × chance. A linear probe on the same features reaches 93.2 %."
    )
    only = [Score(name="encoder", knn_top1=0.02, probe_top1=None)]
    assert headline(a_run(scores=only, classes=()))[1] == ""
    without = [Score(name="zero", knn_top1=0.0, probe_top1=None), *only]
    assert headline(a_run(scores=without))[1].replace(NBSP, " ") == "0.2 × chance."
    assert headline(unlabelled()) == ("Loss 4.000", "after 100 steps; it began at 5.980.")


def test_table_has_the_scores_and_the_bars_their_lengths() -> None:
    page = Page(render(a_run()))
    for number in ("38.1 %", "29.7 %", "21.3 %", "40.2 %", "91.3 %", "93.2 %", "chance: 10.0 %"):
        assert page.has(number)
    assert [bar["style"] for bar in page.all("i", "bar")][-1] == "width:93.20%"
    assert {mark["style"] for mark in page.all("i", "chance")} == {"left:10.00%"}


def test_without_a_probe_the_table_has_no_such_column() -> None:
    page = Page(render(a_run(scores=[Score(name="encoder", knn_top1=0.5, probe_top1=None)])))
    assert page.has("50.0 %") and not page.has("robe")


def test_nothing_is_loaded_from_outside() -> None:
    text = render(a_run())
    page = Page(text)
    for tag, attributes in page.elements:
        for name in ("src", "href", "srcset", "poster", "action", "data"):
            value = attributes.get(name)
            assert value is None or value.startswith(("data:image/", "#")), (tag, name, value)
    assert not re.search(r"https?://|@import|@font-face|fetch\(|XMLHttpRequest|import\(|url\(", text)
    policy = next(a["content"] for a in page.all("meta") if a.get("http-equiv") == "Content-Security-Policy")
    assert policy and policy.startswith("default-src 'none'; img-src data:;")
    anchors = {a["href"] for a in page.all("a")}
    assert anchors <= {f"#{a['id']}" for _, a in page.elements if a.get("id")}


def test_all_text_is_escaped() -> None:
    evil = "</script><img src=x onerror=alert(1)>\"'&"
    data = a_run(
        title=evil,
        command=evil,
        config={f"optim.{evil}": evil},
        facts={evil: evil},
        scores=[Score(name=evil, knn_top1=0.5, probe_top1=0.5), Score(name="encoder", knn_top1=0.6, probe_top1=0.5)],
        classes=tuple(f"{evil} {i}" for i in range(10)),
        timings=[(evil, 1.0)],
    )
    text = render(data)
    page = Page(text)
    assert page.has(evil) and not [a for _, a in page.elements if "onerror" in a]
    assert len(page.all("script")) == 2
    assert readings(text)["map"]["names"][3] == f"{evil} 3"


def test_names_that_are_no_utf8_are_written(tmp_path: Path) -> None:
    broken = b"caf\xe9".decode("utf-8", "surrogateescape")
    path = write(a_run(title=broken, classes=(broken, *CLASSES[1:])), tmp_path / "new" / "report.html")
    assert "caf?" in path.read_text(encoding="utf-8")


def test_write_replaces_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "report.html"
    path.write_text("old")

    def full_disk(self: Path, text: str, **_: Any) -> int:
        self.write_bytes(text[:10].encode())
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full_disk)
        with pytest.raises(OSError, match="space"):
            write(a_run(), path)
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["report.html"]
    assert write(a_run(), path) == path and path.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


def test_neighbours_are_marked_by_more_than_colour() -> None:
    page = Page(render(a_run()))
    assert len(page.all("li", "right")) == 11 and len(page.all("li", "wrong")) == 1
    assert page.texts.count("✗") == 2 and page.texts.count("✓") == 12  # one of each explains itself in the margin
    assert page.has("Here 11 of 12 are of the same class") and page.has("0.98") and page.has("−0.25")
    assert [a["alt"] for a in page.all("img") if "another class" in (a["alt"] or "")] == ["Neighbour 3: kind 7, another class"]
    assert all(a["alt"] is not None for a in page.all("img"))


def test_pictures_have_the_names_of_their_files() -> None:
    data = a_run()
    names = np.array([[f"cat/{i}{j}.jpg" for j in range(3)] for i in range(4)])
    named = replace(data.neighbours, query_names=np.array(["dogs/<b>.jpg", "", "x.png", "y.png"]), names=names)
    text = render(replace(data, neighbours=named))
    page = Page(text)
    assert "<small>dogs/<wbr>&lt;b&gt;.jpg</small>" in text and page.has("x.png")
    assert {f"Query: {CLASSES[0]}, dogs/<b>.jpg", f"Query: {CLASSES[1]}"} <= {a["alt"] for a in page.all("img")}
    assert [a["title"] for a in page.all("span", "frame")][4] == f"Neighbour 2: {CLASSES[1]}, the same class, cat/11.jpg"


def test_map_draws_each_point_and_rings_the_wrong_ones_last() -> None:
    text = render(a_run())
    page, numbers = Page(text), readings(text)["map"]
    rings = [i for i, a in enumerate(page.all("circle")) if a["class"] == "ring"]
    assert len(page.all("circle")) == 55 and rings == [46, 48, 50, 52, 54]
    assert numbers["labels"][-5:] == [3] * 5 and numbers["predicted"][-5:] == [0] * 5 and numbers["labels"][:4] == [0, 1, 2, 4]
    assert page.has("5 of 50 here") and page.has("0/5")
    at = np.array(numbers["at"])
    assert at.min() >= 20 and at[:, 0].max() <= 780 and at[:, 1].max() <= 580


def test_sheet_holds_the_thumbs_in_the_order_of_the_points() -> None:
    data = a_run()
    text = render(data)
    source = re.search(r'id="sheet"[^>]*src="data:image/png;base64,([^"]+)"', text)
    assert source
    sheet = np.asarray(Image.open(io.BytesIO(base64.b64decode(source[1]))).convert("RGB"))
    assert sheet.shape == (7 * 8, 8 * 8, 3)  # 50 points, ⌈√50⌉ = 8 to a row
    last = np.flatnonzero(data.map.wrong)[-1]
    assert (sheet[48:56, 8:16] == data.map.thumbs[last]).all()  # place 49 = row 6, column 1


def test_a_thousand_noisy_thumbs_stay_under_two_megabytes() -> None:
    assert len(render(a_run(side=32, points=1000)).encode()) < 2_000_000


def test_small_images_are_crisp_and_photographs_smooth() -> None:
    small, photo = Page(render(a_run(side=32))), Page(render(a_run(side=224)))
    lists = small.all("ol", "crisp")
    assert [a["style"] for a in lists] == ["--w:32;--small:2;--large:3"] * 2  # 64 px on a phone, 96 px on a desk
    assert not small.all("img", "photo") and not photo.all("img", "pixels") and not photo.all("ol", "crisp")
    assert len(photo.all("img", "photo")) == 8 * 3 + 4 + 4 * 3


@pytest.mark.parametrize(("side", "zoom"), [(8, 8), (28, 3), (32, 2), (33, 2), (64, 1)])
def test_a_crisp_image_is_at_least_64_px(side: int, zoom: int) -> None:
    assert f"--small:{zoom};" in charts.display(noise(1, side, side)) and side * zoom >= 64


def test_unlabelled_run_has_no_verdicts() -> None:
    text = render(unlabelled())
    page = Page(text)
    assert not page.all("li", "right") and not page.all("li", "wrong") and not page.all("circle", "ring")
    assert not page.all("table", "scores")
    assert len(page.all("circle", "none")) == 50 and not page.has("chance") and not page.all("ul", "classes")


def test_one_report_and_values_that_are_not_finite() -> None:
    one = render(a_run(history=[{"step": 1, "train/loss": 5.5, "train/lr": math.nan}]))
    assert readings(one)["curves"] == [[[500.0, 500.0, 1, None, "5.5"]]]
    assert Page(one).has("step 1")
    history = [{"step": s, "train/loss": math.nan if s == 3 else float(s)} for s in range(1, 6)]
    text = render(a_run(history=history))
    rows = readings(text)["curves"][0]
    assert [row[2] for row in rows] == [1, 2, 4, 5]
    line = next(a["d"] for a in Page(text).all("path", "line"))
    assert line and line.count("M") == 2 and line.count("L") == 2
    assert Page(render(a_run(history=[{"step": 1, "train/loss": math.inf}]))).has("91.3 %")


def test_an_empty_run_still_has_a_page() -> None:
    none = np.zeros((0, 8, 8, 3), np.uint8)
    data = ReportData(
        title="nothing",
        command="",
        config={},
        facts={},
        scores=[],
        history=[],
        classes=(),
        gallery=np.zeros((0, 3, 8, 8, 3), np.uint8),
        neighbours=Neighbours(
            queries=none, query_labels=np.zeros(0, int), images=none[:, None], labels=np.zeros((0, 1), int), similarity=np.zeros((0, 1))
        ),
        map=FeatureMap(xy=np.zeros((0, 2)), labels=np.zeros(0, int), predicted=np.zeros(0, int), thumbs=none),
        timings=[],
    )
    page = Page(render(data))
    assert not page.all("section") and page.has("No result yet")


def test_a_point_that_is_not_finite_is_left_out() -> None:
    data = a_run()
    xy = data.map.xy.copy()
    xy[7] = math.nan
    numbers = readings(render(replace(data, map=replace(data.map, xy=xy))))["map"]
    assert len(numbers["at"]) == len(numbers["labels"]) == 49 and np.isfinite(numbers["at"]).all()


def test_a_hundred_and_twenty_classes_have_colours_of_their_own() -> None:
    labels = np.arange(240) % 120
    data = a_run(points=240, classes=tuple(f"kind {i}" for i in range(120)))
    text = render(replace(data, map=replace(data.map, labels=labels, predicted=labels)))
    colours = re.findall(r"\.k\d+\{--c:([^}]+)\}", text)
    assert len(colours) == len(set(colours)) == 120
    assert not Page(text).all("span", "k5") and len(Page(text).all("button", "k5")) == 1


def test_config_is_grouped_and_plain() -> None:
    page = Page(render(a_run()))
    assert [a["data-key"] for a in page.all("tr") if "data-key" in a] == list(a_run().config)
    assert len(page.all("details")) == 3 and page.has("false") and page.has("simclr pretrain kinds --data 'runs/my kinds'")


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 1, [0, 0.25, 0.5, 0.75, 1]),
        (0, 91.3, [0, 25, 50, 75, 100]),
        (3.04, 6.24, [3, 4, 5, 6, 7]),
        (-3.1, -0.5, [-4, -3, -2, -1, 0]),
        (0, 4e-5, [0, 1e-5, 2e-5, 3e-5, 4e-5]),
        (0, 312_000, [0, 100_000, 200_000, 300_000, 400_000]),
    ],
)
def test_ticks_are_round_and_cover_the_range(low: float, high: float, expected: list[float]) -> None:
    assert charts.ticks(low, high) == pytest.approx(expected)


def test_numbers_as_text() -> None:
    marks = (0, 0.25, 1500, 20_000, 2.5e6, -0.5, 2e-5)
    assert list(map(charts.tick_text, marks)) == ["0", "0.25", "1,500", "20k", "2.5M", "−0.5", "2e−5"]
    assert list(map(charts.duration, (0.42, 9.96, 59.7, 105))) == ["0.4 s", "10 s", "1 min 00 s", "1 min 45 s"]
    assert list(map(charts.duration, (7380, math.nan))) == ["2 h 03 min", "–"]
    assert charts.percent(0.9995).replace(NBSP, " ") == "100.0 %" and charts.percent(None) == charts.percent(math.nan) == "–"


def test_a_long_history_keeps_its_ends_and_its_spikes() -> None:
    y = np.zeros(100_000)
    y[12_345], y[67_890] = 9.0, -9.0
    keep = charts.thin(y)
    assert len(keep) <= 400 and keep[0] == 0 and keep[-1] == 99_999 and {12_345, 67_890} <= set(keep.tolist())


def test_the_ten_colours_stand_out_from_the_page_and_differ_for_every_eye() -> None:
    """Contrast at least 3 : 1 (WCAG 1.4.11), and pairwise OKLab distances of at least 0.07 with each dichromatic vision.

    Matrices: Machado, Oliveira and Fernandes 2009, severity 1; OKLab: Ottosson 2020.
    """
    css = (Path(charts.__file__).parent / "page.css").read_text(encoding="utf-8")
    pairs = re.findall(r"--k\d: light-dark\((#\w{6}), (#\w{6})\)", css)
    papers = re.search(r"--raised: light-dark\((#\w{6}), (#\w{6})\)", css)
    assert len(pairs) == 10 and papers
    vision = {
        "full": np.eye(3),
        "protanopia": np.array([[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]),
        "deuteranopia": np.array([[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]),
        "tritanopia": np.array([[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]]),
    }
    to_lms = np.array([[0.41222147, 0.53633254, 0.05144599], [0.21190350, 0.68069955, 0.10739696], [0.08830246, 0.28171884, 0.62997870]])
    to_lab = np.array([[0.21045426, 0.79361779, -0.00407205], [1.97799850, -2.42859221, 0.45059371], [0.02590404, 0.78277177, -0.80867577]])

    def linear(hex_colour: str) -> NDArray[np.float64]:
        v = np.array([int(hex_colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
        return np.where(v <= 0.04045, v / 12.92, ((v + 0.055) / 1.055) ** 2.4)

    for theme in range(2):
        colours = np.stack([linear(pair[theme]) for pair in pairs])
        light = np.append(colours, [linear(papers[theme + 1])], 0) @ [0.2126, 0.7152, 0.0722] + 0.05
        assert (np.maximum(light[:-1], light[-1]) / np.minimum(light[:-1], light[-1])).min() >= 3
        for name, matrix in vision.items():
            lab = np.cbrt(np.clip(colours @ matrix.T, 0, 1) @ to_lms.T) @ to_lab.T
            apart = np.linalg.norm(lab[:, None] - lab[None], axis=-1) + np.eye(10)
            assert apart.min() >= 0.07, name
